"""Comparisons in mask subgraphs: bands of positions, and documents.

k <= q + c                       AtMost(k - q - c)
document[b, q] == document[b, k] Same
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch.fx import Node

from seer_compile.passes.fx_utils import cited, fake_value
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
    choose,
    is_number,
    lift,
    negate,
)

aten = torch.ops.aten
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


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
        if name in ("eq", "ne") and isinstance(formula, Unclear):
            same = _same_document(interpreter, node, index, left, right)
            if same is not None:
                return same if name == "eq" else negate(same)
        return formula

    return rule


def _compare(interpreter: MaskInterpreter, name: str, left: Any, right: Any) -> Formula:
    if is_number(left) and is_number(right):
        if isinstance(left, float) or isinstance(right, float):
            # SymPy holds that Integer(0) and 0.0 differ.
            left, right = float(left), float(right)
        return TRUE if getattr(operator, name)(left, right) else FALSE
    if not isinstance(left, sympy.Expr) or not isinstance(right, sympy.Expr):
        unknown = next((x for x in (left, right) if isinstance(x, Real)), None)
        return Unclear(
            f"compares values of {cited(unknown.read.node)}" if unknown else "comparison"
        )
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


COMPARISONS = {
    getattr(aten, name): _comparison(name) for name in ("le", "lt", "ge", "gt", "eq", "ne")
}
