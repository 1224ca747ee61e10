"""The values that mask interpretation computes with: formulas and numbers over token positions.

A boolean element of a mask is a *formula* over its position: a conjunction or disjunction of atoms.
``AtMost(e)`` says ``e <= 0`` for an integer expression over the index symbols, ``Flag`` is an
element of a boolean tensor, ``Same`` an equality of two integer elements, ``Unclear`` something not
understood. A numeric element is an integer expression, a float constant, or a ``Choice`` between
two values. Every operation here is exact; what cannot be exact becomes ``Unclear`` or None.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
from torch.fx import Node

from seer_compile.types import SkipCode

# Leaves of nested choices; a mask that needs more is not understood.
_MOST_LEAVES = 64


@dataclass(frozen=True, slots=True)
class Read:
    """One element of a tensor: ``node[index]``, as it is when ``node`` has just run."""

    node: Node
    index: tuple[sympy.Expr, ...]


@dataclass(frozen=True, slots=True)
class AtMost:
    """``expression <= 0``."""

    expression: sympy.Expr


@dataclass(frozen=True, slots=True)
class Flag:
    """A boolean element, or its negation."""

    read: Read
    negated: bool = False


@dataclass(frozen=True, slots=True)
class Same:
    """Equality of an integer element per query and one per key, or its negation."""

    left: Read
    right: Read
    negated: bool = False


@dataclass(frozen=True, slots=True)
class Unclear:
    """A truth value that is not understood."""

    why: str
    code: SkipCode = SkipCode.OPAQUE_MASK


@dataclass(frozen=True, slots=True)
class AllOf:
    """Conjunction; without parts it is true."""

    parts: frozenset[Any] = frozenset()


@dataclass(frozen=True, slots=True)
class AnyOf:
    """Disjunction; without parts it is false."""

    parts: frozenset[Any] = frozenset()


Formula = AtMost | Flag | Same | Unclear | AllOf | AnyOf
TRUE = AllOf()
FALSE = AnyOf()


@dataclass(frozen=True, slots=True)
class Choice:
    """``then`` where the condition holds, ``other`` elsewhere."""

    condition: Formula
    then: Any
    other: Any


@dataclass(frozen=True, slots=True)
class Real:
    """An element of a floating-point tensor of which nothing is known."""

    read: Read


Value = Formula | sympy.Expr | float | Choice | Real


def negate(formula: Formula) -> Formula:
    """Return the formula that holds where ``formula`` does not."""
    if isinstance(formula, AtMost):
        return AtMost(sympy.expand(1 - formula.expression))
    if isinstance(formula, Flag):
        return Flag(formula.read, not formula.negated)
    if isinstance(formula, Same):
        return Same(formula.left, formula.right, not formula.negated)
    if isinstance(formula, AllOf):
        return either(*(negate(part) for part in formula.parts))
    if isinstance(formula, AnyOf):
        return both(*(negate(part) for part in formula.parts))
    return formula


def both(*formulas: Formula) -> Formula:
    """Return the conjunction."""
    return _combine(formulas, AllOf, FALSE)


def either(*formulas: Formula) -> Formula:
    """Return the disjunction."""
    return _combine(formulas, AnyOf, TRUE)


def _combine(
    formulas: tuple[Formula, ...], kind: type[AllOf] | type[AnyOf], absorbing: Formula
) -> Formula:
    parts: set[Formula] = set()
    for formula in formulas:
        parts |= formula.parts if isinstance(formula, kind) else {formula}
    # An unclear part is not its own complement, so only atoms with exact negations cancel.
    exact = [part for part in parts if isinstance(part, (AtMost, Flag, Same))]
    if absorbing in parts or any(negate(part) in parts for part in exact):
        return absorbing
    return parts.pop() if len(parts) == 1 else kind(frozenset(parts))


def choose(condition: Formula, then: Formula, other: Formula) -> Formula:
    """Return the formula ``then`` where the condition holds and ``other`` elsewhere."""
    if then == other or condition == TRUE:
        return then
    if condition == FALSE:
        return other
    if then in (TRUE, FALSE):
        rest = either(condition, other) if then == TRUE else both(negate(condition), other)
        return negate(condition) if then == FALSE and other == TRUE else rest
    if other in (TRUE, FALSE):
        return either(negate(condition), then) if other == TRUE else both(condition, then)
    if _implies(condition, other) and _implies(negate(condition), then):
        return both(then, other)
    return either(both(condition, then), both(negate(condition), other))


def _implies(condition: Formula, consequence: Formula) -> bool:
    """Whether one bound follows from another; it is how ``|x| <= c`` becomes two bounds."""
    if not isinstance(condition, AtMost) or not isinstance(consequence, AtMost):
        return False
    slack = sympy.expand(consequence.expression - condition.expression)
    return bool(slack.is_number) and slack <= 0


def choice(condition: Formula, then: Value, other: Value) -> Value:
    """Return the numeric value ``then`` where the condition holds and ``other`` elsewhere."""
    if then == other or condition == TRUE:
        return then
    return other if condition == FALSE else Choice(condition, then, other)


def as_number(value: Value) -> Value:
    """Return a truth value as the number 1 or 0; numbers unchanged."""
    if isinstance(value, Formula):
        return choice(value, sympy.Integer(1), sympy.Integer(0))
    return value


def is_number(value: Any) -> bool:
    """Whether a value is a known constant."""
    return isinstance(value, float) or (isinstance(value, sympy.Expr) and bool(value.is_number))


def lift(function: Callable[..., Any], *values: Any) -> Any:
    """Apply ``function`` below every choice of its arguments.

    ``function`` takes values that are no choices. It returns a value, a formula, or None where it
    does not know; one None makes the whole result None.
    """
    if _leaves(*values) > _MOST_LEAVES:
        return None
    for place, value in enumerate(values):
        if isinstance(value, Choice):
            then, other = (
                lift(function, *values[:place], branch, *values[place + 1 :])
                for branch in (value.then, value.other)
            )
            if then is None or other is None:
                return None
            join = choose if isinstance(then, Formula) else choice
            return join(value.condition, then, other)
    return None if any(value is None for value in values) else function(*values)


def _leaves(*values: Any) -> int:
    count = 1
    for value in values:
        if isinstance(value, Choice):
            count *= _leaves(value.then) + _leaves(value.other)
    return count
