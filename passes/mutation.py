"""Which calls change a tensor in place, and whether a value survives from one node to another.

Graphs of the pre-dispatch dialect are not functional: a static cache counts its tokens with
``add_``. A pass that reads a value later than the graph did must know whether it changed meanwhile.
"""

from __future__ import annotations

import networkx
import torch
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import Graph, Node


class Mutations:
    """The in-place writes of a graph, by the storage they reach.

    Two nodes share storage as far as the schemas tell: views, in-place results, and calls such as
    ``reshape`` that may return a view. Connected components of that relation are the classes.

    Args:
        graph: The graph as it is now; later edits are not seen.
    """

    def __init__(self, graph: Graph) -> None:
        nodes = list(graph.nodes)
        self.position = {node: place for place, node in enumerate(nodes)}
        aliases: networkx.Graph = networkx.Graph()
        aliases.add_nodes_from(nodes)
        written: list[tuple[Node, Node]] = []
        for node in nodes:
            shared, changed = _effects(node)
            aliases.add_edges_from((node, other) for other in shared)
            written += [(other, node) for other in changed]
        self._class_of = {
            node: number
            for number, members in enumerate(networkx.connected_components(aliases))
            for node in members
        }
        self._writes: dict[int, list[Node]] = {}
        for tensor, writer in written:
            self._writes.setdefault(self._class_of[tensor], []).append(writer)

    def writer_between(self, tensor: Node, start: Node, stop: Node) -> Node | None:
        """Return a node strictly between ``start`` and ``stop`` that changes ``tensor``."""
        first, last = self.position[start], self.position[stop]
        writers = self._writes.get(self._class_of[tensor], ())
        return next((node for node in writers if first < self.position[node] < last), None)

    def memory_of(self, node: Node) -> int:
        """Return the number of the storage that a node's value may lie in."""
        return self._class_of[node]

    def is_written(self, tensor: Node) -> bool:
        """Whether any call of the graph changes the tensor or what it shares memory with."""
        return self._class_of[tensor] in self._writes


def _effects(node: Node) -> tuple[list[Node], list[Node]]:
    """Return the arguments that the result may share memory with, and those that are changed."""
    if node.op != "call_function":
        return [], []
    if node.target is torch.ops.higher_order.flex_attention:
        return [], []
    if not isinstance(node.target, OpOverload):
        is_writing = isinstance(node.target, HigherOrderOperator) and "mutation" in str(node.target)
        return list(node.all_input_nodes), list(node.all_input_nodes) if is_writing else []
    shared: list[Node] = []
    changed: list[Node] = []
    for place, argument in enumerate(node.target._schema.arguments):
        if argument.alias_info is None:
            continue
        value = node.args[place] if place < len(node.args) else node.kwargs.get(argument.name)
        members = value if isinstance(value, (list, tuple)) else [value]
        tensors = [member for member in members if isinstance(member, Node)]
        shared += tensors
        if argument.alias_info.is_write:
            changed += tensors
    return shared, changed
