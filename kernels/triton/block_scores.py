"""Block scores of a gate: pooled features to the share of attention each key block carries.

A block score is the largest, over the query sub-blocks of a block (and over the heads of a group),
of the softmax over key blocks of the best match among their sub-blocks; see :mod:`score_blocks`.
Scores of sub-block pairs are never stored.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from seer_compile.errors import RangeError
from seer_compile.kernels.triton.column_rules import column_rules
from seer_compile.kernels.triton.launching import launch_kernel
from seer_compile.kernels.triton.primitives import (
    ceil_div,
    dot_precision,
    launching_on,
    make_band,
    padded_dim,
    positive_scale,
)
from seer_compile.kernels.triton.score_blocks import score_blocks
from seer_compile.kernels.triton.tuning import ScoresTiling, scores_tiling

_WIDTH = 128
"""Units of a row that are turned into scores at a time."""


def launch(
    query_features: Tensor,
    key_features: Tensor,
    scale: float,
    query_sub_block: int,
    key_sub_block: int,
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
    tiling: ScoresTiling | None = None,
) -> Tensor:
    """Score block pairs.

    Args:
        query_features: ``Float[b h r e]``.
        key_features: ``Float[b h c e]``.
        scale: Factor on the logits.
        query_sub_block: Tokens per sub-block of queries.
        key_sub_block: Tokens per sub-block of keys.
        query_block: Tokens per query block, a multiple of ``query_sub_block``.
        key_block: Tokens per key block, a multiple of ``key_sub_block``.
        q_len: Query tokens; ``r = ceil(q_len / query_sub_block)``.
        k_len: Key tokens; ``c = ceil(k_len / key_sub_block)``.
        groups: Consecutive heads that share a selection.
        upper: Largest visible ``j - i``.
        lower: Smallest visible ``j - i``.
        offset: ``Int[]``, added to both bounds.
        key_padding: ``Bool[b k]``.
        query_documents: ``Int[b q]``.
        key_documents: ``Int[b k]``.
        tiling: Overrides the tuning table.

    Returns:
        ``Float32[b h//groups m n]``, in [0, 1]; exactly 0 for pairs that are not visible.

    Cost:
        The products of features once, and memory for their maxima, 320 MB at most, in one launch;
        where that is too little, the products twice.

    Raises:
        RangeError: A block is not a whole number of sub-blocks.
    """
    extents, blocks = (query_sub_block, key_sub_block), (query_block, key_block)
    for side, block, extent in zip(("query", "key"), blocks, extents, strict=True):
        if block % extent:
            raise RangeError(
                argument=f"{side}_sub_block", got=extent, expected=f"a divisor of {block}"
            )
    batch, heads, num_rows, dim = query_features.shape
    num_columns, device = key_features.shape[2], query_features.device
    units = tuple(block // extent for block, extent in zip(blocks, extents, strict=True))
    shape = (ceil_div(q_len, query_block), ceil_div(k_len, key_block))
    result = torch.empty((batch, heads // groups, *shape), dtype=torch.float32, device=device)
    if result.numel() == 0 or query_features.numel() == 0 or key_features.numel() == 0:
        return result.zero_()
    padded_units = tuple(triton.next_power_of_2(unit) for unit in units)
    padded = padded_dim(dim)
    tiling = tiling or scores_tiling(padded, query_features.dtype, padded_units, shape[1], device)
    row_units = max(1, tiling.rows // padded_units[0], 16 // padded_units[0])
    column_units = max(1, tiling.columns // padded_units[1], 16 // padded_units[1])
    tiles, tile_rows = ceil_div(shape[0], row_units), row_units * padded_units[0]
    programs = min(tiling.programs, tiles * heads * batch)
    kept = ceil_div(shape[1], column_units) * column_units if tiling.keep else 0
    memory = torch.empty(programs * tile_rows * (kept + 2), dtype=torch.float32, device=device)
    if groups > 1:
        result.zero_()
    band = make_band(upper, lower, offset)
    rules = column_rules(extents, key_padding, query_documents, key_documents)
    with launching_on(query_features, "query_features"):
        launch_kernel(score_blocks, programs,
            query_features, key_features, memory, result, query_features.stride(),
            key_features.stride(), band.offset, *rules, num_rows, num_columns, *shape, q_len, k_len,
            band.upper, band.lower, positive_scale(scale), tiles, heads, batch,
            POOLED=groups, ROW_EXTENT=query_sub_block, COLUMN_EXTENT=key_sub_block,
            ROW_UNIT=units[0], COLUMN_UNIT=units[1], ROW_UNITS=row_units, UNITS=column_units,
            ROWS=padded_units[0], COLUMNS=padded_units[1], DIM=dim, PADDED_DIM=padded,
            WIDTH=_WIDTH, PRECISION=dot_precision(query_features.dtype), NEGATE=scale < 0,
            KEEP=tiling.keep, num_warps=tiling.warps, num_stages=tiling.stages,
            maxnreg=tiling.registers,
        )  # fmt: skip
    return result
