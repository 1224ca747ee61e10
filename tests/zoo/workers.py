"""Run cells in several processes. Processes are handed names: situations hold local functions."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch

from zoo.cell import Cell, Row, cells_of
from zoo.matrix import run_cells
from zoo.registry import ARCHITECTURES

LIBRARIES = ("torch", "transformers", "timm", "diffusers")


def group(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Return runs of cells that share a model and a situation, first spellings first.

    Time may run out, and one spelling of everything says more than all spellings of half.
    """
    groups: dict[tuple[int, str, str, str], list[Cell]] = {}
    for cell in cells:
        place = cell.architecture.spellings.index(cell.spelling)
        key = (place, cell.architecture.name, cell.spelling, cell.situation.name)
        groups.setdefault(key, []).append(cell)
    return [groups[key] for key in sorted(groups, key=lambda key: key[0])]


def run_groups(groups: Sequence[Sequence[Cell]], jobs: int, end: float) -> Iterator[Row]:
    """Yield the rows of groups as they come; no cell starts after ``end`` (``time.time()``)."""
    stack = versions()
    for row in _run_groups(groups, jobs, end):
        yield dataclasses.replace(row, versions=stack)


def _run_groups(groups: Sequence[Sequence[Cell]], jobs: int, end: float) -> Iterator[Row]:
    if jobs == 1:
        for cells in groups:
            yield from run_cells(_in_time(cells, end))
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        jobs, context, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        names = [[str(cell) for cell in cells] for cells in groups]
        for future in as_completed([pool.submit(_run_named, each, end) for each in names]):
            yield from future.result()


def _run_named(names: Sequence[str], end: float) -> list[Row]:
    known = {str(cell): cell for each in ARCHITECTURES.values() for cell in cells_of(each)}
    return list(run_cells(_in_time([known[name] for name in names], end)))


def _in_time(cells: Sequence[Cell], end: float) -> Iterator[Cell]:
    for cell in cells:
        if time.time() >= end:
            return
        yield cell


def versions() -> str:
    """Return the versions that rows of this process are about."""
    return ", ".join(f"{name} {_version(name)}" for name in LIBRARIES)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return "absent"
