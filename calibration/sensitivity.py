"""Which sites cost the model's output most: one site sparse at a time, all others dense.

Letters of shapes: see :mod:`seer_compile.types`. D is the number of densities.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from tqdm.auto import tqdm

from seer_compile.calibration import distributed
from seer_compile.calibration.matching import attend_at_density
from seer_compile.calibration.record import Run, dense_answer, gate_of
from seer_compile.errors import CalibrationDataError
from seer_compile.gate_store import GateStore
from seer_compile.sensitivity import SensitivityCurve
from seer_compile.types import SiteInputs

DENSITIES: tuple[float, ...] = (0.005, 0.01, 0.02, 0.03, 0.045, 0.065, 0.1, 0.16, 0.25, 0.5)
"""Asked of each site in turn; what every selection keeps can be more than the smallest.

Close together where they are small: a site that loses nothing at 5 % can fall off a cliff at 3 %,
and the blocks that such sites do not need are what the others live on.
"""

# Of the dense output that is kept for comparison, and of float32 copies at a time.
_HELD_BYTES = 256 << 20
_CHUNK_BYTES = 128 << 20


class DenseOutput:
    """A sample of the rows of the model's dense output, to compare sparse outputs with.

    The output is ``logits`` where the model returns something by that name, and the first
    floating-point tensor with an axis otherwise. Evenly spaced rows are kept, 256 MB at most.

    Raises:
        CalibrationDataError: The model returned no floating-point tensor.
    """

    def __init__(self, output: Any) -> None:
        self.is_logits, rows = _rows_of(output)
        held = max(1, _HELD_BYTES // max(1, rows.shape[-1] * rows.element_size()))
        self._step = -(-rows.shape[0] // held)
        self._rows = rows[:: self._step].clone()

    def divergence(self, output: Any) -> float:
        """Return how far another output of the same call is from this one.

        For logits the Kullback-Leibler divergence of the sparse distribution from the dense one,
        in nats, mean over rows. Otherwise the squared error relative to the squared norm of the
        dense output.
        """
        rows = _rows_of(output)[1][:: self._step]
        step = max(1, _CHUNK_BYTES // max(1, 4 * rows.shape[-1]))
        wrong = torch.zeros((), dtype=torch.float64, device=rows.device)
        norm = wrong.clone()
        for pair in zip(self._rows.split(step), rows.split(step), strict=True):
            dense, sparse = (part.float() for part in pair)
            if self.is_logits:
                log_dense, log_sparse = dense.log_softmax(-1), sparse.log_softmax(-1)
                wrong += (log_dense.exp() * (log_dense - log_sparse)).sum(dtype=torch.float64)
                norm += dense.shape[0]
            else:
                wrong += (dense - sparse).square().sum(dtype=torch.float64)
                norm += dense.square().sum(dtype=torch.float64)
        found = float(wrong / norm.clamp(min=torch.finfo(torch.float32).tiny))
        # Rounding can make nothing slightly negative; written so that NaN stays NaN.
        return 0.0 if found < 0 else found


class OneSparseSite:
    """The site handler that answers one site sparsely, at a density, and the others densely."""

    def __init__(self, store: GateStore, name: str | None, density: float) -> None:
        self.store, self.name, self.density = store, name, density
        self.kept = self.visible = 0
        self.lengths: dict[str, int] = {}
        """Key tokens of every site met."""

    def __call__(self, inputs: SiteInputs) -> Tensor:
        """Answer one site."""
        gate = gate_of(self.store, inputs)
        self.lengths[inputs.name] = inputs.key.shape[-2]
        if inputs.name != self.name:
            return dense_answer(gate, inputs)
        out, matched = attend_at_density(gate, inputs, self.density)
        self.kept += matched.kept
        self.visible += matched.visible
        return out


class _Point(NamedTuple):
    density: float
    divergence: float


def measure_sensitivity(
    run: Run,
    store: GateStore,
    batches: Iterable[Any],
    *,
    per_length: int = 1,
    densities: Sequence[float] = DENSITIES,
    progress: bool = False,
) -> dict[str, SensitivityCurve]:
    """Measure how far the model's output moves when one site alone is sparse.

    Args:
        run: One forward of the frozen model with a handler; returns what the model returns.
        store: Trained gates.
        batches: Held-out batches, the preferred ones first.
        per_length: Batches of one length that are measured and averaged; further ones are skipped.
        densities: Asked of every site in turn, ascending.
        progress: Show a progress bar.

    Returns:
        A curve per site; under ``torch.distributed`` that of process 0, everywhere.

    Raises:
        CalibrationDataError: An output is not finite, or no tensor to compare is returned.

    Cost:
        One forward per batch, and one more per site and density where it is measured.
    """
    found: dict[str, dict[int, list[list[_Point]]]] = {}
    measured: Counter[tuple[int, ...]] = Counter()
    hidden = not progress or distributed.rank() != 0
    with torch.no_grad():
        for batch in batches if per_length else ():
            observer = OneSparseSite(store, None, 1.0)
            dense = DenseOutput(run(batch, observer))
            shape = tuple(observer.lengths.values())
            measured[shape] += 1
            if measured[shape] > per_length:
                continue
            names = tqdm(
                observer.lengths, desc="Measuring sensitivity", unit="site", disable=hidden
            )
            for name in names:
                points = _points(run, store, batch, dense, name, densities)
                by_length = found.setdefault(name, {})
                by_length.setdefault(observer.lengths[name], []).append(points)
    curves = {name: _curve(by_length) for name, by_length in found.items()}
    return distributed.everywhere(store, curves, SensitivityCurve.from_json)


def _points(
    run: Run,
    store: GateStore,
    batch: Any,
    dense: DenseOutput,
    name: str,
    densities: Sequence[float],
) -> list[_Point]:
    points: list[_Point] = []
    for density in densities:
        # What every selection keeps can be more than is asked for.
        is_reached = bool(points) and density <= points[-1].density
        handler = OneSparseSite(store, name, density)
        points.append(points[-1] if is_reached else _point(handler, dense, run(batch, handler)))
    return points


def _point(handler: OneSparseSite, dense: DenseOutput, output: Any) -> _Point:
    divergence = dense.divergence(output)
    if not math.isfinite(divergence):
        raise CalibrationDataError(
            "the model's output on a held-out batch is not finite",
            context={"sparse site": handler.name, "density": handler.density},
        )
    return _Point(handler.kept / max(handler.visible, 1), divergence)


def _curve(by_length: Mapping[int, list[list[_Point]]]) -> SensitivityCurve:
    densities, divergences = [], []
    for _, runs in sorted(by_length.items()):
        columns = list(zip(*runs, strict=True))
        densities.append(tuple(sum(p.density for p in c) / len(c) for c in columns))
        divergences.append(tuple(sum(p.divergence for p in c) / len(c) for c in columns))
    return SensitivityCurve(
        lengths=tuple(sorted(by_length)),
        densities=tuple(densities),
        divergences=tuple(divergences),
    )


def _rows_of(output: Any) -> tuple[bool, Tensor]:
    """Return whether the output is logits, and ``Float[rows channels]``."""
    logits = output.get("logits") if isinstance(output, Mapping) else None
    logits = getattr(output, "logits", logits)
    if isinstance(logits, Tensor) and logits.is_floating_point():
        return True, logits.detach().flatten(0, -2)
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim:
            return False, leaf.detach().reshape(-1, leaf.shape[-1])
    raise CalibrationDataError("the model returns no floating-point tensor to compare")
