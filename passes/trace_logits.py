"""From a softmax back to the product that made its logits.

    softmax <- add(mask) <- mul(scale) <- matmul(q, k^T)

Each call between is one effect on the logits. The walk stops at the first call that it does not
know; a site whose logits do more than this table says is reported, never rewritten.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch.fx import Node

from seer_compile.passes.axes import permutation_of
from seer_compile.passes.contractions import CONTRACTIONS
from seer_compile.passes.dataflow import (
    COPIES,
    VIEWS,
    keeps_numbers,
    leads_to_product,
    row_maximum,
    varies_with,
)
from seer_compile.passes.fx_utils import (
    bound_arguments,
    fake_value,
    is_known,
    packet_of,
    tensor_shape,
)
from seer_compile.passes.logit_chain import Effect, LogitChain
from seer_compile.types import SkipCode, SkipReason

aten = torch.ops.aten
_LONGEST = 40
Number = Callable[[Any], float | None]


def trace_logits(logits: Any, number: Number) -> LogitChain:
    """Walk from what a softmax normalises back to the product of queries and keys.

    Args:
        logits: The argument of the softmax.
        number: Returns the value of a constant (a Python number, or a node of known value).

    Returns:
        The chain; without product, and with the reason, where a call is not understood.
    """
    walk = _Walk(number)
    try:
        product = walk.run(logits)
    except _LeftTableError as error:
        return LogitChain(None, obstacles=(*walk.obstacles, error.reason))
    return LogitChain(
        product,
        tuple(reversed(walk.effects)),
        frozenset(walk.helpers),
        tuple(walk.obstacles),
    )


class _LeftTableError(Exception):
    def __init__(self, why: str, code: SkipCode = SkipCode.AMBIGUOUS) -> None:
        super().__init__(why)
        self.reason = SkipReason(code, why)


@dataclass(slots=True)
class _Walk:
    number: Number
    effects: list[Effect] = field(default_factory=list[Effect])
    """Last executed first."""
    helpers: set[Node] = field(default_factory=set[Node])
    obstacles: list[SkipReason] = field(default_factory=list[SkipReason])

    def run(self, node: Any) -> Node:
        """Step back until a product."""
        for _ in range(_LONGEST):
            if not isinstance(node, Node):
                break
            packet = packet_of(node)
            if packet in CONTRACTIONS:
                self._end(node)
                return node
            if permutation_of(node, len(tensor_shape(node) or ())) is not None:
                step = _Walk.layout
            else:
                step = self.STEPS.get(packet)
            if step is None:
                raise _LeftTableError(f"`{node.name}` ({packet or node.target})")
            node = step(self, node)
        raise _LeftTableError("no product of queries and keys behind it")

    def _end(self, product: Node) -> None:
        """Note what ``baddbmm`` does besides multiplying."""
        if packet_of(product) is not aten.baddbmm:
            return
        weight = self._weight(product, "beta")
        if weight != 0:
            self.effects.append(Effect("add", product, weight, bound_arguments(product)["self"]))
        self.effects.append(Effect("scale", product, self._weight(product, "alpha")))

    def _weight(self, node: Node, name: str) -> float:
        """Return a numeric argument, which dynamic capture may have made symbolic."""
        weight = self.number(bound_arguments(node)[name])
        if weight is None:
            raise _LeftTableError(f"`{name}` of `{node.name}` is not constant", SkipCode.SCALE)
        return weight

    def copy(self, node: Node) -> Any:
        if not keeps_numbers(node):
            raise _LeftTableError(f"`{node.name}` makes the logits {fake_value(node).dtype}")
        return node.args[0]

    def dropout(self, node: Node) -> Any:
        if bound_arguments(node)["train"]:
            raise _LeftTableError(f"`{node.name}` drops logits", SkipCode.DROPOUT)
        return node.args[0]

    def layout(self, node: Node) -> Any:
        if not keeps_numbers(node):
            raise _LeftTableError(f"`{node.name}` reads the logits as {fake_value(node).dtype}")
        self.effects.append(Effect("layout", node))
        return node.args[0]

    def tanh(self, node: Node) -> Any:
        self.effects.append(Effect("tanh", node))
        return node.args[0]

    def scale(self, node: Node) -> Any:
        left, right = node.args[:2]
        lengths = (tensor_shape(node) or ())[-2:]
        if varies_with(left, lengths) or varies_with(right, lengths):
            raise _LeftTableError(f"`{node.name}` varies with the tokens", SkipCode.SCALE)
        factor = self.number(right)
        is_division = packet_of(node) in (aten.div, aten.div_)
        if is_division and bound_arguments(node).get("rounding_mode") is not None:
            raise _LeftTableError(f"`{node.name}` rounds the logits")
        if factor is None and not is_division:
            left, right, factor = right, left, self.number(left)
        if factor is None or (is_division and factor == 0):
            raise _LeftTableError(f"`{node.name}` multiplies logits by a tensor", SkipCode.SCALE)
        _require_same_shape(node, left)
        self.effects.append(Effect("scale", node, 1 / factor if is_division else factor))
        return left

    def add(self, node: Node) -> Any:
        left, right = node.args[:2]
        weight = self._weight(node, "alpha")
        if packet_of(node) in (aten.sub, aten.sub_):
            stabiliser = row_maximum(right, left)
            if stabiliser is not None and weight == 1:
                self.helpers |= stabiliser
                self.effects.append(Effect("centre", node))
                return left
            weight = -weight
        logits, other = self._sides(node, left, right)
        if logits is right and weight != 1:
            raise _LeftTableError(f"`{node.name}` subtracts the logits")
        if isinstance(other, Node):
            self.effects.append(Effect("add", node, weight, other))
            return logits
        shift = self.number(other)
        if shift is None:
            raise _LeftTableError(f"`{node.name}` adds {other}")
        self.effects.append(Effect("shift", node, weight * shift))
        return logits

    def masked_fill(self, node: Node) -> Any:
        logits, condition, fill = node.args[:3]
        return self._fill("masked_fill", node, logits, condition, fill)

    def where(self, node: Node) -> Any:
        if len(node.args) != 3:
            raise _LeftTableError(f"`{node.name}`")
        condition, then, other = node.args
        logits, fill = self._sides(node, then, other)
        kind = "where" if logits is then else "masked_fill"
        return self._fill(kind, node, logits, condition, fill)

    def floor(self, node: Node) -> Any:
        """``max(logits, finfo.min)``."""
        left, *bounds = (*node.args, *node.kwargs.values())
        if len(bounds) != 1 or "max" in node.kwargs:
            raise _LeftTableError(f"`{node.name}` limits the logits")
        logits, bound = self._sides(node, left, bounds[0])
        lowest = self.number(bound)
        if lowest is None:
            raise _LeftTableError(f"`{node.name}` limits the logits")
        self.effects.append(Effect("floor", node, lowest))
        return logits

    def concatenation(self, node: Node) -> Any:
        parts = node.args[0]
        sides = [part for part in parts if leads_to_product(part)]  # pyright: ignore
        if len(sides) != 1:
            raise _LeftTableError(f"`{node.name}` joins logits")
        others = [part for part in parts if part is not sides[0]]  # pyright: ignore
        if not others:
            raise _LeftTableError(f"`{node.name}` joins logits")
        self.effects.append(Effect("append", node, operand=others[0]))
        return sides[0]

    def _fill(
        self, kind: Literal["masked_fill", "where"], node: Node, logits: Any, when: Any, fill: Any
    ) -> Any:
        if not isinstance(when, Node):
            raise _LeftTableError(f"`{node.name}` has no condition tensor")
        _require_same_shape(node, logits)
        self.effects.append(Effect(kind, node, operand=when, fill=fill))
        return logits

    def _sides(self, node: Node, left: Any, right: Any) -> tuple[Any, Any]:
        """Return the logits and the other operand."""
        is_product = leads_to_product(left), leads_to_product(right)
        if is_product[0] == is_product[1]:
            raise _LeftTableError(f"`{node.name}` joins two products")
        logits, other = (left, right) if is_product[0] else (right, left)
        _require_same_shape(node, logits)
        return logits, other

    STEPS: ClassVar[dict[Any, Callable[[_Walk, Node], Any]]] = {
        **dict.fromkeys(COPIES, copy),
        **dict.fromkeys(VIEWS, layout),
        **dict.fromkeys((aten.mul, aten.mul_, aten.div, aten.div_), scale),
        **dict.fromkeys((aten.add, aten.add_, aten.sub, aten.sub_), add),
        **dict.fromkeys((aten.masked_fill, aten.masked_fill_), masked_fill),
        **dict.fromkeys((aten.maximum, aten.max, aten.clamp, aten.clamp_min), floor),
        aten.tanh: tanh,
        aten.dropout: dropout,
        aten.where: where,
        aten.cat: concatenation,
    }


def _require_same_shape(node: Node, source: Any) -> None:
    before, after = tensor_shape(source), tensor_shape(node)
    is_same = before is not None and after is not None and len(before) == len(after)
    if not is_same or not all(is_known(old == new) for old, new in zip(before, after, strict=True)):  # pyright: ignore
        raise _LeftTableError(f"`{node.name}` broadcasts the logits")
