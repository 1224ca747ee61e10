"""Layout calls between a tensor's own dimensions and the canonical ones, one per group of letters.

    (b h) t d  ->  unflatten  ->  b h t d            to the canonical form
    b h q v    ->  permute    ->  b q h v            from it

The canonical groups are batch, heads, tokens, dim. A group without letters has size 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from seer_compile.passes.axes import AxisBook, Layout, Letters
from seer_compile.types import LayoutStep

aten = torch.ops.aten


def steps_to_canonical(
    layout: Layout, groups: tuple[Letters, ...], book: AxisBook
) -> tuple[LayoutStep, ...] | None:
    """Return the calls that bring a tensor to one dimension per group."""
    dimensions, steps = _split_dimensions(layout, groups, book)
    if dimensions is None:
        return None
    blanks = [axis for axis, letters in enumerate(dimensions) if not letters]
    order: list[int] = []
    pieces: list[int] = []
    for group in groups:
        axes = _axes_of(group, dimensions) if group else blanks[:1]
        if axes is None:
            return None
        if not group:
            blanks = blanks[1:]
        order += axes
        pieces.append(len(axes))
    if len(order) + len(blanks) != len(dimensions):
        return None
    steps += [LayoutStep(aten.squeeze.dim, (axis,)) for axis in reversed(blanks)]
    order = [axis - sum(blank < axis for blank in blanks) for axis in order]
    if order != sorted(order):
        steps.append(LayoutStep(aten.permute.default, (order,)))
    for place, count in enumerate(pieces):
        if count == 0:
            steps.append(LayoutStep(aten.unsqueeze.default, (place,)))
        elif count > 1:
            steps.append(LayoutStep(aten.flatten.using_ints, (place, place + count - 1)))
    return tuple(steps)


def _split_dimensions(
    layout: Layout, groups: tuple[Letters, ...], book: AxisBook
) -> tuple[list[Letters] | None, list[LayoutStep]]:
    """Unmerge dimensions that run over several groups, such as batch * heads."""
    dimensions: list[Letters] = []
    steps: list[LayoutStep] = []
    for letters in layout:
        runs = _runs(book.resolve(letters), groups)
        if len(runs) > 1:
            sizes = _static_sizes(runs, book)
            if sizes is None:
                return None, []
            steps.append(LayoutStep(aten.unflatten.int, (len(dimensions), sizes)))
        dimensions += runs or [()]
    return dimensions, steps


def _axes_of(group: Letters, dimensions: Sequence[Letters]) -> list[int] | None:
    """Return the dimensions that make up a group, in the order of its letters."""
    axes = [
        axis for axis, letters in enumerate(dimensions) if letters and set(letters) <= set(group)
    ]
    axes.sort(key=lambda axis: group.index(dimensions[axis][0]))
    joined = tuple(letter for axis in axes for letter in dimensions[axis])
    return axes if joined == group else None


def steps_from_canonical(
    layout: Layout, groups: tuple[Letters, ...], book: AxisBook
) -> tuple[LayoutStep, ...] | None:
    """Return the calls that bring the canonical output to the layout of the product."""
    wanted = [_runs(book.resolve(dimension), groups) for dimension in layout]
    runs = [run for dimension in wanted for run in dimension]
    steps: list[LayoutStep] = []
    present: list[Letters] = []
    for place in reversed(range(len(groups))):
        pieces = sorted(
            (run for run in runs if set(run) <= set(groups[place]) and run),
            key=lambda run, place=place: groups[place].index(run[0]),
        )
        if tuple(letter for piece in pieces for letter in piece) != groups[place]:
            return None
        if len(pieces) > 1:
            sizes = _static_sizes(pieces, book)
            if sizes is None:
                return None
            steps.append(LayoutStep(aten.unflatten.int, (place, sizes)))
        if not groups[place]:
            steps.append(LayoutStep(aten.squeeze.dim, (place,)))
        present = [*pieces, *present]
    order = [present.index(run) for run in runs]
    if order != sorted(order):
        steps.append(LayoutStep(aten.permute.default, (order,)))
    for place, dimension in enumerate(wanted):
        if not dimension:
            steps.append(LayoutStep(aten.unsqueeze.default, (place,)))
        elif len(dimension) > 1:
            steps.append(LayoutStep(aten.flatten.using_ints, (place, place + len(dimension) - 1)))
    return tuple(steps)


def _runs(letters: Letters, groups: tuple[Letters, ...]) -> list[Letters]:
    """Cut merged letters where the group changes."""
    runs: list[list[str]] = []
    for letter in letters:
        group = next((group for group in groups if letter in group), ())
        if runs and runs[-1][-1] in group:
            runs[-1].append(letter)
        else:
            runs.append([letter])
    return [tuple(run) for run in runs]


def _static_sizes(pieces: Sequence[Letters], book: AxisBook) -> list[int] | None:
    sizes: list[Any] = [book.size(piece) for piece in pieces]
    unknown = [place for place, size in enumerate(sizes) if not isinstance(size, int)]
    if len(unknown) > 1:
        return None
    return [-1 if place in unknown else int(size) for place, size in enumerate(sizes)]
