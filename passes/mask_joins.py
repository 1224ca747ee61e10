"""Masks put together from parts, or of which rows are taken.

Only where positions alone decide: what is made of data stays one tensor, which is read as it is.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch.fx import Node

from seer_compile.passes.fx_utils import bound_arguments, fake_value, tensor_shape
from seer_compile.passes.index_ranges import as_expression
from seer_compile.passes.interpret_masks import Index, MaskInterpreter, Rule
from seer_compile.passes.mask_comparisons import at_most_zero
from seer_compile.passes.mask_domain import (
    AllOf,
    AnyOf,
    AtMost,
    Choice,
    Formula,
    Value,
    as_number,
    choice,
    choose,
)

aten = torch.ops.aten


def _concatenation(interpreter: MaskInterpreter, node: Node, index: Index) -> Value | None:
    """``cat`` and its relatives: the first part up to its size, the others behind it."""
    parts, axis = node.args[0], _axis(node, len(index))
    if not isinstance(parts, (list, tuple)) or not all(isinstance(part, Node) for part in parts):
        return None
    shapes = [tensor_shape(part) for part in parts]
    if any(shape is None or len(shape) != len(index) for shape in shapes):
        return None
    is_boolean = fake_value(node).dtype == torch.bool
    place, values, ends = index[axis], list[Value](), list[sympy.Expr]()
    for part, shape in zip(parts, shapes, strict=True):
        assert isinstance(part, Node)
        start = ends[-1] if ends else sympy.Integer(0)
        inside = (*index[:axis], sympy.expand(place - start), *index[axis + 1 :])
        value = interpreter.read(node, part, inside)
        if value is None or not is_positional(interpreter, value):
            return None
        values.append(value if is_boolean else as_number(value))
        ends.append(sympy.expand(start + as_expression((shape or ())[axis])))
    joined = values.pop()
    for value, end in zip(reversed(values), reversed(ends[:-1]), strict=True):
        joined = _join(at_most_zero(interpreter, place - end + 1), value, joined)
    return joined


def _axis(node: Node, rank: int) -> int:
    name = str(node.target).split(".")[1]
    if name == "hstack":
        return 0 if rank == 1 else 1
    if name == "vstack":
        return 0
    return bound_arguments(node)["dim"] % rank


def _join(condition: Formula, then: Value, other: Value) -> Value:
    if isinstance(then, Formula) and isinstance(other, Formula):
        return choose(condition, then, other)
    return choice(condition, as_number(then), as_number(other))


def _index_select(interpreter: MaskInterpreter, node: Node, index: Index) -> Value | None:
    """Rows by number: the numbers are evaluated, then the source at their values."""
    arguments = bound_arguments(node)
    source, numbers = arguments["self"], arguments["index"]
    if not isinstance(source, Node) or not isinstance(numbers, Node) or not index:
        return None
    axis = arguments["dim"] % len(index)
    row = interpreter.operand(node, numbers, (index[axis],))
    # A negative number would be an error, so there is nothing to wrap around.
    if not isinstance(row, sympy.Expr) or not is_positional(interpreter, row):
        return None
    value = interpreter.read(node, source, (*index[:axis], row, *index[axis + 1 :]))
    return value if value is not None and is_positional(interpreter, value) else None


def is_positional(interpreter: MaskInterpreter, value: Any) -> bool:
    """Whether positions and sizes alone say what a value is."""
    if isinstance(value, Choice):
        parts = (value.condition, value.then, value.other)
    elif isinstance(value, (AllOf, AnyOf)):
        parts = tuple(value.parts)
    else:
        expression = value.expression if isinstance(value, AtMost) else value
        is_number = isinstance(expression, (float, sympy.Expr))
        return is_number and not (
            isinstance(expression, sympy.Expr)
            and expression.free_symbols & interpreter.read_of.keys()
        )
    return all(is_positional(interpreter, part) for part in parts)


JOINS: dict[Any, Rule] = {
    **dict.fromkeys((aten.cat, aten.concat, aten.hstack, aten.vstack), _concatenation),
    aten.index_select: _index_select,
}
