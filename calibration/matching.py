"""Spend a given density on block scores, exactly, and answer a site with the selection.

Methods are compared at the density that was asked, not at parameters that happen to be near it:
one budget per site, over all its rows and heads, is solved on the input at hand.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

import seer_compile.kernels.ops  # noqa: F401  (registers the operators called below)
from seer_compile.budget_curve import check_fraction
from seer_compile.types import BlockSelection, BlockSize, SiteInputs

_HALVINGS = 40
# Top-p is solved on -log(1 - mass), where density is nearly straight; float64 ends near 32.
_LARGEST_LOG_REST = 32.0


class MatchedSelection(NamedTuple):
    """A selection and what it keeps."""

    selection: BlockSelection
    budget: float
    """The selector's budget that was solved for."""
    kept: int
    """Blocks kept, over batch, heads and rows."""
    visible: int
    """Blocks visible, over batch, heads and rows."""


def select(
    scores: Tensor, inputs: SiteInputs, block_size: BlockSize, selector: str, budget: float
) -> BlockSelection:
    """Select by one budget for all heads; ``scores`` is ``Float32[b s m n]``."""
    budgets = torch.full((scores.shape[1],), budget, dtype=torch.float64, device=scores.device)
    return BlockSelection(
        *torch.ops.seer_compile.select_blocks.v1(
            scores,
            budgets,
            selector,
            block_size.query,
            block_size.key,
            inputs.query.shape[-2],
            inputs.key.shape[-2],
            *inputs.visibility.as_arguments().values(),
        )
    )


def count_visible(scores: Tensor, inputs: SiteInputs, block_size: BlockSize) -> int:
    """Count visible blocks over batch, heads and rows."""
    return int(select(scores, inputs, block_size, "top_p", 1.0).counts.sum())


def match_density(
    scores: Tensor, inputs: SiteInputs, block_size: BlockSize, *, selector: str, density: float
) -> MatchedSelection:
    """Solve one budget such that kept / visible blocks comes as near a density as scores allow.

    Args:
        scores: ``Float32[b s m n]``.
        inputs: Operands of the site.
        block_size: Tokens per block.
        selector: ``top_p`` or ``fraction``.
        density: Kept blocks / visible blocks, in (0, 1]. Blocks that every selection keeps, and
            scores that are equal, can make it unreachable; then the nearest density stands.

    Cost:
        About 40 selections, each of which is counted on the host.
    """
    check_fraction("density", density)
    visible = count_visible(scores, inputs, block_size)
    wanted = density * visible
    low, high = 0.0, _LARGEST_LOG_REST if selector == "top_p" else 1.0
    best: MatchedSelection | None = None
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        budget = -math.expm1(-middle) if selector == "top_p" else middle
        selection = select(scores, inputs, block_size, selector, budget)
        kept = int(selection.counts.sum())
        if best is None or abs(kept - wanted) < abs(best.kept - wanted):
            best = MatchedSelection(selection, budget, kept, visible)
        if abs(kept - wanted) < 1 or high - low < 1e-9:
            break
        low, high = (middle, high) if kept < wanted else (low, middle)
    if best is None or wanted >= visible:
        full = select(scores, inputs, block_size, selector, 1.0)
        return MatchedSelection(full, 1.0, int(full.counts.sum()), visible)
    return best


def attend(inputs: SiteInputs, selection: BlockSelection, block_size: BlockSize) -> Tensor:
    """Answer a site with a selection: ``Float[b h q v]``."""
    return torch.ops.seer_compile.block_sparse_attention.v1(
        inputs.query,
        inputs.key,
        inputs.value,
        selection.indices,
        selection.counts,
        inputs.scale,
        block_size.query,
        block_size.key,
        *inputs.visibility.as_arguments().values(),
    )[0]
