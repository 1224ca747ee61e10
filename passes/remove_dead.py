"""Sweep out what a rewrite left without readers: the former attention regions and masks.

FX's own dead-code elimination keeps two kinds of calls that would keep a whole region alive:
random calls (dropout and fused attention, which draw nothing in evaluation) and metadata assertions
that ``torch.export`` adds about intermediate tensors. Here a call stays when the output depends
on it, when it writes to memory that something else reads, or when it has another side effect; an
assertion about a tensor that nothing else needs goes with the tensor.
"""

from __future__ import annotations

import torch
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import Graph, GraphModule, Node

from seer_compile.passes.fx_utils import bound_arguments, packet_of
from seer_compile.passes.mutation import Mutations
from seer_compile.types import PassResult

aten = torch.ops.aten
_ASSERTIONS = (aten._assert_tensor_metadata,)
_RANDOM = (
    aten.dropout,
    aten.native_dropout,
    aten.feature_dropout,
    aten.scaled_dot_product_attention,
)


def remove_dead(graph_module: GraphModule) -> PassResult:
    """Erase every call on which neither an output nor a side effect depends.

    Args:
        graph_module: Changed in place.

    Returns:
        The names of the nodes erased.
    """
    nodes = list(graph_module.graph.nodes)
    live = _needed({node for node in nodes if _is_root(node)}, graph_module.graph)
    assertions = [node for node in nodes if packet_of(node) in _ASSERTIONS]
    live |= {node for node in assertions if all(arg in live for arg in node.all_input_nodes)}
    dead = [node for node in reversed(nodes) if node not in live]
    for node in dead:
        graph_module.graph.erase_node(node)
    return PassResult(graph_module=graph_module, rewritten=tuple(node.name for node in dead))


def _needed(roots: set[Node], graph: Graph) -> set[Node]:
    """Return what the roots need, writes to memory of the graph's own only where it is read."""
    mutations = Mutations(graph)
    theirs = {
        mutations.memory_of(node) for node in graph.nodes if node.op in ("placeholder", "get_attr")
    }
    writes = {
        node for node in roots if _only_writes(node) and mutations.memory_of(node) not in theirs
    }
    live = _with_inputs(roots - writes)
    while True:
        read = {mutations.memory_of(node) for node in live}
        needed = {node for node in writes - live if mutations.memory_of(node) in read}
        if not needed:
            return live
        live |= _with_inputs(needed)


def _only_writes(node: Node) -> bool:
    """Whether changing its arguments is all that a call does beside returning a value."""
    if not isinstance(node.target, OpOverload) or not node.target._schema.is_mutable:
        return False
    return torch.Tag.nondeterministic_seeded not in node.target.tags


def _is_root(node: Node) -> bool:
    if node.op in ("placeholder", "output"):
        return True
    if packet_of(node) in (*_ASSERTIONS, *_RANDOM):
        return packet_of(node) in _RANDOM and _draws(node)
    if node.target is torch.ops.higher_order.flex_attention:
        return False
    # What another higher-order operator does is not known here, so it stays.
    return node.is_impure() or isinstance(node.target, HigherOrderOperator)


def _draws(node: Node) -> bool:
    if not isinstance(node.target, OpOverload):
        return True
    arguments = bound_arguments(node)
    probability = arguments.get("p", arguments.get("dropout_p"))
    return bool(arguments.get("train", True)) and probability != 0


def _with_inputs(roots: set[Node]) -> set[Node]:
    live, pending = set(roots), list(roots)
    while pending:
        for node in pending.pop().all_input_nodes:
            if node not in live:
                live.add(node)
                pending.append(node)
    return live
