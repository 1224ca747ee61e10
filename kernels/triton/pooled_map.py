"""Second pass of a pooled softmax map: weights, reduced to units in registers, written once.

See :mod:`row_statistics` for the formula and what rows and columns are.

Layout: tiles of rows against tiles of columns. The columns of a tile are taken unit by unit (place
``p`` of every unit, then ``p + 1``), which puts the columns of one unit into the same thread of a
tensor-core result, so that the reduction over them needs no exchange between threads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from seer_compile.kernels.triton.primitives import load_tile, shifted_band, tile_pointers
from seer_compile.kernels.triton.row_statistics import (
    logits_of,
    tile_ranges,
    visible_pairs,
    weights_of,
)


@triton.jit
def _load_rows(
    row_base,
    maximum_ptr,
    sum_ptr,
    row_strides,
    first_head,
    head,
    rows,
    is_row,
    num_rows,
    dims,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    NEGATE: tl.constexpr,
):
    """Return the rows of one head, their maxima, and one over their sums.

    For a row that sees nothing the maximum is +inf, which makes its weights 0, and the rest is 0.
    """
    pointers = tile_pointers(
        row_base + head * row_strides[1], rows, row_strides[2], dims, row_strides[3]
    )
    row = load_tile(pointers, is_row, dims, DIM, PADDED_DIM)
    statistics = (first_head + head) * num_rows + rows
    maximum = tl.load(maximum_ptr + statistics, mask=is_row, other=float("-inf"))
    is_seeing = maximum != float("-inf")
    total = tl.load(sum_ptr + statistics, mask=is_row, other=1.0)
    inverse = tl.where(is_seeing, 1.0 / tl.where(is_seeing, total, 1.0), 0.0)
    return -row if NEGATE else row, tl.where(is_seeing, maximum, float("inf")), inverse


@triton.jit
def _reduce_tile(
    weight,
    inverse,
    ROW_UNITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMN_UNITS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SUM_COLUMNS: tl.constexpr,
    MEAN_ROWS: tl.constexpr,
):
    """Reduce ``[rows, columns]`` weights, not yet divided, to ``[row units, column units]``."""
    weight = tl.reshape(weight, [ROW_UNITS * ROWS, COLUMNS, COLUMN_UNITS])
    weight = tl.sum(weight, 1) if SUM_COLUMNS else tl.max(weight, 1)
    weight = tl.reshape(weight * inverse[:, None], [ROW_UNITS, ROWS, COLUMN_UNITS])
    if MEAN_ROWS:
        is_seeing = tl.reshape((inverse > 0.0).to(tl.float32), [ROW_UNITS, ROWS])
        weight = tl.sum(weight, 1) / tl.maximum(tl.sum(is_seeing, 1), 1.0)[:, None]
    else:
        weight = tl.max(weight, 1)
    return weight


@triton.jit(
    do_not_specialize=[
        "num_rows",
        "num_columns",
        "num_row_units",
        "num_column_units",
        "q_len",
        "k_len",
        "upper",
        "lower",
        "tiles",
        "heads",
    ]
)
def pooled_map(
    row_ptr,
    column_ptr,
    maximum_ptr,
    sum_ptr,
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
    inner_scale,
    tiles,
    heads,
    PER_KEY_HEAD: tl.constexpr,
    ROW_UNIT: tl.constexpr,
    COLUMN_UNIT: tl.constexpr,
    ROW_UNITS: tl.constexpr,
    COLUMN_UNITS: tl.constexpr,
    PADDED_ROW_UNIT: tl.constexpr,
    PADDED_COLUMN_UNIT: tl.constexpr,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    SUM_COLUMNS: tl.constexpr,
    MEAN_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
    NEGATE: tl.constexpr,
    IS_CAPPED: tl.constexpr,
):
    """Write the pooled map; 0 where unseen."""
    program = tl.program_id(0)
    tile = tiles - 1 - program % tiles
    head = (program // tiles % heads).to(tl.int64)
    batch = (program // tiles // heads).to(tl.int64)
    upper, lower = shifted_band(upper, lower, offset_ptr)
    TILE_R: tl.constexpr = ROW_UNITS * PADDED_ROW_UNIT
    TILE_C: tl.constexpr = COLUMN_UNITS * PADDED_COLUMN_UNIT
    row_places = tl.arange(0, TILE_R)
    row_units = tile * ROW_UNITS + tl.arange(0, ROW_UNITS)
    rows = (tile * ROW_UNITS + row_places // PADDED_ROW_UNIT) * ROW_UNIT
    rows += row_places % PADDED_ROW_UNIT
    is_row = (row_places % PADDED_ROW_UNIT < ROW_UNIT) & (rows < num_rows)
    places = tl.arange(0, TILE_C)
    # Place p of every unit of the tile, then place p + 1.
    columns_of_tile = places % COLUMN_UNITS * COLUMN_UNIT + places // COLUMN_UNITS
    is_place = places // COLUMN_UNITS < COLUMN_UNIT
    units_of_tile = tl.arange(0, COLUMN_UNITS)
    dims = tl.arange(0, PADDED_DIM)
    STEP: tl.constexpr = COLUMN_UNITS * COLUMN_UNIT
    if usable_ptr is not None:
        usable_ptr += batch * num_columns
    if row_low_ptr is not None:
        row_low_ptr += batch * num_rows
        row_high_ptr += batch * num_rows
        column_low_ptr += batch * num_columns
        column_high_ptr += batch * num_columns
    first_row = tile * ROW_UNITS * ROW_UNIT
    last_row = tl.minimum(first_row + ROW_UNITS * ROW_UNIT, num_rows) - 1
    begin, inner_begin, inner_end, end = tile_ranges(
        first_row, last_row, num_columns, q_len, k_len, upper, lower, 1, 1, STEP
    )
    if (usable_ptr is not None) or (row_low_ptr is not None):
        inner_begin = begin
        inner_end = begin
    map_rows = ((batch * heads + head) * num_row_units + row_units) * num_column_units
    target = map_ptr + map_rows[:, None] + units_of_tile[None, :]
    is_row_unit = row_units < num_row_units
    unseen = tl.zeros([ROW_UNITS, COLUMN_UNITS], tl.float32)
    num_steps = (num_column_units + COLUMN_UNITS - 1) // COLUMN_UNITS
    for step in range(0, begin):
        is_unit = step * COLUMN_UNITS + units_of_tile < num_column_units
        inside = is_row_unit[:, None] & is_unit[None, :]
        tl.store(target + step * COLUMN_UNITS, unseen, mask=inside)
    for step in range(end, num_steps):
        is_unit = step * COLUMN_UNITS + units_of_tile < num_column_units
        inside = is_row_unit[:, None] & is_unit[None, :]
        tl.store(target + step * COLUMN_UNITS, unseen, mask=inside)

    row, maximum, inverse = _load_rows(
        row_ptr + batch * row_strides[0], maximum_ptr, sum_ptr, row_strides, batch * heads, head,
        rows, is_row, num_rows, dims, DIM, PADDED_DIM, NEGATE,
    )  # fmt: skip
    column_base = column_ptr + batch * column_strides[0] + head // PER_KEY_HEAD * column_strides[1]
    for step in range(begin, end):
        columns = step * STEP + columns_of_tile
        is_column = is_place & (columns < num_columns)
        is_edge = (step < inner_begin) | (step >= inner_end)
        column = load_tile(
            tile_pointers(column_base, columns, column_strides[2], dims, column_strides[3]),
            is_column, dims, DIM, PADDED_DIM,
        )  # fmt: skip
        logits = logits_of(row, column, inner_scale, PRECISION, IS_CAPPED)
        weight = weights_of(logits, maximum, qk_scale, PRECISION)
        if is_edge:
            visible = visible_pairs(
                rows, columns, is_column, q_len, k_len, upper, lower, usable_ptr, row_low_ptr,
                row_high_ptr, column_low_ptr, column_high_ptr, 1, 1,
            )  # fmt: skip
            weight = tl.where(visible, weight, 0.0)
        if PADDED_COLUMN_UNIT > COLUMN_UNIT:
            weight = tl.where(is_place[None, :], weight, 0.0)
        result = _reduce_tile(
            weight, inverse, ROW_UNITS, PADDED_ROW_UNIT, COLUMN_UNITS, PADDED_COLUMN_UNIT,
            SUM_COLUMNS, MEAN_ROWS,
        )  # fmt: skip
        is_unit = step * COLUMN_UNITS + units_of_tile < num_column_units
        inside = is_row_unit[:, None] & is_unit[None, :]
        tl.store(target + step * COLUMN_UNITS, result, mask=inside)
