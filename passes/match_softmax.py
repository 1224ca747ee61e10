"""A softmax in any spelling, with or without a sink in its sum.

    softmax(x, d)
    exp(x - m) / (sum(exp(x - m), d) [+ exp(sink - m)])      m is anything constant along d
    exp(x - logsumexp(x, d))
    exp(x - logaddexp(logsumexp(x, d), sink))

A column that is appended to the logits and dropped after is told by ``trace_logits``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from seer_compile.passes.axes import shape_of
from seer_compile.passes.fx_utils import bound_arguments, is_known, packet_of, tensor_shape

aten = torch.ops.aten
CALLS = (aten.softmax, aten._softmax, aten._safe_softmax, aten.special_softmax)


@dataclass(frozen=True, slots=True)
class Softmax:
    """Logits made into weights."""

    weights: Node
    logits: Any
    """What is normalised; a node in every graph of tensors."""
    axis: int
    """The dimension whose weights (and sink) add up to 1."""
    sink: Node | None = None
    """A logit beside those along the axis; broadcasts to the weights."""


def as_softmax(node: Node) -> Softmax | None:
    """Return a call as the last one of a softmax; None for others."""
    packet = packet_of(node)
    if packet in CALLS:
        return Softmax(node, node.args[0], int(bound_arguments(node)["dim"]))
    if packet is aten.div:
        return _as_quotient(node)
    return _as_exponential(node) if packet is aten.exp else None


def _as_quotient(node: Node) -> Softmax | None:
    """``exp(x - m) / sum``."""
    weights, total = _operands(node)
    if packet_of(weights) is not aten.exp or bound_arguments(node).get("rounding_mode"):
        return None
    is_sum = packet_of(total) is aten.add and bound_arguments(total)["alpha"] == 1
    axis, others = _axis_and_others(_operands(total) if is_sum else (total,), aten.sum, weights)
    if axis is None or not all(packet_of(other) is aten.exp for other in others):
        return None
    logits, centre = _centred(weights.args[0], axis)
    if not others:
        return Softmax(node, logits, axis)
    sink, other_centre = _centred(others[0].args[0], axis)
    if centre is not other_centre:
        # Exact for the logits as they are exponentiated; whether they moved is the chain's to say.
        logits, sink = weights.args[0], others[0].args[0]
    return Softmax(node, logits, axis, sink)


def _as_exponential(node: Node) -> Softmax | None:
    """``exp(x - log(sum))``."""
    if not _is_difference(node.args[0]):
        return None
    logits, total = _operands(node.args[0])
    parts = _operands(total) if packet_of(total) is aten.logaddexp else (total,)
    axis, others = _axis_and_others(parts, aten.logsumexp, logits)
    if axis is None or not all(isinstance(other, Node) for other in others):
        return None
    return Softmax(node, logits, axis, *others)


def _operands(node: Any) -> tuple[Any, Any]:
    return node.args[0], node.args[1]


def _axis_and_others(
    parts: Sequence[Any], reduction: Any, source: Any
) -> tuple[int | None, list[Any]]:
    """Return along which axis one of some parts reduces ``source``, and the other parts."""
    axes = [_axis_of(part, reduction, source) for part in parts]
    others = [part for part, axis in zip(parts, axes, strict=True) if axis is None]
    found = [axis for axis in axes if axis is not None]
    return (found[0] if len(found) == 1 else None), others


def _axis_of(node: Any, reduction: Any, source: Any) -> int | None:
    """Return the one axis along which a node reduces ``source``, kept as one of size 1."""
    if packet_of(node) is not reduction:
        return None
    arguments = bound_arguments(node)
    axes = arguments.get("dim")
    is_kept = arguments.get("keepdim") and arguments.get("dtype") is None
    if arguments["self"] is not source or not is_kept or not isinstance(axes, list | tuple):
        return None
    return int(axes[0]) if len(axes) == 1 else None


def _centred(value: Any, axis: int) -> tuple[Any, Any]:
    """Return ``x`` and ``m`` of ``x - m``, m constant along the axis; else the value and None."""
    if not _is_difference(value):
        return value, None
    left, right = _operands(value)
    shape, rank = tensor_shape(right), len(shape_of(value))
    axis -= rank if axis >= 0 else 0
    is_constant = shape is not None and (len(shape) < -axis or is_known(shape[axis] == 1))
    return (left, right) if is_constant else (value, None)


def _is_difference(node: Any) -> bool:
    return packet_of(node) is aten.sub and bound_arguments(node)["alpha"] == 1
