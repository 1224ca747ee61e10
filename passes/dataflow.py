"""Which calls hand values on unchanged, which only look, and whether a product lies behind."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from seer_compile.passes.contractions import is_batched
from seer_compile.passes.fx_utils import packet_of

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
_OBSERVERS = (aten._assert_tensor_metadata, aten.sym_size, aten.sym_stride, aten.sym_numel)
# Behind these lie other layers, not the logits of this one.
_FRESH_VALUES = (aten.linear, aten.mm, aten.addmm, aten.embedding)
_DEEPEST = 12


def only_observes(user: Node, node: Node) -> bool:
    """Whether a reader looks at a tensor's metadata only."""
    packet = packet_of(user)
    is_type = packet is aten.type_as and user.args[0] is not node
    return packet in _OBSERVERS or is_type


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
