"""What happens to logits between the product that makes them and the softmax, call by call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch.fx import Node

from seer_compile.types import SkipReason

EffectKind = Literal[
    "layout",
    "scale",
    "shift",
    "tanh",
    "floor",
    "add",
    "masked_fill",
    "where",
    "centre",
    "append",
]
"""``centre`` subtracts the maximum of a row; ``append`` puts a column beside the logits."""


@dataclass(frozen=True, slots=True)
class Effect:
    """One call on the way from the product to the softmax."""

    kind: EffectKind
    node: Node
    number: float = 1.0
    """Factor of ``scale``, summand of ``shift``, bound of ``floor``, weight of ``add``."""
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
