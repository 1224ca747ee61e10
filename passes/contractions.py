"""``matmul``, ``bmm``, ``baddbmm`` and ``einsum`` as one thing: a product summed over one axis."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node
from torch.utils import _pytree as pytree

from seer_compile.passes.axes import AxisBook, Layout
from seer_compile.passes.fx_utils import bound_arguments, is_known, packet_of, tensor_shape

aten = torch.ops.aten
CONTRACTIONS = (aten.matmul, aten.bmm, aten.baddbmm, aten.einsum)


@dataclass(frozen=True, slots=True)
class Contraction:
    """A batched product of two tensors, with a letter per dimension.

    A dimension of size 1 that broadcasts against a larger one has no letter.
    """

    operands: tuple[Node, Node]
    layouts: tuple[Layout, Layout]
    result: Layout
    summed: str


def as_contraction(node: Node, book: AxisBook, prefix: str) -> Contraction | None:
    """Return a call as a contraction; None unless it is one over one axis of two batched tensors.

    Args:
        node: The call.
        book: Receives the sizes of the letters.
        prefix: Starts every letter, so that two contractions do not share one.
    """
    packet = packet_of(node)
    if packet is aten.einsum:
        parsed = _parse_einsum(node)
    elif packet in (aten.matmul, aten.bmm, aten.baddbmm):
        parsed = _parse_matmul(node)
    else:
        return None
    if parsed is None:
        return None
    operands, subscripts, result = parsed
    return _labelled(operands, subscripts, result, book, prefix)


def _parse_matmul(node: Node) -> tuple[list[Node], list[str], str] | None:
    arguments = bound_arguments(node)
    is_biased = packet_of(node) is aten.baddbmm
    names = ("batch1", "batch2") if is_biased else ("self", "other")
    if packet_of(node) is aten.bmm:
        names = ("self", "mat2")
    operands = [arguments[name] for name in names]
    rank = len(tensor_shape(node) or ())
    ranks = {len(tensor_shape(operand) or ()) for operand in operands}
    if ranks != {rank} or not 3 <= rank <= 6:
        return None
    batch = "abcd"[: rank - 2]
    return operands, [f"{batch}xz", f"{batch}zy"], f"{batch}xy"


def _parse_einsum(node: Node) -> tuple[list[Node], list[str], str] | None:
    equation, operands = node.args[0], node.args[1]
    if not isinstance(equation, str) or not isinstance(operands, (list, tuple)):
        return None
    sides = equation.replace(" ", "").split("->")
    subscripts = sides[0].split(",")
    tensors = [operand for operand in operands if isinstance(operand, Node)]
    if len(sides) != 2 or len(subscripts) != 2 or len(tensors) != 2:
        return None
    ranks = [len(tensor_shape(tensor) or ()) for tensor in tensors]
    hidden = [
        rank - len(text.replace("...", "")) if "..." in text else 0
        for text, rank in zip(subscripts, ranks, strict=True)
    ]
    letters = "ABCDEFGH"[: max(hidden)]
    expanded = [
        text.replace("...", letters[len(letters) - count :])
        for text, count in zip(subscripts, hidden, strict=True)
    ]
    return tensors, expanded, sides[1].replace("...", letters)


def _labelled(
    operands: list[Node], subscripts: list[str], result: str, book: AxisBook, prefix: str
) -> Contraction | None:
    summed = [letter for letter in dict.fromkeys("".join(subscripts)) if letter not in result]
    shared = set(subscripts[0]) & set(subscripts[1])
    is_plain = all(len(set(text)) == len(text) for text in (*subscripts, result))
    if len(summed) != 1 or summed[0] not in shared or not is_plain or len(result) < 3:
        return None
    sizes = _letter_sizes(operands, subscripts)
    if sizes is None:
        return None
    book.sizes.update({prefix + letter: size for letter, size in sizes.items()})
    layouts = [
        tuple(
            () if is_known(size == 1) and not is_known(sizes[letter] == 1) else (prefix + letter,)
            for letter, size in zip(text, tensor_shape(operand) or (), strict=True)
        )
        for operand, text in zip(operands, subscripts, strict=True)
    ]
    return Contraction(
        operands=(operands[0], operands[1]),
        layouts=(layouts[0], layouts[1]),
        result=tuple((prefix + letter,) for letter in result),
        summed=prefix + summed[0],
    )


def _letter_sizes(operands: list[Node], subscripts: list[str]) -> dict[str, object] | None:
    sizes: dict[str, object] = {}
    for operand, text in zip(operands, subscripts, strict=True):
        shape = tensor_shape(operand)
        if shape is None or len(shape) != len(text):
            return None
        for letter, size in zip(text, shape, strict=True):
            if letter not in sizes or is_known(sizes[letter] == 1):
                sizes[letter] = size
    return sizes


def is_batched(node: Node) -> bool:
    """Whether the call multiplies two tensors of at least three dimensions each."""
    if packet_of(node) not in CONTRACTIONS:
        return False
    operands = [
        argument for argument in pytree.tree_leaves(node.args) if isinstance(argument, Node)
    ]
    return sum(len(tensor_shape(operand) or ()) >= 3 for operand in operands) >= 2
