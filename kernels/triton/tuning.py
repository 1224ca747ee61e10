"""Sizes of tiles, warps and pipeline stages, and how heads share tiles.

Measured figures are medians on one H200 in bfloat16: 32,768 tokens, 32 query heads, 8 key heads,
causal, 90 % of the blocks dropped; ``benchmarks/kernels_speed.py`` makes them.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton

from seer_compile.errors import HeadConfigError
from seer_compile.kernels.triton.primitives import multiprocessors

_HOLDS_PAIRS = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
"""Whether queries of 128 dims fit the registers beside two key tiles; Triton 3.9 spills, and its
assembler then serialises the products."""

HOPPER_SHARED = 232_448
"""Bytes of shared memory that one program may use on sm_90."""


def shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory that one program may use."""
    if device.type != "cuda":
        return HOPPER_SHARED
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def _fit(fixed: int, per_key: int, keys: int, stages: int, limit: int) -> tuple[int, int]:
    """Return keys per tile and stages, fewer where shared memory is smaller than Hopper's."""
    while fixed + per_key * keys * stages > limit and stages > 1:
        stages -= 1
    while fixed + per_key * keys > limit and keys > 16:
        keys //= 2
    return keys, stages


class HeadLayout(NamedTuple):
    """How query heads map to key heads and to selections."""

    heads: int
    per_key_head: int
    per_selection: int


def head_layout(heads: int, kv_heads: int, selections: int) -> HeadLayout:
    """Return the layout of heads.

    Raises:
        HeadConfigError: Query heads do not form equal groups per key head or per selection.
    """
    for argument, groups in (("kv_heads", kv_heads), ("selection heads", selections)):
        if groups < 1 or heads % groups:
            raise HeadConfigError(
                argument=argument, got=groups, expected=f"a divisor of the {heads} query heads"
            )
    return HeadLayout(heads, heads // kv_heads, heads // selections)


class Tiling(NamedTuple):
    """How one launch is cut into tiles."""

    rows: int
    """Query tokens of one head in a tile; divides the query block."""
    keys: int
    """Key tokens of a tile; divides the key block."""
    heads: int
    """Query heads in a tile."""
    warps: int
    stages: int


def forward_tiling(
    layout: HeadLayout,
    query_block: int,
    key_block: int,
    dim: int,
    dtype: torch.dtype,
    limit: int = HOPPER_SHARED,
) -> Tiling:
    """Return the tiling for a shape.

    Args:
        layout: How heads map to key heads and selections.
        query_block: Tokens per query block.
        key_block: Tokens per key block.
        dim: The larger of the padded head dims.
        dtype: Of the tensors.
        limit: Bytes of shared memory per program.
    """
    if dtype is torch.float32:
        # Exact float32 products run on the vector units: small tiles keep the code short.
        return Tiling(min(query_block, 32), min(key_block, 32), 1, 4, 1)
    # 32,768 tokens, 32/8 heads, D128, 90 % sparse, one H200: 64 rows of one head 2.39 ms, 128 rows
    # of one head 2.56, of two heads 2.48, 256 rows of four heads that share a selection 2.21.
    rows = min(query_block, 64)
    shared = math.gcd(layout.per_key_head, layout.per_selection)
    for tile_rows in (256, 64) if dim <= 128 else (64,):
        heads = tile_rows // rows
        if shared % heads == 0:
            break
    else:
        heads = 1
    if 2 * (rows * heads + 2 * 2 * 64) * dim > limit:
        heads = 1
    is_large = rows * heads > 64
    stages = 2 if is_large or dim > 128 else 3
    keys, stages = _fit(2 * rows * heads * dim, 4 * dim, min(key_block, 64), stages, limit)
    return Tiling(rows, keys, heads, 8 if is_large else 4, stages)


class HopperTiling(NamedTuple):
    """How one launch of the Hopper engine is cut."""

    consumers: int
    """Groups of four warps, 64 query rows each, that share key tiles: 1 or 2."""
    heads: int
    """Query heads in a tile: 1, or one per consumer."""
    tiles: int
    """Key tiles per slot of the ring, and per step of the softmax: 1 or 2."""
    stages: int
    """Slots of the ring."""
    query_in_registers: bool
    """Whether the first product takes its queries from registers: it spares shared memory half of
    its reads, and costs ``dim / 4`` registers."""
    programs: int
    """Programs per multiprocessor."""
    registers: int
    """Registers per thread at entry; the copying warps hand most of theirs to the others."""


def hopper_tiling(layout: HeadLayout, query_block: int, dim: int) -> HopperTiling:
    """Return the tiling of the Hopper engine for a shape, the fastest of those measured.

    Two groups of 64 rows that share key tiles halve the traffic from the second-level cache; where
    neither the query block nor a shared selection allows that, two programs of one group share a
    multiprocessor, so that the softmax of one runs behind the products of the other. Two tiles per
    slot save a quarter of the instructions, where two programs need not share the memory.

    Args:
        layout: How heads map to key heads and selections.
        query_block: Tokens per query block, a multiple of 64.
        dim: Head dim: 64, 128 or 256.
    """
    if query_block % 128 == 0:
        consumers, heads = 2, 1
    elif math.gcd(layout.per_key_head, layout.per_selection) % 2 == 0:
        consumers, heads = 2, 2
    else:
        consumers, heads = 1, 1
    if dim == 256:
        stages, tiles, programs, registers = (2 if consumers == 2 else 3), 1, 1, 168
    elif consumers == 2:
        stages, tiles, programs, registers = (5 if dim == 64 else 3), 2, 1, 168
    else:
        stages, tiles, programs, registers = 3, (2 if dim == 64 else 1), 2, 128
    in_registers = dim == 64 or (dim == 128 and (tiles == 1 or _HOLDS_PAIRS))
    return HopperTiling(consumers, heads, tiles, stages, in_registers, programs, registers)


class HopperQueryTiling(NamedTuple):
    """How the Hopper kernel for the gradient of the queries is cut."""

    consumers: int
    """Groups of four warps, 64 rows of one head each, that share key tiles: 1 or 2."""
    key_stages: int
    """Slots of the ring of keys; 2 or more where products run ahead."""
    value_stages: int
    in_registers: int
    """What the first products take from registers, each of which costs ``dim / 4``: nothing,
    queries, or queries and output gradients."""
    ahead: int
    """What of a tile runs beside products of another: nothing, its last product beside the first
    ones of the next (1), or its exponentials beside the logits of the next (2)."""
    programs: int
    """Programs per multiprocessor."""
    registers: int
    """Registers per thread at entry."""


class HopperKeyTiling(NamedTuple):
    """How the Hopper kernel for the gradients of keys and values is cut."""

    stages: int
    """Slots of the ring of query tiles."""
    parts: int
    """Programs that share the first key tile, two or more: attention sinks are read by all
    queries."""
    registers: int
    """Registers per thread at entry: 128 lets two programs share a multiprocessor."""


def hopper_query_tiling(layout: HeadLayout, dim: int) -> HopperQueryTiling:
    """Return the tiling of the Hopper kernel for the gradient of the queries, the fastest measured.

    32,768 tokens, 32 and 8 heads, 10 % of the blocks, one H200: at D128 2.11 ms per group (others
    2.16 to 2.36) and 2.25 per head (2.28 to 2.37); at D64 1.37 and 1.31.
    """
    if math.gcd(layout.per_key_head, layout.per_selection) % 2 == 0:
        if dim == 64:
            return HopperQueryTiling(2, 8, 8, 1, 2, 1, 168)
        return HopperQueryTiling(2, 4, 4, 1, 1, 1, 168)
    if dim == 64:
        return HopperQueryTiling(1, 6, 5, 1, 2, 2, 128)
    return HopperQueryTiling(1, 3, 2, 1, 1, 2, 128)


def hopper_key_tiling(dim: int) -> HopperKeyTiling:
    """Return the tiling of the Hopper kernel for the gradients of keys and values.

    As above: 3.17 ms at D128 in 8 parts (2 parts 3.70, 32 parts 3.34), at D64 1.84 (5 slots 1.87).
    """
    return HopperKeyTiling(3 if dim == 64 else 2, 8, 128)


class BackwardTiling(NamedTuple):
    """How the two kernels are cut into tiles; each divides its block."""

    rows: int
    keys: int
    query_warps: int
    query_stages: int
    key_warps: int
    key_stages: int


def backward_tiling(
    query_block: int, key_block: int, dim: int, dtype: torch.dtype, limit: int = HOPPER_SHARED
) -> BackwardTiling:
    """Return the tiling for a shape; ``dim`` is the larger of the padded head dims."""
    if dtype is torch.float32:
        size = 32 if dim <= 64 else 16
        return BackwardTiling(min(query_block, size), min(key_block, size), 4, 1, 4, 1)
    rows, keys = min(query_block, 64), min(key_block, 64)
    if dim <= 64:
        return BackwardTiling(rows, keys, 4, 3, 4, 3)
    if dim <= 128:
        # 4 warps for the key side although they spill: 12.5 ms against 17.0 ms with 8 (one H200,
        # 32,768 tokens, 32/8 heads, 90 % sparse).
        return BackwardTiling(rows, keys, 4, 2, 4, 2)
    keys, stages = _fit(4 * rows * dim, 4 * dim, min(keys, 32), 2, limit)
    return BackwardTiling(rows, keys, 8, stages, 8, 1)


class MapTiling(NamedTuple):
    """Sizes of the tiles of the two passes, in rows and columns."""

    rows: int
    columns: int
    warps: int
    stages: int


class ScoresTiling(NamedTuple):
    """How block scores are made."""

    rows: int
    columns: int
    warps: int
    stages: int
    programs: int
    """Programs in all; each has a stretch of memory for its maxima."""
    registers: int
    """Per thread at most, so that several programs share a multiprocessor."""
    keep: bool
    """Whether maxima are kept in memory; else products are made again."""


_LARGEST_MAXIMA = 320 << 20
"""Bytes that block scores keep."""


@functools.lru_cache(256)
def scores_tiling(
    dim: int,
    dtype: torch.dtype,
    units: tuple[int, ...],
    num_column_units: int,
    device: torch.device,
) -> ScoresTiling:
    """Return the tiling for a shape, the fastest of those measured.

    32,768 tokens, gate dim 64, sub-blocks of 2 and 4 tokens, one H200: 0.912 ms for 32 heads and
    0.229 for 8 (128 rows 0.972 and 0.256 as two programs per multiprocessor, 0.969 and 0.245 as one
    with all registers; 64 columns 1.216). Sub-blocks of 4 and 4: 128 rows 0.438 for 32 heads, 256
    rows 0.453 to 0.487.

    Args:
        dim: Padded feature dim.
        dtype: Of the features.
        units: Rows and columns per unit, filled up to powers of 2.
        num_column_units: Key blocks.
        device: Where it runs.
    """
    limit = shared_memory(device)
    # Eight units side by side lie in one thread each.
    columns, size = min(128, max(64, 8 * units[1])), 2
    is_tall = units[0] >= 32 and dim <= 64 and 2 * dim * (256 + 3 * columns) <= limit
    rows = 256 if is_tall else 128 if dim <= 128 else 64
    if dtype is torch.float32:
        rows, columns, size, is_tall = 32, 32, 4, False
    rows, columns = max(rows, units[0]), max(columns, units[1])
    # Units of few columns leave as many maxima and sums in registers as there are pairs.
    fits = size * dim * (rows + 2 * columns) <= limit // 2 and units[1] >= 4 and not is_tall
    programs = multiprocessors(device) * (2 if fits else 1)
    columns, stages = _fit(size * rows * dim, size * dim, columns, 3, limit // (2 if fits else 1))
    columns = max(columns, units[1])
    keep = 4 * programs * rows * (num_column_units + columns) <= _LARGEST_MAXIMA
    warps = 4 if dtype is torch.float32 else 8
    return ScoresTiling(rows, columns, warps, stages, programs, 128 if fits else 255, keep)


def mass_tiling(dim: int, dtype: torch.dtype, limit: int = HOPPER_SHARED) -> MapTiling:
    """Return the tiling for a padded head dim."""
    if dtype is torch.float32:
        return MapTiling(32, 32, 4, 1)
    # At D128 tiles of 64 columns beat 128: 21.9 against 24.3 ms (one H200, 32,768 tokens, 32/8
    # heads, units of 8 x 64).
    columns, stages = (64, 3) if dim <= 128 else (128, 2)
    columns, stages = _fit(2 * 128 * dim, 2 * dim, columns, stages, limit)
    return MapTiling(128, columns, 8, stages)


class PoolTiling(NamedTuple):
    """How pooling with projection is cut into tiles."""

    rows: int
    """Sub-blocks."""
    dims: int
    """Channels of the tokens that are pooled before they are multiplied."""
    unroll: int
    """Tokens of a sub-block that are asked for before the first is used."""
    warps: int


def pool_tiling(num_sub_blocks: int, size: int) -> PoolTiling:
    """Return the tiling for a number of sub-blocks of so many tokens.

    32,768 tokens of D128, one H200: means of two tokens of 32 heads 0.120 ms, summed over groups
    of four 0.119 (128 dims at a time 0.135 and 0.114, 8 warps 0.152 and 0.139); mean and extremes
    of four tokens of 8 heads 0.050 (asking for four tokens at a time 0.052, 8 warps 0.057).
    """
    if num_sub_blocks <= 16:
        return PoolTiling(16, 64, 4, 4)
    return PoolTiling(128 if size < 4 else 64, 64, 4 if size < 4 else 2, 4)


class MeansTiling(NamedTuple):
    """How projected means are cut into tiles."""

    tokens: int
    dims: int
    stages: int
    warps: int


def means_tiling(num_tokens: int) -> MeansTiling:
    """Return the tiling for a number of tokens.

    32 heads of D128 in groups of four, two tokens per sub-block, 32,768 tokens, one H200: 0.085 ms
    (128 tokens and 4 warps 0.110, 64 tokens 0.145; with weights in 16 bits 0.078 to 0.082, and
    0.003 to round them), where ``pool_features`` takes 0.118.
    """
    return MeansTiling(256, 64, 2, 8) if num_tokens > 2048 else MeansTiling(64, 64, 2, 4)
