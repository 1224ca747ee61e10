"""How sites share a density, found by trying: all of them sparse at once, as in use.

One site at a time, sensitivities add up only while they are small: what one sparse site loses, the
next may no longer look up. The search starts from the shares that sensitivities give, moves blocks
to or from one site, and keeps what brings the model's output nearer to the dense one.

Letters of shapes: see :mod:`seer_compile.types`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from seer_compile.allocation import allocate, least_densities, with_mean
from seer_compile.calibration import distributed
from seer_compile.calibration.matching import attend_at_density
from seer_compile.calibration.record import Run, gate_of
from seer_compile.calibration.sensitivity import DenseOutput, OneSparseSite
from seer_compile.gate_store import GateStore
from seer_compile.shares import ShareTable
from seer_compile.types import SiteInputs

DENSITIES: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4)
_FACTORS = (1.8, 1.3)
# Moves that gain less are noise of one batch.
_LEAST_GAIN = 0.003


class SparseSites:
    """The site handler that answers every site sparsely, each at a density of its own."""

    def __init__(self, store: GateStore, shares: Mapping[str, float]) -> None:
        self.store, self.shares = store, shares

    def __call__(self, inputs: SiteInputs) -> Tensor:
        """Answer one site."""
        gate = gate_of(self.store, inputs)
        density = min(1.0, max(self.shares[inputs.name], 1e-4))
        return attend_at_density(gate, inputs, density)[0]


class _Trial(NamedTuple):
    """The batch of one length, and what the model makes of it when it is dense."""

    length: int
    batch: Any
    dense: DenseOutput


def search_shares(
    run: Run,
    store: GateStore,
    batches: Iterable[Any],
    *,
    evaluations: int,
    densities: Sequence[float] = DENSITIES,
    progress: bool = False,
) -> dict[str, ShareTable]:
    """Search the density of every site at each mean density and each length.

    Args:
        run: One forward of the frozen model with a handler; returns what the model returns.
        store: Trained gates with curves, and with sensitivities where they were measured.
        batches: Held-out batches; the first of each length counts.
        evaluations: Forwards per length and density; 0 searches nothing.
        densities: Mean densities, ascending.
        progress: Show a progress bar.

    Returns:
        A table per site; under ``torch.distributed`` that of process 0, everywhere.

    Cost:
        ``evaluations`` forwards per length and density, and one per batch.
    """
    if evaluations < 1:
        return {}
    found: dict[str, dict[int, list[float]]] = {}
    hidden = not progress or distributed.rank() != 0
    with torch.no_grad():
        trials = _trials(run, store, batches)
        bar = tqdm(total=len(trials) * len(densities), desc="Searching shares", disable=hidden)
        for trial in trials:
            for density in densities:
                shares = _search(run, store, trial, density, evaluations)
                for name, share in shares.items():
                    found.setdefault(name, {}).setdefault(trial.length, []).append(share)
                bar.update()
        bar.close()
    tables = {
        name: ShareTable(
            lengths=tuple(sorted(rows)),
            asked=tuple(densities),
            shares=tuple(tuple(rows[length]) for length in sorted(rows)),
        )
        for name, rows in found.items()
    }
    return distributed.everywhere(tables, ShareTable.from_json)


def _trials(run: Run, store: GateStore, batches: Iterable[Any]) -> list[_Trial]:
    by_length: dict[int, _Trial] = {}
    for batch in batches:
        observer = OneSparseSite(store, None, 1.0)
        output = run(batch, observer)
        length = max(observer.lengths.values(), default=0)
        if length not in by_length:
            by_length[length] = _Trial(length, batch, DenseOutput(output))
    return list(by_length.values())


def _search(
    run: Run, store: GateStore, trial: _Trial, density: float, evaluations: int
) -> dict[str, float]:
    """Return the best shares found: coordinate moves, large ones first, until they end."""
    left = evaluations

    def loss(shares: Mapping[str, float]) -> float:
        nonlocal left
        left -= 1
        value = trial.dense.divergence(run(trial.batch, SparseSites(store, shares)))
        return value if math.isfinite(value) else math.inf

    curves = {name: gate.curve for name, gate in store.items() if gate.curve is not None}
    known = {name: gate.sensitivity for name, gate in store.items() if name in curves}
    least = least_densities(curves, trial.length)
    starts = [with_mean(dict.fromkeys(curves, density), density, least=least)]
    if all(curve is not None for curve in known.values()):
        starts.append(
            allocate(
                curves,
                density,
                length=trial.length,
                allocation="sensitivity",
                sensitivities=known,
            )
        )
        # Half way between the two, by ratio: what one batch says is not all true.
        middle = {name: math.sqrt(density * starts[1][name]) for name in curves}
        starts.append(with_mean(middle, density, least=least))
    best_loss, best = min(((loss(shares), shares) for shares in starts), key=lambda pair: pair[0])
    for factor in _FACTORS:
        improved = True
        while improved and left > 0:
            improved = False
            for name in sorted(best, key=lambda site: -best[site]):
                for change in (factor, 1 / factor):
                    if left <= 0:
                        return best
                    wanted = {**best, name: min(1.0, best[name] * change)}
                    moved = with_mean(wanted, density, least=least, fixed=name)
                    reached = loss(moved)
                    if reached < best_loss * (1 - _LEAST_GAIN):
                        best_loss, best, improved = reached, moved, True
                        break
    return best
