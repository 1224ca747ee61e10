"""Arithmetic and logic in mask subgraphs."""

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
    AtMost,
    Formula,
    Value,
    as_number,
    both,
    choice,
    choose,
    either,
    is_number,
    lift,
    negate,
)

aten = torch.ops.aten
Operation = Callable[[Any, Any], Any]


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
        both_known = is_number(left) and is_number(right)
        return _on_numbers(operation, left, right) if both_known else None

    return compute


def _product(left: Any, right: Any) -> Any:
    if isinstance(left, sympy.Expr) and isinstance(right, sympy.Expr):
        return sympy.expand(left * right) if left.is_number or right.is_number else None
    return _on_numbers(operator.mul, left, right) if is_number(left) and is_number(right) else None


def _true_division(left: Any, right: Any) -> Any:
    known = is_number(left) and is_number(right)
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
        return lift(lambda x: _on_numbers(function, x) if is_number(x) else None, value)

    return rule


def _power(interpreter: MaskInterpreter, node: Node, index: Index) -> Value | None:
    left, right = _numbers(interpreter, node, index)
    known = is_number(left) and is_number(right)
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
