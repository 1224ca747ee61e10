"""Running sums of one site at one length, and the curves that come of them.

Letters of shapes: see :mod:`seer_compile.types`. P is the number of budgets of a grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seer_compile.types import BlockSelection


class CurveSums:
    """Running sums over the batches of one length."""

    def __init__(self, budgets: int, heads: int) -> None:
        self.batches, self.halves, self.length_sum = 0, 0, 0
        self.rows = 0.0
        self.visible_per_head = torch.zeros(heads, dtype=torch.float64)
        self.gate_kept = torch.zeros(budgets, heads, dtype=torch.float64)
        self.kept = {"gate": [0.0] * budgets, "oracle": [0.0] * budgets}
        self.captured = {"gate": [0.0] * budgets, "oracle": [0.0] * budgets}
        self.wrong, self.norm = [0.0] * budgets, [0.0] * budgets
        self.control: dict[int, tuple[float, float]] = {}

    def add_rows(self, k_len: int, mass: Tensor, visible: Tensor, *, is_half: bool = False) -> None:
        """Add a batch: its mass ``Float32[b s m n]`` and what of it is ``Bool[m n]`` visible."""
        self.batches += 1
        self.halves += is_half
        self.length_sum += k_len
        # A row of which nothing can be read carries no mass, captured or not.
        self.rows += float((mass.sum(-1) != 0).sum())
        self.visible_per_head += float(visible.sum()) * mass.shape[0]

    def add(self, kind: str, first: int, kept: Tensor, captured: Tensor) -> None:
        """Add ``Int64[P s]`` blocks and ``Float64[P s]`` mass of consecutive budgets."""
        kept, captured = kept.cpu(), captured.cpu()
        for place, (blocks, mass) in enumerate(zip(kept, captured, strict=True), first):
            self.kept[kind][place] += float(blocks.sum())
            self.captured[kind][place] += float(mass.sum())
        if kind == "gate":
            self.gate_kept[first : first + len(kept)] += kept

    def add_error(self, place: int, sparse: Tensor, dense: Tensor) -> None:
        """Add the squared error of one budget's answer, and the squared norm of the dense one."""
        self.wrong[place] += float((sparse.double() - dense.double()).square().sum())
        self.norm[place] += float(dense.double().square().sum())

    def add_control(self, mass: Tensor, visible: Tensor, sink: Tensor, distance: Tensor) -> None:
        """Add what sinks and local windows hold, ``distance`` in blocks from the diagonal.

        Batches of one bucket may differ in their windows. The last window of each holds all of it,
        and so do larger ones: every batch counts in every window, as it does in what is visible.
        """
        windows = control_windows(mass.shape[-1])
        everything = self.control[max(self.control)] if self.control else (0.0, 0.0)
        for window in sorted({*self.control, *windows}):
            chosen = visible & ((distance < window) | sink)
            kept, captured = self.control.get(window, everything)
            kept += float(chosen.expand_as(mass).sum())
            captured += float(torch.where(chosen, mass, 0.0).sum(dtype=torch.float64))
            self.control[window] = (kept, captured)


def selection_totals(selection: BlockSelection, mass: Tensor) -> tuple[Tensor, Tensor]:
    """Return, per selection head and row, the blocks kept and the mass they carry.

    Args:
        selection: Indices ``Int32[b s m capacity]`` and counts ``Int32[b s m]``.
        mass: ``Float32[b s m n]``.

    Returns:
        ``Int64[s m]`` and ``Float64[s m]``, summed over the batch.
    """
    indices, counts = selection
    slots = torch.arange(indices.shape[-1], device=indices.device)
    is_kept = slots < counts[..., None]
    # Entries past the count are undefined; they must not be used as indices.
    found = mass.gather(-1, torch.where(is_kept, indices, 0).long())
    captured = torch.where(is_kept, found, 0.0).double().sum((0, 3))
    return counts.long().sum(0), captured


def control_windows(blocks: int) -> list[int]:
    """Return local windows in blocks: none, then powers of two until all blocks are inside."""
    return [0, *(2**power for power in range(max(1, blocks).bit_length() + 1))]


def windows_of(ordered: Sequence[CurveSums]) -> tuple[float, ...]:
    """Return every local window that was measured, ascending."""
    return tuple(
        float(window) for window in sorted(set().union(*(sums.control for sums in ordered)))
    )


def curve_of(
    kind: str, selector: str, budgets: Sequence[float], ordered: Sequence[CurveSums]
) -> dict[str, Any]:
    """Return a curve as plain data, one row per length."""
    densities, masses, errors = [], [], []
    for sums in ordered:
        visible = max(1.0, float(sums.visible_per_head.sum()))
        rows = max(1.0, sums.rows)
        if kind == "control":
            # A short sequence has fewer windows; all beyond its last keep everything.
            points = [sums.control[min(w, max(sums.control))] for w in map(int, budgets)]
            kept, captured = zip(*points, strict=True)
        else:
            kept, captured = (part[kind][: len(budgets)] for part in (sums.kept, sums.captured))
        densities.append([_share(value, visible) for value in kept])
        masses.append([_share(value, rows) for value in captured])
        if kind == "gate" and any(sums.norm):
            errors.append(
                [math.sqrt(w / n) if n else 0.0 for w, n in zip(sums.wrong, sums.norm, strict=True)]
            )
    lengths = _ascending([round(sums.length_sum / sums.batches) for sums in ordered])
    return {
        "selector": selector,
        "lengths": lengths,
        "halves": [
            length
            for length, sums in zip(lengths, ordered, strict=True)
            if sums.halves == sums.batches
        ],
        "budgets": list(budgets),
        "densities": densities,
        "captured_mass": masses,
        "errors": errors if len(errors) == len(ordered) else None,
    }


def _share(part: float, whole: float) -> float:
    # Rounding may pass 1; written so that NaN stays NaN.
    return 1.0 if part > whole else part / whole


def _ascending(lengths: list[int]) -> list[int]:
    for place in range(1, len(lengths)):
        lengths[place] = max(lengths[place], lengths[place - 1] + 1)
    return lengths
