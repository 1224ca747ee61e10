"""What a budget buys, measured: density and captured mass per site, for gate, oracle and control.

Letters of shapes: see :mod:`seer_compile.types`. P is the number of budgets of a grid.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from seer_compile.budget_curve import BudgetCurve
from seer_compile.calibration import distributed
from seer_compile.calibration.curve_sums import (
    CurveSums,
    curve_of,
    selection_totals,
    windows_of,
)
from seer_compile.calibration.record import Run, dense_answer, gate_of
from seer_compile.calibration.site_trainer import no_site
from seer_compile.calibration.spans import Span, spans_of
from seer_compile.calibration.targets import attention_mass
from seer_compile.errors import CalibrationDataError
from seer_compile.gate import AttnGate
from seer_compile.gate_scores import visible_units
from seer_compile.gate_store import GateStore
from seer_compile.kernels.geometry import units_with_key
from seer_compile.types import BlockSelection, SiteInputs, Visibility

MASS_GRID: tuple[float, ...] = (
    *(0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75),
    *(0.8, 0.85, 0.9, 0.925, 0.95, 0.965, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9998),
    *(1 - 1e-4, 1 - 3e-5, 1 - 1e-5, 1 - 3e-6, 1 - 1e-6, 1 - 1e-7, 1 - 1e-8, 1 - 1e-9, 1 - 1e-10),
    *(1 - 1e-11, 1 - 1e-12, 1.0),
)
"""Budgets at which top-p is measured; density rises fastest near 1.

A trained gate is sure of itself: at some sites of a 27M-parameter model all but 1e-5 of the score
sits in 5 % of the blocks. What tells the other blocks apart are shares far closer to 1.
"""
FRACTION_GRID: tuple[float, ...] = (
    *(0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
    *(0.9, 1.0),
)
COUNT_GRID: tuple[float, ...] = tuple(
    float(count) for power in range(15) for count in (2**power, 3 * 2**power // 2)
)[1:]
RATIO_GRID: tuple[float, ...] = tuple(2.0 ** (6 - power / 2) for power in range(33))
GRIDS = {
    "top_p": MASS_GRID,
    "fraction": FRACTION_GRID,
    "top_k": COUNT_GRID,
    "threshold": RATIO_GRID,
}

# Lengths closer than this many steps per octave share a row of the curve.
_STEPS_PER_OCTAVE = 2
_SCORES_AT_ONCE = 8 * 2**20
"""Block scores that selections of several budgets are made from in one call: 32 MB."""

_MAP_SIDE = 96
_ORACLE_STEP = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockMap:
    """One head's maps on one sequence, for plots: rows are query blocks, columns key blocks."""

    head: int
    scores: tuple[tuple[float, ...], ...]
    oracle: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteTable:
    """Everything measured at one site."""

    gate: BudgetCurve
    oracle: BudgetCurve
    """The same selector on the true mass map."""
    control: BudgetCurve
    """Sink and local window of 1, 2, 4, ... blocks; the budget is the window."""
    head_densities: tuple[tuple[float, ...], ...]
    """P x s: the gate's density per selection head at the longest length."""
    block_map: BlockMap


def tabulate(
    run: Run,
    store: GateStore,
    batches: Iterable[Any],
    *,
    grid: Sequence[float] | None = None,
    measure_errors: bool = False,
    progress: bool = False,
) -> dict[str, SiteTable]:
    """Measure every site that the batches reach, at every length they have.

    Density at a given mass falls with length, so curves hold for the lengths that were measured;
    longer batches can be passed although training saw short ones only.

    Args:
        run: One forward of the frozen model with a handler.
        store: The gates.
        batches: Held-out batches.
        grid: Budgets of the gates' selector; a grid made for it when None.
        measure_errors: Also run sparse attention at every budget and measure its output.
        progress: Show a progress bar.

    Returns:
        A table per site; under ``torch.distributed`` that of process 0, everywhere.

    Raises:
        CalibrationDataError: No batch reaches a site.

    Cost:
        Per site and batch: one attention-mass map, and four selections per three budgets; some 16
        times the 32 MB of scores from which several are made at once.
    """
    recorder = CurveRecorder(store, grid=grid, measure_errors=measure_errors)
    hidden = not progress or distributed.rank() != 0
    with torch.no_grad():
        for batch in tqdm(batches, desc="Measuring budgets", unit="batch", disable=hidden):
            run(batch, recorder)
    return recorder.tables()


class CurveRecorder:
    """The site handler that measures: a dense answer, and sums for the curves."""

    def __init__(
        self,
        store: GateStore,
        *,
        grid: Sequence[float] | None = None,
        measure_errors: bool = False,
    ) -> None:
        self.store = store
        self.grid = tuple(GRIDS[store.config.selector.name] if grid is None else grid)
        # The oracle is for comparison only: every third budget, and all blocks.
        self.oracle_grid = (*self.grid[:-1:_ORACLE_STEP], self.grid[-1])
        self.measure_errors = measure_errors
        self._sums: dict[str, dict[int, CurveSums]] = {}
        self._maps: dict[str, BlockMap] = {}
        self._map_lengths: dict[str, int] = {}

    def __call__(self, inputs: SiteInputs) -> Tensor:
        """Measure one site on one batch and answer densely."""
        gate = gate_of(self.store, inputs)
        answer = dense_answer(gate, inputs)
        with torch.inference_mode(False), torch.no_grad():
            self._measure(gate, inputs, answer)
        return answer

    def tables(self) -> dict[str, SiteTable]:
        """Return what was measured so far.

        Raises:
            CalibrationDataError: Nothing was measured, or it is not finite.
        """
        if not self._sums:
            raise no_site()
        return {name: self._table(name, sums) for name, sums in self._sums.items()}

    def _measure(self, gate: AttnGate, inputs: SiteInputs, answer: Tensor) -> None:
        size, k_len = gate.config.block_size, inputs.key.shape[-2]
        mass = attention_mass(inputs, query_unit=size.query, key_unit=size.key)
        # [b s m n]: what the heads of one selection carry together, and what the neediest needs.
        shared = mass.unflatten(1, (gate.selection_heads, gate.groups))
        captured_by, needed = shared.mean(2), shared.amax(2)
        visible, distance = block_visibility(gate, inputs), _distance_to_diagonal(gate, inputs)
        sink = _sink(visible, inputs, size.key)
        spans = [(span, self._sums_of(inputs.name, gate, span)) for span in spans_of(gate, inputs)]
        for span, sums in spans:
            part, seen = span.of(captured_by), span.of(visible)
            sums.add_rows(span.tokens, part, seen, is_half=span.is_half)
            sums.add_control(part, seen, span.of(sink), span.of(distance))
        scores = gate.block_scores(inputs)
        grids = {"gate": (scores, self.grid), "oracle": (needed, self.oracle_grid)}
        for kind, (ranked, grid) in grids.items():
            for first, selection in selections_at(gate, inputs, ranked, grid):
                count = selection.counts.shape[1] // gate.selection_heads
                totals = selection_totals(selection, _repeated(captured_by, count))
                kept, captured = (part.unflatten(0, (count, -1)) for part in totals)
                for span, sums in spans:
                    rows = slice(span.rows)
                    sums.add(kind, first, kept[..., rows].sum(-1), captured[..., rows].sum(-1))
                if kind == "gate" and self.measure_errors:
                    for place in range(count):
                        sparse = _sparse_answer(gate, inputs, _one_of(selection, place, count))
                        for span, sums in spans:
                            tokens = slice(span.rows * size.query)
                            parts = (sparse[..., tokens, :], answer[..., tokens, :])
                            sums.add_error(first + place, *parts)
        self._keep_map(inputs.name, k_len, scores, needed)

    def _sums_of(self, name: str, gate: AttnGate, span: Span) -> CurveSums:
        by_bucket = self._sums.setdefault(name, {})
        bucket = round(_STEPS_PER_OCTAVE * math.log2(max(span.tokens, 1)))
        return by_bucket.setdefault(bucket, CurveSums(len(self.grid), gate.selection_heads))

    def _keep_map(self, name: str, k_len: int, scores: Tensor, needed: Tensor) -> None:
        if k_len > self._map_lengths.get(name, 0):
            head = scores.shape[1] // 2
            self._map_lengths[name] = k_len
            self._maps[name] = BlockMap(
                head=head, scores=_thumbnail(scores[0, head]), oracle=_thumbnail(needed[0, head])
            )

    def _table(self, name: str, by_bucket: dict[int, CurveSums]) -> SiteTable:
        ordered = [by_bucket[bucket] for bucket in sorted(by_bucket)]
        longest = ordered[-1]
        heads = longest.gate_kept / longest.visible_per_head.clamp(min=1)
        data = {
            "gate": curve_of("gate", self.store.config.selector.name, self.grid, ordered),
            "oracle": curve_of(
                "oracle", self.store.config.selector.name, self.oracle_grid, ordered
            ),
            "control": curve_of("control", "sink_local", windows_of(ordered), ordered),
            "heads": heads.tolist(),
            "map": [self._maps[name].head, self._maps[name].scores, self._maps[name].oracle],
        }
        if not math.isfinite(sum(map(sum, data["gate"]["captured_mass"]))):
            raise CalibrationDataError(
                "the attention mass of a held-out batch is not finite", context={"site": name}
            )
        data = distributed.gather(data)[0]
        head, scores, oracle = data["map"]
        return SiteTable(
            gate=BudgetCurve.from_json(data["gate"]),
            oracle=BudgetCurve.from_json(data["oracle"]),
            control=BudgetCurve.from_json(data["control"]),
            head_densities=tuple(map(tuple, data["heads"])),
            block_map=BlockMap(
                head=head, scores=tuple(map(tuple, scores)), oracle=tuple(map(tuple, oracle))
            ),
        )


def selections_at(
    gate: AttnGate, inputs: SiteInputs, scores: Tensor, budgets: Sequence[float]
) -> Iterator[tuple[int, BlockSelection]]:
    """Select at every budget, as many as memory allows in one call.

    A call costs the host more than a selection costs the device, at lengths that are calibrated on.

    Args:
        gate: Whose selector chooses.
        inputs: Operands of the site.
        scores: ``Float32[b s m n]``.
        budgets: Of the selector.

    Yields:
        The place of the first budget of a call, and its selections: ``P*s`` heads, those of one
        budget after those of the one before.
    """
    at_once = max(1, _SCORES_AT_ONCE // max(scores.numel(), 1))
    for first in range(0, len(budgets), at_once):
        part = torch.tensor(budgets[first : first + at_once], dtype=torch.float64)
        budget = part.repeat_interleave(scores.shape[1]).to(scores.device)
        yield first, gate.select_from(_repeated(scores, len(part)), inputs, budget)


def _repeated(scores: Tensor, count: int) -> Tensor:
    """Return heads several times over; a long sequence's, taken once, are not copied."""
    return scores if count == 1 else scores.repeat(1, count, 1, 1)


def _one_of(selection: BlockSelection, place: int, count: int) -> BlockSelection:
    """Return one of ``count`` selections that came of one call."""
    return BlockSelection(*(part.unflatten(1, (count, -1))[:, place] for part in selection))


def block_visibility(gate: AttnGate, inputs: SiteInputs) -> Tensor:
    """Return ``Bool[m n]``: which block pairs the band leaves visible."""
    size = gate.config.block_size
    return visible_units(
        inputs.visibility,
        units=(size.query, size.key),
        lengths=(inputs.query.shape[-2], inputs.key.shape[-2]),
        device=inputs.query.device,
        band_only=True,
    )[0, 0]


def _sink(visible: Tensor, inputs: SiteInputs, key_unit: int) -> Tensor:
    """Return ``Bool[b or 1, 1, m, n]``: the first visible block of a row with a real key."""
    padding = inputs.visibility.key_padding
    readable = visible[None, None]
    if padding is not None:
        readable = readable & units_with_key(padding, key_unit)[:, None, None]
    return readable & readable.cumsum(-1).eq(1)


def _distance_to_diagonal(gate: AttnGate, inputs: SiteInputs) -> Tensor:
    """Return ``Int64[m n]``: key blocks between a block and its row's own position."""
    size, visibility = gate.config.block_size, inputs.visibility
    q_len, k_len = inputs.query.shape[-2], inputs.key.shape[-2]
    device = inputs.query.device
    rows = torch.arange(-(-q_len // size.query), device=device)
    shift = _own_position(visibility, q_len, k_len)
    first = (rows * size.query + shift).clamp(0, k_len - 1) // size.key
    last = ((rows + 1) * size.query - 1).clamp(max=q_len - 1) + shift
    last = last.clamp(0, k_len - 1) // size.key
    columns = torch.arange(-(-k_len // size.key), device=device)
    before = (first[:, None] - columns).clamp(min=0)
    return before + (columns - last[:, None]).clamp(min=0)


def _own_position(visibility: Visibility, q_len: int, k_len: int) -> int | Tensor:
    if visibility.upper is None:
        return 0 if q_len == k_len else k_len - q_len
    return visibility.upper + (0 if visibility.offset is None else visibility.offset)


def _sparse_answer(gate: AttnGate, inputs: SiteInputs, selection: BlockSelection) -> Tensor:
    size = gate.config.block_size
    return torch.ops.seer_compile.block_sparse_attention.v1(
        inputs.query,
        inputs.key,
        inputs.value,
        selection.indices,
        selection.counts,
        inputs.scale,
        size.query,
        size.key,
        *inputs.last_arguments(),
    )[0]


def _thumbnail(scores: Tensor) -> tuple[tuple[float, ...], ...]:
    """Return a map of at most 96 x 96 cells, each the largest of the blocks it stands for."""
    rows, columns = (min(_MAP_SIDE, side) for side in scores.shape)
    small = torch.nn.functional.adaptive_max_pool2d(scores[None].float(), (rows, columns))[0]
    return tuple(tuple(round(value, 5) for value in row) for row in small.cpu().tolist())
