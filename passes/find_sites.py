"""Every attention computation of a graph, in the order of execution.

    aten.scaled_dot_product_attention        taken as it is
    matmul - softmax - matmul                walked from the softmax (match_decomposed)
    flex_attention, branches, loops          listed; they stay dense

Read-only. A site that cannot be rewritten is still returned, with the obstacle.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch._ops import HigherOrderOperator
from torch.fx import GraphModule, Node

from seer_compile.passes.attention_axes import Arrangement, arrange, heads_among_rows
from seer_compile.passes.constant_scalars import ConstantScalars
from seer_compile.passes.find_sinks import letters_of_sinks, sinks_operand
from seer_compile.passes.fx_utils import (
    is_known,
    packet_of,
    source_frames,
    tensor_shape,
)
from seer_compile.passes.match_decomposed import match_decomposed
from seer_compile.passes.match_flex import match_flex
from seer_compile.passes.match_fused import match_fused
from seer_compile.passes.match_softmax import as_softmax
from seer_compile.passes.matches import Match
from seer_compile.passes.mutation import Mutations
from seer_compile.passes.operand_dtypes import dtype_of, in_dtype
from seer_compile.passes.site_names import SiteCounter, SiteNames
from seer_compile.passes.stable_operands import stable_products
from seer_compile.types import AttentionSite, MaskTerm, Operand, SkipCode

aten = torch.ops.aten


def find_sites(graph_module: GraphModule, names: SiteNames) -> tuple[AttentionSite, ...]:
    """Return the attention sites of a normalised (or exported) graph, in graph order.

    Args:
        graph_module: ATen pre-dispatch calls with traced values; not changed.
        names: Resolves module stacks to the user's module names.

    Returns:
        All sites, those with obstacles included; sites of sub-graphs carry ``graph_path``. Every
        obstacle forbids a rewrite.

    Cost:
        About 1 ms per softmax or fused call. Symbolic head counts and scales are made constant,
        which guards the graph on them.
    """
    return tuple(_sites(graph_module, names.counter(), ""))


def _sites(graph_module: GraphModule, counter: SiteCounter, path: str) -> Iterator[AttentionSite]:
    mutations = Mutations(graph_module.graph)
    number = ConstantScalars(graph_module, mutations)
    for node in graph_module.graph.nodes:
        match = None
        if packet_of(node) is aten.scaled_dot_product_attention:
            match = match_fused(node, number)
        elif (softmax := as_softmax(node)) is not None:
            match = match_decomposed(softmax, number, mutations)
        elif isinstance(node.target, HigherOrderOperator):
            if node.target is torch.ops.higher_order.flex_attention:
                match = match_flex(graph_module, node, number, mutations)
            yield from _sites_of_bodies(graph_module, node, counter, path)
        if match is not None:
            name = counter.next_name([match.reader, match.softmax, match.output])
            yield _as_site(match, name, mutations, path)


def _sites_of_bodies(
    graph_module: GraphModule, node: Node, counter: SiteCounter, path: str
) -> Iterator[AttentionSite]:
    """Visit the sub-graphs that a higher-order call runs, such as branches."""
    for source in node.all_input_nodes:
        body = getattr(graph_module, str(source.target), None) if source.op == "get_attr" else None
        if isinstance(body, GraphModule):
            yield from _sites(body, counter, f"{path}.{source.target}".strip("."))


def _as_site(match: Match, name: str, mutations: Mutations, path: str) -> AttentionSite:
    products = match.products
    if products is not None:
        products = match.products = stable_products(match, products, mutations)
    arrangement = None
    if products is not None:
        masked = _masked_letters(match.mask_terms)
        products = match.products = heads_among_rows(products, match.book, masked)
        sinks = letters_of_sinks(match)
        arrangement = arrange(products, match.book, dtype_of(match.output), masked, sinks)
    if match.dropout:
        match.refuse(SkipCode.DROPOUT, f"p={match.dropout:g}")
    if path:
        match.refuse(SkipCode.SUBGRAPH)
    if arrangement is None or products is None:
        if not match.obstacles:
            match.refuse(SkipCode.RANK)
        return _unarranged_site(match, name, path)
    book = match.book
    head_dim = int(book.size(book.resolve(products.head_dim)))
    letters = _canonical_letters(match, arrangement)
    scale = 1 / math.sqrt(head_dim) if match.scale is None else match.scale
    return AttentionSite(
        name=name,
        kind=match.kind,
        query=in_dtype(arrangement.query, match.reader, match.output),
        key=in_dtype(arrangement.key, match.reader, match.output),
        value=in_dtype(arrangement.value, match.output, match.output),
        output=match.output,
        output_steps=arrangement.output_steps,
        sinks=sinks_operand(match, arrangement.heads, mutations),
        heads=int(book.size(arrangement.heads)),
        kv_heads=int(book.size(arrangement.kv_heads)),
        head_dim=head_dim,
        value_dim=int(book.size(book.resolve(products.value_dim))),
        scale=scale * arrangement.factor,
        mask_terms=tuple(
            term._replace(axes=tuple(_renamed(book.resolve(axis), letters) for axis in term.axes))
            for term in match.mask_terms
        ),
        axis_sizes={new: book.size(old) for old, new in letters},
        is_causal=match.is_causal,
        softcap=match.softcap,
        dropout=match.dropout,
        obstacles=tuple(match.obstacles),
        source=_source_line(match.output),
        reader=match.reader,
        graph_path=path,
    )


def _masked_letters(terms: Sequence[MaskTerm]) -> tuple[str, ...]:
    """Return the letters along which masks differ."""
    found: list[str] = []
    for term in terms:
        shape = tensor_shape(term.node) or ()
        axes = term.axes[max(len(term.axes) - len(shape), 0) :]
        for letters, size in zip(axes, shape, strict=False):
            found += () if is_known(size == 1) else letters
    return tuple(found)


def _canonical_letters(match: Match, arrangement: Arrangement) -> list[tuple[tuple[str, ...], str]]:
    """Return the letters of types.py for the match's own: ``b h q k``, ``h0 h1`` for parts."""
    assert match.products is not None
    groups = {
        "b": arrangement.batch,
        "h": arrangement.heads,
        "q": match.book.resolve(match.products.query_tokens),
        "k": match.book.resolve(match.products.key_tokens),
    }
    whole = [(letters, name) for name, letters in groups.items()]
    parts: list[tuple[tuple[str, ...], str]] = []
    for name, letters in groups.items():
        if len(letters) < 2:
            continue
        # Beside letters of one position, a letter is the whole group.
        long = [letter for letter in letters if not is_known(match.book.size([letter]) == 1)]
        parts += [
            ((letter,), name if long == [letter] else f"{name}{place}")
            for place, letter in enumerate(letters)
        ]
    return whole + parts


def _renamed(letters: tuple[str, ...], names: list[tuple[tuple[str, ...], str]]) -> tuple[str, ...]:
    if len(letters) > 1 and letters not in [old for old, _ in names]:
        # Views cut an axis that batch and heads share; only the parts of heads can follow.
        names = sorted(names, key=lambda pair: pair[1] == "h")
    renamed: list[str] = []
    while letters:
        old, new = next((o, n) for o, n in names if o and letters[: len(o)] == o)
        renamed.append(new)
        letters = letters[len(old) :]
    return tuple(renamed)


def _unarranged_site(match: Match, name: str, path: str) -> AttentionSite:
    """Return a row for a site whose axes are unknown; it has an obstacle."""
    inputs = [node for node in match.reader.all_input_nodes if tensor_shape(node) is not None]
    first, last = (inputs[0], inputs[-1]) if inputs else (match.softmax, match.softmax)
    query, key, value = match.operands or (first, last, last)
    query_shape, value_shape = tensor_shape(query) or (), tensor_shape(value) or ()
    return AttentionSite(
        name=name,
        kind=match.kind,
        query=Operand(node=query),
        key=Operand(node=key),
        value=Operand(node=value),
        output=match.output,
        heads=_static(query_shape, -3),
        kv_heads=_static(tensor_shape(key) or (), -3),
        head_dim=_static(query_shape, -1),
        value_dim=_static(value_shape, -1),
        scale=match.scale if match.scale is not None else 1.0,
        is_causal=match.is_causal,
        softcap=match.softcap,
        dropout=match.dropout,
        obstacles=tuple(match.obstacles),
        source=_source_line(match.output),
        reader=match.reader,
        graph_path=path,
    )


def _static(shape: tuple[Any, ...], axis: int) -> int:
    size = shape[axis] if len(shape) >= -axis else 0
    return size if isinstance(size, int) else 0


def _source_line(node: Node) -> str:
    """Return the last user frame of the node's stack trace: file, line and code."""
    return " | ".join(source_frames(node))
