"""How far back an operand may be read where the graph changes tensors in place.

    keys = repeat(k)      keys[:, 0].zero_()      attention(q, keys, v)

The rewritten site reads its operands at the output. That is what the graph reads if nothing writes
between the two moments; and a tensor behind a copy stands for the copy only if the copy itself is
not written before it is read.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch.fx import Node

from seer_compile.passes.attention_axes import Products
from seer_compile.passes.fx_utils import packet_of
from seer_compile.passes.matches import Match
from seer_compile.passes.mutation import Mutations
from seer_compile.passes.peel_layouts import Peeled
from seer_compile.types import SkipCode

aten = torch.ops.aten
# These never copy: what they show is read when their own reader runs.
_VIEWS = (
    aten.alias,
    aten.expand,
    aten.mT,
    aten.permute,
    aten.slice,
    aten.swapaxes,
    aten.t,
    aten.transpose,
    aten.unsqueeze,
    aten.view,
)


def stable_products(match: Match, products: Products, mutations: Mutations) -> Products:
    """Return the products with the ways back cut where reading at the output would differ.

    Args:
        match: Refused where even the operand itself changes between its use and the output.
        products: What the matcher found.
        mutations: Of the graph.
    """
    return replace(
        products,
        query=_stable(match, products.query, match.reader, mutations),
        key=_stable(match, products.key, match.reader, mutations),
        value=_stable(match, products.value, match.output, mutations),
    )


def _stable(
    match: Match, states: Sequence[Peeled], reader: Node, mutations: Mutations
) -> list[Peeled]:
    first = states[0].node
    writer = mutations.writer_between(first, reader, match.output)
    if writer is not None:
        match.refuse(SkipCode.MUTATION, f"`{writer.name}` changes `{first.name}`")
    kept = [states[0]]
    for shown, behind in itertools.pairwise(states):
        if mutations.writer_between(shown.node, shown.node, reader) is not None:
            break
        if packet_of(shown.node) not in _VIEWS:
            reader = shown.node
        if mutations.writer_between(behind.node, reader, match.output) is not None:
            break
        kept.append(behind)
    return kept
