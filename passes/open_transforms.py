"""Write out ``vmap``, ``grad`` and ``jvp`` in a Dynamo graph as the ordinary calls they make.

    _vmap_increment_nesting, _add_batch_dim, le, _remove_batch_dim ...   ->   aten.le over both axes

Tracing before dispatch does not see what happens below the tensors of a transform: it would take
the result for a constant of no value. So each outermost region is traced by itself, after dispatch,
and called in place of its nodes. Legal because those are the calls that the transform runs. Models
write masks with ``vmap``, for one query and one key at a time.
"""

from __future__ import annotations

import itertools
import operator
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from seer_compile.passes.fx_utils import fake_value


@dataclass(eq=False, slots=True)
class _Region:
    """The nodes from entering an outermost transform to leaving it."""

    nodes: list[Node] = field(default_factory=list[Node])

    @property
    def inputs(self) -> list[Node]:
        """Nodes before the region that it reads, each once."""
        read = itertools.chain.from_iterable(node.all_input_nodes for node in self.nodes)
        return [node for node in dict.fromkeys(read) if node not in self.nodes]

    @property
    def results(self) -> list[Node]:
        """Nodes of the region that are read behind it."""
        inside = set(self.nodes)
        return [node for node in self.nodes if set(node.users) - inside]


def open_transforms(graph_module: GraphModule) -> GraphModule:
    """Return a graph without transforms; the graph itself where it has none.

    Args:
        graph_module: Captured by Dynamo, with ``example_value`` on its nodes; not changed. The
            fake mode of those values is active.

    Returns:
        A graph module with the same placeholders and outputs; a former region is one call of a
        submodule of ATen calls.
    """
    regions = _regions(graph_module.graph)
    if not regions:
        return graph_module
    graph = Graph()
    members: dict[str, Any] = {}
    first = {region.nodes[0]: region for region in regions}
    inside = {node for region in regions for node in region.nodes}
    new: dict[Node, Node] = {}
    for node in graph_module.graph.nodes:
        if node in first:
            name = f"transform_{len(members)}"
            members[name] = _traced(graph_module, first[node])
            _call(graph, name, first[node], new)
        elif node not in inside:
            new[node] = graph.node_copy(node, new.__getitem__)
            if node.op in ("get_attr", "call_module"):
                members[str(node.target)] = operator.attrgetter(str(node.target))(graph_module)
    graph.lint()
    return GraphModule(members, graph)


def _regions(graph: Graph) -> list[_Region]:
    found: list[_Region] = []
    depth = 0
    for node in graph.nodes:
        name = getattr(node.target, "__name__", "")
        if name.endswith("_increment_nesting"):
            if depth == 0:
                found.append(_Region())
            depth += 1
        if depth:
            found[-1].nodes.append(node)
        if name.endswith("_decrement_nesting"):
            depth -= 1
    return found


def _traced(owner: GraphModule, region: _Region) -> GraphModule:
    graph = Graph()
    copies = {node: graph.placeholder(node.name) for node in region.inputs}
    for node in region.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in region.results))
    run = GraphModule(owner, graph)
    values = [fake_value(node) for node in region.inputs]
    return make_fx(run, _allow_non_fake_inputs=True)(*values)


def _call(graph: Graph, name: str, region: _Region, new: dict[Node, Node]) -> None:
    """Add a call of a traced region, and what it returns, to the new graph."""
    call = graph.call_module(name, tuple(new[node] for node in region.inputs))
    call.meta.update(region.nodes[0].meta)
    for place, node in enumerate(region.results):
        new[node] = graph.call_function(operator.getitem, (call, place))
        new[node].meta.update(node.meta)
