"""Means of the tokens of each sub-block, projected to gate features and summed over heads.

Averaging and projecting are both linear, so tokens are multiplied first and averaged last: they go
straight from memory to the tensor cores, several chunks ahead of their use, and nothing is pooled
in registers. :mod:`pool_features` does the same for every kind of pooling.

Layout: one program per tile of sub-blocks of the heads whose features are added up; it walks these
heads, and their dims in chunks.

Numerics: weights are rounded to the dtype of the tokens, products and means are taken in float32,
features are rounded once. Tokens that do not count are not read.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from seer_compile.kernels.triton.launching import launch_kernel
from seer_compile.kernels.triton.primitives import (
    as_bytes,
    ceil_div,
    empty_features,
    launching_on,
    padded_dim,
)
from seer_compile.kernels.triton.tuning import MeansTiling, means_tiling


@triton.jit
def _features_of_tokens(
    tokens_ptr,
    weight_ptr,
    positions,
    is_token,
    token_strides,
    weight_strides,
    first_head,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    GATE_DIM: tl.constexpr,
    PADDED_GATE_DIM: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Return ``Float32[tokens, gate dims]``, summed over heads."""
    CHUNKS: tl.constexpr = (DIM + CHUNK - 1) // CHUNK
    gate_dims = tl.arange(0, PADDED_GATE_DIM)
    features = tl.zeros([positions.shape[0], PADDED_GATE_DIM], tl.float32)
    rows = positions[:, None].to(tl.int64) * token_strides[2]
    for step in tl.range(0, GROUPS * CHUNKS, num_stages=STAGES):
        head = first_head + step // CHUNKS
        dims = step % CHUNKS * CHUNK + tl.arange(0, CHUNK)
        pointers = tokens_ptr + head * token_strides[1] + rows
        pointers += dims[None, :].to(tl.int64) * token_strides[3]
        mask = is_token[:, None]
        if DIM % CHUNK != 0:
            mask = mask & (dims < DIM)[None, :]
        token = tl.load(pointers, mask=mask, other=0.0)
        pointers = weight_ptr + head * weight_strides[0]
        pointers += dims[:, None].to(tl.int64) * weight_strides[1]
        pointers += gate_dims[None, :].to(tl.int64) * weight_strides[2]
        mask = (dims < DIM)[:, None] & (gate_dims < GATE_DIM)[None, :]
        weight = tl.load(pointers, mask=mask, other=0.0).to(token.dtype)
        features = tl.dot(token, weight, features)
    return features


@triton.jit(do_not_specialize=["num_tokens", "num_sub_blocks", "tiles", "heads"])
def _pool_means(
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
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
    DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    GATE_DIM: tl.constexpr,
    PADDED_GATE_DIM: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    tile = program % tiles
    gate_head = (program // tiles % heads).to(tl.int64)
    batch = (program // tiles // heads).to(tl.int64)
    positions = tile * TILE * SIZE + tl.arange(0, TILE * SIZE)
    is_token = positions < num_tokens
    if padding_ptr is not None:
        padding_ptr += batch * num_tokens
        is_token = is_token & (tl.load(padding_ptr + positions, mask=is_token, other=0) != 0)
    features = _features_of_tokens(
        tokens_ptr + batch * token_strides[0], weight_ptr, positions, is_token, token_strides,
        weight_strides, gate_head * GROUPS, GROUPS, DIM, CHUNK, GATE_DIM, PADDED_GATE_DIM, STAGES,
    )  # fmt: skip
    count = tl.sum(tl.reshape(is_token.to(tl.float32), [TILE, SIZE]), 1)
    total = tl.sum(tl.reshape(features, [TILE, SIZE, PADDED_GATE_DIM]), 1)
    mean = total / tl.maximum(count, 1.0)[:, None]
    sub_blocks = tile * TILE + tl.arange(0, TILE)
    gate_dims = tl.arange(0, PADDED_GATE_DIM)
    rows = (batch * heads + gate_head) * num_sub_blocks + sub_blocks
    target = features_ptr + rows[:, None] * GATE_DIM + gate_dims[None, :]
    mask = (sub_blocks < num_sub_blocks)[:, None] & (gate_dims < GATE_DIM)[None, :]
    tl.store(target, mean.to(features_ptr.dtype.element_ty), mask=mask)


def takes(size: int, kinds: str, groups: int) -> bool:
    """Whether this kernel is meant for a call: means over few tokens, of several heads each.

    The heads of one program share its tokens' place in memory; for single heads the weights weigh
    as much as the tokens, and ``pool_features`` reads them less often.
    """
    return kinds == "mean" and groups > 1 and size in (1, 2, 4, 8, 16)


def launch(
    tokens: Tensor,
    weight: Tensor,
    size: int,
    padding: Tensor | None = None,
    groups: int = 1,
    tiling: MeansTiling | None = None,
) -> Tensor:
    """Pool and project; arguments and result as ``pool_features.launch`` with means alone.

    ``size`` must be a power of 2.
    """
    batch, heads, num_tokens, dim = tokens.shape
    heads //= groups
    gate_dim, num_sub_blocks = weight.shape[2], ceil_div(num_tokens, size)
    features = empty_features((batch, heads, num_sub_blocks, gate_dim), tokens)
    if features.numel() == 0:
        return features
    tiling = tiling or means_tiling(num_tokens)
    tile = max(1, tiling.tokens // size)
    tiles = ceil_div(num_sub_blocks, tile)
    with launching_on(tokens, "tokens"):
        launch_kernel(_pool_means, tiles * heads * batch,
            tokens, weight, features, as_bytes(padding), tokens.stride(), weight.stride(),
            num_tokens, num_sub_blocks, tiles, heads, GROUPS=groups, SIZE=size, TILE=tile,
            DIM=dim, CHUNK=min(padded_dim(dim), tiling.dims), GATE_DIM=gate_dim,
            PADDED_GATE_DIM=padded_dim(gate_dim), STAGES=tiling.stages, num_warps=tiling.warps,
        )  # fmt: skip
    return features
