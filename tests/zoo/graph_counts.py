"""Count the graphs that one architecture needs for many lengths: ours, and PyTorch's alone.

A model that PyTorch captures whole must do with :data:`MOST_GRAPHS`. One whose own Python breaks
its graph has graphs in several frames (code objects), each of which must do with that many. Where
PyTorch alone needs more for the same calls, we must not need more than it: counted is plain
``torch.compile`` with the backend ``eager`` and, where that needs fewer than we do, ``aot_eager``,
which traces captured graphs on to ATen, as Inductor does and as we do.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._guards import CompileContext
from torch.fx import GraphModule

import seer_compile
from seer_compile.report import SeerReport
from zoo import doors
from zoo.lengths import Lengths, kinds_of_calls
from zoo.reference import build

MOST_GRAPHS = 3
"""Per frame: one for the first length, one for all lengths, one for a special case of the model's
own, such as lengths within its window."""
KINDS = kinds_of_calls()
MISSED = {"prefix model": 2, "softmax plus one": 2}
"""Sites that could be block-sparse and are not; ``docs/models.md`` says why."""


class FrameCounts:
    """A Dynamo backend that counts graphs per frame and leaves them to another one."""

    def __init__(self, name: str = "eager") -> None:
        self.name = name
        self.by_frame: Counter[Any] = Counter()

    def __call__(self, graph_module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        compiling = CompileContext.current_compile_id()
        self.by_frame[getattr(compiling, "frame_id", None)] += 1
        return torch._dynamo.lookup_backend(self.name)(graph_module, list(inputs))


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Graphs of one model in many calls."""

    graphs: int
    first: int
    """Those that the first length needed."""
    frames: int
    """Code objects that have graphs."""
    most: int
    """The largest number of graphs of one frame."""
    dynamo: int
    """Graphs as Dynamo counts them itself."""


@dataclass(kw_only=True)
class GraphRow:
    """What came of one architecture: plain data."""

    model: str
    spelling: str
    unit: str
    shortest: int
    longest: int
    lengths: int
    distinct: int
    ours: Counts
    plain: Counts
    traced: Counts | None = None
    """Plain with the backend ``aot_eager``; counted where it is needed."""
    reported: int
    """Graphs in our report."""
    possible: int
    """Sites that can be block-sparse in principle."""
    sparse: int
    calls: dict[str, dict[str, int]] = field(default_factory=dict[str, dict[str, int]])
    """Per site and path."""
    expected_calls: dict[str, int] = field(default_factory=dict[str, int])
    uncompiled: int = 0
    """Calls that PyTorch ran without a graph, at its limit of recompiles."""
    errors: tuple[str, ...] = ()
    refuses_other_sizes: bool | None = None
    """Whether the plain model refuses pictures or sound of another size; None where it has many."""
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        """Return ``few``, ``few per frame``, ``as plain`` or ``too many``."""
        if self.ours.graphs <= MOST_GRAPHS:
            return "few"
        # What Dynamo compiles for one frame says nothing of another.
        if self.ours.most <= MOST_GRAPHS and self.ours.graphs <= MOST_GRAPHS * self.plain.first:
            return "few per frame"
        alone = self.plain.graphs if self.traced is None else self.traced.graphs
        return "as plain" if self.ours.graphs <= alone else "too many"

    def problems(self) -> list[str]:
        """Return what is not as it should be."""
        found = [f"a pass failed: {error}" for error in self.errors]
        if self.verdict == "too many":
            found.append(f"{self.ours}, without us {self.plain}, {self.traced}")
        if not self.ours.graphs == self.ours.dynamo == self.reported:
            found.append(f"{self.ours} counted, {self.reported} reported")
        if self.plain.graphs != self.plain.dynamo:
            found.append(f"{self.plain} counted without us")
        if self.sparse != self.possible - MISSED.get(self.model, 0):
            found.append(f"{self.sparse} of {self.possible} sites are sparse")
        if self.uncompiled and self.verdict != "as plain":
            found.append(f"{self.uncompiled} calls ran uncompiled")
        for site, expected in self.expected_calls.items():
            paths = self.calls.get(site, {})
            if paths != {"sparse": expected}:
                found.append(f"{site}: calls {paths}, {expected} were made")
        if self.refuses_other_sizes is False:
            found.append("the model takes other sizes, which were not tried")
        return found

    def flat(self) -> dict[str, Any]:
        """Return what goes into a file of rows."""
        return {
            "model": self.model,
            "spelling": self.spelling,
            "varies": self.unit,
            "shortest": self.shortest,
            "longest": self.longest,
            "lengths": self.lengths,
            "distinct": self.distinct,
            "graphs": self.ours.graphs,
            "plain_graphs": self.plain.graphs,
            "plain_aot_graphs": None if self.traced is None else self.traced.graphs,
            "first": self.ours.first,
            "plain_first": self.plain.first,
            "frames": self.ours.frames,
            "plain_frames": self.plain.frames,
            "most_per_frame": self.ours.most,
            "plain_most_per_frame": self.plain.most,
            "verdict": self.verdict,
            "sites": self.possible,
            "sparse": self.sparse,
            "sparse_calls": sum(paths.get("sparse", 0) for paths in self.calls.values()),
            "uncompiled_calls": self.uncompiled,
            "refuses_other_sizes": self.refuses_other_sizes,
            "problems": self.problems(),
            "seconds": round(self.seconds, 1),
        }


@torch.no_grad()
def count_graphs(name: str, number: int) -> GraphRow:
    """Make calls of one kind at random lengths, compiled by PyTorch alone, then optimized.

    Gates answer sparsely at any size, so that short calls go through the sparse path as well.
    """
    started = time.perf_counter()
    architecture, lengths = KINDS[name]
    spelling = architecture.spellings[0]
    untouched = build(architecture, spelling)
    longest = lengths.longest_accepted(untouched)
    sizes = lengths.draw(number, longest)
    refuses = None if lengths.other is None else lengths.refuses(untouched)
    with doors.quiet():
        plain = _count_plain(name, sizes, "eager")
        backend = FrameCounts()
        model: Any = build(architecture, spelling)
        seer_compile.optimize(model, zero_shot=True, inner=backend)
        model.seer_gates.set_mode(True, at_any_size=True)
        ours = _run(model, backend, lengths, sizes)
        needs_more = ours.graphs > plain.graphs
        traced = _count_plain(name, sizes, "aot_eager") if needs_more else None
    report: SeerReport = model.seer_report()
    sparse = _sparse_sites(report)
    compiled = number - report.uncompiled_calls
    return GraphRow(
        model=name,
        spelling=spelling,
        unit=lengths.unit,
        shortest=sizes[-2],
        longest=sizes[-1],
        lengths=number,
        distinct=len(set(sizes)),
        ours=ours,
        plain=plain,
        traced=traced,
        reported=report.graphs,
        possible=architecture.sites - sum(architecture.barred.values()),
        sparse=sum(sparse.values()),
        calls={site: paths for site, paths in report.calls.items() if paths},
        expected_calls={site: times * compiled for site, times in sparse.items()},
        uncompiled=report.uncompiled_calls,
        errors=report.errors,
        refuses_other_sizes=refuses,
        seconds=time.perf_counter() - started,
    )


def _sparse_sites(report: SeerReport) -> dict[str, int]:
    """Return the sites that are sparse in every graph, and their calls per forward."""
    decisions: dict[str, set[str]] = {}
    for row in report.rows:
        decisions.setdefault(row.site.name, set()).add(row.site.decision)
    return {
        site: report.shared_gates.get(site, 1)
        for site, decided in decisions.items()
        if decided == {"sparse"}
    }


def _count_plain(name: str, sizes: Sequence[int], backend: str) -> Counts:
    architecture, lengths = KINDS[name]
    model, counting = build(architecture, architecture.spellings[0]), FrameCounts(backend)
    model.compile(backend=counting)
    return _run(model, counting, lengths, sizes)


def _run(model: nn.Module, backend: FrameCounts, lengths: Lengths, sizes: Sequence[int]) -> Counts:
    torch._dynamo.reset()
    before, first = counters["stats"]["unique_graphs"], 0
    module = lengths.wrap(model, "dynamo")
    for size in sizes:
        module(lengths.make(model, size).inputs)
        first = first or backend.by_frame.total()
    return Counts(
        graphs=backend.by_frame.total(),
        first=first,
        frames=len(backend.by_frame),
        most=max(backend.by_frame.values(), default=0),
        dynamo=counters["stats"]["unique_graphs"] - before,
    )
