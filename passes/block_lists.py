"""Which mask the block lists of a ``flex_attention`` call were made of, in the same graph.

    mask  ->  pad  ->  Bool[b h m Q n K]  ->  sum per block  ->  0 < sum < Q K   partial blocks
                                                             ->      sum == Q K  full blocks
    blocks  ->  sum over n                                   ->  how many
    blocks  ->  argsort, descending                          ->  which, those first

That is what ``create_block_mask`` leaves in a graph. Lists that come from elsewhere may leave out
blocks in which the mask function holds, so they are data: nothing is known of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from seer_compile.passes.fx_utils import bound_arguments, fake_value, is_known, packet_of
from seer_compile.passes.mutation import Mutations

aten = torch.ops.aten
_CASTS = (aten.to, aten._to_copy)
_COUNTING = (torch.int32, torch.int64)


def listed_mask(
    lists: Sequence[Any], sizes: tuple[Any, Any], call: Node, mutations: Mutations
) -> Node | None:
    """Return ``Bool[b h q k]`` of which the lists name every partial and every full block.

    Args:
        lists: Number and indices of the partial blocks of each row, and of the full ones; None for
            both of the latter where full blocks are among the partial ones.
        sizes: Queries and keys of a block.
        call: The attention that reads the lists.
        mutations: Of the graph.

    Returns:
        The mask before it was cut into blocks; None where the lists are not known to be complete.
    """
    followed = _Followed(call, mutations)
    partial = followed.blocks(*lists[:2])
    if partial is None or (lists[2] is None) != (lists[3] is None):
        return None
    if lists[2] is None:
        sums = followed.compared(partial, aten.gt, 0)
        return followed.mask(sums, sizes)
    full = followed.blocks(*lists[2:4])
    parts = followed.arguments(partial, aten.__and__, aten.logical_and, aten.bitwise_and)
    if full is None or parts is None:
        return None
    most = sizes[0] * sizes[1]
    sums = {
        followed.compared(parts[0], aten.gt, 0),
        followed.compared(parts[1], aten.lt, most),
        followed.compared(full, aten.eq, most),
    }
    return followed.mask(sums.pop(), sizes) if len(sums) == 1 else None


class _Followed:
    """Steps back from the lists; every step answers None where it is another one."""

    def __init__(self, call: Node, mutations: Mutations) -> None:
        self._call = call
        self._mutations = mutations

    def arguments(self, node: Any, *packets: Any) -> tuple[Any, ...] | None:
        """Return the arguments of a call of one of the operators whose result nothing changes."""
        if not isinstance(node, Node) or packet_of(node) not in packets:
            return None
        changed = self._mutations.writer_between(node, node, self._call) is not None
        return None if changed else tuple(bound_arguments(node).values())

    def summed(self, node: Any, axes: list[int]) -> Any:
        """Return what is added up along some axes, exactly."""
        if self.arguments(node, aten.sum) is None:
            return None
        call = bound_arguments(node)
        is_exact = call.get("keepdim") is False and call["dtype"] in (None, *_COUNTING)
        return call["self"] if is_exact and list(call["dim"]) == axes else None

    def blocks(self, numbers: Any, indices: Any) -> Node | None:
        """Return ``Bool[b h m n]`` of which every row is counted and then listed."""
        counted = self._uncast(self.summed(self._uncast(numbers), [-1]))
        indices = self._uncast(indices)
        if self.arguments(indices, aten.argsort) is None:
            return None
        call = bound_arguments(indices)
        is_listed = call["dim"] == -1 and call["descending"] is True
        is_listed = is_listed and self._uncast(call["self"]) is counted
        is_truth = isinstance(counted, Node) and fake_value(counted).dtype == torch.bool
        return counted if is_truth and is_listed else None

    def compared(self, node: Any, packet: Any, number: int) -> Any:
        """Return what a comparison with a number compares."""
        arguments = self.arguments(node, packet)
        return arguments[0] if arguments is not None and arguments[1] == number else None

    def mask(self, sums: Any, sizes: tuple[Any, Any]) -> Node | None:
        """Return the mask whose blocks were added up."""
        permuted = self.arguments(self.summed(sums, [-2, -1]), aten.permute)
        if permuted is None or list(permuted[1]) != [0, 1, 2, 4, 3, 5]:
            return None
        cut = self.arguments(permuted[0], aten.view, aten.reshape)
        if cut is None:
            return None
        whole, parts = fake_value(cut[0]).shape, fake_value(permuted[0]).shape
        if len(whole) != 4 or len(parts) != 6:
            return None
        fits = (
            *(parts[axis] == whole[axis] for axis in (0, 1)),
            *(parts[axis] == size for axis, size in zip((3, 5), sizes, strict=True)),
            parts[4] * parts[5] == whole[3],
        )
        return self._unpadded(cut[0]) if all(map(is_known, fits)) else None

    def _unpadded(self, node: Any) -> Node | None:
        """Return a mask before keys and queries that are not there were added, hidden."""
        padded = self.arguments(node, aten.pad, aten.constant_pad_nd)
        if padded is not None:
            amounts, rest = list(padded[1]), padded[2:]
            is_behind = len(amounts) == 4 and amounts[0] == amounts[2] == 0
            if not is_behind or not all(value in (None, 0, "constant") for value in rest):
                return None
            node = padded[0]
        is_mask = isinstance(node, Node) and fake_value(node).dtype == torch.bool
        return node if is_mask and fake_value(node).ndim == 4 else None

    def _uncast(self, node: Any) -> Any:
        """Return a truth value or a count before it was widened or narrowed to a count's dtype."""
        while isinstance(node, Node) and packet_of(node) in _CASTS:
            source = node.args[0]
            is_truth = fake_value(source).dtype in (torch.bool, torch.int8)
            if not is_truth and fake_value(node).dtype not in _COUNTING:
                return node
            if self.arguments(node, *_CASTS) is None:
                return node
            node = source
        return node
