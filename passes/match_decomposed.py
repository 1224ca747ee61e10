"""Attention written as product, softmax, product.

    softmax(scale * q k^T + mask) v

The softmax is where it starts: back to the product of queries and keys (``trace_logits``), forward
to the product with the values (``follow_weights``). The axis of the softmax decides which operand
holds the keys, so transposed spellings and wrong axes tell themselves apart.
"""

from __future__ import annotations

import math

from torch.fx import Node

from seer_compile.passes.axes import AxisBook, Layout, shape_of
from seer_compile.passes.contractions import Contraction, as_contraction
from seer_compile.passes.dataflow import leads_to_product, only_observes
from seer_compile.passes.find_sinks import add_sink, append_sink
from seer_compile.passes.follow_weights import moved, products_of, routes_to_product
from seer_compile.passes.fx_utils import cited, tensor_shape
from seer_compile.passes.logit_chain import Effect, LogitChain
from seer_compile.passes.match_softmax import Softmax
from seer_compile.passes.matches import HIDING, MOST_SHIFTED, Match
from seer_compile.passes.mutation import Mutations
from seer_compile.passes.trace_logits import Number, trace_logits
from seer_compile.types import MaskTerm, SkipCode

# Far more than a mask takes; a wider search would cross layers.
_MOST_BEHIND = 200
# What a softmax does not feel, with a sink or without; and another sink, which is told by itself.
_MOVING_ALL = ("layout", "shift", "centre", "append")


def match_decomposed(softmax: Softmax, number: Number, mutations: Mutations) -> Match | None:
    """Return the attention around a softmax; None where it is not part of one.

    Args:
        softmax: The softmax.
        number: Returns the value of a constant.
        mutations: Of the graph.

    Returns:
        The match. Where something is not understood it carries an obstacle, and where even the
        axes are unknown its ``products`` is None. A softmax of two dimensions, one that is not
        followed by a product, or whose input does not come from one (a router, a classifier), is
        not attention.
    """
    weights = softmax.weights
    if len(tensor_shape(weights) or ()) < 3:
        return None
    routes, escapes = routes_to_product(weights)
    if not routes or not leads_to_product(softmax.logits):
        return None
    chain = trace_logits(softmax.logits, number)
    reader = chain.product or weights
    match = Match("decomposed", reader, weights, routes[0][-1], AxisBook(), axis=softmax.axis)
    match.obstacles += chain.obstacles
    if len(routes) > 1:
        match.refuse(SkipCode.AMBIGUOUS, f"{len(routes)} products read the weights")
    if escapes:
        match.refuse(SkipCode.WEIGHTS_ESCAPE, f"{cited(escapes[0])} reads them")
    if chain.product is None:
        return match
    product = as_contraction(chain.product, match.book, "p")
    if product is None:
        match.refuse(SkipCode.RANK, f"`{chain.product.name}` is no batched product over one axis")
        return match
    _check_chain(match, chain, mutations)
    layout = _follow_effects(match, chain, product)
    if layout is None:
        return match
    add_sink(match, softmax, layout)
    match.products = products_of(match, product, routes[0], layout, mutations)
    if match.sink is not None and match.sink.column != "none":
        match.refuse(SkipCode.SINK_LOGIT, f"the column of {cited(match.sink.node)} is not dropped")
    return match


def _follow_effects(match: Match, chain: LogitChain, product: Contraction) -> Layout | None:
    """Apply the chain's effects to the scale and the mask terms; return the softmax's layout."""
    layout: Layout | None = product.result
    for effect in chain.effects:
        if layout is None:
            break
        if match.sink is not None and effect.kind not in _MOVING_ALL:
            match.refuse(SkipCode.SINK_LOGIT, f"{cited(effect.node)} changes logits and sink")
        if effect.kind == "layout":
            layout = moved(effect.node, layout, match.book)
        elif effect.kind == "append" and effect.operand is not None:
            append_sink(match, effect.node, effect.operand, layout)
        else:
            _apply(match, effect, layout)
    if layout is None:
        match.refuse(SkipCode.RANK, "a view of the logits mixes axes")
    if match.floor > HIDING:
        match.refuse(SkipCode.AMBIGUOUS, f"logits are at least {match.floor:g}")
    if match.shift > MOST_SHIFTED:
        match.refuse(SkipCode.AMBIGUOUS, f"logits are shifted by {match.shift:g}")
    _settle_softcap(match)
    return layout


def _apply(match: Match, effect: Effect, layout: Layout) -> None:
    if effect.kind == "scale":
        _multiply(match, effect.number)
    elif effect.kind == "shift":
        match.shift += abs(effect.number)
    elif effect.kind == "centre":
        match.is_centred = True
    elif effect.kind == "tanh":
        _cap(match, effect)
    elif effect.kind == "floor":
        match.floor = max(match.floor, effect.number)
    elif effect.kind in ("add", "masked_fill", "where") and effect.operand is not None:
        term = MaskTerm(effect.kind, effect.operand, effect.fill, layout, effect.number)
        match.mask_terms.append(term)


def _cap(match: Match, effect: Effect) -> None:
    """Note a hyperbolic tangent; refused unless it bounds scaled products and nothing else."""
    if match.softcap is not None:
        match.refuse(SkipCode.SOFTCAP, f"{cited(effect.node)} is the second one")
    if match.mask_terms:
        match.refuse(SkipCode.SOFTCAP, f"{cited(effect.node)} bounds masked logits")
    if match.shift or match.is_centred or match.floor > -math.inf:
        match.refuse(SkipCode.SOFTCAP, f"{cited(effect.node)} bounds logits that were shifted")
    match.softcap = 1.0


def _settle_softcap(match: Match) -> None:
    """Write ``softcap * tanh(scale * x)`` as ``softcap * tanh(scale * softcap * x / softcap)``."""
    if match.softcap is None:
        return
    if match.softcap == 0:
        match.refuse(SkipCode.SOFTCAP, "logits are bounded by 0")
    match.scale = (match.scale or 0.0) * match.softcap
    # The tangent is odd: a negative bound is a negative scale, which the product already has.
    match.softcap = abs(match.softcap)


def _multiply(match: Match, factor: float) -> None:
    """Multiply everything on the logits so far."""
    if match.floor > -math.inf:
        match.floor = match.floor * factor if factor > 0 else math.inf
    match.shift *= abs(factor)
    match.mask_terms = [term._replace(factor=term.factor * factor) for term in match.mask_terms]
    if match.softcap is not None:
        match.softcap *= factor
    else:
        match.scale = (match.scale or 0.0) * factor


def _check_chain(match: Match, chain: LogitChain, mutations: Mutations) -> None:
    """Refuse logits that others read, or that change by other ways than the chain."""
    assert chain.product is not None
    inside = _between(chain.product, match.softmax) | chain.helpers
    edges = [
        (node, user)
        for node in inside - {match.softmax} - chain.helpers
        for user in node.users
        if not only_observes(user, node)
    ]
    readers = [user for _, user in edges if user not in inside]
    if readers:
        match.refuse(SkipCode.WEIGHTS_ESCAPE, f"`{readers[0].name}` reads the logits")
    for node, user in edges:
        if user in inside and mutations.writer_between(node, node, user) is not None:
            match.refuse(SkipCode.MUTATION, f"`{node.name}` changes before it is read")
            break
    if chain.helpers and match.axis not in (-1, len(shape_of(match.softmax)) - 1):
        match.refuse(SkipCode.AMBIGUOUS, "a maximum is subtracted along another axis")


def _between(first: Node, last: Node) -> set[Node]:
    """Return the nodes on the ways from a product to the softmax."""
    found: set[Node] = set()
    pending = [last]
    while pending:
        node = pending.pop()
        if node in found:
            continue
        found.add(node)
        if node is not first:
            pending += [source for source in node.all_input_nodes if _is_behind(first, source)]
    return found


def _is_behind(first: Node, node: Node) -> bool:
    pending, seen = [node], set[Node]()
    while pending and len(seen) < _MOST_BEHIND:
        current = pending.pop()
        if current is first:
            return True
        if current not in seen:
            seen.add(current)
            pending += current.all_input_nodes
    return False
