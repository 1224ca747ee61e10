"""The operators, typed and documented: what they take, return, cost and raise.

Importing this module registers them as ``torch.ops.seer_compile.NAME.v1``, where every field of
a :class:`~seer_compile.types.Visibility` is an argument of its own and a
:class:`~seer_compile.types.BlockSelection` two. Graphs hold those; people call these.

Common to all: any strides, any lengths (0 too), a last block that may be shorter, 16- and 32-bit
floats; float32 inside. Malformed calls raise a :class:`~seer_compile.errors.SeerError` that names
the argument. Values in keys that nobody may read do not matter, NaN included.
Letters of shapes: see :mod:`seer_compile.types`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from seer_compile.kernels import autocast, contracts  # noqa: F401  (registers the operators)
from seer_compile.kernels.arguments import (
    block_tokens,
    joined_pools,
    readable_arguments,
    require_optional_tensor,
    require_tensor,
    scale_or_default,
)
from seer_compile.kernels.attention_ops import (
    block_sparse_attention,
    dense_attention,
    gated_attention,
)
from seer_compile.kernels.checks import check_choice, check_integer, check_scale, check_softcap
from seer_compile.types import BlockSelection, BlockSize, PoolKind, Visibility

__all__ = [
    "attention_mass",
    "block_scores",
    "block_sparse_attention",
    "dense_attention",
    "gated_attention",
    "pool_blocks",
    "select_blocks",
]


def pool_blocks(
    tokens: Tensor,
    *,
    size: int,
    kinds: Sequence[PoolKind] = ("mean",),
    padding: Tensor | None = None,
) -> Tensor:
    """Reduce every run of ``size`` tokens to one vector per kind of pooling.

    Args:
        tokens: ``Float[b x t d]``, x any heads.
        size: Tokens per sub-block.
        kinds: Distinct kinds; their results are concatenated on the last axis in this order.
        padding: ``Bool[b t]``, True where a token counts; all count when None.

    Returns:
        ``Float[b x ceil(t/size) len(kinds)*d]`` in the dtype of ``tokens``. A sub-block in which
        no token counts is 0.

    Raises:
        SeerInputError: A malformed argument.

    Cost:
        One read of the tokens. No gradient.
    """
    require_tensor("tokens", tokens)
    require_optional_tensor("padding", padding, like=tokens)
    check_integer("size", size, minimum=1)
    joined = joined_pools("kinds", kinds)
    return torch.ops.seer_compile.pool_blocks.v1(tokens, size, joined, padding)


def block_scores(
    query_features: Tensor,
    key_features: Tensor,
    *,
    scale: float,
    query_sub_block: int,
    key_sub_block: int,
    block_size: BlockSize,
    q_len: int,
    k_len: int,
    groups: int = 1,
    visibility: Visibility | None = None,
) -> Tensor:
    """Score block pairs: the share of a query's attention that a key block is predicted to carry.

    A key block matches a query sub-row as well as the best of its visible key sub-blocks does; the
    softmax of these matches over the key blocks is that share, and a block pair scores what its
    neediest sub-row gives. Where sub-blocks are whole blocks this is the published gate's softmax
    (Gao et al., arXiv:2410.13276, equation 3).

    Args:
        query_features: ``Float[b h r e]``, one row per sub-block of queries.
        key_features: ``Float[b h c e]``.
        scale: Factor on the dot products.
        query_sub_block: Tokens per sub-block of queries; divides the query block.
        key_sub_block: Tokens per sub-block of keys; divides the key block.
        block_size: Tokens per block.
        q_len: Query tokens.
        k_len: Key tokens.
        groups: Consecutive heads that share a selection; a block takes their largest score.
        visibility: What each query may read. Documents count by the range of ids in a sub-block.

    Returns:
        ``Float32[b h//groups m n]`` in [0, 1]; 0 for blocks outside the band or of padding.

    Raises:
        SeerInputError: A malformed argument.

    Cost:
        h r c e multiply-adds, twice that where 320 MB do not hold the r x n matches; the r x c
        logits are never held on CUDA. No gradient.
    """
    require_tensor("query_features", query_features)
    require_tensor("key_features", key_features, like=query_features)
    check_scale(scale)
    counts = {"query_sub_block": query_sub_block, "key_sub_block": key_sub_block}
    for name, number in {**counts, "groups": groups}.items():
        check_integer(name, number, minimum=1)
    for name, number in {"q_len": q_len, "k_len": k_len}.items():
        check_integer(name, number, minimum=0)
    return torch.ops.seer_compile.block_scores.v1(
        query_features,
        key_features,
        float(scale),
        query_sub_block,
        key_sub_block,
        *block_tokens(block_size),
        q_len,
        k_len,
        groups,
        *readable_arguments(visibility, query_features),
    )


def select_blocks(
    scores: Tensor,
    *,
    budget: Tensor,
    selector: str,
    block_size: BlockSize,
    q_len: int,
    k_len: int,
    visibility: Visibility | None = None,
) -> BlockSelection:
    """Select the key blocks that each query block reads.

    The diagonal, the sink (the first visible block with a key that is not padding) and the best
    block of a row are always kept where the band shows them: no row that sees a block is empty.
    To these are added, by selector:

    - ``top_p``: the fewest highest scores with which the row's kept sum reaches ``budget`` times
      its sum; equal scores stay together. From 1 on, every visible block.
    - ``fraction``: highest scores up to ``budget`` times the visible blocks, rounded up.
    - ``top_k``: highest scores up to ``budget`` blocks.
    - ``threshold``: scores of at least ``budget`` times the row's mean over visible blocks.

    Args:
        scores: ``Float32[b s m n]``. A row with NaN keeps what cannot be judged.
        budget: ``Float[s]``, float32 or float64, on the device of the scores.
        selector: One of the four names.
        block_size: Tokens per block.
        q_len: Query tokens.
        k_len: Key tokens.
        visibility: The band says which blocks are visible, padding where the sink is.

    Returns:
        Indices ``Int32[b s m n]``, ascending, and counts ``Int32[b s m]``. The same scores give
        the same selection; ties go to the lower index.

    Raises:
        SeerInputError: A malformed argument.
    """
    require_tensor("scores", scores)
    require_tensor("budget", budget, like=scores)
    check_choice("selector", selector, contracts.SELECTOR_NAMES)
    for name, number in {"q_len": q_len, "k_len": k_len}.items():
        check_integer(name, number, minimum=0)
    sizes = (*block_tokens(block_size), q_len, k_len)
    return BlockSelection(
        *torch.ops.seer_compile.select_blocks.v1(
            scores, budget, selector, *sizes, *readable_arguments(visibility, scores)
        )
    )


def attention_mass(
    query: Tensor,
    key: Tensor,
    *,
    query_unit: int,
    key_unit: int,
    query_reduce: str = "mean",
    key_reduce: str = "sum",
    scale: float | None = None,
    visibility: Visibility | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Return attention probability per pair of units: what gates learn to predict.

    Args:
        query: ``Float[b h q d]``.
        key: ``Float[b g k d]``.
        query_unit: Tokens per unit of queries.
        key_unit: Tokens per unit of keys.
        query_reduce: ``mean`` over the queries of a unit that read anything, or ``max``.
        key_reduce: ``sum`` over the keys of a unit, the mass, or ``max``, the published map.
        scale: Factor on the logits; ``1 / sqrt(d)`` when None.
        visibility: What each query may read.
        softcap: Bounds the logits by ``softcap * tanh(logits / softcap)``, before the mask.

    Returns:
        ``Float32[b h ceil(q/query_unit) ceil(k/key_unit)]`` in [0, 1].

    Raises:
        SeerInputError: A malformed argument.

    Cost:
        The products of dense attention's first half; memory for the result only. With a softcap on
        CUDA in float32, by PyTorch's operators, in slabs of 512 MB. No gradient.
    """
    require_tensor("query", query)
    require_tensor("key", key, like=query)
    for name, number in {"query_unit": query_unit, "key_unit": key_unit}.items():
        check_integer(name, number, minimum=1)
    check_choice("query_reduce", query_reduce, ("mean", "max"))
    check_choice("key_reduce", key_reduce, ("sum", "max"))
    check_softcap(softcap)
    units = (query_unit, key_unit, query_reduce, key_reduce)
    readable = readable_arguments(visibility, query)
    return torch.ops.seer_compile.attention_mass.v1(
        query, key, scale_or_default(scale, query), *units, *readable, softcap
    )
