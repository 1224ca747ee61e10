"""Attention written as product, softmax, product.

    softmax(scale * q k^T + mask) v

The softmax is where it starts: back to the product of queries and keys (``trace_logits``), forward
to the product with the values. The axis of the softmax decides which operand holds the keys, so
transposed spellings and wrong axes tell themselves apart.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from seer_compile.passes.attention_axes import Products
from seer_compile.passes.axes import AxisBook, Layout, permuted, shape_of
from seer_compile.passes.contractions import CONTRACTIONS, Contraction, as_contraction
from seer_compile.passes.fx_utils import bound_arguments, packet_of, tensor_shape
from seer_compile.passes.matches import Match
from seer_compile.passes.mutation import Mutations
from seer_compile.passes.peel_layouts import peel
from seer_compile.passes.trace_logits import (
    COPIES,
    VIEWS,
    LogitChain,
    Number,
    leads_to_product,
    only_observes,
    trace_logits,
)
from seer_compile.types import MaskTerm, SkipCode, SkipReason

aten = torch.ops.aten
SOFTMAXES = (aten.softmax, aten._softmax, aten._safe_softmax, aten.special_softmax)
_DROPOUTS = (aten.dropout, aten.dropout_, aten.native_dropout)
# A row without visible keys is NaN before, zero in ours and zero after.
_HARMLESS = (aten.nan_to_num,)
_LONGEST = 12


def match_decomposed(softmax: Node, number: Number, mutations: Mutations) -> Match | None:
    """Return the attention around a softmax; None where it is not part of one.

    Args:
        softmax: A softmax call of at least three dimensions.
        number: Returns the value of a constant.
        mutations: Of the graph.

    Returns:
        The match. Where something is not understood it carries an obstacle, and where even the
        axes are unknown its ``products`` is None. A softmax that is not followed by a product, or
        whose input does not come from one (a router, a classifier), is not attention.
    """
    if len(tensor_shape(softmax) or ()) < 3:
        return None
    routes, escapes = _routes_to_product(softmax)
    if not routes or not leads_to_product(softmax.args[0]):
        return None
    chain = trace_logits(softmax, number)
    route = routes[0]
    book = AxisBook()
    match = Match("decomposed", chain.product or softmax, softmax, route[-1], book)
    match.obstacles += chain.obstacles
    if len(routes) > 1:
        match.refuse(SkipCode.AMBIGUOUS, f"{len(routes)} products read the weights")
    if escapes:
        match.refuse(SkipCode.WEIGHTS_ESCAPE, f"`{escapes[0].name}` reads them")
    if chain.product is None:
        return match
    product = as_contraction(chain.product, book, "p")
    if product is None:
        match.refuse(SkipCode.RANK, f"`{chain.product.name}` is no batched product over one axis")
        return match
    _check_chain(match, chain, mutations)
    layout = _follow_effects(match, chain, product, book)
    if layout is not None:
        _follow_weights(match, route, layout, product, book, mutations)
    return match


def _follow_effects(
    match: Match, chain: LogitChain, product: Contraction, book: AxisBook
) -> Layout | None:
    """Apply the chain's effects to the scale and the mask terms; return the softmax's layout."""
    layout: Layout | None = product.result
    for effect in chain.effects:
        if layout is None:
            break
        if effect.kind == "layout":
            layout = _moved(effect.node, layout, book)
        elif effect.kind == "scale":
            match.scale = (match.scale or 0.0) * effect.number
            match.mask_terms = [
                term._replace(factor=term.factor * effect.number) for term in match.mask_terms
            ]
            if match.softcap is not None:
                match.softcap *= effect.number
        elif effect.kind == "tanh":
            match.softcap = 1.0
        elif effect.operand is not None:
            term = MaskTerm(effect.kind, effect.operand, effect.fill, layout, effect.number)
            match.mask_terms.append(term)
    if layout is None:
        match.refuse(SkipCode.RANK, "a view of the logits mixes axes")
    if match.softcap is not None:
        match.refuse(SkipCode.SOFTCAP, f"logits are bounded by {match.softcap:g}")
    return layout


def _moved(node: Node, layout: Layout, book: AxisBook) -> Layout | None:
    """Return the layout after a transposition or a view."""
    if packet_of(node) in COPIES:
        return layout
    source = node.args[0]
    if packet_of(node) is aten.expand and tensor_shape(source) != tensor_shape(node):
        return None
    return permuted(node, layout) or book.regroup(layout, shape_of(node))


def _routes_to_product(weights: Node) -> tuple[list[list[Node]], list[Node]]:
    """Return the ways from the softmax to products, and the readers that lead to none."""
    routes: list[list[Node]] = []
    escapes: list[Node] = []
    pending = [(weights, [weights])]
    while pending:
        node, route = pending.pop()
        for user in node.users:
            packet = packet_of(user)
            if packet in CONTRACTIONS:
                routes.append([*route, user])
            elif _passes_weights(user, node) and len(route) < _LONGEST:
                pending.append((user, [*route, user]))
            elif not only_observes(user, node):
                escapes.append(user)
    order = {node: place for place, node in enumerate(weights.graph.nodes)}
    return sorted(routes, key=lambda route: order[route[-1]]), escapes


def _passes_weights(user: Node, weights: Node) -> bool:
    """Whether a call hands the weights on, possibly reordered, rounded or dropped out."""
    packet = packet_of(user)
    is_known = packet in (*COPIES, *VIEWS, *_DROPOUTS, *_HARMLESS, aten.slice)
    is_known = is_known or packet in (aten.transpose, aten.permute, aten.swapaxes, aten.mT)
    return is_known and user.args[0] is weights


def _check_chain(match: Match, chain: LogitChain, mutations: Mutations) -> None:
    """Refuse logits that others read, or that change by other ways than the chain."""
    assert chain.product is not None
    members = [chain.product, *(effect.node for effect in chain.effects), match.softmax]
    inside = _between(chain.product, match.softmax) | chain.helpers
    for node in inside - {match.softmax} - chain.helpers:
        for user in node.users:
            if user not in inside and not only_observes(user, node):
                match.refuse(SkipCode.WEIGHTS_ESCAPE, f"`{user.name}` reads the logits")
                return
            if mutations.writer_between(node, node, user) is not None and user in members:
                match.refuse(SkipCode.MUTATION, f"`{node.name}` changes before it is read")
                return
    axis = bound_arguments(match.softmax)["dim"]
    if chain.helpers and axis not in (-1, len(shape_of(match.softmax)) - 1):
        match.refuse(SkipCode.AMBIGUOUS, "a maximum is subtracted along another axis")


def _between(first: Node, last: Node) -> set[Node]:
    """Return the nodes on the main way from a product to the softmax."""
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
    pending, seen = [node], set()
    while pending and len(seen) < 200:
        current = pending.pop()
        if current is first:
            return True
        if current not in seen:
            seen.add(current)
            pending += current.all_input_nodes
    return False


def _follow_weights(
    match: Match,
    route: list[Node],
    layout: Layout,
    product: Contraction,
    book: AxisBook,
    mutations: Mutations,
) -> None:
    axis = bound_arguments(match.softmax)["dim"]
    keys = layout[axis]
    weights: Layout | None = layout
    for source, node in zip(route[:-1], route[1:], strict=True):
        if mutations.writer_between(source, source, node) is not None:
            match.refuse(SkipCode.MUTATION, f"`{source.name}` changes before it is read")
        if node is route[-1] or weights is None:
            break
        weights = _pass_weights(match, node, source, weights, book)
    if weights is None or len(keys) != 1:
        match.refuse(SkipCode.RANK, "a view of the weights mixes axes")
        return
    second = as_contraction(route[-1], book, "v")
    if second is None or packet_of(route[-1]) is aten.baddbmm:
        match.refuse(SkipCode.RANK, f"`{route[-1].name}` is no plain batched product")
        return
    match.products = _products(match, product, second, route[-2], weights, keys[0], book)


def _pass_weights(
    match: Match, node: Node, source: Node, layout: Layout, book: AxisBook
) -> Layout | None:
    packet = packet_of(node)
    if packet in _DROPOUTS:
        arguments = bound_arguments(node)
        is_active = arguments.get("train", True)
        match.dropout = float(arguments["p"]) if is_active else match.dropout
        return layout
    if packet in _HARMLESS:
        return layout
    if packet is aten.slice:
        is_cut = tensor_shape(node) != tensor_shape(source)
        if is_cut and not any(o.code is SkipCode.SINK_LOGIT for o in match.obstacles):
            match.refuse(SkipCode.AMBIGUOUS, f"`{node.name}` drops weights")
        return layout
    return _moved(node, layout, book)


def _products(
    match: Match,
    product: Contraction,
    second: Contraction,
    weights_node: Node,
    weights: Layout,
    keys: str,
    book: AxisBook,
) -> Products | None:
    sides = [keys in {x for dim in layout for x in dim} for layout in product.layouts]
    if sides[0] == sides[1] or second.operands[0] is second.operands[1]:
        match.refuse(SkipCode.AMBIGUOUS, "the softmax does not run over the keys")
        return None
    key_side = 0 if sides[0] else 1
    query_layout, key_layout = product.layouts[1 - key_side], product.layouts[key_side]
    own = [dim[0] for dim in product.result if dim in query_layout and dim not in key_layout]
    key_only = [dim[0] for dim in product.result if dim in key_layout and dim not in query_layout]
    if key_only != [keys] or not own:
        match.refuse(SkipCode.RANK, "queries broadcast over a dimension of the keys")
        return None
    side = 0 if second.operands[0] is weights_node else 1
    match.operands = (
        product.operands[1 - key_side],
        product.operands[key_side],
        second.operands[1 - side],
    )
    names = _letters_of_values(second, side, weights, book)
    if names is None or book.resolve(names[second.summed]) != book.resolve((keys,)):
        match.refuse(SkipCode.AMBIGUOUS, "the second product does not run over the keys")
        return None
    batch = tuple(dim for dim in product.result if dim not in ((own[-1],), (keys,)))
    value_layout = tuple(
        tuple(x for letter in dim for x in names[letter]) for dim in second.layouts[1 - side]
    )
    carried = {letter for dim in value_layout for letter in dim}
    batch_letters = {letter for dim in batch for letter in book.resolve(dim)}
    new = [letter for dim in second.layouts[1 - side] for letter in dim if names[letter] == (letter,)]
    broadcast = frozenset(batch_letters - set(book.resolve(tuple(carried))))
    if len(new) != 1 or own[-1] in book.resolve(tuple(carried)):
        match.refuse(SkipCode.RANK, "values are not batch x keys x dim")
        return None
    return Products(
        query=peel(product.operands[1 - key_side], query_layout, frozenset(), book),
        key=peel(product.operands[key_side], key_layout, frozenset(own[:-1]), book),
        value=peel(
            second.operands[1 - side],
            value_layout,
            broadcast,
            book,
        ),
        batch=batch,
        query_tokens=(own[-1],),
        key_tokens=(keys,),
        head_dim=(product.summed,),
        value_dim=(new[0],),
        output=tuple(tuple(x for letter in dim for x in names[letter]) for dim in second.result),
    )


def _letters_of_values(
    second: Contraction, side: int, weights: Layout, book: AxisBook
) -> dict[str, tuple[str, ...]] | None:
    """Return what each letter of the second product is in the letters of the first."""
    names: dict[str, tuple[str, ...]] = {}
    for dimension, meaning in zip(second.layouts[side], weights, strict=True):
        if dimension:
            names[dimension[0]] = book.resolve(meaning)
        elif meaning:
            return None
    for dimension in (*second.layouts[1 - side], *second.result):
        for letter in dimension:
            names.setdefault(letter, (letter,))
    return names
