"""What the mask of a site provably is: a band, key padding, documents, or not proved.

Every restriction of a site (its ``mask_terms``, ``is_causal``) is interpreted as a formula over
query ``q``, key ``k`` and batch item ``b``. The proof succeeds when their conjunction is exactly a
:class:`~seer_compile.types.Visibility`:

    k - q <= upper, k - q >= lower     bounds: sizes, plus one offset read from 0-d tensors
    node[b, k + c]                     key padding
    node[b, q + c] == node[b, k + c]   documents, in one numbering or several

A number on the logits counts as hiding a key from -10000 down, as visible at 0, and as an unproved
bias elsewhere. Nothing is run, nothing is changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from seer_compile.passes.fx_utils import cited, fake_value, tensor_shape
from seer_compile.passes.index_ranges import IndexRanges, as_expression
from seer_compile.passes.interpret_masks import MaskInterpreter, broadcast_index
from seer_compile.passes.mask_comparisons import at_most_zero
from seer_compile.passes.mask_domain import (
    FALSE,
    TRUE,
    Formula,
    Real,
    Unclear,
    as_number,
    both,
    lift,
    negate,
)
from seer_compile.passes.mask_functions import agrees
from seer_compile.passes.mask_rules import RULES
from seer_compile.passes.mask_visibility import NotProvedError, as_visibility
from seer_compile.passes.matches import HIDING
from seer_compile.passes.mutation import Mutations
from seer_compile.types import (
    AttentionSite,
    MaskProof,
    MaskTerm,
    SkipCode,
)


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
        offset, tuples of ``Flag`` as key padding and of ``Read`` as documents; ``materialise``
        turns them into nodes.
    """
    mutations = Mutations(graph_module.graph)
    return tuple(_prove(site, mutations, constants or {}) for site in sites)


def _prove(
    site: AttentionSite, mutations: Mutations, constants: Mapping[Node, Tensor]
) -> MaskProof:
    is_opaque = site.kind == "flex" and bool(site.obstacles)
    if site.graph_path or is_opaque or not site.axis_sizes:
        # Nothing to interpret here: the finder has said why.
        return MaskProof(visibility=None, reason=site.obstacles[0])
    mode = getattr(fake_value(site.output), "fake_mode", None)
    ranges = IndexRanges(site.axis_sizes, getattr(mode, "shape_env", None))
    interpreter = MaskInterpreter(RULES, ranges, mutations, constants)
    try:
        formula = both(*(_visible(term, site, interpreter, mutations) for term in site.mask_terms))
        if site.is_causal:
            formula = both(formula, at_most_zero(interpreter, ranges.key - ranges.query))
        visibility = as_visibility(formula, interpreter)
    except NotProvedError as error:
        return MaskProof(visibility=None, reason=error.reason)
    return MaskProof(visibility=visibility, constants=tuple(sorted(interpreter.constants_read)))


def _visible(
    term: MaskTerm, site: AttentionSite, interpreter: MaskInterpreter, mutations: Mutations
) -> Formula:
    """Return when a term leaves a key visible."""
    shape = tensor_shape(term.node)
    if shape is None:
        raise NotProvedError(f"`{term.node.name}` is no tensor")
    writer = mutations.writer_between(term.node, term.node, site.output)
    if writer is not None:
        raise NotProvedError(f"`{writer.name}` changes it in place", SkipCode.MUTATION)
    index = tuple(_position(axis, interpreter.ranges) for axis in term.axes)
    if len(shape) > len(index):
        raise NotProvedError(f"`{term.node.name}` has {len(shape)} axes")
    value = interpreter.element(term.node, broadcast_index(index, shape))
    is_boolean = fake_value(term.node).dtype == torch.bool
    if term.kind in ("masked_fill", "where"):
        if not isinstance(value, Formula):
            raise NotProvedError(f"`{term.node.name}` is not boolean")
        _require_hiding(term, interpreter)
        return negate(value) if term.kind == "masked_fill" else value
    function = term.function
    if function is not None and not agrees(function, term.node, index, interpreter):
        raise NotProvedError("its blocks are not known to be those of its mask function")
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
    if not isinstance(fill, (int, float)) or not fill * term.factor <= HIDING:
        raise NotProvedError(
            f"hidden logits become {term.fill}, not {HIDING:g} or less", SkipCode.FLOAT_BIAS
        )


def _leaf_visible(leaf: Any, term: MaskTerm) -> Formula:
    if isinstance(leaf, float) or (isinstance(leaf, sympy.Expr) and leaf.is_number):
        number = float(leaf) * term.factor
        if number == 0:
            return TRUE
        if number <= HIDING:
            return FALSE
        return Unclear(f"`{term.node.name}` adds {number:g}", SkipCode.FLOAT_BIAS)
    source = leaf.read.node if isinstance(leaf, Real) else term.node
    return Unclear(f"values of {cited(source)}", SkipCode.FLOAT_BIAS)
