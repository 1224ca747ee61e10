"""Which calls hand values on unchanged, which only look, and whether a product lies behind."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from seer_compile.passes.contractions import is_batched
from seer_compile.passes.fx_utils import bound_arguments, fake_value, packet_of

aten = torch.ops.aten
COPIES = (
    aten.to,
    aten._to_copy,
    aten.type_as,
    aten.contiguous,
    aten.clone,
    aten.alias,
)
VIEWS = (
    aten.view,
    aten.reshape,
    aten._unsafe_view,
    aten.flatten,
    aten.unflatten,
    aten.squeeze,
    aten.unsqueeze,
    aten.expand,
)
_SIZES = (aten.sym_size, aten.sym_stride, aten.sym_numel)
_OBSERVERS = (aten._assert_tensor_metadata, *_SIZES)
# Behind these lie other layers, not the logits of this one; sizes hold none of a tensor's numbers.
_FRESH_VALUES = (aten.linear, aten.mm, aten.addmm, aten.embedding, *_SIZES)
_DEEPEST = 12


def only_observes(user: Node, node: Node) -> bool:
    """Whether a reader looks at a tensor's metadata only."""
    packet = packet_of(user)
    is_type = packet is aten.type_as and user.args[0] is not node
    return packet in _OBSERVERS or is_type


def keeps_numbers(node: Node) -> bool:
    """Whether a copy or view of a tensor holds the same numbers, up to the rounding of a float.

    Integers cut numbers off, and a view in another dtype reads the same bits as other numbers.
    """
    before, after = fake_value(node.args[0]).dtype, fake_value(node).dtype
    is_float = before.is_floating_point and after.is_floating_point
    return before == after or (is_float and packet_of(node) in COPIES)


def varies_with(value: Any, sizes: Sequence[Any]) -> bool:
    """Whether a number is made of some sizes, so that making it constant would fix those."""
    number = fake_value(value)
    if not isinstance(number, torch.SymInt | torch.SymFloat):
        return False
    symbols = [size.node.expr.free_symbols for size in sizes if isinstance(size, torch.SymInt)]
    return bool(number.node.expr.free_symbols & set().union(*symbols))


def leads_to_product(value: Any) -> bool:
    """Whether a product of two batched tensors lies a few calls behind a value."""
    if not isinstance(value, Node):
        return False
    pending, seen = [(value, 0)], set[Node]()
    while pending:
        node, depth = pending.pop()
        if node in seen or depth > _DEEPEST:
            continue
        seen.add(node)
        if is_batched(node):
            return True
        if packet_of(node) not in _FRESH_VALUES:
            pending += [(source, depth + 1) for source in node.all_input_nodes]
    return False


def row_maximum(subtrahend: Any, logits: Any) -> set[Node] | None:
    """Return the nodes of ``logits.max(-1, keepdim=True)``, which a softmax does not feel."""
    chain: set[Node] = set()
    node = subtrahend
    while isinstance(node, Node):
        chain.add(node)
        if packet_of(node) in (aten.amax, aten.max):
            arguments = bound_arguments(node)
            axes = arguments.get("dim")
            is_row = axes in (-1, [-1]) and arguments.get("keepdim") and node.args[0] is logits
            return chain if is_row else None
        is_first = node.target is operator.getitem and node.args[1] == 0
        node = node.args[0] if packet_of(node) in (aten.detach, *COPIES) or is_first else None
    return None
