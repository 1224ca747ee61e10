"""Make the regions that ``inline_bodies`` wrote out calls of a body again.

    the calls of one region, rewritten   =>   tag_activation_checkpoint(new body, x, mask, weights)

Legal because the region runs at one place, what it reads is there before it, and it is the same
operator with the same settings. Nodes that passes inserted belong to the region whose values they
need. What they need of the outside (a gate's weights and knobs, a mask's padding) becomes an
operand, so that it is saved, and differentiated, as every other operand is.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from seer_compile.passes.fx_utils import fake_value
from seer_compile.passes.inline_bodies import REGION, Region
from seer_compile.types import PassResult

_Path = tuple[Region, ...]
_KEPT_METADATA = ("val", "nn_module_stack", "stack_trace")


def outline_bodies(graph_module: GraphModule) -> PassResult:
    """Close every open region.

    Args:
        graph_module: Changed in place; receives the bodies as submodules.

    Returns:
        The names of the bodies made; a graph without open regions is unchanged.
    """
    _settle(graph_module.graph)
    names = []
    # Nested regions are closed within the body that they become part of.
    for region in _outermost(graph_module.graph):
        members = [node for node in graph_module.graph.nodes if node.meta[REGION][:1] == (region,)]
        names.append(_outline(graph_module, region, members))
    for node in graph_module.graph.nodes:
        del node.meta[REGION]
    return PassResult(graph_module=graph_module, rewritten=tuple(names))


def _settle(graph: Graph) -> None:
    """Give every node its regions: nodes that passes inserted have none yet."""
    following: dict[Node, _Path] = {}
    path: _Path = ()
    for node in reversed(graph.nodes):
        path = node.meta.get(REGION, path)
        following[node] = path
    for node in graph.nodes:
        if REGION not in node.meta or _is_size(node):
            needed = (_shared(following[node], item.meta[REGION]) for item in node.all_input_nodes)
            node.meta[REGION] = max(needed, key=len, default=())


def _is_size(node: Node) -> bool:
    """Whether a node computes a size: sizes of the outside are read where tracing first met them.

    Body attributes and calls without a value are no sizes.
    """
    value = fake_value(node)
    return (
        node.op == "call_function" and value is not None and not isinstance(value, Tensor | tuple)
    )


def _shared(left: _Path, right: _Path) -> _Path:
    pairs = itertools.takewhile(lambda pair: pair[0] is pair[1], zip(left, right, strict=False))
    return tuple(region for region, _ in pairs)


def _outermost(graph: Graph) -> list[Region]:
    paths = (node.meta[REGION] for node in graph.nodes)
    return list(dict.fromkeys(path[0] for path in paths if path))


def _outline(graph_module: GraphModule, region: Region, members: Sequence[Node]) -> str:
    inside = set(members)
    inputs = list(
        dict.fromkeys(
            item for node in members for item in node.all_input_nodes if item not in inside
        )
    )
    outputs = [node for node in members if not inside.issuperset(node.users)]
    body = _body(graph_module, members, inputs, outputs)
    body.meta.update(region.body_meta)
    name = _free_name(graph_module, region.name)
    graph_module.add_submodule(name, body)
    parts = _call(graph_module.graph, region, name, members[-1], inputs, outputs)
    for old, new in zip(outputs, parts, strict=True):
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in inside)
    for node in reversed(members):
        graph_module.graph.erase_node(node)
    return name


def _body(
    graph_module: GraphModule,
    members: Sequence[Node],
    inputs: Sequence[Node],
    outputs: Sequence[Node],
) -> GraphModule:
    graph = Graph()
    new: dict[Node, Node] = {}
    for node in inputs:
        new[node] = graph.placeholder(node.name)
        new[node].meta["val"] = fake_value(node)
        new[node].meta[REGION] = ()
    for node in members:
        new[node] = graph.node_copy(node, lambda inner: new[inner])
        new[node].meta[REGION] = node.meta[REGION][1:]
    graph.output(tuple(new[node] for node in outputs)).meta[REGION] = ()
    body = GraphModule(graph_module, graph)
    outline_bodies(body)
    body.graph.lint()
    body.recompile()
    return body


def _call(
    graph: Graph,
    region: Region,
    name: str,
    last: Node,
    inputs: Sequence[Node],
    outputs: Sequence[Node],
) -> list[Node]:
    """Insert the call of a body behind the region's last node; return its results."""
    with graph.inserting_after(last):
        body = graph.get_attr(name)
    body.meta[REGION] = ()
    with graph.inserting_after(body):
        arguments = (*region.leading, body, *inputs)
        call = graph.call_function(region.target, arguments, dict(region.keywords))
    call.meta = dict(region.meta)
    call.meta[REGION] = ()
    call.meta["val"] = tuple(fake_value(node) for node in outputs)
    parts: list[Node] = []
    for place, node in enumerate(outputs):
        with graph.inserting_after(parts[-1] if parts else call):
            part = graph.call_function(operator.getitem, (call, place))
        part.meta = {key: node.meta[key] for key in _KEPT_METADATA if key in node.meta}
        part.meta[REGION] = ()
        parts.append(part)
    return parts


def _free_name(graph_module: GraphModule, wanted: str) -> str:
    names: Any = (f"{wanted}_{number}" if number else wanted for number in itertools.count())
    return next(name for name in names if not hasattr(graph_module, name))
