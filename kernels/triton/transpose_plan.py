"""Turn a plan of key tiles per query block into one of query blocks per key tile.

Whether a tile needs a mask was decided by ``hopper_plan``; here it is carried over. As there, a row
holds the masked entries at its front and the whole ones at its end. Two kernels, no host sync, no
atomics.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from seer_compile.kernels.triton.hopper_plan import Plan
from seer_compile.kernels.triton.launching import launch_kernel
from seer_compile.kernels.triton.primitives import ceil_div

_MARK_CHUNK = 128
_ROWS = 64
_COLUMNS = 16


class KeyPlan(NamedTuple):
    """Query blocks per list and key tile."""

    blocks: Tensor
    """``Int32[b*s*n m]``."""
    masked: Tensor
    """``Int32[b*s*n]``: blocks at the front of a row."""
    whole: Tensor
    """``Int32[b*s*n]``: blocks at the end of a row."""
    capacity: int
    """``m``."""


@triton.jit(do_not_specialize=["capacity", "key_tiles"])
def _mark_tiles(
    tiles_ptr, masked_ptr, whole_ptr, map_ptr, capacity, key_tiles, CHUNK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    masked = tl.load(masked_ptr + row)
    count = masked + tl.load(whole_ptr + row)
    for start in range(0, count, CHUNK):
        positions = start + tl.arange(0, CHUNK)
        is_entry = positions < count
        is_masked = positions < masked
        places = tl.where(is_masked, positions, positions + capacity - count)
        tiles = tl.load(tiles_ptr + row * capacity + places, mask=is_entry, other=0)
        mark = tl.where(is_masked, 1, 2).to(tl.uint8)
        tl.store(map_ptr + row * key_tiles + tiles, mark, mask=is_entry)


@triton.jit(do_not_specialize=["query_blocks", "key_tiles", "column_tiles"])
def _compact_marks(
    map_ptr, blocks_ptr, masked_ptr, whole_ptr, query_blocks, key_tiles, column_tiles,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    selection = (program // column_tiles).to(tl.int64)
    columns = program % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    is_column = columns < key_tiles
    masked = tl.zeros([COLUMNS], tl.int32)
    whole = tl.zeros([COLUMNS], tl.int32)
    lists = (selection * key_tiles + columns) * query_blocks
    for start in range(0, query_blocks, ROWS):
        rows = start + tl.arange(0, ROWS)
        cells = (selection * query_blocks + rows)[:, None] * key_tiles + columns[None, :]
        inside = (rows < query_blocks)[:, None] & is_column[None, :]
        marks = tl.load(map_ptr + cells, mask=inside, other=0)
        is_masked = (marks == 1).to(tl.int32)
        is_whole = (marks == 2).to(tl.int32)
        from_front = masked[None, :] + tl.cumsum(is_masked, 0) - 1
        from_end = query_blocks - whole[None, :] - tl.cumsum(is_whole, 0)
        places = lists[None, :] + tl.where(marks == 2, from_end, from_front)
        row_tile = tl.broadcast_to(rows[:, None], [ROWS, COLUMNS])
        tl.store(blocks_ptr + places, row_tile, mask=inside & (marks != 0))
        masked += tl.sum(is_masked, 0)
        whole += tl.sum(is_whole, 0)
    tl.store(masked_ptr + selection * key_tiles + columns, masked, mask=is_column)
    tl.store(whole_ptr + selection * key_tiles + columns, whole, mask=is_column)


def transpose_plan(plan: Plan, selections: int, query_blocks: int, key_tiles: int) -> KeyPlan:
    """Return the plan seen from the key side.

    Args:
        plan: Of ``selections * query_blocks`` lists.
        selections: ``b * s``.
        query_blocks: ``m``.
        key_tiles: ``n``, tiles of 64 keys.

    Cost:
        ``b * s * m * n`` bytes of scratch and four times that of result.
    """
    device = plan.tiles.device
    marks = torch.zeros((selections * query_blocks, key_tiles), dtype=torch.uint8, device=device)
    rows = selections * key_tiles
    blocks = torch.empty((rows, query_blocks), dtype=torch.int32, device=device)
    masked = torch.empty(rows, dtype=torch.int32, device=device)
    whole = torch.empty_like(masked)
    launch_kernel(_mark_tiles, selections * query_blocks,
        plan.tiles, plan.masked, plan.whole, marks, plan.capacity, key_tiles,
        CHUNK=_MARK_CHUNK, num_warps=1,
    )  # fmt: skip
    column_tiles = ceil_div(key_tiles, _COLUMNS)
    launch_kernel(_compact_marks, selections * column_tiles,
        marks, blocks, masked, whole, query_blocks, key_tiles, column_tiles,
        ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=4,
    )  # fmt: skip
    return KeyPlan(blocks, masked, whole, query_blocks)
