"""What a matcher hands over: one attention, as far as it was understood."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from torch.fx import Node

from seer_compile.passes.attention_axes import Products
from seer_compile.passes.axes import AxisBook, Layout, Letters
from seer_compile.types import MaskTerm, SkipCode, SkipReason

# A number added to or put in place of a logit hides its key from here down: half-precision masks
# use -1e4, others finfo.min or -inf.
HIDING = -1e4
# By so much all logits may move together, with those numbers still far below every other.
MOST_SHIFTED = 1e3


Column = Literal["first", "last", "none"]


@dataclass(slots=True)
class Sink:
    """A logit beside those of the keys, whose weight reads no value."""

    node: Node
    layout: Layout
    """Of the node; a dimension of size 1 has no letter."""
    keys: Letters
    """Of the axis that it stands beside."""
    column: Column
    """Where it stands among the weights as they are; none where it is in their sum only."""


@dataclass(slots=True)
class Match:
    """An attention found in the graph, with the letters of ``book`` as axes."""

    kind: Literal["sdpa", "decomposed", "flex"]
    reader: Node
    """The node that reads query and key."""
    softmax: Node
    """The node that normalises; the fused call itself where there is one."""
    output: Node
    book: AxisBook
    products: Products | None = None
    """None where the axes are unknown; an obstacle says why."""
    operands: tuple[Node, Node, Node] | None = None
    """Query, key and value as the graph has them."""
    scale: float | None = 1.0
    """None for one over the square root of the head dim."""
    softcap: float | None = None
    axis: int = -1
    """The dimension of the weights that add up to 1."""
    sink: Sink | None = None
    is_centred: bool = False
    """Whether a maximum was subtracted from the logits so far."""
    shift: float = 0.0
    """The largest constant, by amount, that all logits carry on their way to the softmax."""
    floor: float = -math.inf
    """No logit is lower, those of hidden keys included."""
    dropout: float = 0.0
    is_causal: bool = False
    mask_terms: list[MaskTerm] = field(default_factory=list[MaskTerm])
    obstacles: list[SkipReason] = field(default_factory=list[SkipReason])

    def refuse(self, code: SkipCode, detail: str = "") -> None:
        """Add a reason why the site stays dense.

        A change in place goes first: a tensor that is written through a view also looks as if
        somebody else read it.
        """
        place = 0 if code is SkipCode.MUTATION else len(self.obstacles)
        self.obstacles.insert(place, SkipReason(code, detail))
