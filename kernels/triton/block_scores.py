"""Block scores of a gate: pooled features to the share of attention each key block carries.

Sub-blocks are the rows and columns of :mod:`one_pass_scores`, for 16-bit features, or of the two
passes of :mod:`row_statistics` and :mod:`pooled_map`. A block score is the largest, over the query
sub-blocks of a block (and over the heads of a group), of the summed probability of the key
sub-blocks of the other block. Scores of sub-block pairs are never stored.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from seer_compile.errors import RangeError
from seer_compile.kernels.triton.one_pass_scores import launch_one_pass
from seer_compile.kernels.triton.pooled_map import pooled_map
from seer_compile.kernels.triton.primitives import (
    LOG2_E,
    ceil_div,
    dot_precision,
    launching_on,
    make_band,
    padded_dim,
)
from seer_compile.kernels.triton.row_statistics import row_statistics
from seer_compile.kernels.triton.tuning import (
    MapTiling,
    OnePassTiling,
    head_layout,
    one_pass_tiling,
    scores_tiling,
    shared_memory,
)


class ColumnRules(NamedTuple):
    """What decides, besides the band, whether a row sees a column."""

    usable: Tensor | None
    """``UInt8[b c]``: 0 where a column holds no readable key."""
    row_low: Tensor | None
    row_high: Tensor | None
    column_low: Tensor | None
    column_high: Tensor | None
    """``Int32[b r]`` and ``Int32[b c]``: smallest and largest document id."""


def _in_units(tokens: Tensor, extent: int, fill: int) -> Tensor:
    """Return ``[b t]`` as ``[b units extent]``, the last unit filled up."""
    missing = -tokens.shape[1] % extent
    padded = torch.nn.functional.pad(tokens, (0, missing), value=fill)
    return padded.unflatten(1, (-1, extent))


def column_rules(
    extent: int,
    key_padding: Tensor | None,
    query_documents: Tensor | None,
    key_documents: Tensor | None,
) -> ColumnRules:
    """Return the rules for rows and columns of ``extent`` tokens."""
    usable = None
    if key_padding is not None:
        usable = _in_units(key_padding.to(torch.uint8), extent, 0).amax(2)
    if query_documents is None or key_documents is None:
        return ColumnRules(usable, None, None, None, None)
    limits = torch.iinfo(torch.int32)
    ranges = []
    for documents in (query_documents.int(), key_documents.int()):
        ranges.append(_in_units(documents, extent, limits.max).amin(2).contiguous())
        ranges.append(_in_units(documents, extent, limits.min).amax(2).contiguous())
    return ColumnRules(usable, *ranges)


def _positive_scale(scale: float) -> float:
    """Return the factor for powers of 2; kernels take maxima before scaling: it is positive."""
    return max(abs(scale) * LOG2_E, 1e-30)


def pooled_softmax_map(
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
    tiling: MapTiling | None = None,
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
        tiling: Overrides the tuning table.

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
    tiling = tiling or scores_tiling(padded, rows.dtype, shared_memory(rows.device))
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
    qk_scale = _positive_scale(scale)
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


def launch(
    query_features: Tensor,
    key_features: Tensor,
    scale: float,
    sub_block: int,
    query_block: int,
    key_block: int,
    q_len: int,
    k_len: int,
    groups: int,
    upper: int | None = None,
    lower: int | None = None,
    offset: Tensor | None = None,
    key_padding: Tensor | None = None,
    query_documents: Tensor | None = None,
    key_documents: Tensor | None = None,
    tiling: OnePassTiling | MapTiling | None = None,
) -> Tensor:
    """Score block pairs.

    Args:
        query_features: ``Float[b h r e]``.
        key_features: ``Float[b h c e]``.
        scale: Factor on the logits.
        sub_block: Tokens per sub-block.
        query_block: Tokens per query block, a multiple of ``sub_block``.
        key_block: Tokens per key block, a multiple of ``sub_block``.
        q_len: Query tokens; ``r = ceil(q_len / sub_block)``.
        k_len: Key tokens; ``c = ceil(k_len / sub_block)``.
        groups: Consecutive heads that share a selection.
        upper: Largest visible ``j - i``.
        lower: Smallest visible ``j - i``.
        offset: ``Int[]``, added to both bounds.
        key_padding: ``Bool[b k]``.
        query_documents: ``Int[b q]``.
        key_documents: ``Int[b k]``.
        tiling: Overrides the tuning table, and the number of passes.

    Returns:
        ``Float32[b h//groups m n]``, in [0, 1]; exactly 0 for pairs that are not visible.

    Raises:
        RangeError: A block is not a whole number of sub-blocks.
    """
    if query_block % sub_block or key_block % sub_block:
        raise RangeError(
            argument="sub_block", got=sub_block, expected=f"a divisor of {query_block}, {key_block}"
        )
    units = (query_block // sub_block, key_block // sub_block)
    shape = (ceil_div(q_len, query_block), ceil_div(k_len, key_block))
    rules = column_rules(sub_block, key_padding, query_documents, key_documents)
    batch, heads, _, dim = query_features.shape
    is_narrow = query_features.dtype is not torch.float32 and query_features.numel() > 0
    if tiling is None and is_narrow and key_features.numel() > 0:
        device = query_features.device
        tiling = one_pass_tiling(padded_dim(dim), units, key_features.shape[2], device)
    if isinstance(tiling, OnePassTiling):
        size = (batch, heads // groups, *shape)
        result = torch.empty(size, dtype=torch.float32, device=query_features.device)
        with launching_on(query_features, "query_features"):
            launch_one_pass(
                query_features, key_features, _positive_scale(scale), scale < 0, sub_block, units,
                (q_len, k_len), make_band(upper, lower, offset), rules, result, tiling,
            )  # fmt: skip
        return result
    return pooled_softmax_map(
        query_features, key_features, scale, sub_block, *units, *shape, q_len, k_len, groups,
        True, False, upper, lower, offset, rules, tiling,
    )  # fmt: skip
