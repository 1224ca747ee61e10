"""From a formula over positions to a ``Visibility``, exactly or not at all.

AtMost(k - q - c)         upper bound c
AtMost(q - k + c)         lower bound c
Flag(node[b, k + c])      key padding
Same(left, right)         documents
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
from torch.utils._sympy.functions import Max, Min

from seer_compile.passes.fx_utils import cited
from seer_compile.passes.interpret_masks import MaskInterpreter
from seer_compile.passes.mask_domain import (
    FALSE,
    AllOf,
    AnyOf,
    AtMost,
    Flag,
    Formula,
    Read,
    Same,
    Unclear,
    both,
    either,
)
from seer_compile.passes.position_runs import positions_within_documents
from seer_compile.types import SkipCode, SkipReason, Visibility

_AXES = {"b": "batch item", "h": "head", "q": "query"}


@dataclass(frozen=True, slots=True)
class ScalarSum:
    """An offset known at run time: a weighted sum of elements of integer tensors."""

    terms: tuple[tuple[Read, int], ...]

    def __str__(self) -> str:
        """Return the names of the tensors, for tables."""
        return " + ".join(
            read.node.name if weight == 1 else f"{weight} * {read.node.name}"
            for read, weight in self.terms
        )


class NotProvedError(Exception):
    """A mask is not a visibility; ``reason`` says why."""

    def __init__(self, why: str, code: SkipCode = SkipCode.OPAQUE_MASK) -> None:
        super().__init__(why)
        self.reason = SkipReason(code, why)


def as_visibility(formula: Formula, interpreter: MaskInterpreter) -> Visibility:
    """Return the visibility that a formula over query, key and batch item is exactly.

    Raises:
        NotProvedError: It is none.
    """
    formula = _without_implied(formula, interpreter)
    if formula == FALSE:
        raise NotProvedError("hides every key")
    atoms = formula.parts if isinstance(formula, AllOf) else frozenset({formula})
    for atom in sorted(atoms, key=str):
        _require_atom(atom)
    flags = [atom for atom in sorted(atoms, key=str) if isinstance(atom, Flag)]
    documents = [atom for atom in sorted(atoms, key=str) if isinstance(atom, Same)]
    bounds = [
        atom.expression
        for atom in atoms
        if isinstance(atom, AtMost) and not interpreter.ranges.is_at_most_zero(atom.expression)
    ]
    for document in documents:
        bounds = positions_within_documents(document, bounds, interpreter)
    for flag in flags:
        _require_key_padding(flag, interpreter)
    upper, lower, offset = _band(bounds, interpreter)
    return Visibility(
        upper=upper,
        lower=lower,
        offset=offset,
        key_padding=tuple(flags) or None,
        query_documents=tuple(document.left for document in documents) or None,
        key_documents=tuple(document.right for document in documents) or None,
    )


def _without_implied(formula: Formula, interpreter: MaskInterpreter) -> Formula:
    """Leave out the alternatives that imply another one."""
    if isinstance(formula, AllOf):
        return both(*(_without_implied(part, interpreter) for part in formula.parts))
    if not isinstance(formula, AnyOf):
        return formula
    kept: list[Any] = []
    for part in sorted(formula.parts, key=str):
        if any(_implies(part, other, interpreter) for other in kept):
            continue
        kept = [*(other for other in kept if not _implies(other, part, interpreter)), part]
    return either(*kept)


def _implies(part: Any, other: Any, interpreter: MaskInterpreter) -> bool:
    """Whether one bound holds wherever another does."""
    if not isinstance(part, AtMost) or not isinstance(other, AtMost):
        return False
    return interpreter.ranges.is_at_most_zero(other.expression - part.expression)


def _require_atom(formula: Formula) -> None:
    """Refuse what is not understood, and alternatives."""
    unclear = _unclear_within(formula)
    if unclear is not None:
        raise NotProvedError(unclear.why, unclear.code)
    if isinstance(formula, Same) and formula.negated:
        raise NotProvedError("only tokens of another document are visible")
    if not isinstance(formula, (Flag, Same, AtMost)):
        raise NotProvedError("a key is visible under one of several conditions")


def _unclear_within(formula: Formula) -> Unclear | None:
    """Return a part that was not understood, the cause of what its whole looks like."""
    if isinstance(formula, Unclear):
        return formula
    parts = sorted(formula.parts, key=str) if isinstance(formula, (AllOf, AnyOf)) else ()
    return next(filter(None, map(_unclear_within, parts)), None)


def _require_key_padding(flag: Flag, interpreter: MaskInterpreter) -> None:
    others = interpreter.dependence(flag.read.index) - interpreter.ranges.key_side
    if others:
        names = {_AXES.get(str(symbol).removeprefix("index_"), "position") for symbol in others}
        raise NotProvedError(f"{cited(flag.read.node)} is data per {' and '.join(sorted(names))}")
    if not interpreter.is_plain(flag.read):
        raise NotProvedError(f"`{flag.read.node.name}` is gathered by position")


def _band(
    bounds: Sequence[sympy.Expr], interpreter: MaskInterpreter
) -> tuple[Any, Any, ScalarSum | None]:
    """Return the band that all bounds ``expression <= 0`` make together."""
    uppers: list[sympy.Expr] = []
    lowers: list[sympy.Expr] = []
    offsets: set[sympy.Expr] = set()
    for expression in bounds:
        side, size, offset = _edge(expression, interpreter)
        (uppers if side > 0 else lowers).append(size)
        offsets.add(offset)
    if len(offsets) > 1:
        raise NotProvedError("bounds with different run-time offsets")
    upper = _tightest(uppers, Min, interpreter)
    lower = _tightest(lowers, Max, interpreter)
    return upper, lower, _scalar_sum(offsets.pop(), interpreter) if offsets else None


def _edge(
    expression: sympy.Expr, interpreter: MaskInterpreter
) -> tuple[int, sympy.Expr, sympy.Expr]:
    """Return the side (1 upper, -1 lower), the size part and the tensor part of a bound."""
    ranges = interpreter.ranges
    slopes = tuple(expression.coeff(symbol) for symbol in (ranges.query, ranges.key))
    if ranges.has_one_query:
        # The only query is at 0: its slope is free, so a bound on the key alone is a band.
        expression = expression.subs(ranges.query, 0)
        slopes = (-slopes[1], slopes[1])
        expression = sympy.expand(expression + slopes[0] * ranges.query)
    if slopes not in ((-1, 1), (1, -1)):
        raise NotProvedError(f"a condition on {_named(expression, interpreter)}")
    side = int(slopes[1])
    rest = sympy.expand(expression - side * (ranges.key - ranges.query))
    if interpreter.dependence(rest):
        raise NotProvedError(f"a condition on {_named(expression, interpreter)}")
    scalars = [symbol for symbol in rest.free_symbols if symbol in interpreter.read_of]
    offset = sympy.expand(sum((rest.coeff(s) * s for s in scalars), sympy.Integer(0)))
    return side, sympy.expand(-side * (rest - offset)), sympy.expand(-side * offset)


def _named(expression: sympy.Expr, interpreter: MaskInterpreter) -> str:
    names = {
        symbol: sympy.Symbol(interpreter.read_of[symbol].node.name)
        for symbol in expression.free_symbols
        if symbol in interpreter.read_of
    }
    return str(expression.subs(names)).replace("index_", "")


def _tightest(edges: Sequence[sympy.Expr], join: Any, interpreter: MaskInterpreter) -> Any:
    if not edges:
        return None
    size = interpreter.ranges.as_size(edges[0] if len(edges) == 1 else join(*edges))
    if size is None:
        raise NotProvedError(f"bound {edges[0]} is not a size")
    return size


def _scalar_sum(offset: sympy.Expr, interpreter: MaskInterpreter) -> ScalarSum | None:
    if offset == 0:
        return None
    terms = []
    for symbol in sorted(offset.free_symbols, key=str):
        weight = offset.coeff(symbol)
        if not weight.is_Integer:
            raise NotProvedError("a run-time offset that is not a sum")
        terms.append((interpreter.read_of[symbol], int(weight)))
    return ScalarSum(tuple(terms))
