"""Write the body of a checkpointed region where it is called, so that the passes see one graph.

    tag_activation_checkpoint(body, x, mask)   =>   the calls of body, marked as one region

A site needs its surroundings: the mask of a checkpointed layer is made outside of it. Legal because
the region is only open while passes run: ``outline_bodies`` makes a call of a body of it again,
under the same operator with the same settings. Opened are operators that run their body once, as
it is; branches, loops and bodies that several calls share stay closed.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

REGION = "seer_region"
"""Metadata key: the regions around a node, outermost first. Inserted nodes have none."""
_OPENED = frozenset(
    {"tag_activation_checkpoint", "wrap", "wrap_with_set_grad_enabled", "wrap_with_autocast"}
)


@dataclass(frozen=True, eq=False, kw_only=True)
class Region:
    """A call whose body was written out."""

    target: Callable[..., Any]
    leading: tuple[Any, ...]
    """Constants in front of the body in the call's arguments."""
    keywords: dict[str, Any]
    name: str
    """Name under which the graph held the body."""
    body_meta: dict[str, Any]
    """Metadata of the body, such as what selective checkpointing saves."""
    meta: dict[str, Any]
    """Metadata of the call."""


def inline_bodies(graph_module: GraphModule) -> GraphModule:
    """Return the graph with the bodies of its regions written out.

    Args:
        graph_module: A captured graph; not changed.

    Returns:
        A fresh graph module whose nodes are marked, or ``graph_module`` where there is no region.
    """
    if not any(_body_of(graph_module, node) for node in graph_module.graph.nodes):
        return graph_module
    fresh = _copy(graph_module)
    for node in fresh.graph.nodes:
        node.meta[REGION] = ()
    pending = list(fresh.graph.nodes)
    while pending:
        node = pending.pop()
        body = _body_of(fresh, node)
        if body is not None:
            pending += _inline(fresh, node, body)
    fresh.graph.lint()
    fresh.recompile()
    return fresh


def _copy(graph_module: GraphModule) -> GraphModule:
    fresh = GraphModule(graph_module, copy.deepcopy(graph_module.graph))
    fresh.meta = dict(graph_module.meta)
    for new, old in zip(fresh.graph.nodes, graph_module.graph.nodes, strict=True):
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    return fresh


def _body_of(graph_module: GraphModule, node: Node) -> GraphModule | None:
    """Return the body that a node runs, if it is one that can be written out."""
    if not isinstance(node.target, torch._ops.HigherOrderOperator):
        return None
    if node.target.name() not in _OPENED:
        return None
    place = next((n for n, item in enumerate(node.args) if isinstance(item, Node)), None)
    if place is None or any(isinstance(item, Node) for item in node.kwargs.values()):
        return None
    source = node.args[place]
    if not isinstance(source, Node) or source.op != "get_attr":
        return None
    body = getattr(graph_module, str(source.target), None)
    if not isinstance(body, GraphModule) or not isinstance(_result(body.graph), (tuple, list)):
        return None
    inputs = [inner for inner in body.graph.nodes if inner.op == "placeholder"]
    is_plain = len(inputs) == len(node.args) - place - 1
    is_plain &= all(user.target is operator.getitem for user in node.users)
    return body if is_plain and source.target == str(source.target).partition(".")[0] else None


def _result(graph: Graph) -> Any:
    return next(node for node in reversed(graph.nodes) if node.op == "output").args[0]


def _inline(graph_module: GraphModule, call: Node, body: GraphModule) -> list[Node]:
    """Replace a call by its body's nodes and return those."""
    place = next(n for n, item in enumerate(call.args) if isinstance(item, Node))
    source = call.args[place]
    assert isinstance(source, Node)
    region = Region(
        target=call.target,  # pyright: ignore[reportArgumentType]
        leading=tuple(call.args[:place]),
        keywords=dict(call.kwargs),
        name=str(source.target),
        body_meta=dict(body.meta),
        meta=dict(call.meta),
    )
    new = _copy_body(graph_module, call, body, call.args[place + 1 :], region)
    results = map_arg(_result(body.graph), lambda node: new[node])
    for part in list(call.users):
        _replace(part, results[part.args[1]])  # pyright: ignore[reportArgumentType]
        graph_module.graph.erase_node(part)
    graph_module.graph.erase_node(call)
    if not source.users:
        graph_module.graph.erase_node(source)
    if not any(node.op == "get_attr" and node.target == region.name for node in _nodes(source)):
        delattr(graph_module, region.name)
    return [node for inner, node in new.items() if inner.op == "call_function"]


def _nodes(node: Node) -> list[Node]:
    return list(node.graph.nodes)


def _copy_body(
    graph_module: GraphModule,
    call: Node,
    body: GraphModule,
    operands: Sequence[Any],
    region: Region,
) -> dict[Node, Any]:
    inputs = [node for node in body.graph.nodes if node.op == "placeholder"]
    new: dict[Node, Any] = dict(zip(inputs, operands, strict=True))
    for node in body.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        with graph_module.graph.inserting_before(call):
            fresh = graph_module.graph.node_copy(node, lambda inner: new[inner])
        fresh.meta[REGION] = (*call.meta[REGION], region)
        if node.op in ("get_attr", "call_module"):
            fresh.target = _adopt(graph_module, body, str(node.target))
        new[node] = fresh
    return new


def _adopt(graph_module: GraphModule, body: GraphModule, path: str) -> str:
    """Register an attribute of a body with the outer graph, under a name that is free there."""
    value: Any = body
    for part in path.split("."):
        value = getattr(value, part)
    stem = path.replace(".", "_")
    names = (f"{stem}_{number}" if number else stem for number in range(10**6))
    name = next(n for n in names if not hasattr(graph_module, n) or _same(graph_module, n, value))
    if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter):
        graph_module.register_buffer(name, value)
    else:
        setattr(graph_module, name, value)
    return name


def _same(graph_module: GraphModule, name: str, value: Any) -> bool:
    return getattr(graph_module, name) is value


def _replace(node: Node, value: Any) -> None:
    if isinstance(value, Node):
        node.replace_all_uses_with(value)
        return
    # A body may return a constant; nodes alone can be replaced as a whole.
    for user in list(node.users):
        user.args = map_arg(user.args, lambda item: value if item is node else item)
        user.kwargs = map_arg(user.kwargs, lambda item: value if item is node else item)
