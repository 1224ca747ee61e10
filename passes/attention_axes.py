"""From the operands of an attention to the canonical axes: batch, heads, tokens, dim.

The letters of the logits that are neither query nor key are batch or heads. Three dimensions may
hide both in one; five may split either; keys may be repeated over the inner part of the heads. This
module finds the partition under which query, key and value all take the canonical form, preferring
keys and values before their repetition, and writes down the layout calls that get there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from seer_compile.passes.axes import AxisBook, Layout
from seer_compile.passes.peel_layouts import Peeled
from seer_compile.types import LayoutStep, Operand

aten = torch.ops.aten
Letters = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Products:
    """The two products of an attention: their operands, ways back, and letters."""

    query: list[Peeled]
    key: list[Peeled]
    value: list[Peeled]
    batch: tuple[Letters, ...]
    """One entry per dimension of the logits that is neither query nor key."""
    query_tokens: Letters
    key_tokens: Letters
    head_dim: Letters
    value_dim: Letters
    output: Layout


@dataclass(frozen=True, slots=True)
class Arrangement:
    """Operands in canonical form."""

    query: Operand
    key: Operand
    value: Operand
    output_steps: tuple[LayoutStep, ...]
    batch: Letters
    heads: Letters
    kv_heads: Letters
    factor: float
    """What the graph multiplied query and key by before their product, left out here."""


@dataclass(frozen=True, slots=True)
class _Candidate:
    operand: Operand
    factor: float


def arrange(products: Products, book: AxisBook) -> Arrangement | None:
    """Return the operands and the output in canonical axes; None where no partition fits."""
    flat = book.resolve([letter for dimension in products.batch for letter in dimension])
    for batch_count in _partitions(products, book, len(flat)):
        # Only a fixed number of heads may be unmerged from the batch.
        is_cut = len(products.batch) == 1 and batch_count < len(flat)
        if is_cut and not isinstance(book.size(flat[batch_count:]), int):
            continue
        found = _arrange(products, book, flat[:batch_count], flat[batch_count:])
        if found is not None:
            return found
    return None


def _partitions(products: Products, book: AxisBook, count: int) -> list[int]:
    """Return how many leading letters may be the batch, most likely first."""
    lengths = [len(book.resolve(dimension)) for dimension in products.batch]
    if len(lengths) == 1:
        return [*range(1, count), count]
    repeated = {letter for state in products.key for letter in book.resolve(list(state.repeated))}
    last = set(book.resolve(products.batch[-1]))
    # Five dimensions are batch x groups x repeats where keys repeat over the whole last one.
    is_grouped = len(lengths) > 2 and last <= repeated
    return [sum(lengths[: -2 if is_grouped else -1])]


def _arrange(
    products: Products, book: AxisBook, batch: Letters, heads: Letters
) -> Arrangement | None:
    query_tokens, key_tokens = book.resolve(products.query_tokens), book.resolve(products.key_tokens)
    dims, value_dims = book.resolve(products.head_dim), book.resolve(products.value_dim)
    queries = _by_repetition(products.query, book, batch, heads, query_tokens, dims)
    keys = _by_repetition(products.key, book, batch, heads, key_tokens, dims)
    # Attention has no factor for values: those behind a multiplication do not count.
    unscaled = [state for state in products.value if state.factor == 1]
    values = _by_repetition(unscaled, book, batch, heads, key_tokens, value_dims)
    common = sorted(keys.keys() & values.keys())
    groups = (batch, heads, query_tokens, value_dims)
    steps = _steps_from_canonical(products.output, groups, book)
    if len(heads) not in queries or not common or steps is None:
        return None
    kept = common[0]
    query, key, value = queries[len(heads)], keys[kept], values[kept]
    return Arrangement(
        query=query.operand,
        key=key.operand,
        value=value.operand,
        output_steps=steps,
        batch=batch,
        heads=heads,
        kv_heads=heads[:kept],
        factor=query.factor * key.factor,
    )


def _by_repetition(
    states: Sequence[Peeled],
    book: AxisBook,
    batch: Letters,
    heads: Letters,
    tokens: Letters,
    dims: Letters,
) -> dict[int, _Candidate]:
    """Return the simplest operand for each number of leading head letters that it still has."""
    found: dict[int, _Candidate] = {}
    for state in states:
        repeated = set(book.resolve(list(state.repeated)))
        kept = len(heads) - len(repeated)
        if kept < 0 or repeated != set(heads[kept:]):
            continue
        steps = _steps_to_canonical(state.layout, (batch, heads[:kept], tokens, dims), book)
        if steps is None or (kept in found and len(steps) >= len(found[kept].operand.steps)):
            continue
        found[kept] = _Candidate(Operand(node=state.node, steps=steps), state.factor)
    return found


def _steps_to_canonical(
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
    axes = [axis for axis, letters in enumerate(dimensions) if letters and set(letters) <= set(group)]
    axes.sort(key=lambda axis: group.index(dimensions[axis][0]))
    joined = tuple(letter for axis in axes for letter in dimensions[axis])
    return axes if joined == group else None


def _steps_from_canonical(
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
