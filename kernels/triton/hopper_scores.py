"""Block scores on Hopper: the same operator as ``block_scores``, on asynchronous products.

A program stays on its multiprocessor and takes tiles of 256 rows in turn, the heaviest first. One
of its warps copies features into shared memory, two groups of four multiply them and reduce key
blocks in registers, and a third group writes scores (``hopper_score_warps``). Maxima of a tile are
kept, for most lengths in the second-level cache, until the sums of its rows are known.

Not for every call: :func:`obstacle` says what it does not take.

Numerics: products and sums in float32. Maxima are kept as float16, scaled: an error of 2^-11 of a
logit, a quarter of what bfloat16 features carry; logits beyond 65,504 / log2(e) count as that.
"""

from __future__ import annotations

import functools

import torch
import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from seer_compile.kernels.triton.hopper_launch import (
    describe,
    make_barriers,
    memory_obstacle,
)
from seer_compile.kernels.triton.hopper_score_warps import copy_features, finish, score
from seer_compile.kernels.triton.launching import launch_kernel
from seer_compile.kernels.triton.primitives import (
    ceil_div,
    is_hopper,
    launching_on,
    make_band,
    multiprocessors,
    positive_scale,
)

TILE_ROWS = 256
_COLUMNS = 128
"""Columns of a tile: key blocks times their sub-blocks."""

_TILE_PLACES = 16
"""Sub-blocks of a key block in a tile, at most: a product's thread holds those of 8 key blocks."""

_STAGES = 4
_DIMS = (32, 64, 128)
_DTYPES = (torch.float16, torch.bfloat16)
_ROW_UNITS = (8, 16, 32, 64)
_COLUMN_UNITS = (4, 8, 16, 32)
_LARGEST_MAXIMA = 320 << 20
"""Bytes that are kept."""


@gluon.jit(
    do_not_specialize=[
        "num_rows", "num_columns", "num_row_units", "num_column_units", "q_len", "k_len", "upper",
        "lower", "tiles", "heads", "batches", "items",
    ]
)  # fmt: skip
def _hopper_scores(
    row_desc,
    column_desc,
    memory_ptr,
    map_ptr,
    offset_ptr,
    num_rows,
    num_columns,
    num_row_units,
    num_column_units,
    q_len,
    k_len,
    upper,
    lower,
    qk_scale,
    tiles,
    heads,
    batches,
    items,
    POOLED: gl.constexpr,
    PLACES: gl.constexpr,
    ROW_UNIT: gl.constexpr,
    ROW_EXTENT: gl.constexpr,
    COLUMN_EXTENT: gl.constexpr,
    STAGES: gl.constexpr,
    NEGATE: gl.constexpr,
):
    dim: gl.constexpr = row_desc.block_type.shape[3]
    TILE_PLACES: gl.constexpr = column_desc.block_type.shape[2]
    UNITS: gl.constexpr = column_desc.block_type.shape[3]
    row_smem = gl.allocate_shared_memory(row_desc.dtype, [4, 1, 1, 64, dim], row_desc.layout)
    column_smem = gl.allocate_shared_memory(
        column_desc.dtype, [STAGES, 1, 1, TILE_PLACES, UNITS, dim], column_desc.layout
    )
    row_ring = (row_smem, make_barriers(1, 1), make_barriers(1, 2))
    column_ring = (column_smem, make_barriers(STAGES, 1), make_barriers(STAGES, 2))
    normalizer_smem = gl.allocate_shared_memory(gl.float32, [8, 64], mbarrier.MBarrierLayout())
    scored, finished = make_barriers(2, 2), make_barriers(2, 1)
    # The copy engine must see barriers that are ready.
    hopper.fence_async_shared()
    if offset_ptr is not None:
        shift = gl.load(offset_ptr).to(gl.int32)
        upper += shift
        lower += shift
    work = (tiles, heads, batches)
    band = (q_len, k_len, upper, lower)
    sizes = (num_rows, num_columns)
    # Constants stay constants only where a tuple is written in the call.
    gl.warp_specialize(
        [
            (score, (
                row_ring, column_ring, normalizer_smem, scored, finished, memory_ptr, work, items,
                band, sizes, num_column_units, qk_scale, PLACES, UNITS, ROW_EXTENT, COLUMN_EXTENT,
                STAGES, NEGATE, 0,
            )),
            (score, (
                row_ring, column_ring, normalizer_smem, scored, finished, memory_ptr, work, items,
                band, sizes, num_column_units, qk_scale, PLACES, UNITS, ROW_EXTENT, COLUMN_EXTENT,
                STAGES, NEGATE, 1,
            )),
            (finish, (
                normalizer_smem, scored, finished, memory_ptr, map_ptr, work, items, band, sizes,
                (num_row_units, num_column_units), POOLED, PLACES, UNITS, ROW_UNIT, ROW_EXTENT,
                COLUMN_EXTENT,
            )),
            (copy_features, (
                (row_desc, column_desc), row_ring, column_ring, work, items, band, sizes, PLACES,
                UNITS, ROW_EXTENT, COLUMN_EXTENT, STAGES,
            )),
        ],
        [4, 4, 1],
        [208, 72, 24],
    )  # fmt: skip


def obstacle(
    query_features: Tensor,
    key_features: Tensor,
    sub_blocks: tuple[int, int],
    blocks: tuple[int, int],
    k_len: int,
    *,
    is_fine: bool,
) -> str | None:
    """Return why this engine does not take a call, or None.

    Args:
        query_features: ``Float[b h r e]``.
        key_features: ``Float[b h c e]``.
        sub_blocks: Tokens per sub-block of queries and of keys.
        blocks: Tokens per query block and per key block.
        k_len: Key tokens.
        is_fine: Whether padding or documents may hide anything.
    """
    if query_features.is_cuda and not is_hopper(query_features.device):
        return "the device is no Hopper GPU"
    if is_fine:
        return "padding or documents"
    reason = _shape_obstacle(query_features, sub_blocks, blocks, ceil_div(k_len, blocks[1]))
    if reason is not None:
        return reason
    for name, tensor in (("query_features", query_features), ("key_features", key_features)):
        reason = memory_obstacle(tensor)
        if reason is not None:
            return f"{name} {reason}"
    return _end_obstacle(key_features, blocks[1] // sub_blocks[1])


def _shape_obstacle(
    features: Tensor, sub_blocks: tuple[int, int], blocks: tuple[int, int], num_blocks: int
) -> str | None:
    """Return what of dtype, gate dim and blocks the kernel is not built for, or None."""
    if features.dtype not in _DTYPES:
        return f"dtype {features.dtype}"
    if features.shape[3] not in _DIMS:
        return f"gate dim {features.shape[3]}"
    row_unit, places = (block // size for block, size in zip(blocks, sub_blocks, strict=True))
    if (row_unit * sub_blocks[0], places * sub_blocks[1]) != blocks:
        return "blocks are no whole number of sub-blocks"
    if row_unit not in _ROW_UNITS or places not in _COLUMN_UNITS:
        return f"{row_unit} and {places} sub-blocks per block"
    if _kept_bytes(features, places, num_blocks) > _LARGEST_MAXIMA:
        return f"maxima of {num_blocks} key blocks"
    return None


def _end_obstacle(key_features: Tensor, places: int) -> str | None:
    """Return why whole key blocks cannot be read, or None: the last one may lack sub-blocks."""
    whole = ceil_div(key_features.shape[2], places) * places
    sizes = (*key_features.shape[:2], whole, key_features.shape[3])
    strides = key_features.stride()
    last = sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    room = key_features.untyped_storage().nbytes() // key_features.element_size()
    if key_features.storage_offset() + last < room:
        return None
    return f"key_features end within a block of {places} sub-blocks"


def _programs(features: Tensor) -> int:
    batch, heads, num_rows, _ = features.shape
    return min(multiprocessors(features.device), ceil_div(num_rows, TILE_ROWS) * heads * batch)


def _units_of_step(places: int) -> int:
    """Return the key blocks of ``places`` sub-blocks that are taken together."""
    return _COLUMNS // min(places, _TILE_PLACES)


def _kept_bytes(features: Tensor, places: int, num_column_units: int) -> int:
    units = _units_of_step(places)
    return 4 * _programs(features) * TILE_ROWS * ceil_div(num_column_units, units) * units


def _describe_columns(features: Tensor, places: int) -> TensorDescriptor:
    """Describe ``[b h c e]`` as ``[b h places blocks e]``, for copies of column tiles."""
    batch, heads, columns, dim = features.shape
    shape = [batch, heads, places, ceil_div(columns, places), dim]
    # The stride of an axis of one entry means nothing and may be anything.
    outer = [
        stride if size > 1 else dim
        for size, stride in zip(features.shape[:2], features.stride()[:2], strict=True)
    ]
    step = features.stride(2)
    strides = [*outer, step, places * step, 1]
    block = (1, 1, min(places, _TILE_PLACES), _units_of_step(places), dim)
    layout = _column_layout(block, features.dtype)
    return TensorDescriptor(features, shape, strides, list(block), layout)


@functools.cache
def _column_layout(block: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    element = gl.bfloat16 if dtype is torch.bfloat16 else gl.float16
    return gl.NVMMASharedLayout.get_default_for(list(block), element)


def launch(
    query_features: Tensor,
    key_features: Tensor,
    scale: float,
    query_sub_block: int,
    key_sub_block: int,
    query_block: int,
    key_block: int,
    q_len: int,
    k_len: int,
    groups: int,
    upper: int | None = None,
    lower: int | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """Score block pairs; arguments and result as ``block_scores.launch``.

    The call must have no :func:`obstacle`.

    Cost:
        The products of features once; four bytes per row of a program and key block, 320 MB at
        most.
    """
    batch, heads, num_rows, _ = query_features.shape
    num_columns, device = key_features.shape[2], query_features.device
    shape = (ceil_div(q_len, query_block), ceil_div(k_len, key_block))
    places, row_unit = key_block // key_sub_block, query_block // query_sub_block
    result = torch.empty((batch, heads // groups, *shape), dtype=torch.float32, device=device)
    if result.numel() == 0 or query_features.numel() == 0 or key_features.numel() == 0:
        return result.zero_()
    if groups > 1:
        result.zero_()
    band = make_band(upper, lower, offset)
    tiles = ceil_div(num_rows, TILE_ROWS)
    memory = torch.empty(
        _kept_bytes(query_features, places, shape[1]) // 2, dtype=torch.float16, device=device
    )
    with launching_on(query_features, "query_features"):
        launch_kernel(_hopper_scores, _programs(query_features),
            describe(query_features), _describe_columns(key_features, places),
            memory, result.view(torch.int32) if groups > 1 else result, band.offset,
            num_rows, num_columns, *shape, q_len, k_len, band.upper, band.lower,
            positive_scale(scale), tiles, heads, batch, tiles * heads * batch,
            POOLED=groups, PLACES=places, ROW_UNIT=row_unit,
            ROW_EXTENT=query_sub_block, COLUMN_EXTENT=key_sub_block, STAGES=_STAGES,
            NEGATE=scale < 0, num_warps=4, maxnreg=128,
        )  # fmt: skip
    return result
