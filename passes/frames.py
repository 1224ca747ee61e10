"""Which module a captured graph belongs to, where it is not the whole model.

After a graph break, and around layers with hooks that cannot be traced (FSDP), Dynamo captures the
forward of a part by itself. Such a graph does not say which part it is of, and Dynamo runs it for
every other part of the same class: weights are inputs. A gate is not, and neither is a site's name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch._dynamo.guards import GuardBuilder
from torch._dynamo.source import LocalSource
from torch._guards import TracingContext
from torch.fx import GraphModule, Node

from seer_compile.wrappers import plain_name, unwrap

_LOCAL = re.compile(r"^L\['(\w+)'\]")
_STEP = re.compile(r"\._modules\['([^']+)'\]|\.([A-Za-z_]\w*)|\[(\d+)\]|\['([^']+)'\]")
_TENSOR = re.compile(r"\._(?:parameters|buffers)\['[^']+'\]$")


def frame_name(
    graph_module: GraphModule, example_inputs: Sequence[Any], root: nn.Module | None
) -> str:
    """Return the dotted name, in the root, of the module whose forward a graph was captured from.

    Args:
        graph_module: Dynamo's own graph.
        example_inputs: One value per placeholder.
        root: The user's model.

    Returns:
        The name; empty for the root itself and where it cannot be told.
    """
    if root is None:
        return ""
    found = dict(_known_locals(graph_module, example_inputs, unwrap(root)))
    return found.get("self", "")


def pin_frame(graph_module: GraphModule) -> None:
    """Guard the graph that Dynamo is compiling on the identity of the modules it was captured from.

    Another module of the same class then gets a graph, and gates, of its own. Outside of a
    compilation there is nothing to guard.
    """
    context = TracingContext.try_get()
    if context is None:
        return
    for local in sorted({local for local, _, _ in _paths(graph_module)}):
        guard = LocalSource(local).make_guard(GuardBuilder.ID_MATCH)
        context.guards_context.dynamo_guards.add(guard)


def _paths(graph_module: GraphModule) -> Iterator[tuple[str, str, str]]:
    """Yield the local variable that holds a module, the way on from it, and the module's key."""
    for node in graph_module.graph.nodes:
        for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
            start = _LOCAL.match(path)
            if start is not None:
                yield start[1], _dotted(path[start.end() :]), str(key).partition("@")[0]
    for node in graph_module.graph.nodes:
        source = source_name(node)
        start, end = _LOCAL.match(source), _TENSOR.search(source)
        if start is not None and end is not None:
            yield start[1], _dotted(source[start.end() : end.start()]), ""


def _known_locals(
    graph_module: GraphModule, example_inputs: Sequence[Any], root: nn.Module
) -> Iterator[tuple[str, str]]:
    modules = {str(id(module)): plain_name(name) for name, module in root.named_modules()}
    for local, rest, key in _paths(graph_module):
        name = _without_end(modules.get(key), rest)
        if name is not None:
            yield local, name
    tensors = (*root.named_parameters(), *root.named_buffers())
    owners = {id(tensor): plain_name(name.rpartition(".")[0]) for name, tensor in tensors}
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    for node, value in zip(placeholders, example_inputs, strict=False):
        source = source_name(node)
        start, end = _LOCAL.match(source), _TENSOR.search(source)
        if start is not None and end is not None and isinstance(value, torch.Tensor):
            rest = _dotted(source[start.end() : end.start()])
            name = _without_end(owners.get(id(value)), rest)
            if name is not None:
                yield start[1], name


def source_name(node: Node) -> str:
    """Return where Dynamo found the value of a placeholder; empty for other nodes."""
    source = getattr(node.meta.get("grapharg"), "source", None)
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)


def _dotted(path: str) -> str:
    return plain_name(".".join(next(filter(None, step)) for step in _STEP.findall(path)))


def _without_end(name: str | None, end: str) -> str | None:
    """Return what comes before the last steps of a name; None where it does not end in them."""
    if name is None or not end:
        return name
    if name == end:
        return ""
    return name.removesuffix(f".{end}") if name.endswith(f".{end}") else None
