"""Run the whole matrix and write the catalogue: ``make models``.

``python -m zoo --rows FILE`` keeps rows in a file and skips the cells that it has, so that the run
can be done in pieces: ``--shard 1/4`` takes a quarter of the cells, ``--ways`` some ways into the
compiler, ``--only`` some architectures, and ``--minutes`` sets an end. ``--jobs`` runs that many
processes. ``--page FILE ...`` runs nothing and writes the page from rows, which may come from
several machines and versions; the page says what it is about.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from zoo import catalogue, workers
from zoo.cell import Cell, Row, cells_of
from zoo.registry import ARCHITECTURES

WAYS = ("static export", "dynamic dynamo", "dynamic export", "static dynamo")
CATALOGUE = Path(__file__).resolve().parents[2] / "docs" / "models.md"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run cells, print what is off, write the page; 0 where every cell passes."""
    options = _parser().parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if options.page:
        rows = in_order(row for path in options.page for row in read_rows(path))
        CATALOGUE.write_text(catalogue.render(rows))
        return _summary(rows)
    chosen = [name for name in options.only.split(";") if name] or list(ARCHITECTURES)
    absent = [name for name in chosen if not is_installed(name)]
    present = [ARCHITECTURES[name] for name in chosen if name not in absent]
    cells = [cell for each in present for cell in cells_of(each)]
    cells = [cell for cell in cells if cell.way in options.ways.split(";")]
    rows = _run(cells, options)
    for name in absent:
        _say(f"not run: {name}, which needs {', '.join(ARCHITECTURES[name].needs)}")
    if not options.only and not absent and options.shard == (1, 1):
        CATALOGUE.write_text(catalogue.render(rows))
    return _summary(rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="zoo", description=__doc__)
    parser.add_argument("--only", default="", help="architectures, separated by semicolons")
    parser.add_argument(
        "--ways", default=";".join(WAYS), help=f"separated by semicolons, of: {'; '.join(WAYS)}"
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no cell after")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--shard", type=shard, default=(1, 1), help="which part of how many: 1/4")
    parser.add_argument("--rows", type=Path, help="where rows are kept (JSON lines)")
    parser.add_argument(
        "--page", type=Path, nargs="+", help="write the page from rows, run nothing"
    )
    return parser


def shard(text: str) -> tuple[int, int]:
    """Return a part and the number of parts, both counted from 1."""
    part, _, parts = text.partition("/")
    chosen = int(part), int(parts)
    if not 1 <= chosen[0] <= chosen[1]:
        raise argparse.ArgumentTypeError(f"{text}: a part of that many is meant, such as 1/4")
    return chosen


def is_installed(name: str) -> bool:
    """Whether the libraries of an architecture are there."""
    needs = ARCHITECTURES[name].needs
    return all(importlib.util.find_spec(library) is not None for library in needs)


def _run(cells: Sequence[Cell], options: argparse.Namespace) -> list[Row]:
    stack = workers.versions()
    known = {row.name: row for row in read_rows(options.rows) if row.versions == stack}
    part, parts = options.shard
    groups = workers.group([cell for cell in cells if str(cell) not in known])[part - 1 :: parts]
    for row in workers.run_groups(groups, options.jobs, time.time() + 60 * options.minutes):
        known[row.name] = row
        if options.rows is not None:
            with options.rows.open("a") as file:
                file.write(json.dumps(dataclasses.asdict(row)) + "\n")
        if row.outcome != "equal" or not row.passes or row.missed:
            kind = "missed" if row.outcome == "equal" else row.outcome
            _say(f"{kind}: {row.name}: {row.sparse} of {row.counted} {row.reasons} {row.note}")
    return [known[str(cell)] for cell in cells if str(cell) in known]


def read_rows(path: Path | None) -> list[Row]:
    """Return the rows of a file, none where there is no file."""
    if path is None or not path.exists():
        return []
    return [Row(**json.loads(line)) for line in path.read_text().splitlines()]


def in_order(rows: Iterable[Row]) -> list[Row]:
    """Return the last row of each cell and stack, as cells are ordered; unknown ones are left."""
    places = {
        str(cell): place
        for place, cell in enumerate(
            cell for each in ARCHITECTURES.values() for cell in cells_of(each)
        )
    }
    latest = {(row.name, row.versions): row for row in rows if row.name in places}
    return sorted(latest.values(), key=lambda row: (places[row.name], row.versions))


def _summary(rows: Sequence[Row]) -> int:
    run = catalogue.totals(rows)
    _say(f"{run.architectures} architectures, {run.cells} cells: {dict(run.outcomes)}")
    _say(f"{run.sparse} of {run.possible} possible sites are sparse: {run.share:.1%}")
    failures = [row for row in rows if not row.passes]
    return int(bool(failures) or run.share < catalogue.LEAST_SHARE)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
