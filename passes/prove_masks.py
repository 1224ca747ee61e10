"""What the mask of a site provably is: a band, key padding, documents, or not proved.

Every restriction of a site (its ``mask_terms``, ``is_causal``) is interpreted as a formula over
query ``q``, key ``k`` and batch item ``b``. The proof succeeds when their conjunction is exactly a
:class:`~seer_compile.types.Visibility`:

    k - q <= upper, k - q >= lower     bounds: sizes, plus one offset read from 0-d tensors
    node[b, k + c]                     key padding
    node[b, q + c] == node[b, k + c]   documents

A number on the logits counts as hiding a key from -10000 down, as visible at 0, and as an unproved
bias elsewhere. Nothing is run, nothing is changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._sympy.functions import Max, Min

from seer_compile.passes.fx_utils import fake_value, tensor_shape
from seer_compile.passes.index_ranges import IndexRanges, as_expression
from seer_compile.passes.interpret_masks import MaskInterpreter, broadcast_index
from seer_compile.passes.mask_arithmetic import at_most_zero
from seer_compile.passes.mask_domain import (
    FALSE,
    TRUE,
    AllOf,
    AtMost,
    Flag,
    Formula,
    Read,
    Real,
    Same,
    Unclear,
    as_number,
    both,
    lift,
    negate,
)
from seer_compile.passes.mask_rules import RULES
from seer_compile.passes.mutation import Mutations
from seer_compile.passes.position_runs import positions_within_documents
from seer_compile.types import (
    AttentionSite,
    MaskProof,
    MaskTerm,
    SkipCode,
    SkipReason,
    Visibility,
)

# Additive masks use -1e4 in half precision and finfo.min or -inf elsewhere.
_HIDING = -1e4


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


class _NotProvedError(Exception):
    def __init__(self, why: str, code: SkipCode = SkipCode.OPAQUE_MASK) -> None:
        super().__init__(why)
        self.reason = SkipReason(code, why)


def prove_masks(
    graph_module: GraphModule,
    sites: Sequence[AttentionSite],
    constants: Mapping[Node, Tensor] | None = None,
) -> tuple[MaskProof, ...]:
    """Return what each site's mask is, in the order of the sites.

    Args:
        graph_module: The normalised graph that the sites were found in; not changed.
        sites: From ``find_sites``.
        constants: Real values of nodes that stay as they are (``module_constants``); without it
            triangles kept in buffers are not proved.

    Returns:
        One proof per site. Its visibility holds ``int`` or ``SymInt`` bounds, a :class:`ScalarSum`
        offset, ``Flag`` tuples as key padding and ``Read`` documents; ``materialise`` turns them
        into nodes.
    """
    mutations = Mutations(graph_module.graph)
    return tuple(_prove(site, mutations, constants or {}) for site in sites)


def _prove(
    site: AttentionSite, mutations: Mutations, constants: Mapping[Node, Tensor]
) -> MaskProof:
    if site.graph_path or site.kind == "flex":
        reason = SkipReason(SkipCode.FLEX if site.kind == "flex" else SkipCode.SUBGRAPH)
        return MaskProof(visibility=None, reason=reason)
    mode = getattr(fake_value(site.output), "fake_mode", None)
    ranges = IndexRanges(site.axis_sizes, getattr(mode, "shape_env", None))
    interpreter = MaskInterpreter(RULES, ranges, mutations, constants)
    try:
        formula = both(*(_visible(term, site, interpreter, mutations) for term in site.mask_terms))
        if site.is_causal:
            formula = both(formula, at_most_zero(interpreter, ranges.key - ranges.query))
        visibility = _as_visibility(formula, interpreter)
    except _NotProvedError as error:
        return MaskProof(visibility=None, reason=error.reason)
    return MaskProof(visibility=visibility, constants=tuple(sorted(interpreter.constants_read)))


def _visible(
    term: MaskTerm, site: AttentionSite, interpreter: MaskInterpreter, mutations: Mutations
) -> Formula:
    """Return when a term leaves a key visible."""
    shape = tensor_shape(term.node)
    if shape is None:
        raise _NotProvedError(f"`{term.node.name}` is no tensor")
    writer = mutations.writer_between(term.node, term.node, site.output)
    if writer is not None:
        raise _NotProvedError(f"`{writer.name}` changes it in place", SkipCode.MUTATION)
    index = tuple(_position(axis, interpreter.ranges) for axis in term.axes)
    if len(shape) > len(index):
        raise _NotProvedError(f"`{term.node.name}` has {len(shape)} axes")
    value = interpreter.element(term.node, broadcast_index(index, shape))
    is_boolean = fake_value(term.node).dtype == torch.bool
    if term.kind in ("masked_fill", "where"):
        if not isinstance(value, Formula):
            raise _NotProvedError(f"`{term.node.name}` is not boolean")
        _require_hiding(term, interpreter)
        return negate(value) if term.kind == "masked_fill" else value
    if is_boolean and term.kind == "attn_mask":
        return value  # pyright: ignore[reportReturnType]
    formula = lift(lambda leaf: _leaf_visible(leaf, term), as_number(value))
    return formula if formula is not None else Unclear(f"`{term.node.name}` has too many cases")


def _position(axis: tuple[str, ...], ranges: IndexRanges) -> sympy.Expr:
    position = sympy.Integer(0)
    for letter in axis:
        position = position * as_expression(ranges.sizes[letter]) + ranges.symbols[letter]
    return sympy.expand(position)


def _require_hiding(term: MaskTerm, interpreter: MaskInterpreter) -> None:
    fill = term.fill
    if isinstance(fill, Node) and tensor_shape(fill) is not None:
        shape = tensor_shape(fill) or ()
        is_scalar = all(size == 1 for size in shape)
        fill = interpreter.element(fill, (sympy.Integer(0),) * len(shape)) if is_scalar else None
    if isinstance(fill, sympy.Expr) and fill.is_number:
        fill = float(fill)
    if not isinstance(fill, (int, float)) or not fill * term.factor <= _HIDING:
        raise _NotProvedError(
            f"hidden logits become {term.fill}, not {_HIDING:g} or less", SkipCode.FLOAT_BIAS
        )


def _leaf_visible(leaf: Any, term: MaskTerm) -> Formula:
    if isinstance(leaf, float) or (isinstance(leaf, sympy.Expr) and leaf.is_number):
        number = float(leaf) * term.factor
        if number == 0:
            return TRUE
        if number <= _HIDING:
            return FALSE
        return Unclear(f"`{term.node.name}` adds {number:g}", SkipCode.FLOAT_BIAS)
    source = leaf.read.node.name if isinstance(leaf, Real) else term.node.name
    return Unclear(f"values of `{source}`", SkipCode.FLOAT_BIAS)


def _as_visibility(formula: Formula, interpreter: MaskInterpreter) -> Visibility:
    if formula == FALSE:
        raise _NotProvedError("hides every key")
    atoms = formula.parts if isinstance(formula, AllOf) else frozenset({formula})
    flags, documents, bounds = [], [], []
    for atom in sorted(atoms, key=str):
        if isinstance(atom, Unclear):
            raise _NotProvedError(atom.why, atom.code)
        if isinstance(atom, Flag):
            flags.append(atom)
        elif isinstance(atom, Same):
            documents.append(atom)
        elif isinstance(atom, AtMost):
            bounds.append(atom.expression)
        else:
            raise _NotProvedError("a key is visible under one of several conditions")
    if len(documents) > 1:
        raise _NotProvedError("two different document numberings")
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
        query_documents=documents[0].left if documents else None,
        key_documents=documents[0].right if documents else None,
    )


def _require_key_padding(flag: Flag, interpreter: MaskInterpreter) -> None:
    others = interpreter.dependence(flag.read.index) - interpreter.ranges.key_side
    if others:
        letters = ", ".join(sorted(str(symbol).removeprefix("index_") for symbol in others))
        raise _NotProvedError(f"`{flag.read.node.name}` depends on axis {letters}")
    if not interpreter.is_plain(flag.read):
        raise _NotProvedError(f"`{flag.read.node.name}` is gathered by position")


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
        raise _NotProvedError("bounds with different run-time offsets")
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
        raise _NotProvedError(f"a condition on {_named(expression, interpreter)}")
    side = int(slopes[1])
    rest = sympy.expand(expression - side * (ranges.key - ranges.query))
    if interpreter.dependence(rest):
        raise _NotProvedError(f"a condition on {_named(expression, interpreter)}")
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
        raise _NotProvedError(f"bound {edges[0]} is not a size")
    return size


def _scalar_sum(offset: sympy.Expr, interpreter: MaskInterpreter) -> ScalarSum | None:
    if offset == 0:
        return None
    terms = []
    for symbol in sorted(offset.free_symbols, key=str):
        weight = offset.coeff(symbol)
        if not weight.is_Integer:
            raise _NotProvedError("a run-time offset that is not a sum")
        terms.append((interpreter.read_of[symbol], int(weight)))
    return ScalarSum(tuple(terms))
