"""Turn the lists of key blocks per query block into lists of query blocks per key block.

Two kernels, no host sync, no atomics: the listed pairs are marked in a byte map, then each column
of the map is compacted in ascending order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from seer_compile.kernels.triton.launching import launch_kernel
from seer_compile.kernels.triton.primitives import ceil_div

_MARK_CHUNK = 128
_ROWS = 64
_COLUMNS = 32


@triton.jit(do_not_specialize=["capacity", "key_blocks"])
def _mark_pairs(
    indices_ptr,
    counts_ptr,
    map_ptr,
    capacity,
    key_blocks,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    list_ptr = indices_ptr + row * capacity
    count = tl.load(counts_ptr + row)
    for start in range(0, count, CHUNK):
        positions = start + tl.arange(0, CHUNK)
        is_entry = positions < count
        entries = tl.load(list_ptr + positions, mask=is_entry, other=0)
        tl.store(map_ptr + row * key_blocks + entries, 1, mask=is_entry)


@triton.jit(do_not_specialize=["query_blocks", "key_blocks", "column_tiles"])
def _compact_columns(
    map_ptr,
    indices_ptr,
    counts_ptr,
    query_blocks,
    key_blocks,
    column_tiles,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0)
    selection = (program // column_tiles).to(tl.int64)
    columns = program % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    is_column = columns < key_blocks
    found = tl.zeros([COLUMNS], tl.int32)
    lists = (selection * key_blocks + columns) * query_blocks
    for start in range(0, query_blocks, ROWS):
        rows = start + tl.arange(0, ROWS)
        cells = (selection * query_blocks + rows)[:, None] * key_blocks + columns[None, :]
        inside = (rows < query_blocks)[:, None] & is_column[None, :]
        marked = tl.load(map_ptr + cells, mask=inside, other=0).to(tl.int32)
        places = lists[None, :] + found[None, :] + tl.cumsum(marked, 0) - 1
        row_tile = tl.broadcast_to(rows[:, None], [ROWS, COLUMNS])
        tl.store(indices_ptr + places, row_tile, mask=inside & (marked != 0))
        found += tl.sum(marked, 0)
    tl.store(counts_ptr + selection * key_blocks + columns, found, mask=is_column)


def transpose_selection(indices: Tensor, counts: Tensor, key_blocks: int) -> tuple[Tensor, Tensor]:
    """Return the selection seen from the key side.

    Args:
        indices: ``Int32[b s m capacity]``, contiguous.
        counts: ``Int32[b s m]``, contiguous.
        key_blocks: ``n``.

    Returns:
        ``Int32[b s n m]``, ascending query blocks in the first entries of each row, and
        ``Int32[b s n]``, their number.

    Cost:
        ``b * s * m * n`` bytes of scratch and four times that of result.
    """
    batch, selections, query_blocks, _ = indices.shape
    shape = (batch, selections, key_blocks, query_blocks)
    pairs = torch.zeros(
        (batch, selections, query_blocks, key_blocks), dtype=torch.uint8, device=indices.device
    )
    transposed = torch.empty(shape, dtype=torch.int32, device=indices.device)
    transposed_counts = torch.empty(shape[:3], dtype=torch.int32, device=indices.device)
    if pairs.numel() == 0:
        return transposed, transposed_counts.zero_()
    launch_kernel(
        _mark_pairs,
        batch * selections * query_blocks,
        indices,
        counts,
        pairs,
        indices.shape[3],
        key_blocks,
        CHUNK=_MARK_CHUNK,
        num_warps=1,
    )
    column_tiles = ceil_div(key_blocks, _COLUMNS)
    launch_kernel(
        _compact_columns,
        batch * selections * column_tiles,
        pairs,
        transposed,
        transposed_counts,
        query_blocks,
        key_blocks,
        column_tiles,
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
        num_warps=4,
    )
    return transposed, transposed_counts
