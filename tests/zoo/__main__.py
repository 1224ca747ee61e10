"""Run the whole matrix and write the catalogue: ``make models``.

``python -m zoo --rows FILE`` keeps rows in a file and skips the cells that it has, so that the run
can be done in pieces. ``--ways`` leaves out ways into the compiler and ``--minutes`` sets an end;
the page says how many cells of each way it is about. ``--only`` runs some architectures and writes
no page.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from zoo import catalogue
from zoo.cell import Cell, Row, cells_of
from zoo.matrix import run_cells
from zoo.registry import ARCHITECTURES

WAYS = ("static export", "dynamic dynamo", "dynamic export", "static dynamo")
CATALOGUE = Path(__file__).resolve().parents[2] / "docs" / "models.md"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run cells, print what is off, write the page; 0 where every cell passes."""
    parser = argparse.ArgumentParser(prog="zoo", description=__doc__)
    parser.add_argument("--only", default="", help="architectures, separated by semicolons")
    parser.add_argument(
        "--ways", default=";".join(WAYS), help=f"separated by semicolons, of: {'; '.join(WAYS)}"
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no cell after")
    parser.add_argument("--rows", type=Path, help="where rows are kept (JSON lines)")
    options = parser.parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    chosen = [name for name in options.only.split(";") if name] or list(ARCHITECTURES)
    absent = [name for name in chosen if not is_installed(name)]
    cells = [
        cell for name in chosen if name not in absent for cell in cells_of(ARCHITECTURES[name])
    ]
    cells = [cell for cell in cells if cell.way in options.ways.split(";")]
    rows = _run(cells, options.rows, options.minutes)
    failures = [row for row in rows if not row.passes]
    run = catalogue.totals(rows)
    _say(f"{run.architectures} architectures, {run.cells} cells: {dict(run.outcomes)}")
    _say(f"{run.sparse} of {run.possible} possible sites are sparse: {run.share:.1%}")
    for name in absent:
        _say(f"not run: {name}, which needs {', '.join(ARCHITECTURES[name].needs)}")
    if not options.only and not absent:
        CATALOGUE.write_text(catalogue.render(rows, versions()))
    return int(bool(failures) or run.share < catalogue.LEAST_SHARE)


def is_installed(name: str) -> bool:
    """Whether the libraries of an architecture are there."""
    needs = ARCHITECTURES[name].needs
    return all(importlib.util.find_spec(library) is not None for library in needs)


def versions() -> dict[str, str]:
    """Return the versions that a page is about."""
    return {
        name: importlib.metadata.version(name).partition("+")[0]
        for name in ("torch", "transformers", "timm", "diffusers")
    }


def _run(cells: Sequence[Cell], path: Path | None, minutes: float) -> list[Row]:
    known, end = _known_rows(path), time.monotonic() + 60 * minutes
    missing = [cell for cell in cells if str(cell) not in known]
    # The first spelling of every architecture, then the others: time may run out.
    missing.sort(key=lambda cell: cell.architecture.spellings.index(cell.spelling))
    in_time = itertools.takewhile(lambda _: time.monotonic() < end, missing)
    for row in run_cells(in_time):
        known[row.name] = row
        if path is not None:
            with path.open("a") as file:
                file.write(json.dumps(dataclasses.asdict(row)) + "\n")
        if not row.passes or row.missed:
            kind = "missed" if row.passes else row.outcome
            _say(f"{kind}: {row.name}: {row.sparse} of {row.counted} {row.reasons} {row.note}")
    return [known[str(cell)] for cell in cells if str(cell) in known]


def _known_rows(path: Path | None) -> dict[str, Row]:
    if path is None or not path.exists():
        return {}
    rows = (Row(**json.loads(line)) for line in path.read_text().splitlines())
    return {row.name: row for row in rows}


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
