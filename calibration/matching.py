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
from seer_compile.gate import AttnGate
from seer_compile.types import BlockSelection, BlockSize, SiteInputs


class MatchedSelection(NamedTuple):
    """A selection and what it keeps."""

    selection: BlockSelection
    budget: float
    """The selector's budget that was solved for."""
    visible_counts: Tensor
    """``Int32[b s m]``: visible blocks of each row."""

    @property
    def kept(self) -> int:
        """Blocks kept, over batch, heads and rows."""
        return int(self.selection.counts.sum())

    @property
    def visible(self) -> int:
        """Blocks visible, over batch, heads and rows."""
        return int(self.visible_counts.sum())


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
        For ``fraction`` up to 30 selections, each counted on the host. For ``top_p`` a sort of
        the scores and a few ``Float64[b s m n]``.
    """
    check_fraction("density", density)
    full = select(scores, inputs, block_size, "top_p", 1.0)
    visible = int(full.counts.sum())
    wanted = density * visible
    if wanted >= visible:
        return MatchedSelection(full, 1.0, full.counts)
    match = _match_mass if selector == "top_p" else _match_fraction
    selection, budget = match(scores, inputs, block_size, wanted)
    return MatchedSelection(selection, budget, full.counts)


def _match_fraction(
    scores: Tensor, inputs: SiteInputs, block_size: BlockSize, wanted: float
) -> tuple[BlockSelection, float]:
    low, high, nearest = 0.0, 1.0, math.inf
    best: tuple[BlockSelection, float] | None = None
    while best is None or (nearest >= 1 and high - low > 1e-9):
        budget = (low + high) / 2
        selection = select(scores, inputs, block_size, "fraction", budget)
        kept = int(selection.counts.sum())
        if best is None or abs(kept - wanted) < nearest:
            nearest, best = abs(kept - wanted), (selection, budget)
        low, high = (budget, high) if kept < wanted else (low, budget)
    return best


def _match_mass(
    scores: Tensor, inputs: SiteInputs, block_size: BlockSize, wanted: float
) -> tuple[BlockSelection, float]:
    """Threshold the share of mass that a row would lose with a block and all smaller ones.

    Top-p keeps a block exactly when that share exceeds ``1 - p``. Compared as it is, it resolves
    what ``p`` itself cannot: at sites where a twentieth of the blocks carries all but 1e-16.
    """
    least = select(scores, inputs, block_size, "top_p", 0.0)
    always = selection_mask(least, scores.shape[-1])
    total = scores.double().sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    free = scores.double().masked_fill(always, 0.0)
    lost = _mass_up_to(free) / total
    lost = lost.masked_fill(free == 0, 0.0).masked_fill(always, torch.inf)
    place = min(max(round(wanted), 1), lost.numel())
    threshold = lost.flatten().kthvalue(lost.numel() - place + 1).values
    candidates = ((lost >= threshold) & (lost > 0), lost > threshold)
    keep = min(candidates, key=lambda mask: abs(int(mask.sum()) - wanted)) | always
    counts = keep.sum(-1, dtype=torch.int32)
    indices = torch.argsort(~keep, dim=-1, stable=True).to(torch.int32)
    share = min(max(float(threshold), 0.0), 1.0)
    return BlockSelection(indices, counts), 1 - share


def _mass_up_to(values: Tensor) -> Tensor:
    """Return for every value the sum of those in its row that are not larger, itself included."""
    ascending, order = values.sort(dim=-1)
    is_last = torch.ones_like(ascending, dtype=torch.bool)
    is_last[..., :-1] = ascending[..., :-1] != ascending[..., 1:]
    # Of equal values each gets the sum at the last: the smallest marked sum from here on.
    sums = ascending.cumsum(-1).masked_fill(~is_last, torch.inf)
    sums = sums.flip(-1).cummin(-1).values.flip(-1)
    return torch.empty_like(sums).scatter_(-1, order, sums)


def selection_mask(selection: BlockSelection, key_blocks: int) -> Tensor:
    """Return ``Bool[b s m n]``: the selected blocks."""
    places = torch.arange(selection.indices.shape[-1], device=selection.counts.device)
    used = places < selection.counts[..., None]
    # One column more than there are blocks takes the entries past the count.
    shape = (*selection.counts.shape, key_blocks + 1)
    mask = torch.zeros(shape, dtype=torch.bool, device=selection.counts.device)
    mask.scatter_(-1, selection.indices.long().where(used, key_blocks), True)
    return mask[..., :key_blocks]


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
        *inputs.last_arguments(),
    )[0]


def attend_at_density(
    gate: AttnGate, inputs: SiteInputs, density: float
) -> tuple[Tensor, MatchedSelection]:
    """Answer a site by its gate's own scores and kind of selector, at a density.

    Args:
        gate: Of the site.
        inputs: Operands of the site.
        density: Kept / visible blocks, in (0, 1].

    Returns:
        ``Float[b h q v]`` without gradients, and what was kept.
    """
    with torch.inference_mode(False), torch.no_grad():
        matched = match_density(
            gate.block_scores(inputs),
            inputs,
            gate.config.block_size,
            selector="fraction" if gate.config.selector.name == "fraction" else "top_p",
            density=density,
        )
        return attend(inputs, matched.selection, gate.config.block_size), matched
