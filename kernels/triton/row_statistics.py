"""First pass of a pooled softmax map, behind attention mass: the statistics of its rows.

    weight[i, j] = softmax over the visible j of (scale * row[i] . column[j])
    map[m, n]    = reduce over rows i of unit m ( reduce over columns j of unit n ( weight[i, j] ))

Rows and columns are tokens. What is visible is decided for :mod:`score_blocks` too, whose rows and
columns stand for ``ROW_EXTENT`` and ``COLUMN_EXTENT`` tokens: a pair is visible when the band lets
any of its token pairs through, the column is flagged usable, and the ranges of document ids of the
two overlap.

This pass writes maximum and sum of each row. The second, :mod:`pooled_map`, makes the logits again,
turns them into weights and reduces each tile in registers: nothing of size rows x columns, nor
rows x units, exists.

Numerics: products accumulate in float32, softmax and reductions in float32. Maximum and sum stay
apart: a merged log-sum-exp would cost its own rounding. For float32 inputs the maximum is also
subtracted before scaling, so that a weight near 1 is as exact as in an ordinary softmax.
"""

from __future__ import annotations

import triton
import triton.language as tl

from seer_compile.kernels.triton.primitives import (
    load_tile,
    load_whole_tile,
    shifted_band,
    tanh,
    tile_pointers,
)


@triton.jit
def visible_pairs(
    rows,
    columns,
    is_column,
    q_len,
    k_len,
    upper,
    lower,
    usable_ptr,
    row_low_ptr,
    row_high_ptr,
    column_low_ptr,
    column_high_ptr,
    ROW_EXTENT: tl.constexpr,
    COLUMN_EXTENT: tl.constexpr,
):
    """Return ``[rows, columns]``; the pointers are those of one batch item."""
    first_query, first_key = rows * ROW_EXTENT, columns * COLUMN_EXTENT
    last_query = tl.minimum(first_query + ROW_EXTENT, q_len) - 1
    last_key = tl.minimum(first_key + COLUMN_EXTENT, k_len) - 1
    if usable_ptr is not None:
        flags = tl.load(usable_ptr + columns, mask=is_column, other=0)
        is_column = is_column & (flags != 0)
    nearest = first_key[None, :] - last_query[:, None]
    furthest = last_key[None, :] - first_query[:, None]
    visible = (nearest <= upper) & (furthest >= lower) & is_column[None, :]
    if row_low_ptr is not None:
        is_row = first_query < q_len
        row_low = tl.load(row_low_ptr + rows, mask=is_row, other=0)
        row_high = tl.load(row_high_ptr + rows, mask=is_row, other=0)
        column_low = tl.load(column_low_ptr + columns, mask=is_column, other=0)
        column_high = tl.load(column_high_ptr + columns, mask=is_column, other=0)
        visible = visible & (row_low[:, None] <= column_high[None, :])
        visible = visible & (row_high[:, None] >= column_low[None, :])
    return visible


@triton.jit
def tile_ranges(
    first_row,
    last_row,
    num_columns,
    q_len,
    k_len,
    upper,
    lower,
    ROW_EXTENT: tl.constexpr,
    COLUMN_EXTENT: tl.constexpr,
    TILE: tl.constexpr,
):
    """Return the range of column tiles that any row sees, and of those that all rows see whole."""
    first_query = first_row * ROW_EXTENT
    last_query = tl.minimum(last_row * ROW_EXTENT + ROW_EXTENT, q_len) - 1
    tokens = TILE * COLUMN_EXTENT
    end = (tl.maximum(tl.minimum(k_len, last_query + upper + 1), 0) + tokens - 1) // tokens
    begin = tl.minimum(tl.maximum(first_query + lower, 0) // tokens, end)
    # All pairs are visible when the last column begins in reach of the first row's last token,
    # and the first column ends in reach of the last row's first token.
    row_last = tl.minimum(first_query + ROW_EXTENT, q_len) - 1
    reached = tl.minimum((row_last + upper) // COLUMN_EXTENT + 1, num_columns)
    inner_end = tl.maximum(reached, 0) // TILE
    inner_end = tl.where(row_last + upper < 0, 0, inner_end)
    needed = tl.maximum(last_row * ROW_EXTENT + lower, 0)
    inner_begin = (needed + tokens - 1) // tokens
    inner_begin = tl.minimum(tl.maximum(inner_begin, begin), end)
    inner_end = tl.minimum(tl.maximum(inner_end, inner_begin), end)
    return begin, inner_begin, inner_end, end


@triton.jit
def logits_of(row, column, inner_scale, PRECISION: tl.constexpr, IS_CAPPED: tl.constexpr):
    """Return products, or where they are capped ``tanh`` of them, in units of the cap."""
    logits = tl.dot(row, tl.trans(column), input_precision=PRECISION)
    return tanh(logits * inner_scale) if IS_CAPPED else logits


@triton.jit
def weights_of(logits, maximum, qk_scale, PRECISION: tl.constexpr):
    """Return ``2 ** ((logits - maximum) * qk_scale)``; one fused operation where that suffices."""
    if PRECISION == "ieee":
        return tl.math.exp2((logits - maximum[:, None]) * qk_scale)
    return tl.math.exp2(logits * qk_scale - (maximum * qk_scale)[:, None])


@triton.jit
def _add_tile(logits, visible, running_max, running_sum, qk_scale, PRECISION: tl.constexpr):
    """Add a tile of products to the running maximum (unscaled) and sum of the rows."""
    if visible is not None:
        logits = tl.where(visible, logits, float("-inf"))
    new_max = tl.maximum(running_max, tl.max(logits, 1))
    base = tl.where(new_max == float("-inf"), 0.0, new_max)
    running_sum = running_sum * tl.math.exp2((running_max - base) * qk_scale)
    running_sum += tl.sum(weights_of(logits, base, qk_scale, PRECISION), 1)
    return new_max, running_sum


@triton.jit(
    do_not_specialize=[
        "num_rows",
        "num_columns",
        "q_len",
        "k_len",
        "upper",
        "lower",
        "tiles",
        "heads",
    ]
)
def row_statistics(
    row_ptr,
    column_ptr,
    maximum_ptr,
    sum_ptr,
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
    q_len,
    k_len,
    upper,
    lower,
    qk_scale,
    inner_scale,
    tiles,
    heads,
    PER_KEY_HEAD: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_C: tl.constexpr,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    NEGATE: tl.constexpr,
    IS_CAPPED: tl.constexpr,
):
    """Write maximum and sum of each row; a row that sees nothing has maximum -inf."""
    program = tl.program_id(0)
    tile = tiles - 1 - program % tiles
    head = (program // tiles % heads).to(tl.int64)
    batch = (program // tiles // heads).to(tl.int64)
    upper, lower = shifted_band(upper, lower, offset_ptr)
    rows = tile * TILE_R + tl.arange(0, TILE_R)
    columns_of_tile = tl.arange(0, TILE_C)
    dims = tl.arange(0, PADDED_DIM)
    is_row = rows < num_rows
    row_base = row_ptr + batch * row_strides[0] + head * row_strides[1]
    row = load_tile(
        tile_pointers(row_base, rows, row_strides[2], dims, row_strides[3]),
        is_row,
        dims,
        DIM,
        PADDED_DIM,
    )
    if NEGATE:
        row = -row
    key_head = head // PER_KEY_HEAD
    column_base = column_ptr + batch * column_strides[0] + key_head * column_strides[1]
    column_tile = tile_pointers(
        column_base, columns_of_tile, column_strides[2], dims, column_strides[3]
    )
    if usable_ptr is not None:
        usable_ptr += batch * num_columns
    if row_low_ptr is not None:
        row_low_ptr += batch * num_rows
        row_high_ptr += batch * num_rows
        column_low_ptr += batch * num_columns
        column_high_ptr += batch * num_columns
    last_row = tl.minimum(tile * TILE_R + TILE_R, num_rows) - 1
    begin, inner_begin, inner_end, end = tile_ranges(
        tile * TILE_R, last_row, num_columns, q_len, k_len, upper, lower, 1, 1, TILE_C
    )
    if (usable_ptr is not None) or (row_low_ptr is not None):
        inner_begin = begin
        inner_end = begin
    running_max = tl.full([TILE_R], float("-inf"), tl.float32)
    running_sum = tl.zeros([TILE_R], tl.float32)
    for step in range(inner_begin, inner_end):
        start = tl.cast(step * TILE_C, tl.int64)
        column = load_whole_tile(column_tile + start * column_strides[2], dims, DIM, PADDED_DIM)
        logits = logits_of(row, column, inner_scale, PRECISION, IS_CAPPED)
        running_max, running_sum = _add_tile(
            logits, None, running_max, running_sum, qk_scale, PRECISION
        )
    num_before = inner_begin - begin
    for step in range(0, num_before + end - inner_end):
        edge = tl.where(step < num_before, begin + step, inner_end + step - num_before)
        start = tl.cast(edge * TILE_C, tl.int64)
        columns = edge * TILE_C + columns_of_tile
        is_column = columns < num_columns
        column = load_tile(
            column_tile + start * column_strides[2], is_column, dims, DIM, PADDED_DIM
        )
        visible = visible_pairs(
            rows,
            columns,
            is_column,
            q_len,
            k_len,
            upper,
            lower,
            usable_ptr,
            row_low_ptr,
            row_high_ptr,
            column_low_ptr,
            column_high_ptr,
            1,
            1,
        )
        logits = logits_of(row, column, inner_scale, PRECISION, IS_CAPPED)
        running_max, running_sum = _add_tile(
            logits, visible, running_max, running_sum, qk_scale, PRECISION
        )
    target = (batch * heads + head) * num_rows + rows
    tl.store(maximum_ptr + target, running_max, mask=is_row)
    tl.store(sum_ptr + target, running_sum, mask=is_row)
