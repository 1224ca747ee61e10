"""From an operand of a product back through the layout calls that made it.

    k -> [:, :, None] -> expand -> reshape -> transpose -> matmul
    q -> reshape(batch * heads) -> mul(0.125) -> bmm

The keys behind the expansion are what attention over groups of query heads reads; each step back
is recorded, and the caller picks the one that gives the canonical axes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from seer_compile.passes.axes import AxisBook, Layout, permutation_of, shape_of, unpermuted
from seer_compile.passes.fx_utils import (
    bound_arguments,
    fake_value,
    is_known,
    packet_of,
)

aten = torch.ops.aten
_COPIES = (aten.contiguous, aten.clone, aten.alias, aten.to, aten._to_copy)
_VIEWS = (aten.view, aten.reshape, aten._unsafe_view, aten.flatten, aten.unflatten)
_LONGEST = 24


@dataclass(frozen=True, slots=True)
class Peeled:
    """A node on the way back, its layout, and the letters along which it was repeated since."""

    node: Node
    layout: Layout
    repeated: frozenset[str] = frozenset()
    factor: float = 1.0
    """What the graph multiplies this tensor by on the way to the operand."""


def peel(node: Node, layout: Layout, repeated: frozenset[str], book: AxisBook) -> list[Peeled]:
    """Return the operand and every tensor behind it that differs in layout or repetition only.

    Args:
        node: The operand, laid out as ``layout``.
        layout: Letters of its dimensions.
        repeated: Letters that broadcast in the product already.
        book: The site's letters; views may cut some.
    """
    states = [Peeled(node, layout, repeated)]
    for _ in range(_LONGEST):
        behind = _step(states[-1], book)
        if behind is None:
            break
        states.append(behind)
    return states


def _step(state: Peeled, book: AxisBook) -> Peeled | None:
    node, packet = state.node, packet_of(state.node)
    source = node.args[0] if packet is not None and node.args else None
    if not isinstance(source, Node) or not _keeps_elements(source, node):
        return None
    if packet in _COPIES:
        return replace(state, node=source)
    if packet in (aten.mul, aten.div):
        return _unscale(state, source)
    if packet in _VIEWS:
        layout = book.regroup(state.layout, shape_of(source))
    elif permutation_of(node, len(state.layout)) is not None:
        layout = unpermuted(node, state.layout)
    else:
        return _unrepeat(state, source, packet, book)
    return None if layout is None else replace(state, node=source, layout=layout)


def _keeps_elements(source: Node, node: Node) -> bool:
    """Whether nothing is rounded, no bits are read as other numbers, and no device is left."""
    before, after = fake_value(source), fake_value(node)
    is_tensor = isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor)
    if not is_tensor or before.device != after.device:
        return False
    is_wider = torch.promote_types(before.dtype, after.dtype) == after.dtype
    is_float = before.dtype.is_floating_point and packet_of(node) in _COPIES
    return before.dtype == after.dtype or (is_float and is_wider)


def _unscale(state: Peeled, source: Node) -> Peeled | None:
    """Step back over a multiplication by a number."""
    number: Any = state.node.args[1]
    is_number = isinstance(number, (int, float)) and not isinstance(number, bool) and number != 0
    rounds = bound_arguments(state.node).get("rounding_mode") is not None
    if not is_number or rounds:
        return None
    factor = float(number) if packet_of(state.node) is aten.mul else 1 / float(number)
    return replace(state, node=source, factor=state.factor * factor)


def _unrepeat(state: Peeled, source: Node, packet: Any, book: AxisBook) -> Peeled | None:
    layout = list(state.layout)
    if packet is aten.unsqueeze:
        gone = layout.pop(bound_arguments(state.node)["dim"] % len(layout))
        return None if gone else replace(state, node=source, layout=tuple(layout))
    if packet is aten.slice:
        is_whole = all(
            is_known(new == old)
            for new, old in zip(shape_of(state.node), shape_of(source), strict=True)
        )
        return replace(state, node=source) if is_whole else None
    if packet in (aten.expand, aten.repeat):
        return _unexpand(state, source)
    if packet is aten.repeat_interleave:
        return _uninterleave(state, source, book)
    return None


def _unexpand(state: Peeled, source: Node) -> Peeled | None:
    before, after = shape_of(source), shape_of(state.node)
    added = len(after) - len(before)
    before = (*[1] * added, *before)
    layout, repeated = list(state.layout), set(state.repeated)
    for axis, (old, new) in enumerate(zip(before, after, strict=True)):
        if is_known(old == new):
            continue
        # Repeating more than one position would interleave heads in another order.
        if not is_known(old == 1):
            return None
        repeated |= set(layout[axis])
        layout[axis] = ()
    if any(layout[:added]):
        return None
    return replace(state, node=source, layout=tuple(layout[added:]), repeated=frozenset(repeated))


def _uninterleave(state: Peeled, source: Node, book: AxisBook) -> Peeled | None:
    arguments = bound_arguments(state.node)
    times, axis = arguments.get("repeats"), arguments.get("dim")
    if not isinstance(times, int) or not isinstance(axis, int):
        return None
    axis %= len(state.layout)
    letters = book.resolve(state.layout[axis])
    group = shape_of(source)[axis]
    halves = book.regroup((letters,), (group, times)) if letters else None
    if halves is None:
        return None
    layout = [*state.layout[:axis], halves[0], *state.layout[axis + 1 :]]
    repeated = state.repeated | set(halves[1])
    return replace(state, node=source, layout=tuple(layout), repeated=repeated)
