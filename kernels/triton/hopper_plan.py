"""What the Hopper kernel walks: the key tiles of every list, split by whether they need a mask.

A key tile is 64 tokens. One is *whole* for a query block when every query of the block may read
every key of it; the rest that hold anything readable are *masked*. The plan of a list is a row of
``capacity`` tile numbers, the masked ones at its front and the whole ones at its end:

    [masked_0 masked_1 ... | unused | whole_n-1 ... whole_1 whole_0]

so that one pass over the list places each tile without knowing how many are to come. Tiles in
which nothing can be read are left out. Where the kernel takes whole tiles in twos, an odd one is
masked instead, which costs time and changes nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from seer_compile.kernels.triton.launching import launch_kernel
from seer_compile.kernels.triton.primitives import (
    Band,
    ceil_div,
    interior_key_range,
    shifted_band,
    visible_key_range,
)

TILE_KEYS = 64
"""Key tokens of a tile."""


class Plan(NamedTuple):
    """Key tiles per list, and the counter that programs draw their work from."""

    tiles: Tensor
    """``Int32[b*s*m capacity]``."""
    masked: Tensor
    """``Int32[b*s*m]``: tiles at the front of a row."""
    whole: Tensor
    """``Int32[b*s*m]``: tiles at the end of a row."""
    queue: Tensor
    """``Int32[1]``, zero."""
    capacity: int


class TileRules(NamedTuple):
    """Padding and documents per tile: enough to know a whole tile; each None where not given."""

    readable: Tensor | None
    """``UInt8[b n]``: every key of the tile may be read."""
    key_documents: Tensor | None
    """``Int[b n 2]``: lowest and highest document of the tile."""
    query_documents: Tensor | None
    """``Int[b m 2]``: the same of each query block."""


def tile_rules(
    key_padding: Tensor | None,
    query_documents: Tensor | None,
    key_documents: Tensor | None,
    query_block: int,
) -> TileRules:
    """Summarise padding and documents per tile. A few small launches, and only where given."""
    readable = None
    if key_padding is not None:
        readable = _runs(key_padding, TILE_KEYS).all(-1).to(torch.uint8)
    if query_documents is None or key_documents is None:
        return TileRules(readable, None, None)
    return TileRules(
        readable,
        _extremes(_runs(key_documents, TILE_KEYS)),
        _extremes(_runs(query_documents, query_block)),
    )


def _runs(tokens: Tensor, size: int) -> Tensor:
    """Cut ``[b t]`` into ``[b n size]``; a last run that is shorter repeats its last token."""
    length = tokens.shape[1]
    positions = torch.arange(ceil_div(length, size) * size, device=tokens.device)
    return tokens[:, positions.clamp(max=length - 1)].unflatten(1, (-1, size))


def _extremes(runs: Tensor) -> Tensor:
    return torch.stack([runs.amin(-1), runs.amax(-1)], -1)


@triton.jit
def _is_uniform(tiles, is_entry, batch, block, num_tiles, num_blocks, key_ptr, query_ptr):
    """Whether a tile and the query block hold one document, the same."""
    pairs = key_ptr + (batch * num_tiles + tiles) * 2
    lowest = tl.load(pairs, mask=is_entry, other=0)
    highest = tl.load(pairs + 1, mask=is_entry, other=1)
    pair = query_ptr + (batch * num_blocks + block) * 2
    first = tl.load(pair)
    return (lowest == highest) & (lowest == first) & (first == tl.load(pair + 1))


@triton.jit(
    do_not_specialize=[
        "q_len", "k_len", "upper", "lower", "selections", "num_blocks", "listed", "capacity",
        "num_tiles",
    ]
)  # fmt: skip
def _split_lists(
    indices_ptr,
    counts_ptr,
    tiles_ptr,
    masked_ptr,
    whole_ptr,
    queue_ptr,
    offset_ptr,
    readable_ptr,
    key_documents_ptr,
    query_documents_ptr,
    q_len,
    k_len,
    upper,
    lower,
    selections,
    num_blocks,
    listed,
    capacity,
    num_tiles,
    BLOCK_Q: tl.constexpr,
    TILES_PER_BLOCK: tl.constexpr,
    TILE_K: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    block = (row % num_blocks).to(tl.int32)
    batch = row // num_blocks // selections
    upper, lower = shifted_band(upper, lower, offset_ptr)
    first_query = block * BLOCK_Q
    last_query = tl.minimum(first_query + BLOCK_Q, q_len) - 1
    begin, end = interior_key_range(first_query, last_query, upper, lower, k_len, TILE_K)
    visible_begin, visible_end = visible_key_range(
        first_query, last_query, upper, lower, k_len, TILE_K
    )
    count = tl.load(counts_ptr + row) * TILES_PER_BLOCK
    row_ptr = tiles_ptr + row * capacity
    masked = 0
    whole = 0
    for start in range(0, count, CHUNK):
        positions = start + tl.arange(0, CHUNK)
        is_entry = positions < count
        entries = indices_ptr + row * listed + positions // TILES_PER_BLOCK
        tiles = tl.load(entries, mask=is_entry, other=0)
        tiles = tiles * TILES_PER_BLOCK + positions % TILES_PER_BLOCK
        is_entry = is_entry & (tiles >= visible_begin) & (tiles < visible_end)
        is_whole = is_entry & (tiles >= begin) & (tiles < end)
        if readable_ptr is not None:
            flags = tl.load(readable_ptr + batch * num_tiles + tiles, mask=is_entry, other=0)
            is_whole = is_whole & (flags != 0)
        if key_documents_ptr is not None:
            is_whole = is_whole & _is_uniform(
                tiles, is_entry, batch, block, num_tiles, num_blocks,
                key_documents_ptr, query_documents_ptr,
            )  # fmt: skip
        is_masked = is_entry & (is_whole == 0)
        from_front = masked + tl.cumsum(is_masked.to(tl.int32), 0) - 1
        from_end = capacity - whole - tl.cumsum(is_whole.to(tl.int32), 0)
        tl.store(row_ptr + tl.where(is_whole, from_end, from_front), tiles, mask=is_entry)
        masked += tl.sum(is_masked.to(tl.int32), 0)
        whole += tl.sum(is_whole.to(tl.int32), 0)
    tl.store(masked_ptr + row, masked)
    tl.store(whole_ptr + row, whole)
    if row == 0:
        tl.store(queue_ptr, 0)


def plan(
    indices: Tensor,
    counts: Tensor,
    band: Band,
    rules: TileRules,
    lengths: tuple[int, int],
    blocks: tuple[int, int],
) -> Plan:
    """Split every list.

    Args:
        indices: ``Int32[b s m n]``, ascending in the first ``counts`` entries of a row.
        counts: ``Int32[b s m]``.
        band: Which keys a query may read by position.
        rules: Padding and documents per tile.
        lengths: Query and key tokens.
        blocks: Tokens per query block and per key block, a multiple of 64.

    Cost:
        One read of the used part of the lists and one write of it per 64 keys.
    """
    rows, listed = counts.numel(), indices.shape[3]
    per_block = blocks[1] // TILE_KEYS
    capacity = listed * per_block
    tiles = torch.empty((rows, capacity), dtype=torch.int32, device=indices.device)
    # Each of its own: a compiled kernel serves one alignment of each pointer.
    masked = torch.empty(rows, dtype=torch.int32, device=indices.device)
    whole = torch.empty_like(masked)
    queue = torch.empty(1, dtype=torch.int32, device=indices.device)
    launch_kernel(
        _split_lists,
        rows,
        indices.contiguous(),
        counts.contiguous(),
        tiles,
        masked,
        whole,
        queue,
        band.offset,
        *rules,
        *lengths,
        band.upper,
        band.lower,
        *counts.shape[1:],
        listed,
        capacity,
        ceil_div(lengths[1], TILE_KEYS),
        BLOCK_Q=blocks[0],
        TILES_PER_BLOCK=per_block,
        TILE_K=TILE_KEYS,
        CHUNK=128,
        num_warps=1,
    )
    return Plan(tiles, masked, whole, queue, capacity)
