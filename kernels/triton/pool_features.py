"""Pool the tokens of each sub-block and project them to gate features, in one read of the tokens.

Layout: one program per tile of sub-blocks of the heads whose features are added up. It takes these
heads in turn, and the head dim in chunks; of each it pools every kind in registers, as
:mod:`pool_blocks` does, and multiplies the result by the rows of the weights that belong to it.
Pooled vectors never reach memory.

Numerics: those of ``pool_blocks`` followed by :func:`~seer_compile.kernels.scoring.project` on
16-bit inputs: means are summed in float32, pooled values and weights are rounded to the dtype of
the tokens, products accumulate in float32, features are rounded once. Tokens that do not count are
not read. Means alone, of several heads, are left to :mod:`pool_means`, and many tokens of single
heads, pooled in every way, to :mod:`pool_resident`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from seer_compile.errors import DtypeError
from seer_compile.kernels.triton import pool_means, pool_resident
from seer_compile.kernels.triton.launching import launch_kernel
from seer_compile.kernels.triton.pool_steps import pool_chunk
from seer_compile.kernels.triton.primitives import (
    as_bytes,
    ceil_div,
    empty_features,
    launching_on,
    padded_dim,
)
from seer_compile.kernels.triton.tuning import PoolTiling, pool_tiling


@triton.jit
def _add_product(features, pooled, weight_ptr, weight_mask):
    weight = tl.load(weight_ptr, mask=weight_mask, other=0.0).to(pooled.dtype)
    return tl.dot(pooled, weight, features)


@triton.jit(do_not_specialize=["num_tokens", "num_sub_blocks", "tiles", "heads", "groups"])
def _pool_features(
    tokens_ptr,
    weight_ptr,
    features_ptr,
    padding_ptr,
    token_strides,
    weight_strides,
    num_tokens,
    num_sub_blocks,
    tiles,
    heads,
    groups,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    UNROLL: tl.constexpr,
    GATE_DIM: tl.constexpr,
    PADDED_GATE_DIM: tl.constexpr,
    MEAN: tl.constexpr,
    MAXIMUM: tl.constexpr,
    MINIMUM: tl.constexpr,
):
    """Write the features of one tile of sub-blocks, summed over ``groups`` consecutive heads."""
    program = tl.program_id(0)
    tile = program % tiles
    gate_head = (program // tiles % heads).to(tl.int64)
    batch = (program // tiles // heads).to(tl.int64)
    if padding_ptr is not None:
        padding_ptr += batch * num_tokens
    sub_blocks = tile * TILE + tl.arange(0, TILE)
    gate_dims = tl.arange(0, PADDED_GATE_DIM)
    is_output = gate_dims < GATE_DIM
    features = tl.zeros([TILE, PADDED_GATE_DIM], tl.float32)
    is_whole = (tile + 1) * TILE * SIZE <= num_tokens
    for head in range(gate_head * groups, (gate_head + 1) * groups):
        base_ptr = tokens_ptr + batch * token_strides[0] + head * token_strides[1]
        head_weight_ptr = weight_ptr + head * weight_strides[0]
        for start in range(0, DIM, CHUNK):
            columns = start + tl.arange(0, CHUNK)
            if is_whole and padding_ptr is None:
                mean, highest, lowest = pool_chunk(
                    base_ptr, padding_ptr, sub_blocks, columns, token_strides, num_tokens,
                    DIM, CHUNK, SIZE, UNROLL, IS_WHOLE=True,
                )  # fmt: skip
            else:
                mean, highest, lowest = pool_chunk(
                    base_ptr, padding_ptr, sub_blocks, columns, token_strides, num_tokens,
                    DIM, CHUNK, SIZE, UNROLL, IS_WHOLE=False,
                )  # fmt: skip
            mask = (columns < DIM)[:, None] & is_output[None, :]
            pointers = head_weight_ptr + columns[:, None].to(tl.int64) * weight_strides[1]
            pointers += gate_dims[None, :].to(tl.int64) * weight_strides[2]
            place = DIM * weight_strides[1]
            if MEAN >= 0:
                features = _add_product(features, mean, pointers + MEAN * place, mask)
            if MAXIMUM >= 0:
                features = _add_product(features, highest, pointers + MAXIMUM * place, mask)
            if MINIMUM >= 0:
                features = _add_product(features, lowest, pointers + MINIMUM * place, mask)
    rows = (batch * heads + gate_head) * num_sub_blocks + sub_blocks
    target = features_ptr + rows[:, None] * GATE_DIM + gate_dims[None, :]
    mask = (sub_blocks < num_sub_blocks)[:, None] & is_output[None, :]
    tl.store(target, features.to(features_ptr.dtype.element_ty), mask=mask)


def launch(
    tokens: Tensor,
    weight: Tensor,
    size: int,
    kinds: str,
    padding: Tensor | None = None,
    groups: int = 1,
    tiling: PoolTiling | None = None,
) -> Tensor:
    """Pool and project sub-blocks of tokens.

    Args:
        tokens: ``Float16`` or ``BFloat16``, ``[b h t d]``, any strides.
        weight: ``Float32[h len(kinds)*d e]``.
        size: Tokens per sub-block.
        kinds: Comma-joined, distinct, out of ``mean``, ``max``, ``min``.
        padding: ``Bool[b t]``, True where a token counts.
        groups: Consecutive heads whose features are added up.
        tiling: Overrides the tuning table.

    Returns:
        ``[b h//groups ceil(t/size) e]`` in the dtype of the tokens, contiguous.

    Raises:
        DtypeError: Tokens of 32 bits, whose products do not run on the tensor cores.

    Cost:
        One read of the tokens; the features written.
    """
    if tokens.dtype not in (torch.float16, torch.bfloat16):
        raise DtypeError(argument="tokens", got=tokens.dtype, expected="float16 or bfloat16")
    if tiling is None and pool_means.takes(size, kinds, groups):
        return pool_means.launch(tokens, weight, size, padding, groups)
    if (
        tiling is None
        and padding is None
        and pool_resident.takes(tokens, weight, size, kinds, groups)
    ):
        return pool_resident.launch(tokens, weight, size, kinds)
    batch, heads, num_tokens, dim = tokens.shape
    heads //= groups
    gate_dim, num_sub_blocks = weight.shape[2], ceil_div(num_tokens, size)
    shape = (batch, heads, num_sub_blocks, gate_dim)
    features = empty_features(shape, tokens)
    if features.numel() == 0:
        return features
    padded = padded_dim(gate_dim)
    tiling = tiling or pool_tiling(num_sub_blocks, size)
    tiles = ceil_div(num_sub_blocks, tiling.rows)
    order = kinds.split(",")
    places = [order.index(kind) if kind in order else -1 for kind in ("mean", "max", "min")]
    with launching_on(tokens, "tokens"):
        launch_kernel(_pool_features, tiles * heads * batch,
            tokens, weight, features, as_bytes(padding), tokens.stride(), weight.stride(),
            num_tokens, num_sub_blocks, tiles, heads, groups,
            SIZE=size, DIM=dim, CHUNK=min(padded_dim(dim), tiling.dims), TILE=tiling.rows,
            UNROLL=min(tiling.unroll, size & -size), GATE_DIM=gate_dim, PADDED_GATE_DIM=padded,
            MEAN=places[0], MAXIMUM=places[1], MINIMUM=places[2],
            num_warps=tiling.warps, num_stages=1,
        )  # fmt: skip
    return features
