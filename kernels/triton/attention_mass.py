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
from seer_compile.kernels.triton.launching import launch_kernel
from seer_compile.kernels.triton.pooled_map import pooled_map
from seer_compile.kernels.triton.primitives import (
    Band,
    ceil_div,
    dot_precision,
    launching_on,
    make_band,
    padded_dim,
    positive_scale,
)
from seer_compile.kernels.triton.row_statistics import row_statistics
from seer_compile.kernels.triton.tuning import MapTiling, mass_tiling, shared_memory

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
    softcap: float | None = None,
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
        softcap: Bounds the logits by ``softcap * tanh(logits / softcap)``, before the mask.
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
    band = make_band(upper, lower, offset)
    rules = column_rules((1, 1), key_padding, query_documents, key_documents)
    tiling = tiling or mass_tiling(
        padded_dim(query.shape[3]), query.dtype, shared_memory(query.device)
    )
    units = (query_unit, key_unit)
    return _run_both_passes(query, key, scale, softcap, units, is_sum, is_mean, band, rules, tiling)


def _run_both_passes(
    query: Tensor,
    key: Tensor,
    scale: float,
    softcap: float | None,
    units: tuple[int, int],
    sum_keys: bool,
    mean_queries: bool,
    band: Band,
    rules: ColumnRules,
    tiling: MapTiling,
) -> Tensor:
    """Launch the statistics of rows, then the map; see :mod:`row_statistics` for the formula."""
    (batch, heads, q_len, dim), (kv_heads, k_len) = query.shape, key.shape[1:3]
    shape = (ceil_div(q_len, units[0]), ceil_div(k_len, units[1]))
    result = torch.empty((batch, heads, *shape), dtype=torch.float32, device=query.device)
    if result.numel() == 0 or query.numel() == 0 or key.numel() == 0:
        return result.zero_()
    padded = padded_dim(dim)
    statistics = torch.empty((2, batch, heads, q_len), dtype=torch.float32, device=query.device)
    operands = (query, key, *statistics)
    visibility = (query.stride(), key.stride(), band.offset, *rules, q_len, k_len)
    # Capped logits are held in units of the cap: the scale goes inside, the cap is what is left.
    inner, outer = (1.0, scale) if softcap is None else (abs(scale) / softcap, softcap)
    lengths = (q_len, k_len, band.upper, band.lower, positive_scale(outer), inner)
    padded_units = [triton.next_power_of_2(unit) for unit in units]
    row_units = max(1, tiling.rows // padded_units[0], 16 // padded_units[0])
    column_units = max(1, tiling.columns // padded_units[1])
    constants = {
        "PER_KEY_HEAD": heads // kv_heads,
        "DIM": dim,
        "PADDED_DIM": padded,
        "PRECISION": dot_precision(query.dtype),
        "NEGATE": scale < 0,
        "IS_CAPPED": softcap is not None,
        "num_warps": tiling.warps,
        "num_stages": tiling.stages,
    }
    with launching_on(query, "query"):
        tiles = ceil_div(q_len, tiling.rows)
        launch_kernel(row_statistics, tiles * heads * batch,
            *operands, *visibility, *lengths, tiles, heads,
            TILE_R=tiling.rows, TILE_C=tiling.columns, **constants,
        )  # fmt: skip
        tiles = ceil_div(shape[0], row_units)
        launch_kernel(pooled_map, tiles * heads * batch,
            *operands, result, *visibility, *shape, *lengths, tiles, heads,
            ROW_UNIT=units[0], COLUMN_UNIT=units[1], ROW_UNITS=row_units,
            COLUMN_UNITS=column_units, PADDED_ROW_UNIT=padded_units[0],
            PADDED_COLUMN_UNIT=padded_units[1], SUM_COLUMNS=sum_keys, MEAN_ROWS=mean_queries,
            **constants,
        )  # fmt: skip
    return result
