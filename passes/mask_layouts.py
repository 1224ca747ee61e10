"""Layout calls in mask subgraphs: where an element of the result lies in the argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch.fx import Node

from seer_compile.passes.fx_utils import bound_arguments, fake_value, is_known, tensor_shape
from seer_compile.passes.index_ranges import as_expression
from seer_compile.passes.interpret_masks import Index, MaskInterpreter, broadcast_index

aten = torch.ops.aten
ZERO = sympy.Integer(0)
# From the index of the result to the index of the argument; None where it is not known.
Remap = Callable[[MaskInterpreter, Node, Index], Index | None]


def _same(interpreter: MaskInterpreter, node: Node, index: Index) -> Index:
    return index


def _expand(interpreter: MaskInterpreter, node: Node, index: Index) -> Index:
    return broadcast_index(index, tensor_shape(node.args[0]) or ())


def _unsqueeze(interpreter: MaskInterpreter, node: Node, index: Index) -> Index:
    axis = bound_arguments(node)["dim"] % len(index)
    return (*index[:axis], *index[axis + 1 :])


def _permute(interpreter: MaskInterpreter, node: Node, index: Index) -> Index:
    order = [axis % len(index) for axis in bound_arguments(node)["dims"]]
    return tuple(index[order.index(axis)] for axis in range(len(index)))


def _transpose(interpreter: MaskInterpreter, node: Node, index: Index) -> Index:
    arguments = bound_arguments(node)
    first, second = arguments.get("dim0", -2), arguments.get("dim1", -1)
    moved = list(index)
    moved[first], moved[second] = moved[second], moved[first]
    return tuple(moved)


def _slice(interpreter: MaskInterpreter, node: Node, index: Index) -> Index | None:
    arguments = bound_arguments(node)
    shape = tensor_shape(node.args[0]) or ()
    axis, step = arguments["dim"] % len(shape), fake_value(arguments["step"])
    start = slice_start(arguments["start"], shape[axis])
    if start is None or not isinstance(step, int):
        return None
    return (*index[:axis], sympy.expand(start + step * index[axis]), *index[axis + 1 :])


def slice_start(start: Any, size: Any) -> sympy.Expr | None:
    """Return the first position of a slice, as a non-negative expression, if it is not clamped."""
    start = fake_value(start)
    if start is None:
        return ZERO
    if not isinstance(start, (int, torch.SymInt)):
        return None
    if is_known(start < 0):
        start = start + size
    is_inside = is_known(start >= 0) and is_known(start <= size)
    return as_expression(start) if is_inside else None


def _select(interpreter: MaskInterpreter, node: Node, index: Index) -> Index | None:
    arguments = bound_arguments(node)
    shape = list(tensor_shape(node.args[0]) or ())
    axis: int = arguments["dim"] % len(shape)
    place: Any = fake_value(arguments["index"])
    if not isinstance(place, (int, torch.SymInt)):
        return None
    if is_known(place < 0):
        place = place + shape[axis]
    if not is_known(place >= 0):
        return None
    return (*index[:axis], as_expression(place), *index[axis:])


def _reshape(interpreter: MaskInterpreter, node: Node, index: Index) -> Index | None:
    """Regroup axes: ``view``, ``reshape``, ``flatten``, ``unflatten``, ``squeeze``."""
    before, after = list(tensor_shape(node.args[0]) or ()), list(tensor_shape(node) or ())
    # Axes of size 1 carry index 0, so they take no part in the grouping.
    sources = [size for size in before if not is_known(size == 1)]
    results = [
        (size, part) for size, part in zip(after, index, strict=True) if not is_known(size == 1)
    ]
    found: list[sympy.Expr] = []
    while sources and results:
        group, grouped = [sources.pop(0)], [results.pop(0)]
        while not is_known(_product(group) == _product([size for size, _ in grouped])):
            if is_known(_product(group) < _product([size for size, _ in grouped])):
                if not sources:
                    return None
                group.append(sources.pop(0))
            elif results:
                grouped.append(results.pop(0))
            else:
                return None
        parts = _split_position(interpreter, _flat_position(grouped), group)
        if parts is None:
            return None
        found += parts
    if sources or results:
        return None
    return tuple(ZERO if is_known(size == 1) else found.pop(0) for size in before)


def _product(sizes: list[Any]) -> Any:
    total: Any = 1
    for size in sizes:
        total = total * size
    return total


def _flat_position(grouped: list[tuple[Any, sympy.Expr]]) -> sympy.Expr:
    flat = ZERO
    for size, part in grouped:
        flat = flat * as_expression(size) + part
    return sympy.expand(flat)


def _split_position(
    interpreter: MaskInterpreter, flat: sympy.Expr, sizes: list[Any]
) -> list[sympy.Expr] | None:
    """Divide a flat position by the sizes of the axes that it runs over, outermost first."""
    parts: list[sympy.Expr] = []
    for size in reversed(sizes[1:]):
        width = as_expression(size)
        inner = sum((t for t in flat.as_ordered_terms() if not _divides(width, t)), ZERO)
        in_range = interpreter.ranges.is_at_least(inner, 0)
        if not in_range or not interpreter.ranges.is_at_most_zero(inner - width + 1):
            return None
        parts.insert(0, inner)
        flat = sympy.expand(sympy.cancel((flat - inner) / width))
    return [flat, *parts]


def _divides(width: sympy.Expr, term: sympy.Expr) -> bool:
    quotient = sympy.cancel(term / width)
    return bool(quotient.is_integer) and sympy.denom(quotient) == 1


def _repeat(interpreter: MaskInterpreter, node: Node, index: Index) -> Index | None:
    """``repeat`` of axes of size 1, or by 1."""
    shape = tensor_shape(node.args[0]) or ()
    counts = bound_arguments(node)["repeats"][len(index) - len(shape) :]
    is_plain = all(count == 1 or size == 1 for count, size in zip(counts, shape, strict=True))
    return broadcast_index(index, shape) if is_plain else None


def _repeat_interleave(interpreter: MaskInterpreter, node: Node, index: Index) -> Index | None:
    arguments = bound_arguments(node)
    count, axis = arguments.get("repeats"), arguments.get("dim")
    if not isinstance(count, int) or not isinstance(axis, int):
        return None
    axis %= len(index)
    size = (tensor_shape(node.args[0]) or ())[axis]
    parts = _split_position(interpreter, index[axis], [size, count])
    return None if parts is None else (*index[:axis], parts[0], *index[axis + 1 :])


def _through(remap: Remap) -> Callable[[MaskInterpreter, Node, Index], Any]:
    def rule(interpreter: MaskInterpreter, node: Node, index: Index) -> Any:
        source, moved = node.args[0], remap(interpreter, node, index)
        if not isinstance(source, Node) or moved is None:
            return None
        return interpreter.read(node, source, moved)

    return rule


_REMAPS: dict[Any, Remap] = {
    aten.contiguous: _same,
    aten.clone: _same,
    aten.alias: _same,
    aten.detach: _same,
    aten.detach_: _same,
    aten.lift_fresh: _same,
    aten.lift_fresh_copy: _same,
    aten.expand: _expand,
    aten.expand_as: _expand,
    aten.unsqueeze: _unsqueeze,
    aten.permute: _permute,
    aten.transpose: _transpose,
    aten.swapaxes: _transpose,
    aten.mT: _transpose,
    aten.t: _transpose,
    aten.slice: _slice,
    aten.select: _select,
    aten.view: _reshape,
    aten.reshape: _reshape,
    aten._unsafe_view: _reshape,
    aten.flatten: _reshape,
    aten.unflatten: _reshape,
    aten.squeeze: _reshape,
    aten.repeat: _repeat,
    aten.repeat_interleave: _repeat_interleave,
}
LAYOUTS = {target: _through(remap) for target, remap in _REMAPS.items()}
