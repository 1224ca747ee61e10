"""``docs/models.md``: what was found in every model, written from the rows of a run, and read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from zoo.cell import Row

HEADER = ("architecture", "spelling", "situation", "sites", "sparse", "visible", "dense because")
LEAST_SHARE = 0.95
"""Of the sites that can be block-sparse in principle, those that must be."""


@dataclass(frozen=True)
class Entry:
    """One line of the catalogue: what all doors and lengths of a situation have in common."""

    architecture: str
    spelling: str
    situation: str
    sites: str
    sparse: str
    visible: str
    reason: str

    @property
    def key(self) -> tuple[str, str, str]:
        """Return what a line is looked up by."""
        return self.architecture, self.spelling, self.situation


@dataclass(frozen=True, kw_only=True)
class Totals:
    """The figures of a whole run."""

    architectures: int
    cells: int
    outcomes: Mapping[str, int]
    sites: int
    """Attention computations counted in the untouched models, over all cells that ran."""
    possible: int
    """Those that can be block-sparse in principle."""
    sparse: int

    @property
    def share(self) -> float:
        """Return the share of the possible sites that are sparse."""
        return self.sparse / self.possible if self.possible else 1.0


def totals(rows: Sequence[Row]) -> Totals:
    """Add up a run."""
    ran = [row for row in rows if row.outcome != "unavailable"]
    return Totals(
        architectures=len({row.architecture for row in rows}),
        cells=len(rows),
        outcomes=Counter(row.outcome for row in rows),
        sites=sum(row.counted for row in ran),
        possible=sum(row.counted - row.barred for row in ran),
        sparse=sum(row.sparse for row in ran),
    )


def entries(rows: Iterable[Row]) -> list[Entry]:
    """Return the lines of the catalogue, in the order of the rows."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.architecture, row.spelling, row.situation), []).append(row)
    return [_entry(group) for group in groups.values()]


def _entry(group: Sequence[Row]) -> Entry:
    ran = [row for row in group if row.outcome != "unavailable"]
    first = group[0]
    if not ran:
        return Entry(
            first.architecture,
            first.spelling,
            first.situation,
            "",
            "",
            "",
            "torch cannot capture it",
        )
    return Entry(
        first.architecture,
        first.spelling,
        first.situation,
        _agreed(str(row.counted) for row in ran),
        _agreed(str(row.sparse) for row in ran),
        _agreed(plain_visibility(row.visible) for row in ran),
        _agreed(_reasons(row) for row in ran),
    )


def _agreed(values: Iterable[str]) -> str:
    return " / ".join(dict.fromkeys(value for value in values if value))


def _reasons(row: Row) -> str:
    counts: Counter[str] = Counter()
    for reason, count in row.reasons.items():
        # Names of graph nodes differ from run to run.
        counts[re.sub(r"`[^`]*`", "`...`", reason)] += count
    return "; ".join(f"{count} x {reason}" for reason, count in counts.items())


def plain_visibility(text: str) -> str:
    """Return a description without the graph's names for lengths and tensors."""
    parts = (re.sub(r"offset=[^),]*", "offset", part) for part in text.split("; "))
    return "; ".join(dict.fromkeys(parts))


def render(rows: Sequence[Row]) -> str:
    """Return the whole page."""
    families: dict[str, list[Row]] = {}
    for row in rows:
        families.setdefault(row.family, []).append(row)
    lines = [*_introduction(rows)]
    for family, members in families.items():
        names = len({row.architecture for row in members})
        lines += ["", f"## {family.capitalize()} ({names})", "", _line(HEADER)]
        lines.append(_line(["---"] * len(HEADER)))
        lines += [_line(vars(entry).values()) for entry in entries(members)]
    lines += [*_unavailable(rows), *_misses(rows)]
    return "\n".join(lines) + "\n"


def _introduction(rows: Sequence[Row]) -> list[str]:
    lines = [
        "# Models",
        "",
        "Written by `make models`, which fails when a number is off; not to be edited. Small",
        "models with random weights are called as they came and rewritten, every visible block",
        "kept; *equal* means no further from float64 than the untouched model is. Each line stands",
        "for all ways of capturing a model that are named here; `/` separates what differs between",
        "them. *Sites* are counted in the running model, without our finder.",
        "",
        "`dynamo` is `torch.compile`, `export` is `seer_compile.export`. *Unavailable* are cells",
        "that PyTorch alone cannot compile, or export and export again; they are listed below.",
        "Sites that can be block-sparse in principle have no bias on the logits, more than one",
        "query token, and weights that nobody else reads.",
    ]
    for versions in sorted({row.versions for row in rows}, reverse=True):
        lines += ["", *_figures([row for row in rows if row.versions == versions], versions)]
    return lines


def _figures(rows: Sequence[Row], versions: str) -> list[str]:
    """Return the figures of the rows of one set of versions."""
    run = totals(rows)
    ways = Counter(f"{row.lengths} {row.door}" for row in rows)
    outcomes = ", ".join(f"{count} {name}" for name, count in sorted(run.outcomes.items()))
    return [
        f"With {versions}:",
        "",
        f"- {run.architectures} architectures, {run.cells} cells: {outcomes}.",
        f"- {', '.join(f'{way} {count} cells' for way, count in sorted(ways.items()))}.",
        f"- {run.sites} sites ran, {run.possible} can be block-sparse in principle, "
        f"{run.sparse} are: {run.share:.1%}.",
    ]


def _unavailable(rows: Sequence[Row]) -> Iterable[str]:
    groups: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row.outcome == "unavailable":
            key = (row.architecture, f"{row.door}, {row.lengths}", row.note)
            groups.setdefault(key, []).append(f"{row.spelling}: {row.situation}")
    if groups:
        header = ("architecture", "way", "cells", "what PyTorch says")
        yield from ("", "## Unavailable", "", _line(header), _line(["---"] * 4))
        for (architecture, way, note), cells in groups.items():
            yield _line((architecture, way, "; ".join(cells), note))


def _misses(rows: Sequence[Row]) -> Iterable[str]:
    groups: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in rows:
        if row.outcome != "unavailable" and row.missed:
            key = (row.architecture, row.spelling, row.situation, _reasons(row))
            groups.setdefault(key, []).append(row)
    if groups:
        header = ("architecture", "spelling", "situation", "ways", "missed", "why dense")
        yield from ("", "## Misses", "", _line(header), _line(["---"] * len(header)))
        for (*names, reason), members in groups.items():
            ways = dict.fromkeys(f"{row.lengths} {row.door}" for row in members)
            yield _line((*names, ", ".join(ways), sum(row.missed for row in members), reason))


def _line(cells: Iterable[object]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def read(text: str) -> dict[tuple[str, str, str], Entry]:
    """Return the lines of a page by architecture, spelling and situation."""
    found = {}
    for line in text.splitlines():
        cells = re.split(r"(?<!\\)\|", line)[1:-1]
        if len(cells) == len(HEADER) and re.fullmatch(r"[\d /]+", cells[3]):
            entry = Entry(*(cell.strip().replace("\\|", "|") for cell in cells))
            found[entry.key] = entry
    return found
