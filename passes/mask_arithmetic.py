"""Arithmetic, comparisons and logic in mask subgraphs."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch.fx import Node
from torch.utils._sympy.functions import FloorDiv

from seer_compile.passes.fx_utils import bound_arguments, fake_value
from seer_compile.passes.interpret_masks import Index, MaskInterpreter
from seer_compile.passes.mask_domain import (
    FALSE,
    TRUE,
    AtMost,
    Formula,
    Read,
    Real,
    Same,
    Unclear,
    Value,
    as_number,
    both,
    choice,
    choose,
    either,
    lift,
    negate,
)

aten = torch.ops.aten
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
Operation = Callable[[Any, Any], Any]


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, sympy.Expr) and bool(value.is_number))


def _on_numbers(function: Callable[..., float], *values: Any) -> float | None:
    try:
        return float(function(*(float(value) for value in values)))
    except (ValueError, ZeroDivisionError, OverflowError):
        return None


def _linear(operation: Operation) -> Operation:
    """Addition or subtraction."""

    def compute(left: Any, right: Any) -> Any:
        if isinstance(left, sympy.Expr) and isinstance(right, sympy.Expr):
            return sympy.expand(operation(left, right))
        both_known = _is_number(left) and _is_number(right)
        return _on_numbers(operation, left, right) if both_known else None

    return compute


def _product(left: Any, right: Any) -> Any:
    if isinstance(left, sympy.Expr) and isinstance(right, sympy.Expr):
        return sympy.expand(left * right) if left.is_number or right.is_number else None
    return _on_numbers(operator.mul, left, right) if _is_number(left) and _is_number(right) else None


def _true_division(left: Any, right: Any) -> Any:
    known = _is_number(left) and _is_number(right)
    return _on_numbers(operator.truediv, left, right) if known else None


def _floor_division(left: Any, right: Any) -> Any:
    if not isinstance(left, sympy.Expr) or not isinstance(right, sympy.Integer) or right <= 0:
        return None
    return FloorDiv(left, right)


def _with_alpha(node: Node, operation: Operation) -> Operation | None:
    return operation if bound_arguments(node).get("alpha", 1) == 1 else None


def _binary(operation: Operation) -> Callable[[MaskInterpreter, Node, Index], Value | None]:
    def rule(interpreter: MaskInterpreter, node: Node, index: Index) -> Value | None:
        left, right = _numbers(interpreter, node, index)
        compute = _with_alpha(node, operation)
        return None if compute is None else lift(compute, left, right)

    return rule


def _numbers(interpreter: MaskInterpreter, node: Node, index: Index) -> list[Any]:
    values = [interpreter.operand(node, argument, index) for argument in node.args[:2]]
    return [None if value is None else as_number(value) for value in values]


def _formulas(interpreter: MaskInterpreter, node: Node, index: Index) -> list[Formula] | None:
    """Return both operands as truth values; None unless both are boolean."""
    values = [interpreter.operand(node, argument, index) for argument in node.args[:2]]
    formulas = [value for value in values if isinstance(value, Formula)]
    return formulas if len(formulas) == 2 else None


def _boolean_or(
    logic: Callable[..., Formula], number: Callable[..., Any] | None
) -> Callable[[MaskInterpreter, Node, Index], Value | None]:
    """A call that is logic on booleans (``*`` is and, ``+`` is or) and arithmetic on numbers."""

    def rule(interpreter: MaskInterpreter, node: Node, index: Index) -> Value | None:
        if fake_value(node).dtype == torch.bool:
            formulas = _formulas(interpreter, node, index)
            return None if formulas is None else logic(*formulas)
        return None if number is None else number(interpreter, node, index)

    return rule


def _division(interpreter: MaskInterpreter, node: Node, index: Index) -> Value | None:
    mode = bound_arguments(node).get("rounding_mode")
    operation = {None: _true_division, "floor": _floor_division}.get(mode)
    left, right = _numbers(interpreter, node, index)
    return None if operation is None else lift(operation, left, right)


def _reverse_subtract(interpreter: MaskInterpreter, node: Node, index: Index) -> Value | None:
    left, right = _numbers(interpreter, node, index)
    compute = _with_alpha(node, _linear(operator.sub))
    return None if compute is None else lift(compute, right, left)


def _negative(interpreter: MaskInterpreter, node: Node, index: Index) -> Value | None:
    value = interpreter.operand(node, node.args[0], index)
    return None if value is None else lift(lambda x: _product(x, sympy.Integer(-1)), value)


def _unary(
    function: Callable[[float], float],
) -> Callable[[MaskInterpreter, Node, Index], Value | None]:
    def rule(interpreter: MaskInterpreter, node: Node, index: Index) -> Value | None:
        value = interpreter.operand(node, node.args[0], index)
        if value is None:
            return None
        return lift(lambda x: _on_numbers(function, x) if _is_number(x) else None, value)

    return rule


def _power(interpreter: MaskInterpreter, node: Node, index: Index) -> Value | None:
    left, right = _numbers(interpreter, node, index)
    known = _is_number(left) and _is_number(right)
    if not known or not fake_value(node).dtype.is_floating_point:
        return None
    return _on_numbers(operator.pow, left, right)


def _absolute(interpreter: MaskInterpreter, node: Node, index: Index) -> Value | None:
    """``|x|`` as a choice by the sign of ``x``."""
    value = interpreter.operand(node, node.args[0], index)
    if isinstance(value, float):
        return abs(value)
    if not isinstance(value, sympy.Expr):
        return None
    return choice(AtMost(value), sympy.expand(-value), value)


def _comparison(name: str) -> Callable[[MaskInterpreter, Node, Index], Value | None]:
    def rule(interpreter: MaskInterpreter, node: Node, index: Index) -> Value | None:
        values = [interpreter.operand(node, argument, index) for argument in node.args[:2]]
        if name in ("eq", "ne") and all(isinstance(value, Formula) for value in values):
            left, right = values
            same = choose(left, right, negate(right))  # pyright: ignore[reportArgumentType]
            return same if name == "eq" else negate(same)
        if any(value is None for value in values):
            return None
        left, right = (as_number(value) for value in values if value is not None)
        formula = lift(lambda x, y: _compare(interpreter, name, x, y), left, right)
        if name == "eq" and isinstance(formula, Unclear):
            return _same_document(interpreter, node, index, left, right) or formula
        return formula

    return rule


def _compare(interpreter: MaskInterpreter, name: str, left: Any, right: Any) -> Formula:
    if _is_number(left) and _is_number(right):
        if isinstance(left, float) or isinstance(right, float):
            # SymPy holds that Integer(0) and 0.0 differ.
            left, right = float(left), float(right)
        return TRUE if getattr(operator, name)(left, right) else FALSE
    if not isinstance(left, sympy.Expr) or not isinstance(right, sympy.Expr):
        unknown = next((x for x in (left, right) if isinstance(x, Real)), None)
        return Unclear(f"compares values of {unknown.read.node.name}" if unknown else "comparison")
    if name in ("ge", "gt"):
        name, left, right = {"ge": "le", "gt": "lt"}[name], right, left
    difference = sympy.expand(left - right)
    if name in ("le", "lt"):
        return at_most_zero(interpreter, difference + (1 if name == "lt" else 0))
    same = both(
        at_most_zero(interpreter, difference), at_most_zero(interpreter, sympy.expand(-difference))
    )
    if not _is_affine(interpreter, difference) and same not in (TRUE, FALSE):
        same = Unclear("equality of values that are not positions")
    return same if name == "eq" else negate(same)


def at_most_zero(interpreter: MaskInterpreter, expression: sympy.Expr) -> Formula:
    """Return ``expression <= 0``, decided where the ranges of the indices decide it."""
    expression = sympy.expand(expression)
    if interpreter.ranges.is_at_most_zero(expression):
        return TRUE
    return FALSE if interpreter.ranges.is_at_least(expression, 1) else AtMost(expression)


def _is_affine(interpreter: MaskInterpreter, expression: sympy.Expr) -> bool:
    symbols = interpreter.dependence(expression)
    unknown = [symbol for symbol in expression.free_symbols if symbol in interpreter.read_of]
    is_scalar = not any(interpreter.dependence(symbol) for symbol in unknown)
    rest = expression - sum(expression.coeff(symbol) * symbol for symbol in symbols)
    return is_scalar and not sympy.expand(rest).has(*symbols) if symbols else is_scalar


def _same_document(
    interpreter: MaskInterpreter, node: Node, index: Index, left: Any, right: Any
) -> Same | None:
    """Return the equality of an integer per query and an integer per key as one atom."""
    ranges = interpreter.ranges
    reads: list[Read] = []
    for argument, value in zip(node.args[:2], (left, right), strict=True):
        if not isinstance(argument, Node) or fake_value(argument).dtype not in _INTEGERS:
            return None
        read = interpreter.read_of.get(value) if isinstance(value, sympy.Symbol) else None
        reads.append(read or interpreter.operand_read(argument, index))
    if not all(interpreter.is_plain(read) for read in reads):
        return None
    for query, key in (reads, reads[::-1]):
        per_query = interpreter.dependence(query.index) <= ranges.query_side
        if per_query and interpreter.dependence(key.index) <= ranges.key_side:
            return Same(query, key)
    return None


ARITHMETIC = {
    **dict.fromkeys((aten.add, aten.add_), _boolean_or(either, _binary(_linear(operator.add)))),
    **dict.fromkeys((aten.sub, aten.sub_), _binary(_linear(operator.sub))),
    **dict.fromkeys((aten.mul, aten.mul_), _boolean_or(both, _binary(_product))),
    **dict.fromkeys((aten.div, aten.div_), _division),
    aten.floor_divide: _binary(_floor_division),
    aten.rsub: _reverse_subtract,
    aten.neg: _negative,
    aten.abs: _absolute,
    aten.sqrt: _unary(math.sqrt),
    aten.rsqrt: _unary(lambda x: 1 / math.sqrt(x)),
    aten.reciprocal: _unary(lambda x: 1 / x),
    aten.pow: _power,
}
COMPARISONS = {
    getattr(aten, name): _comparison(name) for name in ("le", "lt", "ge", "gt", "eq", "ne")
}
LOGIC = {
    **dict.fromkeys(
        (aten.logical_and, aten.bitwise_and, aten.__and__, aten.__iand__, aten.bitwise_and_),
        _boolean_or(both, None),
    ),
    **dict.fromkeys(
        (aten.logical_or, aten.bitwise_or, aten.__or__, aten.__ior__, aten.bitwise_or_),
        _boolean_or(either, None),
    ),
    **dict.fromkeys(
        (aten.logical_xor, aten.bitwise_xor, aten.__xor__),
        _boolean_or(lambda left, right: choose(left, negate(right), right), None),
    ),
    aten.minimum: _boolean_or(both, None),
    aten.maximum: _boolean_or(either, None),
}
