"""Block scores to a selection, on the CPU, vectorised over rows.

A row keeps the forced blocks (diagonal, sink, best) and what the selector adds. Rows are streamed,
so that beside scores and result only one slab of rows is held. Sums are taken in float64, ties
are broken by the lower index: the same scores give the same selection everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seer_compile.kernels.geometry import Band, Grid, diagonal, units_with_key, visible_pairs
from seer_compile.types import BlockSelection, Visibility

BLOCK_SLACK = 0.01
"""Blocks by which a budget may be missed before one more is kept: float32 has no exact 0.1."""
_SLAB_ELEMENTS = 1 << 22


def select(
    scores: Tensor, budget: Tensor, selector: str, grid: Grid, visibility: Visibility
) -> BlockSelection:
    """Select key blocks for every row of ``Float32[b s m n]``; see ``ops.select_blocks``."""
    batch, heads, num_rows, num_columns = scores.shape
    indices = torch.empty(scores.shape, dtype=torch.int32)
    counts = torch.empty(scores.shape[:-1], dtype=torch.int32)
    band, has_upper = Band.of(visibility), visibility.upper is not None
    readable = None
    if visibility.key_padding is not None:
        readable = units_with_key(visibility.key_padding, grid.key_unit)
    step = max(1, _SLAB_ELEMENTS // max(batch * heads * num_columns, 1))
    for start in range(0, num_rows, step):
        rows = slice(start, min(start + step, num_rows))
        visible = visible_pairs(band, grid, rows)
        forced = diagonal(band, grid, has_upper=has_upper, rows=rows) & visible
        forced = forced | _first(visible if readable is None else visible & readable[:, None])
        slab = scores[:, :, rows].double()
        forced = forced[:, None] if readable is not None else forced[None, None]
        keep = _keep(slab, budget.double(), selector, visible, forced)
        counts[:, :, rows] = keep.sum(-1, dtype=torch.int32)
        indices[:, :, rows] = torch.argsort(~keep, dim=-1, stable=True).to(torch.int32)
    return BlockSelection(indices, counts)


def _first(mask: Tensor) -> Tensor:
    """Return a mask of the first True of every row."""
    return mask & (mask.cumsum(-1) == 1)


def _keep(scores: Tensor, budget: Tensor, selector: str, visible: Tensor, forced: Tensor) -> Tensor:
    """Return ``Bool[b s rows n]``: the kept blocks of rows whose scores are float64."""
    if scores.shape[-1] == 0:
        return torch.zeros(scores.shape, dtype=torch.bool)
    # NaN ranks above every number: what cannot be judged is kept, as dense attention reads it.
    ranked = scores.nan_to_num(nan=torch.inf).masked_fill(~visible, -torch.inf)
    best = torch.zeros_like(ranked, dtype=torch.bool)
    best.scatter_(-1, ranked.argmax(-1, keepdim=True), True)
    forced = (forced | best) & visible
    budget = budget[:, None, None]
    if selector in ("top_p", "threshold"):
        scores = scores.masked_fill(~visible, 0.0)
        total = scores.sum(-1, keepdim=True)
        if selector == "top_p":
            kept = (ranked >= _cut(ranked, scores, forced, budget * total)) | (budget >= 1)
        else:
            num_visible = visible.sum(-1, keepdim=True)
            kept = (scores * num_visible >= budget * total) & (total > 0)
        return (forced | kept | total.isnan()) & visible
    num_visible = visible.sum(-1, keepdim=True)
    wanted = budget * num_visible if selector == "fraction" else budget
    wanted = torch.maximum((wanted - BLOCK_SLACK).ceil(), forced.sum(-1, keepdim=True))
    order = ranked.nan_to_num(posinf=torch.finfo(torch.float64).max).masked_fill(forced, torch.inf)
    place = torch.argsort(order, dim=-1, descending=True, stable=True).argsort(-1)
    return (place < wanted) & visible


def _cut(ranked: Tensor, scores: Tensor, forced: Tensor, target: Tensor) -> Tensor:
    """Return the largest score whose followers and the forced blocks reach the target sum.

    Infinite where the forced blocks reach it alone; -inf where nothing does, by rounding.
    """
    values, order = ranked.sort(-1, descending=True)
    gain = scores.masked_fill(forced, 0.0).gather(-1, order).cumsum(-1)
    start = scores.masked_fill(~forced, 0.0).sum(-1, keepdim=True)
    missed = (start + gain < target).sum(-1, keepdim=True)
    cut = torch.cat([values, torch.full_like(values[..., :1], -torch.inf)], -1).gather(-1, missed)
    return cut.masked_fill(start >= target, torch.inf)
