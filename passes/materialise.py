"""Turn a proved visibility into nodes that a rewritten site can read.

    ScalarSum(cumulative_length)        clone right after the definition, then sums
    Flag(mask[b, k + c])                mask -> select, slice, expand -> Bool[b k]
    Read(documents[b, q])               documents -> select, slice, expand -> Int[b q]; several
                                        are combined into one

A tensor that the graph changes in place later (the counter of a static cache) is copied where it is
defined: the proof speaks of its value there.
"""

from __future__ import annotations

import functools
from typing import Any

import sympy
import torch
from torch import SymInt
from torch.fx import Graph, Node

from seer_compile.errors import PassError
from seer_compile.passes.combine_documents import combine_documents
from seer_compile.passes.fx_utils import fake_value, insert_call, is_known, tensor_shape
from seer_compile.passes.index_ranges import IndexRanges
from seer_compile.passes.mask_domain import Flag, Read
from seer_compile.passes.mask_visibility import ScalarSum
from seer_compile.passes.mutation import Mutations
from seer_compile.passes.symbolic import as_argument
from seer_compile.types import AttentionSite, MaskProof, Visibility

aten = torch.ops.aten


def materialise(proof: MaskProof, site: AttentionSite, graph: Graph) -> Visibility:
    """Insert what the visibility needs before the site and return it in nodes and integers.

    Args:
        proof: A successful proof of the site's mask.
        site: Where the mask is used; its output is still in the graph.
        graph: The graph to extend.

    Returns:
        Bounds as ``int`` or node, ``Int[]`` offset, ``Bool[b k]`` key padding and ``Int[b t]``
        documents as nodes; None where there is no such restriction.

    Raises:
        PassError: The mask was not proved.
    """
    visibility = proof.visibility
    if visibility is None:
        raise PassError("a mask that is not proved has no nodes", context={"site": site.name})
    builder = _Builder(site, graph)
    query_documents, key_documents = builder.documents(visibility)
    return Visibility(
        upper=builder.bound(visibility.upper),
        lower=builder.bound(visibility.lower),
        offset=builder.offset(visibility.offset),
        key_padding=builder.padding(visibility.key_padding or ()),
        query_documents=query_documents,
        key_documents=key_documents,
    )


class _Builder:
    """Inserts nodes before the output of one site."""

    def __init__(self, site: AttentionSite, graph: Graph) -> None:
        self._site = site
        self._graph = graph
        mode = getattr(fake_value(site.output), "fake_mode", None)
        self._ranges = IndexRanges(site.axis_sizes, getattr(mode, "shape_env", None))

    @functools.cached_property
    def _mutations(self) -> Mutations:
        return Mutations(self._graph)

    def bound(self, value: Any) -> Any:
        """Return a bound as ``int`` or as the node of its symbolic size."""
        return as_argument(value, self._graph, self._site.output)

    def offset(self, value: ScalarSum | None) -> Node | None:
        """Return the sum of 0-d integer tensors."""
        if value is None:
            return None
        total: Node | None = None
        for read, weight in value.terms:
            term = self._stable(read.node)
            for place in read.index:
                term = self._call(aten.select.int, term, 0, int(place))
            if weight != 1:
                term = self._call(aten.mul.Tensor, term, weight)
            total = term if total is None else self._call(aten.add.Tensor, total, term)
        return total

    def padding(self, flags: tuple[Flag, ...]) -> Node | None:
        """Return ``Bool[b k]``, True where every flag lets the key be read."""
        total: Node | None = None
        for flag in flags:
            row = self._tokens(flag.read, "k")
            if flag.negated:
                row = self._call(aten.logical_not.default, row)
            total = row if total is None else self._call(aten.logical_and.default, total, row)
        return total

    def documents(self, visibility: Visibility) -> tuple[Node | None, Node | None]:
        """Return the documents of both sides as ``Int[b q]`` and ``Int[b k]``."""
        if visibility.query_documents is None:
            return None, None
        numberings = zip(visibility.query_documents, visibility.key_documents, strict=True)
        pairs = [(self._tokens(left, "q"), self._tokens(right, "k")) for left, right in numberings]
        return combine_documents(pairs, self.bound(self._site.axis_sizes["q"]), self._call)

    def _tokens(self, read: Read, letter: str) -> Node:
        """Return a tensor's elements at every batch item and token."""
        node = self._stable(read.node)
        batch, token = self._ranges.symbols["b"], self._ranges.symbols[letter]
        order: list[sympy.Symbol] = []
        for place in read.index:
            axis = len(order)
            symbol = next((s for s in (batch, token) if place.has(s)), None)
            if symbol is None:
                node = self._call(aten.select.int, node, axis, self._size(place))
                continue
            order.append(symbol)
            node = self._narrow(node, axis, sympy.expand(place - symbol), symbol)
        if order == [token, batch]:
            node = self._call(aten.transpose.int, node, 0, 1)
        for axis, symbol in enumerate((batch, token)):
            if symbol not in order:
                node = self._call(aten.unsqueeze.default, node, axis)
        return self._expanded(node, letter)

    def _narrow(self, node: Node, axis: int, start: sympy.Expr, symbol: sympy.Symbol) -> Node:
        letter = str(symbol).removeprefix("index_")
        size = self._site.axis_sizes[letter]
        shape = tensor_shape(node) or ()
        if start == 0 and is_known(shape[axis] == size):
            return node
        begin = self._ranges.as_size(start)
        return self._call(
            aten.slice.Tensor, node, axis, self.bound(begin), self.bound(begin + size)
        )

    def _expanded(self, node: Node, letter: str) -> Node:
        sizes = [self._site.axis_sizes["b"], self._site.axis_sizes[letter]]
        shape = tensor_shape(node) or ()
        if all(is_known(have == want) for have, want in zip(shape, sizes, strict=True)):
            return node
        return self._call(aten.expand.default, node, [self.bound(size) for size in sizes])

    def _size(self, place: sympy.Expr) -> Any:
        size = self._ranges.as_size(place)
        return self.bound(size) if isinstance(size, SymInt) else size

    def _stable(self, node: Node) -> Node:
        """Return the node, or a copy taken where it is defined if the graph changes it later."""
        if self._mutations.writer_between(node, node, self._site.output) is None:
            return node
        last = node
        while last.op == "placeholder" and last.next.op == "placeholder":
            last = last.next
        with self._graph.inserting_after(last):
            return insert_call(self._graph, aten.clone.default, node)

    def _call(self, target: Any, *args: Any) -> Node:
        with self._graph.inserting_before(self._site.output):
            node = insert_call(self._graph, target, *args)
        for key in ("nn_module_stack", "stack_trace"):
            if key in self._site.output.meta:
                node.meta[key] = self._site.output.meta[key]
        return node
