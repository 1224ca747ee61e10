"""Run cells of the matrix: original against rewritten, site by site and number by number."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from seer_compile.kernels import counters
from seer_compile.types import SiteSummary
from zoo import doors
from zoo.architecture import Architecture, Door
from zoo.cell import Cell, Row, cells_of
from zoo.reference import Answer, answer, build, fresh
from zoo.wrappers import WithCache


class References:
    """Models and answers of the untouched model, kept while neighbouring cells need them."""

    def __init__(self) -> None:
        self._model: tuple[tuple[str, str], nn.Module] | None = None
        self._answers: dict[tuple[str, Door, int], Answer] = {}

    def model(self, architecture: Architecture, spelling: str) -> nn.Module:
        """Return the model of one spelling."""
        key = (architecture.name, spelling)
        if self._model is None or self._model[0] != key:
            self._answers.clear()
            self._model = (key, build(architecture, spelling))
        return self._model[1]

    def answer(self, cell: Cell, size: int) -> Answer:
        """Return what the untouched model answers in the situation of a cell."""
        model = self.model(cell.architecture, cell.spelling)
        key = (cell.situation.name, cell.door, size)
        if key not in self._answers:
            self._answers[key] = answer(model, cell.situation, cell.door, size)
        return self._answers[key]


def run_cells(cells: Iterable[Cell]) -> Iterator[Row]:
    """Run cells one after the other; those of one architecture and spelling share a model."""
    references = References()
    for cell in cells:
        yield run_cell(cell, references)


def run_architecture(architecture: Architecture) -> Iterator[Row]:
    """Run every cell of an architecture."""
    yield from run_cells(cells_of(architecture))


def run_cell(cell: Cell, references: References | None = None) -> Row:
    """Rewrite a model through one door and compare it with the untouched one.

    Never raises for what a model or the compiler does: the row says it.
    """
    row = Row(
        architecture=cell.architecture.name,
        family=cell.architecture.family,
        spelling=cell.spelling,
        situation=cell.situation.name,
        lengths=cell.lengths,
        door=cell.door,
    )
    started = time.perf_counter()
    try:
        with doors.quiet(), torch.no_grad():
            _fill(row, cell, references or References())
    except Exception as cause:
        row.note = _brief(cause)
    torch._dynamo.reset()
    row.seconds = time.perf_counter() - started
    return row


def _fill(row: Row, cell: Cell, references: References) -> None:
    sizes = cell.situation.sizes if cell.dynamic else cell.situation.sizes[:1]
    try:
        answers = [references.answer(cell, size) for size in sizes]
    except Exception as cause:
        row.outcome, row.note = "unavailable", f"eager: {_brief(cause)}"
        return
    model = references.model(cell.architecture, cell.spelling)
    row.counted = answers[0].sites
    if row.counted != cell.sites:
        row.note = f"{row.counted} sites ran, the configuration has {cell.sites}"
        return
    row.barred = cell.barred
    try:
        trial = _try_sparse(cell, model, answers)
    except Exception as cause:
        failure = _failure_without_us(cell, model, answers)
        if failure is None:
            raise
        row.outcome, row.note = "unavailable", failure or _brief(cause)
        return
    row.found = len(trial.sites)
    row.sparse = sum(site.decision == "sparse" for site in trial.sites)
    row.reasons = dict(Counter(site.reason for site in trial.sites if site.decision == "dense"))
    row.visible = "; ".join(
        dict.fromkeys(site.visibility for site in trial.sites if site.decision == "sparse")
    )
    row.error = max(each.excess(got) for each, got in zip(answers, trial.results, strict=True))
    row.outcome = "equal" if row.error <= 1 else "different"
    if row.outcome == "different" and _capture_itself_differs(cell, model, answers, trial):
        row.outcome, row.note = "unavailable", "what PyTorch alone captures answers otherwise"
    if any(calls != row.sparse for calls in trial.sparse_calls):
        row.outcome = "failed"
        row.note = f"{row.sparse} sparse sites, but sparse calls {trial.sparse_calls}"


def _capture_itself_differs(
    cell: Cell, model: nn.Module, answers: Sequence[Answer], trial: _Trial
) -> bool:
    """Whether the capture without us differs from the model too, and from us by rounding only.

    Models may ask whether they are being exported and then build other masks.
    """
    torch._dynamo.reset()
    compiled = _compiled(cell, model, answers[0], sparse=False)
    for each, ours in zip(answers, trial.results, strict=True):
        plain = compiled(each.batch.inputs)
        if each.excess(plain) <= 1 or not each.agrees(plain, ours):
            return False
    return True


@dataclass(kw_only=True)
class _Trial:
    """What one compiled module did on one or two sizes."""

    sites: list[SiteSummary] = field(default_factory=list[SiteSummary])
    results: list[Tensor] = field(default_factory=list[Tensor])
    sparse_calls: list[int] = field(default_factory=list[int])


def _try_sparse(cell: Cell, model: nn.Module, answers: Sequence[Answer]) -> _Trial:
    trial = _Trial()
    with doors.recorded_plans() as plans:
        compiled = _compiled(cell, model, answers[0], sparse=True)
        for each in answers:
            counters.reset()
            trial.results.append(compiled(each.batch.inputs))
            calls = counters.snapshot().values()
            trial.sparse_calls.append(sum(paths.get("sparse", 0) for paths in calls))
            trial.sites = trial.sites or _distinct(plans)
    return trial


def _distinct(plans: Iterable[tuple[SiteSummary, ...]]) -> list[SiteSummary]:
    """Return the sites of all graphs; of a graph that Dynamo handed over twice, the last plan."""
    latest = {tuple(site.name for site in plan): plan for plan in plans}
    return [site for plan in latest.values() for site in plan]


def _failure_without_us(cell: Cell, model: nn.Module, answers: Sequence[Answer]) -> str | None:
    """Return why PyTorch alone cannot compile or export this, or None where it can."""
    torch._dynamo.reset()
    try:
        compiled = _compiled(cell, model, answers[0], sparse=False)
        for each in answers:
            compiled(each.batch.inputs)
    except Exception as cause:
        return _brief(cause)
    return None


def _compiled(cell: Cell, model: nn.Module, first: Answer, *, sparse: bool) -> doors.Compiled:
    """Return the wrapped model behind its door; every call finds its cache as it was."""
    module = cell.situation.wrap(model, cell.door)
    if cell.door == "dynamo":
        compile_module = doors.compile_sparse if sparse else doors.compile_plain
        compiled, owner = compile_module(module, dynamic=cell.dynamic), module
    else:
        shapes = None
        if cell.dynamic:
            shapes = doors.dynamic_shapes(first.batch.inputs, cell.situation.dynamic)
        export_module = doors.export_sparse if sparse else doors.export_plain
        owner = compiled = export_module(module, fresh(first.batch.inputs), shapes)
    before = {name: buffer.clone() for name, buffer in owner.named_buffers()}

    def call(inputs: dict[str, Any]) -> Tensor:
        if isinstance(module, WithCache):
            module.forget_calls()
        result = compiled(fresh(inputs))
        for name, buffer in owner.named_buffers():
            if name in before:
                buffer.copy_(before[name])
        return result

    return call


def _brief(cause: BaseException) -> str:
    """Return the type and the first line of an exception."""
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0] if lines else ''}"[:300]
