"""Block scores in one pass over the columns, for 16-bit features.

The two passes of :mod:`row_statistics` and :mod:`pooled_map` make every product and exponential
twice, and exponentials are what bounds them. Here a program keeps, for its rows, the sum of each
column unit relative to the maximum that the row had when it met that unit, in a stretch of memory
of its own; at the end it reads the sums again, brings them to the last maximum, divides by the
total, and reduces over the rows of a unit.

Layout: programs take several tiles of rows each, the heaviest first and the direction changing
with every turn, so that all have the same work under a triangular band. Columns are taken unit by
unit (place ``p`` of every unit, then ``p + 1``), so that a thread sums a unit without exchange.
Heads that share a selection meet in the result by an atomic maximum of the bits of numbers that
are never negative: the order in which they arrive does not matter.

Numerics: those of the two passes, with one more factor ``2 ** (reference then - reference last)``;
references are maxima already scaled, so that their difference is all but exact.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from seer_compile.kernels.triton.primitives import (
    Band,
    ceil_div,
    load_tile,
    padded_dim,
    shifted_band,
    tile_pointers,
)
from seer_compile.kernels.triton.row_statistics import tile_ranges, visible_pairs
from seer_compile.kernels.triton.tuning import OnePassTiling


@triton.jit
def _add_columns(
    logits,
    running,
    unit_sums,
    qk_scale,
    sums_ptr,
    reference_ptr,
    step,
    rows,
    units,
    num_steps,
    COLUMNS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Add a tile of products to the rows; write its unit sums and what they are relative to."""
    ROWS: tl.constexpr = rows.shape[0]
    reference = tl.maximum(running, tl.max(logits, 1) * qk_scale)
    base = tl.where(reference == float("-inf"), 0.0, reference)
    weight = tl.math.exp2(logits * qk_scale - base[:, None])
    sums = tl.sum(tl.reshape(weight, [ROWS, COLUMNS, UNITS]), 1)
    unit_sums = unit_sums * tl.math.exp2(running - base)[:, None] + sums
    place = rows * (num_steps * UNITS) + step * UNITS
    tl.store(sums_ptr + place[:, None] + units[None, :], sums)
    tl.store(reference_ptr + step * ROWS + rows, reference)
    return reference, unit_sums


@triton.jit
def _reduce_rows(
    sums_ptr,
    reference_ptr,
    final_ptr,
    map_ptr,
    first_unit,
    num_row_units,
    num_column_units,
    num_steps,
    begin,
    end,
    ROW_UNITS: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    STEPS: tl.constexpr,
    IS_SHARED: tl.constexpr,
):
    """Write the largest weight over the rows of each unit.

    ``final_ptr`` holds the last reference of each row, then one over its total.
    """
    TILE_R: tl.constexpr = ROW_UNITS * ROWS
    row_units = tl.arange(0, ROW_UNITS)
    chunk = tl.arange(0, STEPS)
    units = tl.arange(0, UNITS)
    first_step, last_step = 0, num_steps
    if IS_SHARED:
        first_step, last_step = begin, end
    for start in range(first_step, last_step, STEPS):
        steps = start + chunk
        is_seen = (steps >= begin) & (steps < end)
        columns = steps[:, None] * UNITS + units[None, :]
        result = tl.zeros([ROW_UNITS, STEPS, UNITS], tl.float32)
        for member in tl.static_range(ROWS):
            rows = row_units * ROWS + member
            pointers = sums_ptr + (rows * (num_steps * UNITS))[:, None, None] + columns[None]
            sums = tl.load(pointers, mask=is_seen[None, :, None], other=0.0)
            references = reference_ptr + steps[None, :] * TILE_R + rows[:, None]
            reference = tl.load(references, mask=is_seen[None, :], other=float("-inf"))
            last, factor = tl.load(final_ptr + rows), tl.load(final_ptr + TILE_R + rows)
            factor = tl.math.exp2(reference - last[:, None]) * factor[:, None]
            result = tl.maximum(result, sums * factor[:, :, None])
        is_unit = (steps < num_steps)[:, None] & (columns < num_column_units)
        is_row = first_unit + row_units < num_row_units
        mask = is_row[:, None, None] & is_unit[None]
        target = map_ptr + row_units.to(tl.int64)[:, None, None] * num_column_units + columns[None]
        if IS_SHARED:
            target = target.to(tl.pointer_type(tl.int32), bitcast=True)
            tl.atomic_max(target, result.to(tl.int32, bitcast=True), mask=mask, sem="relaxed")
        else:
            tl.store(target, result, mask=mask)


@triton.jit(
    do_not_specialize=[
        "num_rows", "num_columns", "num_row_units", "num_column_units", "num_steps", "q_len",
        "k_len", "upper", "lower", "tiles", "heads", "batches",
    ]
)  # fmt: skip
def one_pass_scores(
    row_ptr,
    column_ptr,
    sums_ptr,
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
    num_steps,
    q_len,
    k_len,
    upper,
    lower,
    qk_scale,
    tiles,
    heads,
    batches,
    POOLED: tl.constexpr,
    EXTENT: tl.constexpr,
    ROW_UNIT: tl.constexpr,
    COLUMN_UNIT: tl.constexpr,
    ROW_UNITS: tl.constexpr,
    COLUMN_UNITS: tl.constexpr,
    PADDED_ROW_UNIT: tl.constexpr,
    PADDED_COLUMN_UNIT: tl.constexpr,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    STEPS: tl.constexpr,
    NEGATE: tl.constexpr,
):
    """Write block scores, their maximum over ``POOLED`` consecutive heads; 0 where unseen."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    TILE_R: tl.constexpr = ROW_UNITS * PADDED_ROW_UNIT
    TILE_C: tl.constexpr = COLUMN_UNITS * PADDED_COLUMN_UNIT
    STEP: tl.constexpr = COLUMN_UNITS * COLUMN_UNIT
    # Of each program: the sums, a reference per row and step, two numbers per row.
    sums_ptr += program.to(tl.int64) * (num_steps * (COLUMN_UNITS + 1) + 2) * TILE_R
    reference_ptr = sums_ptr + num_steps * COLUMN_UNITS * TILE_R
    final_ptr = reference_ptr + num_steps * TILE_R
    upper, lower = shifted_band(upper, lower, offset_ptr)
    row_places, places = tl.arange(0, TILE_R), tl.arange(0, TILE_C)
    columns_of_tile = places % COLUMN_UNITS * COLUMN_UNIT + places // COLUMN_UNITS
    is_place = places // COLUMN_UNITS < COLUMN_UNIT
    units, dims = tl.arange(0, COLUMN_UNITS), tl.arange(0, PADDED_DIM)
    items = tiles * heads * batches
    turns, rest = items // programs, items % programs
    turns += (tl.where(turns % 2 == 0, program, programs - 1 - program) < rest).to(tl.int32)
    for turn in range(0, turns):
        item = turn * programs + tl.where(turn % 2 == 0, program, programs - 1 - program)
        tile = tiles - 1 - item // (heads * batches)
        head = (item % heads).to(tl.int64)
        batch = (item // heads % batches).to(tl.int64)
        rows = (tile * ROW_UNITS + row_places // PADDED_ROW_UNIT) * ROW_UNIT
        rows += row_places % PADDED_ROW_UNIT
        is_row = (row_places % PADDED_ROW_UNIT < ROW_UNIT) & (rows < num_rows)
        row_base = row_ptr + batch * row_strides[0] + head * row_strides[1]
        row = load_tile(
            tile_pointers(row_base, rows, row_strides[2], dims, row_strides[3]),
            is_row, dims, DIM, PADDED_DIM,
        )  # fmt: skip
        if NEGATE:
            row = -row
        column_base = column_ptr + batch * column_strides[0] + head * column_strides[1]
        column_tile = tile_pointers(
            column_base, columns_of_tile, column_strides[2], dims, column_strides[3]
        )
        first_row = tile * ROW_UNITS * ROW_UNIT
        last_row = tl.minimum(first_row + ROW_UNITS * ROW_UNIT, num_rows) - 1
        begin, inner_begin, inner_end, end = tile_ranges(
            first_row, last_row, num_columns, q_len, k_len, upper, lower, EXTENT, STEP
        )
        if (usable_ptr is not None) or (row_low_ptr is not None):
            inner_begin = begin
            inner_end = begin
        running = tl.full([TILE_R], float("-inf"), tl.float32)
        unit_sums = tl.zeros([TILE_R, COLUMN_UNITS], tl.float32)
        for step in range(inner_begin, inner_end):
            start = tl.cast(step * STEP, tl.int64) * column_strides[2]
            column = load_tile(column_tile + start, is_place, dims, DIM, PADDED_DIM)
            logits = tl.dot(row, tl.trans(column))
            if PADDED_COLUMN_UNIT > COLUMN_UNIT:
                logits = tl.where(is_place[None, :], logits, float("-inf"))
            running, unit_sums = _add_columns(
                logits, running, unit_sums, qk_scale, sums_ptr, reference_ptr, step, row_places,
                units, num_steps, PADDED_COLUMN_UNIT, COLUMN_UNITS,
            )  # fmt: skip
        num_before = inner_begin - begin
        for edge in range(0, num_before + end - inner_end):
            step = tl.where(edge < num_before, begin + edge, inner_end + edge - num_before)
            start = tl.cast(step * STEP, tl.int64) * column_strides[2]
            columns = step * STEP + columns_of_tile
            is_column = is_place & (columns < num_columns)
            column = load_tile(column_tile + start, is_column, dims, DIM, PADDED_DIM)
            usable, row_low, row_high = usable_ptr, row_low_ptr, row_high_ptr
            column_low, column_high = column_low_ptr, column_high_ptr
            if usable_ptr is not None:
                usable += batch * num_columns
            if row_low_ptr is not None:
                row_low += batch * num_rows
                row_high += batch * num_rows
                column_low += batch * num_columns
                column_high += batch * num_columns
            visible = visible_pairs(
                rows, columns, is_column, q_len, k_len, upper, lower, usable, row_low, row_high,
                column_low, column_high, EXTENT,
            )  # fmt: skip
            logits = tl.where(visible, tl.dot(row, tl.trans(column)), float("-inf"))
            running, unit_sums = _add_columns(
                logits, running, unit_sums, qk_scale, sums_ptr, reference_ptr, step, row_places,
                units, num_steps, PADDED_COLUMN_UNIT, COLUMN_UNITS,
            )  # fmt: skip
        is_seeing = is_row & (running != float("-inf"))
        factor = tl.where(is_seeing, 1.0 / tl.where(is_seeing, tl.sum(unit_sums, 1), 1.0), 0.0)
        tl.store(final_ptr + row_places, tl.where(is_seeing, running, float("inf")))
        tl.store(final_ptr + TILE_R + row_places, factor)
        # What all threads wrote is read by others.
        tl.debug_barrier()
        map_head = batch * (heads // POOLED) + head // POOLED
        target = map_ptr + (map_head * num_row_units + tile * ROW_UNITS) * num_column_units
        _reduce_rows(
            sums_ptr, reference_ptr, final_ptr, target, tile * ROW_UNITS, num_row_units,
            num_column_units, num_steps, begin, end, ROW_UNITS, PADDED_ROW_UNIT, COLUMN_UNITS,
            STEPS, IS_SHARED=POOLED > 1,
        )  # fmt: skip
        tl.debug_barrier()


def launch_one_pass(
    rows: Tensor,
    columns: Tensor,
    qk_scale: float,
    is_negative: bool,
    extent: int,
    units: tuple[int, int],
    lengths: tuple[int, int],
    band: Band,
    rules: tuple[Tensor | None, ...],
    result: Tensor,
    tiling: OnePassTiling,
) -> None:
    """Write block scores into ``result``.

    Args:
        rows: ``Float[b h r e]``, 16 bits.
        columns: ``Float[b h c e]``.
        qk_scale: Positive factor on the logits, for powers of 2.
        is_negative: Whether the factor is to be negative.
        extent: Tokens that a row or column stands for.
        units: Rows and columns per unit.
        lengths: Query and key tokens.
        band: The band.
        rules: Padding and documents: the fields of ``ColumnRules``.
        result: ``Float32[b s m n]``, contiguous.
        tiling: Sizes and number of programs.
    """
    batch, heads, num_rows, dim = rows.shape
    padded_units = [triton.next_power_of_2(unit) for unit in units]
    row_units = max(1, tiling.rows // padded_units[0])
    column_units = max(1, tiling.columns // padded_units[1])
    tiles, num_steps = ceil_div(result.shape[2], row_units), ceil_div(result.shape[3], column_units)
    pooled = heads // result.shape[1]
    programs = min(tiling.programs, tiles * heads * batch)
    tile_rows = row_units * padded_units[0]
    own = tile_rows * (num_steps * (column_units + 1) + 2)
    sums = torch.empty(programs * own, dtype=torch.float32, device=rows.device)
    if pooled > 1:
        result.zero_()
    one_pass_scores[(programs,)](
        rows, columns, sums, result, rows.stride(), columns.stride(),
        band.offset, *rules, num_rows, columns.shape[2], *result.shape[2:], num_steps, *lengths,
        band.upper, band.lower, qk_scale, tiles, heads, batch,
        POOLED=pooled, EXTENT=extent, ROW_UNIT=units[0], COLUMN_UNIT=units[1],
        ROW_UNITS=row_units, COLUMN_UNITS=column_units, PADDED_ROW_UNIT=padded_units[0],
        PADDED_COLUMN_UNIT=padded_units[1], DIM=dim, PADDED_DIM=padded_dim(dim),
        STEPS=max(1, 64 // column_units), NEGATE=is_negative, num_warps=tiling.warps,
        num_stages=tiling.stages, maxnreg=tiling.registers,
    )  # fmt: skip
