"""Attention mass: the true softmax map of attention, pooled, without ever storing it.

Tokens are the rows and columns of :mod:`row_statistics`. This is the target that gates learn, and
the score of the oracle that selections are judged against.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from seer_compile.errors import RangeError
from seer_compile.kernels.triton.column_rules import ColumnRules, column_rules
from seer_compile.kernels.triton.pooled_map import pooled_map
from seer_compile.kernels.triton.primitives import (
    ceil_div,
    dot_precision,
    launching_on,
    make_band,
    padded_dim,
    positive_scale,
)
from seer_compile.kernels.triton.row_statistics import row_statistics
from seer_compile.kernels.triton.tuning import MapTiling, head_layout, mass_tiling, shared_memory

_LARGEST_UNIT = 128


def _reduction(argument: str, got: str, choices: tuple[str, str]) -> bool:
    if got not in choices:
        raise RangeError(argument=argument, got=got, expected=f"one of {choices}")
    return got == choices[0]


def launch(
    query: Tensor,
    key: Tensor,
    scale: float,
    query_unit: int,
    key_unit: int,
    query_reduce: str,
    key_reduce: str,
    upper: int | None = None,
    lower: int | None = None,
    offset: Tensor | None = None,
    key_padding: Tensor | None = None,
    query_documents: Tensor | None = None,
    key_documents: Tensor | None = None,
    *,
    tiling: MapTiling | None = None,
) -> Tensor:
    """Pool the attention probabilities of unit pairs.

    Args:
        query: ``Float[b h q d]``.
        key: ``Float[b g k d]``.
        scale: Factor on the logits.
        query_unit: Query tokens per unit, 1 to 128.
        key_unit: Key tokens per unit, 1 to 128.
        query_reduce: ``mean`` over the queries of a unit that read anything, or ``max``.
        key_reduce: ``sum`` or ``max`` over the keys of a unit.
        upper: Largest visible ``j - i``.
        lower: Smallest visible ``j - i``.
        offset: ``Int[]``, added to both bounds.
        key_padding: ``Bool[b k]``.
        query_documents: ``Int[b q]``.
        key_documents: ``Int[b k]``.
        tiling: Overrides the tuning table.

    Returns:
        ``Float32[b h ceil(q/query_unit) ceil(k/key_unit)]``.

    Raises:
        RangeError: A unit or a reduction is not one of the above.

    Cost:
        The first product of attention, twice; four bytes per query besides the result.
    """
    for argument, unit in (("query_unit", query_unit), ("key_unit", key_unit)):
        if not 1 <= unit <= _LARGEST_UNIT:
            raise RangeError(argument=argument, got=unit, expected=f"1 to {_LARGEST_UNIT} tokens")
    is_mean = _reduction("query_reduce", query_reduce, ("mean", "max"))
    is_sum = _reduction("key_reduce", key_reduce, ("sum", "max"))
    q_len, k_len = query.shape[2], key.shape[2]
    return _pooled_softmax_map(
        query,
        key,
        scale,
        1,
        query_unit,
        key_unit,
        ceil_div(q_len, query_unit),
        ceil_div(k_len, key_unit),
        q_len,
        k_len,
        1,
        is_sum,
        is_mean,
        upper,
        lower,
        offset,
        column_rules(1, key_padding, query_documents, key_documents),
        tiling or mass_tiling(padded_dim(query.shape[3]), query.dtype, shared_memory(query.device)),
    )


def _pooled_softmax_map(
    rows: Tensor,
    columns: Tensor,
    scale: float,
    extent: int,
    row_unit: int,
    column_unit: int,
    num_row_units: int,
    num_column_units: int,
    q_len: int,
    k_len: int,
    pooled: int,
    sum_columns: bool,
    mean_rows: bool,
    upper: int | None,
    lower: int | None,
    offset: Tensor | None,
    rules: ColumnRules,
    tiling: MapTiling,
) -> Tensor:
    """Run the two passes; see the module of the kernels for the formula.

    Args:
        rows: ``Float[b h r e]``.
        columns: ``Float[b g c e]``.
        scale: Factor on the logits.
        extent: Tokens that a row or column stands for.
        row_unit: Rows per unit of the map.
        column_unit: Columns per unit of the map.
        num_row_units: Units along the rows.
        num_column_units: Units along the columns.
        q_len: Query tokens.
        k_len: Key tokens.
        pooled: Consecutive heads over which the maximum is taken.
        sum_columns: Sum over the columns of a unit; else the maximum.
        mean_rows: Mean over the rows of a unit that see anything; else the maximum.
        upper: Band.
        lower: Band.
        offset: Band.
        rules: Padding and documents.
        tiling: Sizes of the tiles.

    Returns:
        ``Float32[b h//pooled row_units column_units]``.

    Cost:
        Eight bytes per row besides the result.
    """
    batch, heads, num_rows, dim = rows.shape
    pooled_heads, num_columns = heads // pooled, columns.shape[2]
    shape = (batch, pooled_heads, num_row_units, num_column_units)
    result = torch.empty(shape, dtype=torch.float32, device=rows.device)
    if result.numel() == 0 or rows.numel() == 0 or columns.numel() == 0:
        return result.zero_()
    padded = padded_dim(dim)
    band = make_band(upper, lower, offset)
    statistics = torch.empty((2, batch, heads, num_rows), dtype=torch.float32, device=rows.device)
    per_key_head = head_layout(heads, columns.shape[1], pooled_heads).per_key_head
    visibility = (
        rows.stride(),
        columns.stride(),
        band.offset,
        *rules,
        num_rows,
        num_columns,
    )
    qk_scale = positive_scale(scale)
    lengths = (q_len, k_len, band.upper, band.lower, qk_scale)
    padded_row_unit = triton.next_power_of_2(row_unit)
    padded_column_unit = triton.next_power_of_2(column_unit)
    row_units = max(1, tiling.rows // padded_row_unit)
    column_units = max(1, tiling.columns // padded_column_unit)
    if padded_row_unit * row_units < 16:
        row_units = 16 // padded_row_unit
    constants = {
        "PER_KEY_HEAD": per_key_head,
        "EXTENT": extent,
        "DIM": dim,
        "PADDED_DIM": padded,
        "PRECISION": dot_precision(rows.dtype),
        "NEGATE": scale < 0,
        "num_warps": tiling.warps,
        "num_stages": tiling.stages,
    }
    with launching_on(rows, "query"):
        tiles = ceil_div(num_rows, tiling.rows)
        row_statistics[(tiles * heads * batch,)](
            rows, columns, *statistics, *visibility, *lengths, tiles, heads,
            TILE_R=tiling.rows, TILE_C=tiling.columns, **constants,
        )  # fmt: skip
        tiles = ceil_div(num_row_units, row_units)
        pooled_map[(tiles * pooled_heads * batch,)](
            rows, columns, *statistics, result, *visibility, num_row_units, num_column_units,
            *lengths, tiles, pooled_heads, POOLED=pooled, ROW_UNIT=row_unit,
            COLUMN_UNIT=column_unit, ROW_UNITS=row_units, COLUMN_UNITS=column_units,
            PADDED_ROW_UNIT=padded_row_unit, PADDED_COLUMN_UNIT=padded_column_unit,
            SUM_COLUMNS=sum_columns, MEAN_ROWS=mean_rows, **constants,
        )  # fmt: skip
    return result
