"""Several document numberings as one: tokens share its number where they share all of theirs.

A mask may ask for the same document *and* the same chunk of it. The operators take one number per
token, so each numbering is replaced by ranks (how many different numbers are smaller), which are
small whatever the numbers are, and the ranks are packed into one integer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node

aten = torch.ops.aten
Call = Callable[..., Node]
"""Inserts a call and returns its node."""

_RANKS = 1 << 31
"""Above every rank: two of them fit into 64 bits."""


def combine_documents(
    pairs: Sequence[tuple[Node, Node]], query_len: Any, call: Call
) -> tuple[Node, Node]:
    """Return query and key documents that are equal exactly where those of every pair are.

    Args:
        pairs: ``Int[b q]`` and ``Int[b k]`` per numbering; at least one.
        query_len: Query tokens, as ``int`` or node.
        call: How to insert a call.

    Returns:
        ``Int[b q]`` and ``Int[b k]``; a single pair as it is.

    Cost:
        One sort of ``q + k`` numbers per batch item and numbering; nothing for a single pair.
    """
    if len(pairs) == 1:
        return pairs[0]
    combined: Node | None = None
    for query, key in pairs:
        ranks = _ranks(call(aten.cat.default, [query, key], 1), call)
        if combined is not None:
            packed = call(aten.mul.Tensor, combined, _RANKS)
            ranks = _ranks(call(aten.add.Tensor, packed, ranks), call)
        combined = ranks
    assert combined is not None
    return (
        call(aten.slice.Tensor, combined, 1, 0, query_len),
        call(aten.slice.Tensor, combined, 1, query_len),
    )


def _ranks(numbers: Node, call: Call) -> Node:
    """Return, for each number of a row, how many different numbers of the row are smaller."""
    order = call(aten.argsort.default, numbers, 1)
    ascending = call(aten.gather.default, numbers, 1, order)
    later = call(aten.slice.Tensor, ascending, 1, 1)
    earlier = call(aten.slice.Tensor, ascending, 1, 0, -1)
    steps = call(aten.to.dtype, call(aten.ne.Tensor, later, earlier), torch.int64)
    ranks = call(aten.cumsum.default, call(aten.constant_pad_nd.default, steps, [1, 0]), 1)
    return call(aten.scatter.src, order, 1, order, ranks)
