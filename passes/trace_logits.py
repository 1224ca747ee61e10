"""From a softmax back to the product that made its logits.

    softmax <- add(mask) <- mul(scale) <- matmul(q, k^T)

Each call between is one effect on the logits. The walk stops at the first call that it does not
know; a site whose logits do more than this table says is reported, never rewritten.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.fx import Node

from seer_compile.passes.axes import permutation_of
from seer_compile.passes.contractions import CONTRACTIONS, is_batched
from seer_compile.passes.fx_utils import bound_arguments, is_known, packet_of, tensor_shape
from seer_compile.types import SkipCode, SkipReason

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
_PRODUCES_FRESH_VALUES = (aten.linear, aten.mm, aten.addmm, aten.embedding)
_LONGEST = 40
_DEEPEST = 12
_HIDING = -1e4
Number = Callable[[Any], float | None]


@dataclass(frozen=True, slots=True)
class Effect:
    """One call on the way from the product to the softmax."""

    kind: Literal["layout", "scale", "tanh", "add", "masked_fill", "where"]
    node: Node
    number: float = 1.0
    """Factor of ``scale``; weight of the operand of ``add``."""
    operand: Node | None = None
    fill: Any = None


@dataclass(frozen=True, slots=True)
class LogitChain:
    """The way from the product to the softmax."""

    product: Node | None
    """None where the walk failed; ``obstacles`` says why."""
    effects: tuple[Effect, ...] = ()
    """In the order of execution."""
    helpers: frozenset[Node] = frozenset()
    """Nodes beside the chain that belong to the softmax, such as the maximum it subtracts."""
    obstacles: tuple[SkipReason, ...] = ()


class _LeftTableError(Exception):
    def __init__(self, code: SkipCode, why: str) -> None:
        super().__init__(why)
        self.reason = SkipReason(code, why)


def trace_logits(softmax: Node, number: Number) -> LogitChain:
    """Walk from a softmax back to the product of queries and keys.

    Args:
        softmax: The softmax call.
        number: Returns the value of a constant (a Python number, or a node of known value).

    Returns:
        The chain; without product, and with the reason, where a call is not understood.
    """
    effects: list[Effect] = []
    helpers: set[Node] = set()
    obstacles: list[SkipReason] = []
    node = softmax.args[0]
    try:
        for _ in range(_LONGEST):
            if not isinstance(node, Node):
                raise _LeftTableError(SkipCode.AMBIGUOUS, "logits are not a tensor")
            if packet_of(node) in CONTRACTIONS:
                effects += _of_product(node)
                return LogitChain(
                    node, tuple(reversed(effects)), frozenset(helpers), tuple(obstacles)
                )
            node = _step_back(node, number, effects, helpers, obstacles)
        raise _LeftTableError(SkipCode.AMBIGUOUS, "no product of queries and keys behind it")
    except _LeftTableError as error:
        return LogitChain(None, obstacles=(*obstacles, error.reason))


def _step_back(
    node: Node,
    number: Number,
    effects: list[Effect],
    helpers: set[Node],
    obstacles: list[SkipReason],
) -> Any:
    packet = packet_of(node)
    if packet in COPIES:
        return node.args[0]
    if packet in VIEWS or permutation_of(node, len(tensor_shape(node) or ())) is not None:
        effects.append(Effect("layout", node))
        return node.args[0]
    if packet in (aten.mul, aten.mul_, aten.div, aten.div_):
        return _scale(node, number, effects)
    if packet is aten.tanh:
        effects.append(Effect("tanh", node))
        return node.args[0]
    if packet in (aten.add, aten.add_, aten.sub, aten.sub_):
        return _add(node, number, effects, helpers)
    if packet in (aten.masked_fill, aten.masked_fill_, aten.where):
        return _replace(node, effects)
    if packet in (aten.maximum, aten.clamp, aten.clamp_min):
        return _clamp(node, number)
    if packet is aten.cat:
        return _concatenation(node, obstacles)
    raise _LeftTableError(SkipCode.AMBIGUOUS, f"`{node.name}` ({packet or node.target})")


def _of_product(product: Node) -> list[Effect]:
    """Return what ``baddbmm`` does besides multiplying, last effect first."""
    if packet_of(product) is not aten.baddbmm:
        return []
    arguments = bound_arguments(product)
    scale = Effect("scale", product, number=float(arguments["alpha"]))
    weight = float(arguments["beta"])
    if weight == 0:
        return [scale]
    return [Effect("add", product, number=weight, operand=arguments["self"]), scale]


def _scale(node: Node, number: Number, effects: list[Effect]) -> Any:
    left, right = node.args[:2]
    factor = number(right)
    is_division = packet_of(node) in (aten.div, aten.div_)
    if is_division and bound_arguments(node).get("rounding_mode") is not None:
        raise _LeftTableError(SkipCode.AMBIGUOUS, f"`{node.name}` rounds the logits")
    if factor is None and not is_division:
        left, right, factor = right, left, number(left)
    if factor is None or (is_division and factor == 0):
        raise _LeftTableError(SkipCode.SCALE, f"`{node.name}` multiplies logits by a tensor")
    _require_same_shape(node, left)
    effects.append(Effect("scale", node, number=1 / factor if is_division else factor))
    return left


def _add(node: Node, number: Number, effects: list[Effect], helpers: set[Node]) -> Any:
    left, right = node.args[:2]
    weight = float(bound_arguments(node)["alpha"])
    if packet_of(node) in (aten.sub, aten.sub_):
        stabiliser = _row_maximum(right, left)
        if stabiliser is not None and weight == 1:
            helpers |= stabiliser
            return left
        weight = -weight
    sides = [side for side in (left, right) if leads_to_product(side)]
    if len(sides) != 1:
        raise _LeftTableError(SkipCode.AMBIGUOUS, f"`{node.name}` adds two products")
    if sides[0] is right and weight != 1:
        raise _LeftTableError(SkipCode.AMBIGUOUS, f"`{node.name}` subtracts the logits")
    other = right if sides[0] is left else left
    _require_same_shape(node, sides[0])
    if isinstance(other, Node):
        effects.append(Effect("add", node, number=weight, operand=other))
    elif number(other) is None:
        raise _LeftTableError(SkipCode.AMBIGUOUS, f"`{node.name}` adds {other}")
    return sides[0]


def _row_maximum(subtrahend: Any, logits: Any) -> set[Node] | None:
    """Return the nodes of ``logits.max(-1, keepdim=True)``, which a softmax does not feel."""
    chain: set[Node] = set()
    node = subtrahend
    while isinstance(node, Node):
        chain.add(node)
        if packet_of(node) in (aten.amax, aten.max):
            arguments = bound_arguments(node)
            axes = arguments.get("dim")
            is_row = axes in (-1, [-1]) and arguments.get("keepdim") and node.args[0] is logits
            return chain if is_row else None
        is_first = node.target is operator.getitem and node.args[1] == 0
        node = node.args[0] if packet_of(node) in (aten.detach, *COPIES) or is_first else None
    return None


def _replace(node: Node, effects: list[Effect]) -> Any:
    if packet_of(node) is not aten.where:
        logits, condition, fill = node.args[:3]
        _require_same_shape(node, logits)
        _append_fill(effects, "masked_fill", node, condition, fill)
        return logits
    if len(node.args) != 3:
        raise _LeftTableError(SkipCode.AMBIGUOUS, f"`{node.name}`")
    condition, then, other = node.args
    sides = [side for side in (then, other) if leads_to_product(side)]
    if len(sides) != 1:
        raise _LeftTableError(SkipCode.AMBIGUOUS, f"`{node.name}` chooses between two products")
    _require_same_shape(node, sides[0])
    is_kept = sides[0] is then
    _append_fill(
        effects, "where" if is_kept else "masked_fill", node, condition, other if is_kept else then
    )
    return sides[0]


def _append_fill(
    effects: list[Effect],
    kind: Literal["where", "masked_fill"],
    node: Node,
    condition: Any,
    fill: Any,
) -> None:
    if not isinstance(condition, Node):
        raise _LeftTableError(SkipCode.AMBIGUOUS, f"`{node.name}` has no condition tensor")
    effects.append(Effect(kind, node, operand=condition, fill=fill))


def _clamp(node: Node, number: Number) -> Any:
    """``max(logits, finfo.min)``: no logit that counts is lower."""
    logits, *bounds = [side for side in node.args if leads_to_product(side)] or [None]
    limits = [side for side in (*node.args, *node.kwargs.values()) if side is not logits]
    lowest = number(limits[0]) if len(limits) == 1 and not bounds else None
    if logits is None or lowest is None or lowest > _HIDING or "max" in node.kwargs:
        raise _LeftTableError(SkipCode.AMBIGUOUS, f"`{node.name}` limits the logits")
    return logits


def _concatenation(node: Node, obstacles: list[SkipReason]) -> Any:
    parts = node.args[0]
    sides = [part for part in parts if leads_to_product(part)]  # pyright: ignore
    if len(sides) != 1:
        raise _LeftTableError(SkipCode.AMBIGUOUS, f"`{node.name}` joins logits")
    obstacles.append(SkipReason(SkipCode.SINK_LOGIT, f"`{node.name}` appends to the logits"))
    return sides[0]


def _require_same_shape(node: Node, source: Any) -> None:
    before, after = tensor_shape(source), tensor_shape(node)
    if before is None or after is None or len(before) != len(after):
        raise _LeftTableError(SkipCode.AMBIGUOUS, f"`{node.name}` broadcasts the logits")
    if not all(is_known(old == new) for old, new in zip(before, after, strict=True)):
        raise _LeftTableError(SkipCode.AMBIGUOUS, f"`{node.name}` broadcasts the logits")


def only_observes(user: Node, node: Node) -> bool:
    """Whether a reader looks at a tensor's metadata only, or does nothing with it."""
    packet = packet_of(user)
    is_type = packet is aten.type_as and user.args[0] is not node
    return packet in _OBSERVERS or is_type


def leads_to_product(value: Any) -> bool:
    """Whether a product of two batched tensors lies a few calls behind a value."""
    if not isinstance(value, Node):
        return False
    pending, seen = [(value, 0)], set()
    while pending:
        node, depth = pending.pop()
        if node in seen or depth > _DEEPEST:
            continue
        seen.add(node)
        if is_batched(node):
            return True
        if packet_of(node) not in _PRODUCES_FRESH_VALUES:
            pending += [(source, depth + 1) for source in node.all_input_nodes]
    return False
