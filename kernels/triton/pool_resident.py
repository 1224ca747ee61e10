"""Mean, maximum and minimum of many sub-blocks, projected by weights that stay on the chip.

Pooled in every way, a head has three projections, which weigh more than the tokens of one tile. A
program keeps those of its head in shared memory and walks tiles of sub-blocks, the tokens of the
next ones on their way while it pools. :mod:`pool_features` does the same for all other calls.

Numerics: those of ``pool_features``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from seer_compile.kernels.triton.launching import launch_kernel
from seer_compile.kernels.triton.pool_steps import pool_chunk
from seer_compile.kernels.triton.primitives import (
    ceil_div,
    empty_features,
    is_hopper,
    launching_on,
    multiprocessors,
    padded_dim,
)
from seer_compile.kernels.triton.tuning import shared_memory
from seer_compile.types import POOL_KINDS

_ROWS = 64
"""Sub-blocks of a tile: what one product of a group of four warps takes."""
_DIMS = 64
"""Channels that are pooled at a time, for the registers."""
_STAGES = 3
"""Tiles on their way and in use. (8 key heads of D128, sub-blocks of 4, one H200: 0.031 ms at
32,768 tokens and 0.087 at 131,072; two 0.040 and 0.121, one 0.046 and 0.145; ``pool_features``
0.051 and 0.166.)"""
_LEAST_TILES = 4
"""Tiles per multiprocessor, below which loading the weights is not worth it."""


@triton.jit
def _load_weights(
    weight_ptr,
    weight_strides,
    columns,
    gate_dims,
    DIM: tl.constexpr,
    GATE_DIM: tl.constexpr,
    dtype: tl.constexpr,
    MEAN: tl.constexpr,
    MAXIMUM: tl.constexpr,
    MINIMUM: tl.constexpr,
):
    """Return the rows of three projections that belong to some channels."""
    mask = (columns < DIM)[:, None] & (gate_dims < GATE_DIM)[None, :]
    pointers = weight_ptr + columns[:, None].to(tl.int64) * weight_strides[1]
    pointers += gate_dims[None, :].to(tl.int64) * weight_strides[2]
    place = DIM * weight_strides[1]
    mean = tl.load(pointers + MEAN * place, mask=mask, other=0.0).to(dtype)
    highest = tl.load(pointers + MAXIMUM * place, mask=mask, other=0.0).to(dtype)
    lowest = tl.load(pointers + MINIMUM * place, mask=mask, other=0.0).to(dtype)
    return mean, highest, lowest


@triton.jit
def _add_features(
    features,
    base_ptr,
    sub_blocks,
    columns,
    weights,
    token_strides,
    num_tokens,
    DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    SIZE: tl.constexpr,
    IS_WHOLE: tl.constexpr,
):
    """Add what some channels of a tile give."""
    mean, highest, lowest = pool_chunk(
        base_ptr, None, sub_blocks, columns, token_strides, num_tokens,
        DIM, CHUNK, SIZE, UNROLL=SIZE, IS_WHOLE=IS_WHOLE,
    )  # fmt: skip
    features = tl.dot(mean, weights[0], features)
    features = tl.dot(highest, weights[1], features)
    return tl.dot(lowest, weights[2], features)


@triton.jit
def _write_tile(
    tile,
    features_ptr,
    base_ptr,
    first_weights,
    second_weights,
    token_strides,
    num_tokens,
    num_sub_blocks,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    GATE_DIM: tl.constexpr,
    PADDED_GATE_DIM: tl.constexpr,
    IS_WHOLE: tl.constexpr,
):
    sub_blocks = tile * TILE + tl.arange(0, TILE)
    columns = tl.arange(0, CHUNK)
    features = tl.zeros([TILE, PADDED_GATE_DIM], tl.float32)
    features = _add_features(
        features, base_ptr, sub_blocks, columns, first_weights, token_strides, num_tokens,
        DIM, CHUNK, SIZE, IS_WHOLE,
    )  # fmt: skip
    if DIM > CHUNK:
        features = _add_features(
            features, base_ptr, sub_blocks, CHUNK + columns, second_weights, token_strides,
            num_tokens, DIM, CHUNK, SIZE, IS_WHOLE,
        )  # fmt: skip
    gate_dims = tl.arange(0, PADDED_GATE_DIM)
    target = features_ptr + sub_blocks[:, None] * GATE_DIM + gate_dims[None, :]
    mask = (sub_blocks < num_sub_blocks)[:, None] & (gate_dims < GATE_DIM)[None, :]
    tl.store(target, features.to(features_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tokens", "num_sub_blocks", "heads", "programs"])
def _pool_resident(
    tokens_ptr,
    weight_ptr,
    features_ptr,
    token_strides,
    weight_strides,
    num_tokens,
    num_sub_blocks,
    heads,
    programs,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    GATE_DIM: tl.constexpr,
    PADDED_GATE_DIM: tl.constexpr,
    STAGES: tl.constexpr,
    MEAN: tl.constexpr,
    MAXIMUM: tl.constexpr,
    MINIMUM: tl.constexpr,
):
    """Write the features of every ``programs``-th tile of one head."""
    first = tl.program_id(0) % programs
    row = tl.program_id(0) // programs
    head = (row % heads).to(tl.int64)
    base_ptr = tokens_ptr + (row // heads).to(tl.int64) * token_strides[0] + head * token_strides[1]
    weight_ptr += head * weight_strides[0]
    features_ptr += row.to(tl.int64) * num_sub_blocks * GATE_DIM
    dtype: tl.constexpr = tokens_ptr.dtype.element_ty
    columns = tl.arange(0, CHUNK)
    gate_dims = tl.arange(0, PADDED_GATE_DIM)
    first_weights = _load_weights(
        weight_ptr, weight_strides, columns, gate_dims, DIM, GATE_DIM, dtype,
        MEAN, MAXIMUM, MINIMUM,
    )  # fmt: skip
    second_weights = first_weights
    if DIM > CHUNK:
        second_weights = _load_weights(
            weight_ptr, weight_strides, CHUNK + columns, gate_dims, DIM, GATE_DIM, dtype,
            MEAN, MAXIMUM, MINIMUM,
        )  # fmt: skip
    # A branch in the loop would keep the copies of the next tiles from starting early.
    whole = num_tokens // (TILE * SIZE)
    for tile in tl.range(first, whole, programs, num_stages=STAGES):
        _write_tile(
            tile, features_ptr, base_ptr, first_weights, second_weights, token_strides,
            num_tokens, num_sub_blocks, SIZE, DIM, CHUNK, TILE, GATE_DIM, PADDED_GATE_DIM,
            IS_WHOLE=True,
        )  # fmt: skip
    if (first == whole % programs) & (whole * TILE * SIZE < num_tokens):
        _write_tile(
            whole, features_ptr, base_ptr, first_weights, second_weights, token_strides,
            num_tokens, num_sub_blocks, SIZE, DIM, CHUNK, TILE, GATE_DIM, PADDED_GATE_DIM,
            IS_WHOLE=False,
        )  # fmt: skip


def takes(tokens: Tensor, weight: Tensor, size: int, kinds: str, groups: int) -> bool:
    """Whether this kernel is meant for a call: many tokens of single heads, pooled in every way.

    On Hopper, where its products read weights from shared memory and it was measured. The products
    of other GPUs but sm_100 take them from registers, and a thousand bytes of them are spilt.
    """
    if groups > 1 or set(kinds.split(",")) != set(POOL_KINDS):
        return False
    if not tokens.is_cuda or not is_hopper(tokens.device):
        return False
    if size not in (2, 4, 8) or tokens.shape[3] > 2 * _DIMS:
        return False
    tiles = tokens.shape[0] * tokens.shape[1] * tokens.shape[2] // (_ROWS * size)
    if tiles < _LEAST_TILES * multiprocessors(tokens.device):
        return False
    return _shared_bytes(tokens, weight, size) <= shared_memory(tokens.device)


def _shared_bytes(tokens: Tensor, weight: Tensor, size: int) -> int:
    """Return the shared memory of a program: projections, two tiles, and pooled channels."""
    channels = padded_dim(min(tokens.shape[3], _DIMS)) * (2 if tokens.shape[3] > _DIMS else 1)
    numbers = 3 * channels * padded_dim(weight.shape[2])
    numbers += (_STAGES - 1) * _ROWS * size * channels + _ROWS * _DIMS
    return numbers * tokens.element_size()


def launch(tokens: Tensor, weight: Tensor, size: int, kinds: str) -> Tensor:
    """Pool and project; arguments and result as ``pool_features.launch``, every token counting."""
    batch, heads, num_tokens, dim = tokens.shape
    gate_dim, num_sub_blocks = weight.shape[2], ceil_div(num_tokens, size)
    features = empty_features((batch, heads, num_sub_blocks, gate_dim), tokens)
    if features.numel() == 0:
        return features
    tiles = ceil_div(num_sub_blocks, _ROWS)
    programs = min(tiles, max(1, multiprocessors(tokens.device) // (batch * heads)))
    order = kinds.split(",")
    places = [order.index(kind) for kind in ("mean", "max", "min")]
    with launching_on(tokens, "tokens"):
        launch_kernel(_pool_resident, programs * heads * batch,
            tokens, weight, features, tokens.stride(), weight.stride(), num_tokens,
            num_sub_blocks, heads, programs, SIZE=size, DIM=dim,
            CHUNK=min(padded_dim(dim), _DIMS), TILE=_ROWS, GATE_DIM=gate_dim,
            PADDED_GATE_DIM=padded_dim(gate_dim), STAGES=_STAGES,
            MEAN=places[0], MAXIMUM=places[1], MINIMUM=places[2], num_warps=4, num_stages=1,
        )  # fmt: skip
    return features
