"""Which sites cost the model's output most: one site sparse at a time, all others dense.

Where every site is causal, the first half of a sequence is measured as one of its own, as budgets
are: a tenth of the blocks of a short sequence is fewer blocks, and costs more.

Letters of shapes: see :mod:`seer_compile.types`. D is the number of densities.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from tqdm.auto import tqdm

from seer_compile.calibration import distributed
from seer_compile.calibration.matching import attend_at_density
from seer_compile.calibration.record import Run, dense_answer, gate_of
from seer_compile.calibration.spans import Span, spans_of
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
        self.tokens = rows.shape[-2] if rows.ndim > 2 else None
        """Rows of one sequence; None where the output has no axis for them."""
        rows = rows.reshape(-1, rows.shape[-1])
        held = max(1, _HELD_BYTES // max(1, rows.shape[-1] * rows.element_size()))
        self._step = -(-rows.shape[0] // held)
        self._rows = rows[:: self._step].clone()

    def divergence(self, output: Any) -> float:
        """Return how far another output of the same call is from this one.

        For logits the Kullback-Leibler divergence of the sparse distribution from the dense one,
        in nats, mean over rows. Otherwise the squared error relative to the squared norm of the
        dense output.
        """
        return self.divergences(output, (self.tokens,))[0]

    def divergences(self, output: Any, ends: Sequence[int | None]) -> list[float]:
        """Return the divergence over the first rows of every sequence, for several ends of them.

        Args:
            output: Of the same call.
            ends: Rows of a sequence; None for all.
        """
        wrong, norm = self._compare(_rows_of(output)[1])
        places = torch.arange(len(wrong), device=wrong.device) * self._step % (self.tokens or 1)
        found = []
        for end in ends:
            is_counted = places < (self.tokens or 1 if end is None else end)
            least = torch.finfo(torch.float32).tiny
            value = float(wrong[is_counted].sum() / norm[is_counted].sum().clamp(min=least))
            # Rounding can make nothing slightly negative; written so that NaN stays NaN.
            found.append(0.0 if value < 0 else value)
        return found

    def _compare(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is wrong with each row that is held, and its norm: ``Float64[rows]``."""
        rows = rows.reshape(-1, rows.shape[-1])[:: self._step]
        step = max(1, _CHUNK_BYTES // max(1, 4 * rows.shape[-1]))
        wrong, norm = [], []
        for pair in zip(self._rows.split(step), rows.split(step), strict=True):
            dense, sparse = (part.float() for part in pair)
            if self.is_logits:
                log_dense, log_sparse = dense.log_softmax(-1), sparse.log_softmax(-1)
                part = log_dense.exp() * (log_dense - log_sparse)
                wrong.append(part.sum(-1, dtype=torch.float64))
                norm.append(torch.ones_like(wrong[-1]))
            else:
                wrong.append((dense - sparse).square().sum(-1, dtype=torch.float64))
                norm.append(dense.square().sum(-1, dtype=torch.float64))
        return torch.cat(wrong), torch.cat(norm)


class OneSparseSite:
    """The site handler that answers one site sparsely, at a density, and the others densely."""

    def __init__(self, store: GateStore, name: str | None, density: float) -> None:
        self.store, self.name, self.density = store, name, density
        self.spans: dict[str, list[Span]] = {}
        """The whole call, and its first half where that is one: of the sparse site, of every site
        where none is."""
        self._kept: Counter[int] = Counter()
        self._visible: Counter[int] = Counter()

    def __call__(self, inputs: SiteInputs) -> Tensor:
        """Answer one site."""
        gate = gate_of(self.store, inputs)
        if self.name not in (None, inputs.name):
            return dense_answer(gate, inputs)
        spans = self.spans[inputs.name] = spans_of(gate, inputs)
        if self.name is None:
            return dense_answer(gate, inputs)
        out, matched = attend_at_density(gate, inputs, self.density)
        for span in spans:
            self._kept[span.tokens] += int(matched.selection.counts[..., : span.rows].sum())
            self._visible[span.tokens] += int(matched.visible_counts[..., : span.rows].sum())
        return out

    @property
    def lengths(self) -> dict[str, int]:
        """Key tokens of the sites of :attr:`spans`."""
        return {name: spans[0].tokens for name, spans in self.spans.items()}

    def measured_density(self, tokens: int) -> float:
        """Kept / visible blocks over the first so many tokens, a length of :attr:`spans`."""
        return self._kept[tokens] / max(self._visible[tokens], 1)


class _Point(NamedTuple):
    density: float
    divergence: float


_Found = defaultdict[str, defaultdict[int, list[list[_Point]]]]
"""By site and length."""


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
            Halves count where no whole batch has their length.
        densities: Asked of every site in turn, ascending.
        progress: Show a progress bar.

    Returns:
        A curve per site; under ``torch.distributed`` that of process 0, everywhere.

    Raises:
        CalibrationDataError: An output is not finite, or no tensor to compare is returned.

    Cost:
        One forward per batch, and one more per site and density where it is measured.
    """
    wholes: _Found = defaultdict(lambda: defaultdict(list))
    halves: _Found = defaultdict(lambda: defaultdict(list))
    measured: Counter[tuple[int, ...]] = Counter()
    hidden = not progress or distributed.rank() != 0
    with torch.no_grad():
        for batch in batches if per_length else ():
            observer = OneSparseSite(store, None, 1.0)
            dense = DenseOutput(run(batch, observer))
            lengths = observer.lengths
            measured[tuple(lengths.values())] += 1
            if measured[tuple(lengths.values())] > per_length:
                continue
            names = tqdm(lengths, desc="Measuring sensitivity", unit="site", disable=hidden)
            ends = _ends(observer, dense)
            for name in names:
                points = _points(run, store, batch, dense, name, densities, ends)
                for tokens, part in points.items():
                    (wholes if tokens == lengths[name] else halves)[name][tokens].append(part)
    # Where whole sequences of a length were measured, halves of longer ones are not needed.
    curves = {name: _curve({**halves[name], **by_length}) for name, by_length in wholes.items()}
    return distributed.everywhere(curves, SensitivityCurve.from_json)


def _ends(observer: OneSparseSite, dense: DenseOutput) -> tuple[int, ...]:
    """Return the lengths below the whole at which a call is measured as well: one or none.

    The output of a first half is that of the half alone where no site looks ahead, all halves end
    at one token, and the output has a row per token. What looks ahead beside the sites, such as
    attention that is none, is not seen: such a model's sequences are halved all the same.
    """
    halves = {spans[-1].tokens for spans in observer.spans.values()}
    is_split = all(len(spans) == 2 for spans in observer.spans.values())
    if not is_split or len(halves) != 1 or set(observer.lengths.values()) != {dense.tokens}:
        return ()
    return tuple(halves)


def _points(
    run: Run,
    store: GateStore,
    batch: Any,
    dense: DenseOutput,
    name: str,
    densities: Sequence[float],
    halves: tuple[int, ...],
) -> dict[int, list[_Point]]:
    """Return a point per density, at the length of the batch and at its half."""
    points: list[dict[int, _Point]] = []
    for density in densities:
        # What every selection keeps can be more than is asked for; the whole comes first.
        if points and density <= next(iter(points[-1].values())).density:
            points.append(points[-1])
            continue
        handler = OneSparseSite(store, name, density)
        points.append(_point(handler, dense, run(batch, handler), halves))
    return {tokens: [point[tokens] for point in points] for tokens in points[0]} if points else {}


def _point(
    handler: OneSparseSite, dense: DenseOutput, output: Any, halves: tuple[int, ...]
) -> dict[int, _Point]:
    assert handler.name is not None
    tokens = (handler.lengths[handler.name], *halves)
    divergences = finite_divergences(handler, dense, output, (None, *halves))
    return {
        length: _Point(handler.measured_density(length), divergence)
        for length, divergence in zip(tokens, divergences, strict=True)
    }


def finite_divergences(
    handler: OneSparseSite, dense: DenseOutput, output: Any, ends: Sequence[int | None]
) -> list[float]:
    """Return the divergences of an output with one sparse site; see :class:`DenseOutput`.

    Raises:
        CalibrationDataError: One of them is not finite.
    """
    divergences = dense.divergences(output, ends)
    if not all(map(math.isfinite, divergences)):
        raise CalibrationDataError(
            "the model's output on a held-out batch is not finite",
            context={"sparse site": handler.name, "density": handler.density},
        )
    return divergences


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
    """Return whether the output is logits, and ``Float[... channels]``."""
    logits = output.get("logits") if isinstance(output, Mapping) else None
    logits = getattr(output, "logits", logits)
    if isinstance(logits, Tensor) and logits.is_floating_point():
        return True, logits.detach()
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim:
            return False, leaf.detach()
    raise CalibrationDataError("the model returns no floating-point tensor to compare")
