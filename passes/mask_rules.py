"""What each ATen call does to one element: the table behind :class:`MaskInterpreter`.

A rule gets the interpreter, the call and the index of the element asked for, and returns its value
in terms of the arguments' elements, or None where it does not know.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch.fx import Node

from seer_compile.passes.fx_utils import bound_arguments, fake_value, tensor_shape
from seer_compile.passes.index_ranges import as_expression
from seer_compile.passes.interpret_masks import Index, MaskInterpreter, Rule, broadcast_index
from seer_compile.passes.mask_arithmetic import ARITHMETIC, LOGIC
from seer_compile.passes.mask_comparisons import COMPARISONS, at_most_zero
from seer_compile.passes.mask_domain import (
    FALSE,
    TRUE,
    Formula,
    Value,
    as_number,
    both,
    choice,
    choose,
    lift,
    negate,
)
from seer_compile.passes.mask_joins import JOINS
from seer_compile.passes.mask_layouts import LAYOUTS

aten = torch.ops.aten
ZERO = sympy.Integer(0)


def _constant(interpreter: MaskInterpreter, node: Node, index: Index) -> Value | None:
    """``full``, ``ones``, ``zeros`` and their relatives."""
    name = str(node.target).split(".")[1]
    if "ones" in name:
        number: Any = 1
    elif "zeros" in name:
        number = 0
    else:
        arguments = bound_arguments(node)
        number = arguments.get("fill_value", arguments.get("s"))
    value = interpreter.operand(node, number, ())
    if fake_value(node).dtype == torch.bool and not isinstance(value, Formula):
        return None if not isinstance(value, sympy.Integer) else (FALSE if value == 0 else TRUE)
    return None if value is None else as_number(value)


def _arange(interpreter: MaskInterpreter, node: Node, index: Index) -> Value | None:
    arguments = bound_arguments(node)
    start = interpreter.operand(node, arguments.get("start", 0), ())
    step = interpreter.operand(node, arguments.get("step", 1), ())
    if not isinstance(start, sympy.Expr) or not isinstance(step, sympy.Expr):
        return None
    return sympy.expand(start + step * index[0]) if step.is_Integer else None


def _where(interpreter: MaskInterpreter, node: Node, index: Index) -> Value | None:
    if len(node.args) != 3:
        return None
    condition, then, other = (interpreter.operand(node, x, index) for x in node.args)
    return _select(condition, then, other)


def _masked_fill(interpreter: MaskInterpreter, node: Node, index: Index) -> Value | None:
    kept, condition, fill = (interpreter.operand(node, x, index) for x in node.args[:3])
    return _select(condition, fill, kept)


def _select(condition: Any, then: Any, other: Any) -> Value | None:
    if not isinstance(condition, Formula) or then is None or other is None:
        return None
    if isinstance(then, Formula) and isinstance(other, Formula):
        return choose(condition, then, other)
    return choice(condition, as_number(then), as_number(other))


def _triangle(interpreter: MaskInterpreter, node: Node, index: Index) -> Value | None:
    """``tril`` and ``triu``: the argument on one side of a diagonal, zero on the other."""
    diagonal = interpreter.operand(node, bound_arguments(node)["diagonal"], ())
    kept = interpreter.operand(node, node.args[0], index)
    if kept is None or not isinstance(diagonal, sympy.Expr):
        return None
    below = index[-1] - index[-2] - diagonal
    is_lower = str(node.target).startswith("aten.tril")
    inside = at_most_zero(interpreter, below if is_lower else -below)
    if isinstance(kept, Formula):
        return both(inside, kept)
    zero = 0.0 if fake_value(node).dtype.is_floating_point else ZERO
    return choice(inside, kept, zero)


def _cumsum(interpreter: MaskInterpreter, node: Node, index: Index) -> Value | None:
    """A running sum of a constant."""
    arguments = bound_arguments(node)
    source = node.args[0]
    shape = tensor_shape(source)
    if not isinstance(source, Node) or not shape:
        return None
    axis = arguments["dim"] % len(shape)
    along = interpreter.ranges.fresh(shape[axis])
    moving = (*index[:axis], along, *index[axis + 1 :])
    value = interpreter.read(node, source, moving)
    number = None if value is None else as_number(value)
    if not isinstance(number, sympy.Integer):
        return None
    return sympy.expand(number * (index[axis] + 1))


def _diff(interpreter: MaskInterpreter, node: Node, index: Index) -> Value | None:
    """A first difference that is the same everywhere, the prepended element included."""
    arguments = bound_arguments(node)
    source, first = node.args[0], arguments["prepend"]
    shape = tensor_shape(source)
    if not isinstance(source, Node) or not shape or arguments["n"] != 1 or arguments["append"]:
        return None
    axis = arguments["dim"] % len(shape)
    along = interpreter.ranges.fresh(shape[axis])

    def at(position: sympy.Expr) -> Value | None:
        return interpreter.read(node, source, (*index[:axis], position, *index[axis + 1 :]))

    steps = [lift(_subtract, at(along + 1), at(along))]
    if isinstance(first, Node):
        head = broadcast_index((*index[:axis], ZERO, *index[axis + 1 :]), tensor_shape(first) or ())
        before = interpreter.read(node, first, head)
        steps.append(lift(_subtract, at(ZERO), before))
        if len(tensor_shape(first) or ()) != len(shape) or (tensor_shape(first) or ())[axis] != 1:
            return None
    same = isinstance(steps[0], sympy.Integer) and all(step == steps[0] for step in steps)
    return steps[0] if same else None


def _subtract(left: Any, right: Any) -> Value | None:
    if isinstance(left, sympy.Expr) and isinstance(right, sympy.Expr):
        return sympy.expand(left - right)
    return None


def _index(interpreter: MaskInterpreter, node: Node, index: Index) -> Value | None:
    """A gather: indices are evaluated, then the source at their values."""
    source, picks = node.args[0], node.args[1]
    if not isinstance(source, Node) or not isinstance(picks, (list, tuple)):
        return None
    places = [place for place, pick in enumerate(picks) if isinstance(pick, Node)]
    shapes = [tensor_shape(picks[place]) for place in places]
    if not places or any(fake_value(picks[place]).dtype == torch.bool for place in places):
        return None
    rank = max(len(shape or ()) for shape in shapes)
    is_run = places == list(range(places[0], places[-1] + 1))
    start = places[0] if is_run else 0
    gathered, kept = index[start : start + rank], [*index[:start], *index[start + rank :]]
    position: list[sympy.Expr] = []
    for place in range(len(tensor_shape(source) or ())):
        if place not in places:
            position.append(kept.pop(0))
            continue
        value = interpreter.operand(node, picks[place], gathered)
        if not _is_position(interpreter, value):
            return None
        position.append(value)  # pyright: ignore[reportArgumentType]
    return interpreter.read(node, source, tuple(position))


def _is_position(interpreter: MaskInterpreter, value: Any) -> bool:
    """Whether a gather index is known and cannot wrap around (be negative)."""
    if not isinstance(value, sympy.Expr) or value.free_symbols & set(interpreter.read_of):
        return False
    return interpreter.ranges.is_at_least(value, 0)


def _cast(interpreter: MaskInterpreter, node: Node, index: Index) -> Value | None:
    """A conversion; the interpreter settles what the target dtype makes of the value."""
    value = interpreter.operand(node, node.args[0], index)
    source, target = fake_value(node.args[0]), fake_value(node)
    if isinstance(value, float) and not target.dtype.is_floating_point:
        return sympy.Integer(int(value)) if value == int(value) else None
    loses = source.dtype.is_floating_point and not target.dtype.is_floating_point
    is_exact = not loses or not isinstance(value, sympy.Expr) or value.is_number
    return value if is_exact else None


def _logical_not(interpreter: MaskInterpreter, node: Node, index: Index) -> Value | None:
    value = interpreter.operand(node, node.args[0], index)
    if fake_value(node).dtype != torch.bool:
        return None
    return negate(value) if isinstance(value, Formula) else None


def _size(interpreter: MaskInterpreter, node: Node, index: Index) -> Value | None:
    return as_expression(fake_value(node))


RULES: dict[Any, Rule] = {
    **LAYOUTS,
    **ARITHMETIC,
    **COMPARISONS,
    **JOINS,
    **LOGIC,
    **dict.fromkeys(
        (
            aten.full,
            aten.full_like,
            aten.new_full,
            aten.ones,
            aten.ones_like,
            aten.new_ones,
            aten.zeros,
            aten.zeros_like,
            aten.new_zeros,
            aten.scalar_tensor,
        ),
        _constant,
    ),
    **dict.fromkeys((aten.to, aten._to_copy, aten.type_as), _cast),
    **dict.fromkeys((aten.tril, aten.triu, aten.tril_, aten.triu_), _triangle),
    **dict.fromkeys((aten.masked_fill, aten.masked_fill_), _masked_fill),
    **dict.fromkeys((aten.logical_not, aten.bitwise_not), _logical_not),
    aten.arange: _arange,
    aten.where: _where,
    aten.cumsum: _cumsum,
    aten.diff: _diff,
    aten.index: _index,
    aten.sym_size: _size,
}
