"""From a sink in a softmax back to one logit per head.

    sinks[h] -> reshape -> expand -> cat([logits, .])  =>  sinks[h]

A sink joins the logits of a row as a column (first or last), or only their sum. What the operators
take is a number per query head; a sink that varies with the query, or was added to logits that had
been moved, is something else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from seer_compile.passes.axes import AxisBook, Layout, Letters, shape_of
from seer_compile.passes.dataflow import leads_to_product
from seer_compile.passes.fx_utils import bound_arguments, cited, fake_value, is_known, tensor_shape
from seer_compile.passes.match_softmax import Softmax
from seer_compile.passes.matches import Column, Match, Sink
from seer_compile.passes.mutation import Mutations
from seer_compile.passes.peel_layouts import Peeled, peel
from seer_compile.types import LayoutStep, Operand, SkipCode

aten = torch.ops.aten
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def append_sink(match: Match, cat: Node, sink: Node, layout: Layout) -> None:
    """Note a column that joins the logits; refused where it is no sink.

    Args:
        match: Receives the sink, or why not.
        cat: The call that appends it.
        sink: The part beside the logits.
        layout: Of the logits.
    """
    parts: Any = cat.args[0]
    axis = int(bound_arguments(cat)["dim"]) % len(layout)
    if len(parts) != 2 or not is_known(shape_of(sink)[axis] == 1):
        match.refuse(SkipCode.SINK_LOGIT, f"{cited(cat)} appends more than one column")
        return
    column: Column = "first" if parts[0] is sink else "last"
    _set_sink(match, sink, layout, axis, column)


def add_sink(match: Match, softmax: Softmax, layout: Layout) -> None:
    """Note a sink that is in the sum only; refused where it is no sink."""
    if softmax.sink is None:
        return
    if leads_to_product(softmax.sink):
        match.refuse(SkipCode.SINK_LOGIT, f"{cited(softmax.sink)} depends on the logits")
    _set_sink(match, softmax.sink, layout, softmax.axis % len(layout), "none")


def _set_sink(match: Match, sink: Node, layout: Layout, axis: int, column: Column) -> None:
    shape = tensor_shape(sink) or ()
    if match.sink is not None:
        match.refuse(SkipCode.SINK_LOGIT, f"{cited(sink)} is the second one")
    if match.shift or match.is_centred:
        match.refuse(SkipCode.SINK_LOGIT, f"{cited(sink)} joins logits that were shifted")
    shape = (1,) * (len(layout) - len(shape)) + shape
    own = tuple(
        () if is_known(size == 1) else letters for size, letters in zip(shape, layout, strict=True)
    )
    if own[axis]:
        match.refuse(SkipCode.SINK_LOGIT, f"{cited(sink)} varies with the keys")
        return
    match.sink = Sink(
        sink, own[len(layout) - len(tensor_shape(sink) or ()) :], layout[axis], column
    )


def drop_column(match: Match, cut: Node, source: Node, layout: Layout) -> None:
    """Accept a slice of the weights if it drops exactly the sink's column; refuse it otherwise."""
    sink, arguments = match.sink, bound_arguments(cut)
    before, after = shape_of(source), shape_of(cut)
    if all(is_known(old == new) for old, new in zip(before, after, strict=True)):
        return
    axis = int(arguments["dim"]) % len(before)
    is_sinks = sink is not None and sink.column in ("first", "last") and layout[axis] == sink.keys
    if sink is None or not is_sinks:
        match.refuse(SkipCode.AMBIGUOUS, f"`{cut.name}` drops weights")
        return
    start = arguments["start"] or 0
    is_exact = is_known(after[axis] + 1 == before[axis]) and arguments["step"] == 1
    if not is_exact or start != (1 if sink.column == "first" else 0):
        match.refuse(SkipCode.SINK_LOGIT, f"`{cut.name}` drops other weights than the sink's")
    sink.column = "none"


def letters_of_sinks(match: Match) -> Letters:
    """Return along which letters a match's sinks differ; they are heads, then."""
    if match.sink is None or match.obstacles:
        return ()
    states = peel(match.sink.node, match.sink.layout, frozenset(), match.book)
    return tuple(min((_held(state.layout, match.book) for state in states), key=len))


def sinks_operand(match: Match, heads: Letters, mutations: Mutations) -> Operand | None:
    """Return a match's sinks as ``Float[h]``; None where there are none, or with an obstacle.

    Args:
        match: The attention.
        heads: Its head letters.
        mutations: Of the graph: the sinks are read at the output.
    """
    sink, book = match.sink, match.book
    if sink is None or match.obstacles:
        return None
    states = peel(sink.node, sink.layout, frozenset(), book)
    chosen = next((state for state in states if _is_per_head(state, heads, book)), None)
    value = fake_value(sink.node)
    if chosen is None or fake_value(chosen.node).dtype not in _DTYPES:
        match.refuse(SkipCode.SINK_LOGIT, f"{cited(sink.node)} is no number per head")
        return None
    for state in states[: states.index(chosen) + 1]:
        if mutations.writer_between(state.node, state.node, match.output) is not None:
            match.refuse(SkipCode.MUTATION, f"`{state.node.name}` changes after it is read")
    if value.device != fake_value(match.softmax).device:
        match.refuse(SkipCode.SINK_LOGIT, f"{cited(sink.node)} is on another device")
    return Operand(node=chosen.node, steps=_steps(chosen, heads, book))


def _held(layout: Layout, book: AxisBook) -> list[str]:
    letters = book.resolve([letter for dimension in layout for letter in dimension])
    return [letter for letter in letters if not is_known(book.sizes[letter] == 1)]


def _is_per_head(state: Peeled, heads: Letters, book: AxisBook) -> bool:
    held = _held(state.layout, book)
    return state.factor == 1 and held == [
        letter for letter in book.resolve(heads) if letter in held
    ]


def _steps(state: Peeled, heads: Letters, book: AxisBook) -> tuple[LayoutStep, ...]:
    """Return the calls from a tensor over some head letters to one over all."""
    held, letters = _held(state.layout, book), book.resolve(heads)
    sizes = [int(book.sizes[letter]) for letter in letters]
    shown = [size if letter in held else 1 for letter, size in zip(letters, sizes, strict=True)]
    total = LayoutStep(aten.reshape.default, ([int(book.size(letters))],))
    if shown == sizes:
        return () if len(state.layout) == 1 else (total,)
    spread = LayoutStep(aten.expand.default, (sizes,))
    return LayoutStep(aten.reshape.default, (shown,)), spread, total
