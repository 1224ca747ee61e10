"""From a softmax forward to the product with the values, and the letters of both products.

    softmax -> dropout -> to -> matmul(weights, v)

The letters of the second product follow from those of the first: what the weights are summed over
must be the axis of the softmax, what else the values have is batch, heads or their own dim.
"""

from __future__ import annotations

import itertools

import torch
from torch.fx import Node

from seer_compile.passes.attention_axes import Products
from seer_compile.passes.axes import AxisBook, Layout, Letters, permuted, shape_of
from seer_compile.passes.contractions import CONTRACTIONS, Contraction, as_contraction
from seer_compile.passes.dataflow import COPIES, VIEWS, keeps_numbers, only_observes
from seer_compile.passes.find_sinks import drop_column
from seer_compile.passes.fx_utils import bound_arguments, packet_of, tensor_shape
from seer_compile.passes.matches import Match
from seer_compile.passes.mutation import Mutations
from seer_compile.passes.peel_layouts import peel
from seer_compile.types import SkipCode

aten = torch.ops.aten
_DROPOUTS = (aten.dropout, aten.dropout_)
_TRANSPOSITIONS = (aten.transpose, aten.permute, aten.swapaxes, aten.mT)
# A row without visible keys is NaN before, zero in ours and zero after.
_HARMLESS = (aten.nan_to_num,)
# Calls that change weights and keep their axes: a site with these stays dense.
_CHANGES = (
    aten.mul,
    aten.mul_,
    aten.div,
    aten.div_,
    aten.masked_fill,
    aten.masked_fill_,
    aten.where,
    aten.add,
    aten.add_,
    aten.sub,
    aten.sub_,
    aten.rsub,
)
_LONGEST = 12


def routes_to_product(weights: Node) -> tuple[list[list[Node]], list[Node]]:
    """Return the ways from the softmax to products, and the readers that lead to none.

    A way is the list of nodes from the softmax to the product, both included.
    """
    routes: list[list[Node]] = []
    escapes: list[Node] = []
    pending = [(weights, [weights])]
    while pending:
        node, route = pending.pop()
        for user in node.users:
            if packet_of(user) in CONTRACTIONS:
                routes.append([*route, user])
            elif _passes_weights(user, node) and len(route) < _LONGEST:
                pending.append((user, [*route, user]))
            elif not only_observes(user, node):
                escapes.append(user)
    order = {node: place for place, node in enumerate(weights.graph.nodes)}
    return sorted(routes, key=lambda route: order[route[-1]]), escapes


def _passes_weights(user: Node, weights: Node) -> bool:
    """Whether a call hands the weights on, possibly reordered, rounded, dropped out or changed."""
    packet = packet_of(user)
    if packet in _CHANGES:
        return tensor_shape(user) == tensor_shape(weights)
    is_known = packet in (*COPIES, *VIEWS, *_DROPOUTS, *_HARMLESS, *_TRANSPOSITIONS, aten.slice)
    return is_known and user.args[0] is weights


def moved(node: Node, layout: Layout, book: AxisBook) -> Layout | None:
    """Return the layout after a transposition, a view or a copy; None where axes mix."""
    if packet_of(node) in COPIES:
        return layout
    source = node.args[0]
    if packet_of(node) is aten.expand and tensor_shape(source) != tensor_shape(node):
        return None
    return permuted(node, layout) or book.regroup(layout, shape_of(node))


def products_of(
    match: Match, product: Contraction, route: list[Node], layout: Layout, mutations: Mutations
) -> Products | None:
    """Return both products in one set of letters; None, with an obstacle, where they do not fit.

    Args:
        match: Receives operands, dropout and obstacles.
        product: Of queries and keys.
        route: From the softmax to the product with the values.
        layout: Of the softmax, in the letters of ``product``.
        mutations: Of the graph.
    """
    keys = layout[match.axis]
    weights: Layout | None = layout
    for source, node in itertools.pairwise(route):
        if mutations.writer_between(source, source, node) is not None:
            match.refuse(SkipCode.MUTATION, f"`{source.name}` changes before it is read")
        if node is not route[-1] and weights is not None:
            weights = _pass_weights(match, node, source, weights)
    if weights is None or len(keys) != 1:
        match.refuse(SkipCode.RANK, "a view of the weights mixes axes")
        return None
    second = as_contraction(route[-1], match.book, "v")
    if second is None or packet_of(route[-1]) is aten.baddbmm:
        match.refuse(SkipCode.RANK, f"`{route[-1].name}` is no plain batched product")
        return None
    side = 0 if second.operands[0] is route[-2] else 1
    return _joined(match, product, second, side, weights, keys[0])


def _pass_weights(match: Match, node: Node, source: Node, layout: Layout) -> Layout | None:
    packet = packet_of(node)
    if packet in _DROPOUTS:
        arguments = bound_arguments(node)
        if arguments["train"]:
            match.dropout = max(match.dropout, float(arguments["p"]))
        return layout
    fills_rows = packet in _HARMLESS and bound_arguments(node)["nan"] not in (None, 0)
    if packet in _CHANGES or fills_rows or not keeps_numbers(node):
        match.refuse(SkipCode.AMBIGUOUS, f"`{node.name}` changes the weights")
        return layout
    if packet is aten.slice:
        drop_column(match, node, source, layout)
        return layout
    return layout if packet in _HARMLESS else moved(node, layout, match.book)


def _joined(
    match: Match, product: Contraction, second: Contraction, side: int, weights: Layout, keys: str
) -> Products | None:
    book = match.book
    roles = _roles(match, product, keys)
    if roles is None:
        return None
    key_side, own = roles
    query, key = product.operands[1 - key_side], product.operands[key_side]
    value = second.operands[1 - side]
    match.operands = (query, key, value)
    names = _letters_of_values(second, side, weights, book)
    if names is None or book.resolve(names[second.summed]) != book.resolve((keys,)):
        match.refuse(SkipCode.AMBIGUOUS, "the second product does not run over the keys")
        return None
    batch = tuple(dim for dim in product.result if dim not in ((own[-1],), (keys,)))
    value_layout = _renamed(second.layouts[1 - side], names)
    carried = set(book.resolve([letter for dim in value_layout for letter in dim]))
    batch_letters = set(book.resolve([letter for dim in batch for letter in dim]))
    new = [letter for letter, meaning in names.items() if meaning == (letter,)]
    if len(new) != 1 or own[-1] in carried or value is second.operands[side]:
        match.refuse(SkipCode.RANK, "values are not batch x keys x dim")
        return None
    return Products(
        query=peel(query, product.layouts[1 - key_side], frozenset(), book),
        key=peel(key, product.layouts[key_side], frozenset(own[:-1]), book),
        value=peel(value, value_layout, frozenset(batch_letters - carried), book),
        batch=batch,
        query_tokens=(own[-1],),
        key_tokens=(keys,),
        head_dim=(product.summed,),
        value_dim=(new[0],),
        output=_renamed(second.result, names),
    )


def _roles(match: Match, product: Contraction, keys: str) -> tuple[int, list[str]] | None:
    """Return which operand holds the keys, and the letters that only the queries have.

    The last of those is the query's token axis; keys broadcast over the others.
    """
    has_keys = [(keys,) in layout for layout in product.layouts]
    if has_keys[0] == has_keys[1]:
        match.refuse(SkipCode.AMBIGUOUS, "the softmax does not run over the keys")
        return None
    key_side = 0 if has_keys[0] else 1
    query_layout, key_layout = product.layouts[1 - key_side], product.layouts[key_side]
    own = [dim[0] for dim in product.result if dim in query_layout and dim not in key_layout]
    key_only = [dim[0] for dim in product.result if dim in key_layout and dim not in query_layout]
    if key_only != [keys] or not own:
        match.refuse(SkipCode.RANK, "queries broadcast over a dimension of the keys")
        return None
    return key_side, own


def _renamed(layout: Layout, names: dict[str, Letters]) -> Layout:
    return tuple(tuple(x for letter in dim for x in names[letter]) for dim in layout)


def _letters_of_values(
    second: Contraction, side: int, weights: Layout, book: AxisBook
) -> dict[str, Letters] | None:
    """Return what each letter of the second product is in the letters of the first."""
    names: dict[str, Letters] = {}
    for dimension, meaning in zip(second.layouts[side], weights, strict=True):
        if dimension:
            names[dimension[0]] = book.resolve(meaning)
        elif meaning:
            return None
    for dimension in (*second.layouts[1 - side], *second.result):
        for letter in dimension:
            names.setdefault(letter, (letter,))
    return names
