"""What the warps of the Hopper kernel for block scores do: copy, multiply, and finish.

A program takes *items*: 256 rows of one head. One warp copies the rows of an item, then the column
tiles in its reach, one slot of a ring after another. Two groups of four warps take 128 rows each:
they multiply, keep the maxima of every row and key block in memory, and at the end know what is
subtracted from the maxima of a row. A third group then reads them again and writes scores, while
the others are at the next item.

A step is ``UNITS`` key blocks. A column tile holds 16 places of each, or all where there are fewer:
place ``p`` of every block before place ``p + 1``, so that the columns of a block lie in one thread
of a product, whose maximum needs no exchange. Where blocks have 32 places, a step is two tiles, one
slot of the ring after the other.

Barriers, phases counted from 0 as in ``hopper_warps``: ``full`` of rows and of each slot (one
arrival, and bytes), ``empty`` (one arrival per multiplying group); for each of two stretches of
memory, taken in turn, ``scored`` (one arrival per multiplying group: its maxima are there) and
``finished`` (one arrival of the third: they may be overwritten). All take the same items and steps
in the same order, copies wait only for what was read, multiplying groups only for copies and for
an item finished two items ago, and the third only for what was multiplied: some warp can always
go on.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from seer_compile.kernels.triton import row_statistics
from seer_compile.kernels.triton.hopper_score_steps import (
    KEEP_NAN,
    larger,
    normalizer,
    take,
)
from seer_compile.kernels.triton.hopper_steps import meet_warps, next_slot
from seer_compile.kernels.triton.hopper_tiles import flat
from seer_compile.kernels.triton.hopper_warps import copy_tile

tile_ranges = gluon.jit(row_statistics.tile_ranges.fn)

_WRITTEN = gl.constexpr(128)
"""Key blocks whose scores are written together: 64 maxima of each fit the registers of a thread."""


@gluon.jit
def item_of(turn, work):
    """Return the item of a program's turn, its batch, head and tile.

    The last tiles come first, which have most to do under a causal band, and the direction changes
    with every turn, so that all programs have about the same work.
    """
    tiles, heads, batches = work
    program, programs = gl.program_id(0), gl.num_programs(0)
    pairs = heads * batches
    item = turn * programs + gl.where(turn % 2 == 0, program, programs - 1 - program)
    return item, item % pairs // heads, item % heads, tiles - 1 - item // pairs


@gluon.jit
def reach(
    tile,
    band,
    num_rows,
    num_columns,
    TILE_R: gl.constexpr,
    STEP: gl.constexpr,
    ROW_EXTENT: gl.constexpr,
    COLUMN_EXTENT: gl.constexpr,
):
    """Return the range of steps that any row of a tile sees, and of those seen whole."""
    q_len, k_len, upper, lower = band
    first_row = tile * TILE_R
    last_row = gl.minimum(first_row + TILE_R, num_rows) - 1
    return tile_ranges(
        first_row, last_row, num_columns, q_len, k_len, upper, lower, ROW_EXTENT, COLUMN_EXTENT,
        STEP,
    )  # fmt: skip


@gluon.jit
def copy_features(
    descriptors,
    row_ring,
    column_ring,
    work,
    items,
    band,
    sizes,
    PLACES: gl.constexpr,
    UNITS: gl.constexpr,
    ROW_EXTENT: gl.constexpr,
    COLUMN_EXTENT: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Copy what the groups read."""
    row_desc, column_desc = descriptors
    row_smem, row_full, row_empty = row_ring
    column_smem, column_full, column_empty = column_ring
    TILE_PLACES: gl.constexpr = column_smem.shape[3]
    num_rows, num_columns = sizes
    turn = 0
    slot = 0
    phase = 0
    item, batch, head, tile = item_of(turn, work)
    while item < items:
        mbarrier.wait(row_empty.index(0), (turn & 1) ^ 1)
        mbarrier.expect(row_full.index(0), 4 * row_desc.block_type.nbytes)
        for part in gl.static_range(4):
            rows = [batch, head, tile * 256 + part * 64, 0]
            copy_tile(row_desc, rows, row_full.index(0), row_smem.index(part))
        begin, _, _, end = reach(
            tile, band, num_rows, num_columns, 256, PLACES * UNITS, ROW_EXTENT, COLUMN_EXTENT
        )
        for step in range(begin, end):
            for place in gl.static_range(0, PLACES, TILE_PLACES):
                columns = [batch, head, place, step * UNITS, 0]
                mbarrier.wait(column_empty.index(slot), phase ^ 1)
                mbarrier.expect(column_full.index(slot), column_desc.block_type.nbytes)
                copy_tile(column_desc, columns, column_full.index(slot), column_smem.index(slot))
                slot, phase = next_slot(slot, phase, STAGES)
        turn += 1
        item, batch, head, tile = item_of(turn, work)


@gluon.jit
def _clear(map_ptr, rows, num_column_units, first, last):
    """Write 0 to the columns in ``[first, last)`` of some rows."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    columns = gl.arange(0, 128, layout)
    zeros = gl.zeros([128], gl.float32, layout)
    for row in range(rows[0], rows[1]):
        row_ptr = map_ptr + row.to(gl.int64) * num_column_units
        for start in range(first, last, 128):
            gl.store(row_ptr + (start + columns), zeros, mask=start + columns < last)


@gluon.jit
def _write_scores(
    kept_ptr,
    normalizer_smem,
    map_ptr,
    first_row_unit,
    begin,
    end,
    units,
    UNITS: gl.constexpr,
    ROW_UNIT: gl.constexpr,
    POOLED: gl.constexpr,
):
    """Write the scores of 64 rows, from the maxima of the steps in ``[begin, end)``.

    The exponential is taken of the largest of a block's rows: it grows with its argument.
    """
    num_row_units, num_column_units = units
    ROW_UNITS: gl.constexpr = 64 // ROW_UNIT
    STEPS: gl.constexpr = _WRITTEN // UNITS
    # Warps take different query blocks where there are as many, so that few lanes share one.
    WARPS: gl.constexpr = ROW_UNITS if ROW_UNITS < 4 else 4
    layout: gl.constexpr = gl.BlockedLayout(
        [1, 1, 1, 8], [1, 8 // WARPS, STEPS * WARPS // 4, UNITS // 8], [WARPS, 1, 4 // WARPS, 1],
        [3, 2, 1, 0],
    )  # fmt: skip
    first_three: gl.constexpr = gl.SliceLayout(3, layout)
    others: gl.constexpr = gl.SliceLayout(1, layout)
    row_layout: gl.constexpr = gl.SliceLayout(2, first_three)
    row_unit = gl.arange(0, ROW_UNITS, gl.SliceLayout(1, row_layout))[:, None] * ROW_UNIT
    row = row_unit + gl.arange(0, ROW_UNIT, gl.SliceLayout(0, row_layout))[None, :]
    row = gl.expand_dims(gl.expand_dims(row, 2), 3)
    subtracted = normalizer_smem.reshape([ROW_UNITS, ROW_UNIT]).load(row_layout)
    subtracted = gl.expand_dims(gl.expand_dims(subtracted, 2), 3)
    place_layout: gl.constexpr = gl.SliceLayout(0, others)
    place = gl.arange(0, STEPS, gl.SliceLayout(1, place_layout))[:, None]
    unit = gl.arange(0, UNITS, gl.SliceLayout(0, place_layout))[None, :]
    target_layout: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, others))
    target_row = first_row_unit + gl.arange(0, ROW_UNITS, target_layout)
    target_row = gl.expand_dims(gl.expand_dims(target_row, 1), 2)
    target_ptr = map_ptr + target_row.to(gl.int64) * num_column_units
    for start in range(begin // STEPS * STEPS, end, STEPS):
        step = gl.expand_dims(start + place + unit * 0, 0)
        column_unit = gl.expand_dims((start + place) * UNITS + unit, 0)
        within = gl.expand_dims((start + place) * (128 * UNITS) + unit, 0)
        is_seen = gl.expand_dims((step >= begin) & (step < end), 1)
        pointers = kept_ptr + gl.expand_dims(within, 1) + row * UNITS
        kept = gl.load(pointers, mask=is_seen & (row >= 0), other=float("-inf"))
        scores = gl.exp2(gl.reduce(kept.to(gl.float32) - subtracted, 1, larger))
        # What is kept is rounded, the sum is not.
        scores = gl.minimum(scores, 1.0, propagate_nan=KEEP_NAN)
        inside = (column_unit < num_column_units) & (target_row < num_row_units)
        if POOLED > 1:
            # Bits of numbers that are never negative are ordered as the numbers are.
            bits = scores.to(gl.int32, bitcast=True)
            gl.atomic_max(target_ptr + column_unit, bits, mask=inside, sem="relaxed")
        else:
            gl.store(target_ptr + column_unit, scores, mask=inside)


@gluon.jit
def finish(
    normalizer_smem,
    scored,
    finished,
    memory_ptr,
    map_ptr,
    work,
    items,
    band,
    sizes,
    units,
    POOLED: gl.constexpr,
    PLACES: gl.constexpr,
    UNITS: gl.constexpr,
    ROW_UNIT: gl.constexpr,
    ROW_EXTENT: gl.constexpr,
    COLUMN_EXTENT: gl.constexpr,
):
    """Turn the maxima of every item into scores."""
    num_rows, num_columns = sizes
    num_row_units, num_column_units = units
    heads = work[1]
    stride = (num_column_units + UNITS - 1) // UNITS * (128 * UNITS)
    memory_ptr += gl.program_id(0).to(gl.int64) * 4 * stride
    turn = 0
    item, batch, head, tile = item_of(turn, work)
    while item < items:
        half = turn & 1
        begin, _, _, end = reach(
            tile, band, num_rows, num_columns, 256, PLACES * UNITS, ROW_EXTENT, COLUMN_EXTENT
        )
        map_head = batch * (heads // POOLED) + head // POOLED
        target_ptr = map_ptr + map_head.to(gl.int64) * num_row_units * num_column_units
        if POOLED == 1:
            # What no row sees, while the others still multiply; where heads are pooled it is 0.
            rows = tile * 256 // ROW_UNIT, gl.minimum((tile + 1) * 256 // ROW_UNIT, num_row_units)
            first = begin * UNITS // _WRITTEN * _WRITTEN
            last = first + (end * UNITS - first + _WRITTEN - 1) // _WRITTEN * _WRITTEN
            _clear(target_ptr, rows, num_column_units, 0, first)
            _clear(target_ptr, rows, num_column_units, last, num_column_units)
        mbarrier.wait(scored.index(half), (turn >> 1) & 1)
        for part in range(4):
            kept_ptr = memory_ptr + (half * 2 + part // 2) * stride
            _write_scores(
                kept_ptr + part % 2 * (64 * UNITS), normalizer_smem.index(half * 4 + part),
                target_ptr, (tile * 256 + part * 64) // ROW_UNIT, begin, end, units, UNITS,
                ROW_UNIT, POOLED,
            )  # fmt: skip
        meet_warps()
        mbarrier.arrive(finished.index(half), count=1)
        turn += 1
        item, batch, head, tile = item_of(turn, work)


@gluon.jit
def score(
    row_ring,
    column_ring,
    normalizer_smem,
    scored,
    finished,
    memory_ptr,
    work,
    items,
    band,
    sizes,
    num_column_units,
    qk_scale,
    PLACES: gl.constexpr,
    UNITS: gl.constexpr,
    ROW_EXTENT: gl.constexpr,
    COLUMN_EXTENT: gl.constexpr,
    STAGES: gl.constexpr,
    NEGATE: gl.constexpr,
    CONSUMER: gl.constexpr,
):
    """Keep the maxima of 128 rows of every item, and what is subtracted from those of a row."""
    row_smem, row_full, row_empty = row_ring
    num_rows, num_columns = sizes
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, UNITS, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, layout)
    # Of each program, turn and group: step after step, row after row.
    stride = (num_column_units + UNITS - 1) // UNITS * (128 * UNITS)
    memory_ptr += (gl.program_id(0) * 4 + CONSUMER).to(gl.int64) * stride
    places = gl.arange(0, 64, row_layout)[:, None] * UNITS
    places += gl.arange(0, UNITS, gl.SliceLayout(0, layout))[None, :]
    turn = 0
    cursor = (0, 0)
    item, _, _, tile = item_of(turn, work)
    while item < items:
        half = turn & 1
        begin, inner_begin, inner_end, end = reach(
            tile, band, num_rows, num_columns, 256, PLACES * UNITS, ROW_EXTENT, COLUMN_EXTENT
        )
        rows = tile * 256 + CONSUMER * 128 + gl.arange(0, 64, row_layout)
        kept_ptr = memory_ptr + half * 2 * stride
        targets = kept_ptr + places, kept_ptr + 64 * UNITS + places
        lowest = gl.full([64, UNITS], float("-inf"), gl.float32, layout)
        nothing = gl.zeros([64, UNITS], gl.float32, layout)
        state = (lowest, nothing), (lowest, nothing)
        mbarrier.wait(row_full.index(0), turn & 1)
        first, second = flat(row_smem.index(CONSUMER * 2)), flat(row_smem.index(CONSUMER * 2 + 1))
        features = (first, second)
        mbarrier.wait(finished.index(half), ((turn >> 1) & 1) ^ 1)
        for step in range(begin, inner_begin):
            state, cursor = take(
                features, column_ring, state, targets, rows, step, cursor, band, num_columns,
                qk_scale, PLACES, UNITS, ROW_EXTENT, COLUMN_EXTENT, STAGES, NEGATE, True,
            )  # fmt: skip
        for step in range(inner_begin, inner_end):
            state, cursor = take(
                features, column_ring, state, targets, rows, step, cursor, band, num_columns,
                qk_scale, PLACES, UNITS, ROW_EXTENT, COLUMN_EXTENT, STAGES, NEGATE, False,
            )  # fmt: skip
        for step in range(inner_end, end):
            state, cursor = take(
                features, column_ring, state, targets, rows, step, cursor, band, num_columns,
                qk_scale, PLACES, UNITS, ROW_EXTENT, COLUMN_EXTENT, STAGES, NEGATE, True,
            )  # fmt: skip
        mbarrier.arrive(row_empty.index(0), count=1)
        part = half * 4 + CONSUMER * 2
        normalizer_smem.index(part).store(normalizer(state[0], rows, num_rows))
        normalizer_smem.index(part + 1).store(normalizer(state[1], rows + 64, num_rows))
        # What all threads of the group wrote is read by others.
        meet_warps()
        mbarrier.arrive(scored.index(half), count=1)
        turn += 1
        item, _, _, tile = item_of(turn, work)
