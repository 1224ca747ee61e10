"""The operators of attention, typed and documented; :mod:`.ops` has what is common to all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from seer_compile.errors import DtypeError
from seer_compile.kernels import contracts
from seer_compile.kernels.arguments import (
    block_tokens,
    joined_pools,
    readable_arguments,
    require_attention,
    require_optional_tensor,
    require_selection,
    require_tensor,
    scale_or_default,
)
from seer_compile.kernels.checks import (
    as_visibility,
    check_attention,
    check_choice,
    check_integer,
    check_softcap,
    check_visibility,
)
from seer_compile.kernels.dense import dense_attention as _dense_attention
from seer_compile.kernels.sinks import check_sinks
from seer_compile.types import SHARINGS, BlockSelection, BlockSize, PoolKind, Sharing, Visibility


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: BlockSelection,
    *,
    block_size: BlockSize,
    scale: float | None = None,
    visibility: Visibility | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend to the readable keys of the selected blocks only.

    Differentiable in query, key, value and sinks.

    Args:
        query: ``Float[b h q d]``.
        key: ``Float[b g k d]``; ``g`` divides ``h``.
        value: ``Float[b g k v]``.
        selection: Indices ``Int32[b s m capacity]`` and counts ``Int32[b s m]``; s is h, g or 1.
            Indices of a row ascend, without repeats; checked by value on the CPU.
        block_size: Tokens per block.
        scale: Factor on the logits; ``1 / sqrt(d)`` when None.
        visibility: What each query may read; everything when None.
        softcap: Bounds the logits by ``softcap * tanh(logits / softcap)``, before the mask; not
            when None.
        sinks: ``Float[h]``: a logit per head that takes part in the softmax and has no value, as
            one more key would that every query reads; none when None.

    Returns:
        ``Float[b h q v]``, dense, in the query's layout: contiguous where ``query.stride(1)``
        exceeds ``query.stride(2)``, else a contiguous ``b q h v``. And the log-sum-exp of every
        row, the sink in it, ``Float32[b h q]``, which has no gradient. A row that reads nothing is
        0 and its sink, or -inf.

    Raises:
        SeerInputError: A malformed argument.

    Cost:
        2 (d + v) multiply-adds for every query and key of the selected blocks, nothing for others.

    Numerics:
        A selection of every visible block gives dense attention to rounding. Products accumulate
        in float32.

    Example:
        >>> x = torch.ones(1, 1, 128, 8)
        >>> own = BlockSelection(torch.tensor([[[[0], [1]]]]).int(), torch.ones(1, 1, 2).int())
        >>> out, _ = block_sparse_attention(x, x, x, own, block_size=BlockSize())
        >>> bool((out == 1).all())
        True
    """
    require_attention(query, key, value)
    blocks = block_tokens(block_size)
    selection = require_selection(selection, query, key, value, blocks)
    factor = scale_or_default(scale, query)
    readable = readable_arguments(visibility, query)
    require_optional_tensor("sinks", sinks, like=query)
    check_softcap(softcap)
    return torch.ops.seer_compile.block_sparse_attention.v1(
        query, key, value, *selection, factor, *blocks, *readable, softcap, sinks
    )


def gated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    query_weight: Tensor,
    key_weight: Tensor,
    budget: Tensor,
    mode: Tensor,
    query_pools: Sequence[PoolKind],
    key_pools: Sequence[PoolKind],
    query_sub_block: int,
    key_sub_block: int,
    block_size: BlockSize,
    sharing: Sharing,
    selector: str,
    budget_lengths: Sequence[int],
    scale: float | None = None,
    site: str = "",
    visibility: Visibility | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Answer a whole site: pool, project, score, select and attend, or attend densely.

    One operator: no tensor with a block-count axis meets a tracer. Differentiable in query,
    key, value and sinks; the gate's weights get no gradient from here.

    Args:
        query: ``Float[b h q d]``.
        key: ``Float[b g k d]``.
        value: ``Float[b g k v]``.
        query_weight: ``Float32[h Pq*d e]``, Pq the number of query pools.
        key_weight: ``Float32[h Pk*d e]``, or ``Float32[g Pk*d e]`` where the gate is shared.
        budget: ``Float[s L]``, float32 or float64: the selector's budget at each of
            ``budget_lengths``; between them linear in log2 of the key length, outside constant.
        mode: ``Int8[]`` on the CPU: 0 dense; 1 sparse where that pays (see
            :func:`~seer_compile.kernels.dense.dense_reason`); 2 sparse whatever the size.
        query_pools: Kinds of pooling of queries.
        key_pools: Kinds of pooling of keys.
        query_sub_block: Tokens per sub-block of queries; divides the query block.
        key_sub_block: Tokens per sub-block of keys; divides the key block.
        block_size: Tokens per block.
        sharing: What the query heads of a key head have in common: ``none``, their ``selection``
            (the largest of their scores decides), or the ``gate`` (their projected queries are
            added up). With either one selection per key head, ``s = g``, else ``s = h``.
        selector: See :func:`.ops.select_blocks`.
        budget_lengths: Key lengths, in tokens, ascending.
        scale: Factor on the logits; ``1 / sqrt(d)`` when None.
        site: Name under which :mod:`~seer_compile.kernels.counters` counts the call.
        visibility: What each query may read.
        softcap: See :func:`block_sparse_attention`.
        sinks: ``Float[h]``; see there.

    Returns:
        ``Float[b h q v]``, lying as that of :func:`block_sparse_attention`, and
        ``Float32[b h q]``: the log-sum-exp of the sparse path, the sink in it; without sinks
        undefined on the dense path.

    Raises:
        SeerInputError: A malformed argument.

    Cost:
        Scores and indices of one slab of query rows, at most 256 MB; what scoring takes; the
        keys' features.
    """
    require_attention(query, key, value)
    tensors = (query_weight, key_weight, budget, mode)
    for name, tensor in zip(("query_weight", "key_weight", "budget"), tensors, strict=False):
        require_tensor(name, tensor, like=query)
    require_tensor("mode", mode)
    require_optional_tensor("sinks", sinks, like=query)
    check_softcap(softcap)
    for name, tokens in (("query", query_sub_block), ("key", key_sub_block)):
        check_integer(f"{name}_sub_block", tokens, minimum=1)
    check_choice("sharing", sharing, SHARINGS)
    check_choice("selector", selector, contracts.SELECTOR_NAMES)
    if not isinstance(site, str):
        raise DtypeError(argument="site", got=type(site).__name__, expected="a str")
    for length in budget_lengths:
        check_integer("budget_lengths", length, minimum=1)
    return torch.ops.seer_compile.gated_attention.v1(
        query,
        key,
        value,
        *tensors,
        scale_or_default(scale, query),
        joined_pools("query_pools", query_pools),
        joined_pools("key_pools", key_pools),
        query_sub_block,
        key_sub_block,
        *block_tokens(block_size),
        sharing,
        selector,
        list(budget_lengths),
        site,
        *readable_arguments(visibility, query),
        softcap,
        sinks,
    )


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    visibility: Visibility | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend to every readable key; checked front of :func:`.dense.dense_attention`."""
    require_attention(query, key, value)
    check_attention(query, key, value)
    visibility = as_visibility(visibility)
    lengths = {"q_len": query.shape[2], "k_len": key.shape[2]}
    check_visibility(visibility, batch=query.shape[0], device=query.device, **lengths)
    require_optional_tensor("sinks", sinks, like=query)
    check_sinks(sinks, query)
    check_softcap(softcap)
    factor = scale_or_default(scale, query)
    return _dense_attention(
        query, key, value, scale=factor, visibility=visibility, softcap=softcap, sinks=sinks
    )
