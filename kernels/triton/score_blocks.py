"""Block scores, the kernel: products of features, their largest per unit, a softmax over units.

    largest[r, u] = max over the visible columns c of unit u ( row[r] . column[c] )
    score[m, u]   = max over the rows r of unit m ( softmax over u of (scale * largest[r, u]) )

A program takes tiles of rows. One sweep over the columns makes ``largest`` and the running maximum
and sum of each row; a second one turns it into scores, from a stretch of memory of the program's
own where ``KEEP`` is set, and from products made again otherwise. There is one exponential per
unit, not per pair: exponentials would bound this kernel.

Layout: programs take several tiles of rows each, the heaviest first and the direction changing
with every turn, so that all have the same work under a triangular band. Columns are taken unit by
unit (place ``p`` of every unit, then ``p + 1``), so that a thread reduces a unit without exchange.
Heads that share a selection meet in the result by an atomic maximum of the bits of numbers that
are never negative: the order in which they arrive does not matter.

Numerics: products and sums in float32; maxima are subtracted before scaling, so that a weight near
1 is as exact as in an ordinary softmax. A pair that is NaN makes its rows NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from seer_compile.kernels.triton.primitives import (
    is_interpreted,
    load_tile,
    shifted_band,
    tile_pointers,
)
from seer_compile.kernels.triton.row_statistics import tile_ranges, visible_pairs

_IS_INTERPRETED = tl.constexpr(is_interpreted())


@triton.jit
def _larger(left, right):
    return tl.maximum(left, right, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _largest(values, AXIS: tl.constexpr):
    """Return the maximum along an axis, NaN where there is any."""
    if _IS_INTERPRETED:
        # The interpreter calls a function of ours for every element. A sum keeps NaN as well.
        total = tl.sum(values, AXIS)
        return tl.where(total != total, total, tl.max(values, AXIS))
    else:  # noqa: RET505  (a jitted function sees both branches unless they are these)
        return tl.reduce(values, AXIS, _larger)


@triton.jit
def _largest_of_units(
    row,
    column_tile,
    step,
    rows,
    sizes,
    band,
    usable_ptr,
    row_low_ptr,
    row_high_ptr,
    column_low_ptr,
    column_high_ptr,
    column_stride,
    ROW_EXTENT: tl.constexpr,
    COLUMN_EXTENT: tl.constexpr,
    COLUMN_UNIT: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNITS: tl.constexpr,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    IS_EDGE: tl.constexpr,
):
    """Return ``Float32[rows UNITS]``; -inf where a row sees no column of a unit."""
    TILE_C: tl.constexpr = COLUMNS * UNITS
    places, dims = tl.arange(0, TILE_C), tl.arange(0, PADDED_DIM)
    is_column = places // UNITS < COLUMN_UNIT
    start = tl.cast(step * (COLUMN_UNIT * UNITS), tl.int64) * column_stride
    if IS_EDGE:
        num_columns, q_len, k_len = sizes
        upper, lower = band
        columns = step * (COLUMN_UNIT * UNITS) + places % UNITS * COLUMN_UNIT + places // UNITS
        is_column = is_column & (columns < num_columns)
        column = load_tile(column_tile + start, is_column, dims, DIM, PADDED_DIM)
        logits = tl.dot(row, tl.trans(column), input_precision=PRECISION)
        visible = visible_pairs(
            rows, columns, is_column, q_len, k_len, upper, lower, usable_ptr, row_low_ptr,
            row_high_ptr, column_low_ptr, column_high_ptr, ROW_EXTENT, COLUMN_EXTENT,
        )  # fmt: skip
        logits = tl.where(visible, logits, float("-inf"))
    else:
        column = load_tile(column_tile + start, is_column, dims, DIM, PADDED_DIM)
        logits = tl.dot(row, tl.trans(column), input_precision=PRECISION)
        if COLUMNS > COLUMN_UNIT:
            logits = tl.where(is_column[None, :], logits, float("-inf"))
    return _largest(tl.reshape(logits, [rows.shape[0], COLUMNS, UNITS]), 1)


@triton.jit
def _add_units(largest, running_max, running_sum, qk_scale):
    """Add units to the running maximum (unscaled) and sum of each row and place."""
    new_max = _larger(running_max, largest)
    base = tl.where(new_max == float("-inf"), 0.0, new_max)
    running_sum = running_sum * tl.math.exp2((running_max - base) * qk_scale)
    return new_max, running_sum + tl.math.exp2((largest - base) * qk_scale)


@triton.jit
def _write(result, target, mask, IS_SHARED: tl.constexpr):
    if IS_SHARED:
        target = target.to(tl.pointer_type(tl.int32), bitcast=True)
        tl.atomic_max(target, result.to(tl.int32, bitcast=True), mask=mask, sem="relaxed")
    else:
        tl.store(target, result, mask=mask)


@triton.jit
def _write_from_memory(
    largest_ptr,
    final_ptr,
    map_ptr,
    is_row_unit,
    num_column_units,
    stride,
    first,
    last,
    begin,
    end,
    qk_scale,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    IS_SHARED: tl.constexpr,
):
    """Write the scores of the units in ``[first, last)``; 0 outside of ``[begin, end)``.

    ``final_ptr`` holds the maximum of each row, then one over its sum.
    """
    ROW_UNITS: tl.constexpr = is_row_unit.shape[0]
    TOGETHER: tl.constexpr = min(ROWS, 4)
    row_units = tl.arange(0, ROW_UNITS)
    for start in range(first, last, WIDTH):
        units = start + tl.arange(0, WIDTH)
        is_seen = (units >= begin) & (units < end)
        result = tl.zeros([ROW_UNITS, WIDTH], tl.float32)
        # Loads of a few rows under way at a time; written out for all of them, the compiler would
        # take seconds to compare every load with every other.
        for some in range(0, ROWS, TOGETHER):
            for member in tl.static_range(TOGETHER):
                rows = row_units * ROWS + some + member
                pointers = largest_ptr + rows[:, None] * stride + units[None, :]
                largest = tl.load(pointers, mask=is_seen[None, :], other=float("-inf"))
                maximum = tl.load(final_ptr + rows)
                factor = tl.load(final_ptr + ROW_UNITS * ROWS + rows)
                weight = tl.math.exp2((largest - maximum[:, None]) * qk_scale) * factor[:, None]
                result = _larger(result, weight)
        target = map_ptr + row_units.to(tl.int64)[:, None] * num_column_units + units[None, :]
        _write(result, target, is_row_unit[:, None] & (units < last)[None, :], IS_SHARED)


@triton.jit(
    do_not_specialize=[
        "num_rows", "num_columns", "num_row_units", "num_column_units", "q_len", "k_len", "upper",
        "lower", "tiles", "heads", "batches",
    ]
)  # fmt: skip
def score_blocks(
    row_ptr,
    column_ptr,
    memory_ptr,
    map_ptr,
    row_strides,
    column_strides,
    offset_ptr,
    usable_ptr,
    row_low_ptr,
    row_high_ptr,
    column_low_ptr,
    column_high_ptr,
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
    POOLED: tl.constexpr,
    ROW_EXTENT: tl.constexpr,
    COLUMN_EXTENT: tl.constexpr,
    ROW_UNIT: tl.constexpr,
    COLUMN_UNIT: tl.constexpr,
    ROW_UNITS: tl.constexpr,
    UNITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    NEGATE: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Write block scores, their maximum over ``POOLED`` consecutive heads; 0 where unseen.

    ``ROWS`` and ``COLUMNS`` are the units' rows and columns, filled up to powers of 2.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    TILE_R: tl.constexpr = ROW_UNITS * ROWS
    STEP: tl.constexpr = UNITS * COLUMN_UNIT
    num_steps = (num_column_units + UNITS - 1) // UNITS
    stride = num_steps * UNITS if KEEP else 0
    # Of each program: two numbers per row, and the largest products.
    final_ptr = memory_ptr + program.to(tl.int64) * (stride + 2) * TILE_R
    largest_ptr = final_ptr + 2 * TILE_R
    upper, lower = shifted_band(upper, lower, offset_ptr)
    places, units, dims = (
        tl.arange(0, TILE_R), tl.arange(0, UNITS), tl.arange(0, PADDED_DIM)
    )  # fmt: skip
    column_places = tl.arange(0, COLUMNS * UNITS)
    column_places = column_places % UNITS * COLUMN_UNIT + column_places // UNITS
    items = tiles * heads * batches
    turns, rest = items // programs, items % programs
    turns += (tl.where(turns % 2 == 0, program, programs - 1 - program) < rest).to(tl.int32)
    for turn in range(0, turns):
        item = turn * programs + tl.where(turn % 2 == 0, program, programs - 1 - program)
        tile = tiles - 1 - item // (heads * batches)
        head = (item % heads).to(tl.int64)
        batch = (item // heads % batches).to(tl.int64)
        rows = (tile * ROW_UNITS + places // ROWS) * ROW_UNIT + places % ROWS
        is_row = (places % ROWS < ROW_UNIT) & (rows < num_rows)
        row_base = row_ptr + batch * row_strides[0] + head * row_strides[1]
        row = load_tile(
            tile_pointers(row_base, rows, row_strides[2], dims, row_strides[3]),
            is_row, dims, DIM, PADDED_DIM,
        )  # fmt: skip
        if NEGATE:
            row = -row
        column_base = column_ptr + batch * column_strides[0] + head * column_strides[1]
        column_tile = tile_pointers(
            column_base, column_places, column_strides[2], dims, column_strides[3]
        )
        first_row = tile * ROW_UNITS * ROW_UNIT
        last_row = tl.minimum(first_row + ROW_UNITS * ROW_UNIT, num_rows) - 1
        begin, inner_begin, inner_end, end = tile_ranges(
            first_row,
            last_row,
            num_columns,
            q_len,
            k_len,
            upper,
            lower,
            ROW_EXTENT,
            COLUMN_EXTENT,
            STEP,
        )
        usable, row_low, row_high = usable_ptr, row_low_ptr, row_high_ptr
        column_low, column_high = column_low_ptr, column_high_ptr
        if usable_ptr is not None:
            usable += batch * num_columns
        if row_low_ptr is not None:
            row_low += batch * num_rows
            row_high += batch * num_rows
            column_low += batch * num_columns
            column_high += batch * num_columns
        if (usable_ptr is not None) or (row_low_ptr is not None):
            inner_begin = begin
            inner_end = begin
        num_before = inner_begin - begin
        sizes, band = (num_columns, q_len, k_len), (upper, lower)
        running_max = tl.full([TILE_R, UNITS], float("-inf"), tl.float32)
        running_sum = tl.zeros([TILE_R, UNITS], tl.float32)
        kept = largest_ptr + places[:, None] * stride + units[None, :]
        for step in range(inner_begin, inner_end):
            largest = _largest_of_units(
                row, column_tile, step, rows, sizes, band, usable, row_low, row_high, column_low,
                column_high, column_strides[2], ROW_EXTENT, COLUMN_EXTENT, COLUMN_UNIT, COLUMNS,
                UNITS, DIM, PADDED_DIM, PRECISION, IS_EDGE=False,
            )  # fmt: skip
            running_max, running_sum = _add_units(largest, running_max, running_sum, qk_scale)
            if KEEP:
                tl.store(kept + step * UNITS, largest)
        for edge in range(0, num_before + end - inner_end):
            step = tl.where(edge < num_before, begin + edge, inner_end + edge - num_before)
            largest = _largest_of_units(
                row, column_tile, step, rows, sizes, band, usable, row_low, row_high, column_low,
                column_high, column_strides[2], ROW_EXTENT, COLUMN_EXTENT, COLUMN_UNIT, COLUMNS,
                UNITS, DIM, PADDED_DIM, PRECISION, IS_EDGE=True,
            )  # fmt: skip
            running_max, running_sum = _add_units(largest, running_max, running_sum, qk_scale)
            if KEEP:
                tl.store(kept + step * UNITS, largest)
        maximum = _largest(running_max, 1)
        is_seeing = is_row & (maximum != float("-inf"))
        maximum = tl.where(is_seeing, maximum, float("inf"))
        scaled = tl.math.exp2((running_max - maximum[:, None]) * qk_scale) * running_sum
        factor = tl.where(is_seeing, 1.0 / tl.where(is_seeing, tl.sum(scaled, 1), 1.0), 0.0)
        map_head = batch * (heads // POOLED) + head // POOLED
        target = map_ptr + (map_head * num_row_units + tile * ROW_UNITS) * num_column_units
        row_units = tl.arange(0, ROW_UNITS)
        is_row_unit = tile * ROW_UNITS + row_units < num_row_units
        first_unit, last_unit = 0, num_column_units
        if POOLED > 1:
            first_unit, last_unit = begin * UNITS, tl.minimum(end * UNITS, num_column_units)
        if KEEP:
            tl.store(final_ptr + places, maximum)
            tl.store(final_ptr + TILE_R + places, factor)
            # What all threads wrote is read by others.
            tl.debug_barrier()
            _write_from_memory(
                largest_ptr, final_ptr, target, is_row_unit, num_column_units, stride, first_unit,
                last_unit, begin * UNITS, end * UNITS, qk_scale, ROWS, WIDTH, POOLED > 1,
            )  # fmt: skip
            tl.debug_barrier()
        else:
            for step in range(first_unit // UNITS, (last_unit + UNITS - 1) // UNITS):
                result = tl.zeros([ROW_UNITS, UNITS], tl.float32)
                if (step >= begin) & (step < end):
                    largest = _largest_of_units(
                        row, column_tile, step, rows, sizes, band, usable, row_low, row_high,
                        column_low, column_high, column_strides[2], ROW_EXTENT, COLUMN_EXTENT,
                        COLUMN_UNIT, COLUMNS, UNITS, DIM, PADDED_DIM, PRECISION, IS_EDGE=True,
                    )  # fmt: skip
                    weight = tl.math.exp2((largest - maximum[:, None]) * qk_scale)
                    weight = tl.reshape(weight * factor[:, None], [ROW_UNITS, ROWS, UNITS])
                    result = _largest(weight, 1)
                columns = step * UNITS + units
                pointers = target + row_units.to(tl.int64)[:, None] * num_column_units
                mask = is_row_unit[:, None] & (columns < num_column_units)[None, :]
                _write(result, pointers + columns[None, :], mask, POOLED > 1)
