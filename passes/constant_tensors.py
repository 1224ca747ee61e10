"""Buffers of known value: which band of positions a triangle or a table of positions is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node

from seer_compile.passes.mask_domain import AtMost, Value, both, choice

# How tracing and export name the tensors that they lift out of the code.
_LITERAL = re.compile(r"(^|\.)(_tensor_constant|lifted_tensor_)\d+$")
# A comparison of a larger buffer would take seconds.
_MOST_ELEMENTS = 1 << 28


def literal_tensors(graph_module: GraphModule) -> dict[Node, Tensor]:
    """Return the tensors that the program wrote down itself (``torch.tensor(8.0)``), by node.

    Parameters and buffers are not among them: they may change between runs.
    """
    owned = {name for name, _ in (*graph_module.named_parameters(), *graph_module.named_buffers())}
    owned -= {name for name in owned if _LITERAL.search(name)}
    found: dict[Node, Tensor] = {}
    for node in graph_module.graph.nodes:
        if node.op == "get_attr" and node.target not in owned:
            tensor = _real(_attribute(graph_module, str(node.target)))
            if tensor is not None:
                found[node] = tensor
    return found


def module_constants(
    graph_module: GraphModule, example_inputs: Sequence[Any] = (), root: nn.Module | None = None
) -> dict[Node, Tensor]:
    """Return every tensor of known value in a graph: literals, and buffers of the model.

    Args:
        graph_module: A normalised graph, or the module of an exported program.
        example_inputs: One value per placeholder, as Dynamo hands them to a backend.
        root: The user's model. Where it is given only its own buffers count; where it is not,
            Dynamo's record of where a placeholder came from decides.

    Returns:
        Real tensors by node. A proof that used a buffer holds while the buffer keeps its value.
    """
    found = literal_tensors(graph_module)
    graph = graph_module.graph
    buffers = {id(buffer) for buffer in root.buffers()} if root is not None else set[int]()
    names = {name for name, _ in graph_module.named_buffers()}
    held: list[tuple[Node, Any]] = [
        (node, _attribute(graph_module, str(node.target)))
        for node in graph.find_nodes(op="get_attr")
        if node.target in names
    ]
    for node, value in zip(graph.find_nodes(op="placeholder"), example_inputs, strict=False):
        if id(value) in buffers if root is not None else _is_from_buffer(node):
            held.append((node, value))
    for node, value in held:
        tensor = _real(value)
        # What was made in inference mode counts no writes: nobody would notice a new value.
        if tensor is not None and not tensor.is_inference():
            found[node] = tensor
    return found


def _is_from_buffer(placeholder: Node) -> bool:
    source = getattr(placeholder.meta.get("grapharg"), "source", None)
    name = getattr(source, "name", "")
    return "._buffers[" in str(name() if callable(name) else name)


def _attribute(module: nn.Module, path: str) -> Any:
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part, None)
    return value


def _real(value: Any) -> Tensor | None:
    """Return a tensor with data; a fake tensor stands for the constant it was made from."""
    if isinstance(value, FakeTensor):
        value = value.constant
    return value if isinstance(value, Tensor) and not value.is_meta else None


def constant_element(tensor: Tensor, index: Sequence[sympy.Expr]) -> Value | None:
    """Return the element of a tensor of known value at a symbolic index.

    Recognised are tensors of one value, positions (``start + step * n``), and matrices that hold
    one value inside a band of diagonals and another outside, with leading axes of size 1.

    Returns:
        The value; None where the tensor is none of these.
    """
    if tensor.is_meta or not 0 < tensor.numel() <= _MOST_ELEMENTS:
        return None
    first = tensor.flatten()[0]
    if bool((tensor == first).all()):
        return _number(first)
    axes = [axis for axis, size in enumerate(tensor.shape) if size > 1]
    values = tensor.detach().squeeze()
    if len(axes) == 1:
        return _arithmetic(values, index[axes[0]])
    if len(axes) == 2:
        return _band(values, index[axes[0]], index[axes[1]])
    return None


def _arithmetic(values: Tensor, position: sympy.Expr) -> Value | None:
    if values.dtype == torch.bool or values.dtype.is_floating_point or values.dtype.is_complex:
        return None
    start, step = int(values[0]), int(values[1]) - int(values[0])
    line = torch.arange(len(values), device=values.device, dtype=torch.int64) * step + start
    return sympy.expand(start + step * position) if torch.equal(values.long(), line) else None


def _band(values: Tensor, row: sympy.Expr, column: sympy.Expr) -> Value | None:
    """Return ``inside`` where ``low <= column - row <= high`` and ``outside`` elsewhere."""
    corner = values[0, 0]
    is_corner = values == corner
    other = values[~is_corner][0]
    if not bool((is_corner | (values == other)).all()):
        return None
    shift = torch.arange(values.shape[1], device=values.device) - torch.arange(
        values.shape[0], device=values.device
    ).unsqueeze(1)
    for inside, outside, region in ((corner, other, is_corner), (other, corner, ~is_corner)):
        low, high = int(shift[region].min()), int(shift[region].max())
        if torch.equal(region, (shift >= low) & (shift <= high)):
            edges = []
            if high < int(shift.max()):
                edges.append(AtMost(sympy.expand(column - row - high)))
            if low > int(shift.min()):
                edges.append(AtMost(sympy.expand(row - column + low)))
            then, otherwise = _number(inside), _number(outside)
            return choice(both(*edges), then, otherwise)
    return None


def _number(value: Tensor) -> Value:
    if value.dtype.is_floating_point:
        return float(value)
    return sympy.Integer(int(value))
