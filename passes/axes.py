"""Which logical axis each dimension of a tensor is, followed through layout calls.

A *layout* has one tuple of letters per dimension: ``(("b",), ("h", "r"), ("q",), ("d",))`` says
that dimension 1 merges ``h`` (outer) and ``r`` (inner). A dimension of size 1 without a letter is
``()``. When a view cuts a letter in two, the halves get names and the cut is remembered, so layouts
written before the cut stay comparable.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch.fx import Node
from torch.utils._sympy.functions import FloorDiv

from seer_compile.passes.fx_utils import bound_arguments, is_known, tensor_shape

Letters = tuple[str, ...]
Layout = tuple[Letters, ...]


class AxisBook:
    """The letters of one site, their sizes and their cuts."""

    def __init__(self) -> None:
        self.sizes: dict[str, Any] = {}
        self._halves: dict[str, tuple[str, str]] = {}

    def resolve(self, letters: Sequence[str]) -> tuple[str, ...]:
        """Return the letters with every cut letter replaced by its halves."""
        found: list[str] = []
        for letter in letters:
            halves = self._halves.get(letter)
            found += self.resolve(halves) if halves else (letter,)
        return tuple(found)

    def size(self, letters: Sequence[str]) -> Any:
        """Return the number of positions that merged letters run over."""
        total: Any = 1
        for letter in letters:
            total = total * self.sizes[letter]
        return total

    def cut(self, letter: str, outer: Any, inner: Any) -> tuple[str, str]:
        """Split a letter into an outer and an inner half of these sizes."""
        halves = (f"{letter}0", f"{letter}1")
        self._halves[letter] = halves
        self.sizes[halves[0]], self.sizes[halves[1]] = _plain(outer), _plain(inner)
        return halves

    def regroup(self, layout: Layout, shape: Sequence[Any]) -> Layout | None:
        """Return the layout after a view to ``shape`` (also: before a view from ``shape``)."""
        letters = list(self.resolve([letter for dimension in layout for letter in dimension]))
        result: list[tuple[str, ...]] = []
        for size in shape:
            group = self._take(letters, size)
            if group is None:
                return None
            result.append(group)
        while letters and result and is_known(self.sizes[letters[0]] == 1):
            result[-1] = (*result[-1], letters.pop(0))
        return None if letters else tuple(result)

    def _take(self, letters: list[str], size: Any) -> tuple[str, ...] | None:
        """Remove letters that run over ``size`` positions from the front, cutting the last."""
        group: list[str] = []
        if is_known(size == 1):
            is_single = letters and is_known(self.sizes[letters[0]] == 1)
            return (letters.pop(0),) if is_single else ()
        while not is_known(self.size(group) == size):
            if not letters:
                return None
            letter = letters.pop(0)
            taken = self.size([*group, letter])
            if not is_known(taken == size) and not is_known(size % taken == 0):
                outer = size // self.size(group)
                inner = self.sizes[letter] // outer
                if not is_known(outer * inner == self.sizes[letter]):
                    return None
                letter, rest = self.cut(letter, outer, inner)
                letters.insert(0, rest)
            group.append(letter)
        return tuple(group)


def _plain(size: Any) -> Any:
    """Return a symbolic size that is a number after all, such as ``4 * s // s``, as ``int``."""
    if not isinstance(size, torch.SymInt):
        return size
    expression = sympy.cancel(size.node.expr.replace(FloorDiv, lambda a, b: a / b))
    return int(expression) if expression.is_Integer else size


def permuted(node: Node, layout: Layout) -> Layout | None:
    """Return the layout of a transposition's result; None for other calls.

    Args:
        node: The call.
        layout: Of its argument.
    """
    order = permutation_of(node, len(layout))
    return None if order is None else tuple(layout[axis] for axis in order)


def unpermuted(node: Node, layout: Layout) -> Layout | None:
    """Return the layout of a transposition's argument, given that of its result."""
    order = permutation_of(node, len(layout))
    return None if order is None else tuple(layout[order.index(a)] for a in range(len(order)))


def permutation_of(node: Node, rank: int) -> list[int] | None:
    """Return ``order`` such that result axis ``n`` is argument axis ``order[n]``; None if none."""
    name = str(node.target).split(".")[1] if str(node.target).startswith("aten.") else ""
    order = list(range(rank))
    if name == "permute":
        return [axis % rank for axis in bound_arguments(node)["dims"]]
    if name in ("transpose", "swapaxes", "mT", "t") and rank >= 2:
        arguments = bound_arguments(node)
        first = arguments.get("dim0", arguments.get("axis0", -2))
        second = arguments.get("dim1", arguments.get("axis1", -1))
        order[first], order[second] = order[second], order[first]
        return order
    return None


def shape_of(node: Node) -> tuple[Any, ...]:
    """Return the shape of a tensor node."""
    shape = tensor_shape(node)
    assert shape is not None
    return shape
