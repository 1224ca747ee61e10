"""Helpers for reading and extending FX graphs of ATen calls."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch._ops import OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

import seer_compile.types

# Dynamo leaves the frames of PyTorch's own layers out: below them, our call of the model is last.
_OWN_FRAME = f'File "{Path(seer_compile.types.__file__).parent}{os.sep}'


def fake_value(value: Any) -> Any:
    """Return the traced value of a node (fake tensor, number, symbol); other values unchanged."""
    if not isinstance(value, Node):
        return value
    return value.meta.get("val", value.meta.get("example_value"))


def packet_of(node: Any) -> OpOverloadPacket | None:
    """Return the operator that a node calls, whatever the overload; None for other nodes."""
    if isinstance(node, Node) and isinstance(node.target, OpOverload):
        return node.target.overloadpacket
    return None


def bound_arguments(node: Node) -> dict[str, Any]:
    """Return the arguments of an operator call under their schema names, defaults filled in."""
    assert isinstance(node.target, OpOverload)
    schema = node.target._schema.arguments
    bound = {argument.name: argument.default_value for argument in schema}
    bound.update(zip((argument.name for argument in schema), node.args, strict=False))
    bound.update(node.kwargs)
    return bound


def is_known(condition: Any) -> bool:
    """Whether a condition on (symbolic) sizes holds for every run of the graph, guard-free."""
    if isinstance(condition, bool):
        return condition
    return bool(statically_known_true(condition))


def tensor_shape(value: Any) -> tuple[Any, ...] | None:
    """Return the shape of a node's or fake tensor's value; None if it is not a tensor."""
    fake = fake_value(value)
    return tuple(fake.shape) if isinstance(fake, torch.Tensor) else None


def source_frames(node: Node) -> list[str]:
    """Return the last user frame of a node's stack trace: where, and the code; empty if unknown."""
    frames = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines()]
    places = [
        place
        for place, line in enumerate(frames)
        if line.startswith("File ") and not line.startswith(_OWN_FRAME)
    ]
    return frames[places[-1] : places[-1] + 2] if places else []


def cited(node: Node) -> str:
    """Return a node's name for a reason, with the line of the user's that made it."""
    for frame in source_frames(node)[:1]:
        found = re.match(r'File "(?:.*[\\/])?([^"\\/]+)", line (\d+)', frame)
        if found:
            return f"`{node.name} at {found[1]}:{found[2]}`"
    return f"`{node.name}`"


def insert_call(graph: Graph, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
    """Append a call at the graph's insertion point and give it its traced value.

    Args:
        graph: The graph, with its insertion point set.
        target: An ATen overload or another traceable function.
        *args: Nodes, numbers, lists.
        **kwargs: The same, by name.

    Returns:
        The new node; ``meta["val"]`` is the fake result.
    """
    node = graph.call_function(target, args, kwargs)
    fake_args, fake_kwargs = map_arg((args, kwargs), fake_value)
    leaves = pytree.tree_leaves((fake_args, fake_kwargs))
    # Inside a backend the tracing context may hold another mode than the graph's own values.
    own = (leaf.fake_mode for leaf in leaves if isinstance(leaf, FakeTensor))
    mode = next(own, None) or detect_fake_mode(leaves)
    if mode is None:
        node.meta["val"] = target(*fake_args, **fake_kwargs)
    else:
        with mode, torch.no_grad():
            node.meta["val"] = target(*fake_args, **fake_kwargs)
    return node
