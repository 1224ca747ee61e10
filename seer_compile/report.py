"""``seer_report``: what became of each attention site of an optimized model, and what ran."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from seer_compile.session import Session
from seer_compile.table import render_table
from seer_compile.types import SiteSummary


@dataclass(frozen=True, kw_only=True)
class SiteRow:
    """One attention site in one situation (prefill, decode)."""

    site: SiteSummary
    graphs: int
    """Captured graphs in which the site looked like this."""


@dataclass(frozen=True, kw_only=True)
class SeerReport:
    """What was compiled for one model, and how its calls were answered."""

    model: str
    is_calibrated: bool
    is_stale: bool
    """Whether the model is no longer the one that its gates were calibrated on."""
    graphs: int
    """Graphs captured, recompiles included."""
    rows: tuple[SiteRow, ...]
    calls: dict[str, dict[str, int]]
    """Per site, in all its situations: how many calls since :func:`optimize` took which path,
    ``sparse``, or ``dense:`` and why."""
    shared_gates: dict[str, int]
    """Sites that several calls in one graph share, and so one gate: how many calls."""
    uncompiled_calls: int
    """Calls of the model that PyTorch ran without any graph, so with dense attention."""
    errors: tuple[str, ...]
    """Why graphs were compiled as they came."""
    pass_seconds: dict[str, float]
    """Total time per pass."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        """Return a table of the sites and their calls."""
        state = "calibrated" if self.is_calibrated else "not calibrated"
        state += ", for other weights than these" if self.is_stale else ""
        title = f"{self.model}: {self.graphs} graphs, gates {state}"
        header = ("site", "query", "key", "visible", "decision", "reason", "graphs", "calls")
        cells = [
            (*site_cells(row.site), str(row.graphs), calls)
            for row, calls in zip(self.rows, self._call_cells(), strict=True)
        ]
        lines = [title, render_table(header, cells), *sharing_lines(self.shared_gates)]
        if self.uncompiled_calls:
            lines.append(f"{self.uncompiled_calls} calls ran uncompiled, with dense attention")
        lines += [f"compiled as it came: {error}" for error in self.errors]
        return "\n".join(lines)

    def _call_cells(self) -> Iterator[str]:
        """Yield a cell per row: calls are counted per site, so its first sparse row shows them."""
        shown: set[str] = set()
        for site in (row.site for row in self.rows):
            paths = self.calls.get(site.name, {}) if site.decision == "sparse" else {}
            calls = ", ".join(f"{number} {path}" for path, number in sorted(paths.items()))
            yield "(above)" if calls and site.name in shown else calls
            shown |= {site.name} if calls else set()


def site_cells(site: SiteSummary) -> tuple[str, ...]:
    """Return the cells that every table of sites begins with."""
    shapes = (" x ".join(map(str, shape)) for shape in (site.query_shape, site.key_shape))
    return (site.name, *shapes, site.visibility, site.decision, site.reason)


def count_sharing(sites: Iterable[SiteSummary]) -> dict[str, int]:
    """Return how many calls of one forward or graph are one sparse site, where that is several."""
    calls = Counter(site.name for site in sites if site.decision == "sparse")
    return {name: number for name, number in calls.items() if number > 1}


def sharing_lines(shared: Mapping[str, int]) -> list[str]:
    """Say of each shared gate what it follows from."""
    return [
        f"{number} calls share the one gate of {name}, as one module makes them: modules of "
        "their own would have a gate each"
        for name, number in shared.items()
    ]


def build_report(session: Session) -> SeerReport:
    """Return the report of one model at this moment."""
    rows: dict[str, dict[SiteSummary, int]] = {}
    seconds: dict[str, float] = {}
    shared: Counter[str] = Counter()
    for record in session.log.records:
        shared |= Counter(count_sharing(record.sites))
        # Several calls of one module in a graph are one row of it.
        for site in dict.fromkeys(record.sites):
            graphs = rows.setdefault(site.name, {})
            graphs[site] = graphs.get(site, 0) + 1
        for name, time in record.seconds.items():
            seconds[name] = seconds.get(name, 0.0) + time
    return SeerReport(
        model=type(session.model).__name__,
        is_calibrated=session.store.is_calibrated,
        is_stale=bool(session.provenance.differences(session.model)),
        graphs=len(session.log.records),
        rows=tuple(
            SiteRow(site=site, graphs=number)
            for graphs in rows.values()
            for site, number in graphs.items()
        ),
        calls={name: session.calls(name) for name in sorted(rows)},
        shared_gates=dict(shared),
        uncompiled_calls=session.log.uncompiled_calls,
        errors=tuple(record.error for record in session.log.records if record.error),
        pass_seconds=seconds,
    )
