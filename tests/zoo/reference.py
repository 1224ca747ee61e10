"""What the untouched model answers, in its own precision and in float64, and how many sites run."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from zoo.architecture import Architecture, Batch, Door, Situation
from zoo.count_attention import count_attention
from zoo.in_float64 import InFloat64


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One call of the untouched model."""

    batch: Batch
    eager: Tensor
    exact: Tensor
    """The float64 model on the same inputs."""
    sites: int
    """Attention computations that ran."""

    def excess(self, actual: Tensor) -> float:
        """Return how far a result is from float64, over what is allowed; NaN never is.

        Both results are float32, so each may be as far from float64 as the other: twice the
        largest error of eager, and four roundings of the largest value.
        """
        if actual.shape != self.exact.shape or actual.dtype != self.eager.dtype:
            return float("inf")
        distance = self._distance(actual, self.exact)
        return float("inf") if math.isnan(distance) else distance / self._allowed

    def agrees(self, one: Tensor, other: Tensor) -> bool:
        """Whether two float32 results could both come from one float64 result."""
        return one.shape == other.shape and self._distance(one, other) <= 2 * self._allowed

    @property
    def _allowed(self) -> float:
        eps = torch.finfo(self.eager.dtype).eps
        floor = 4 * eps * self._meant(self.exact).abs().max().item()
        return 2 * self._distance(self.eager, self.exact) + floor

    def _distance(self, one: Tensor, other: Tensor) -> float:
        return (self._meant(one).double() - self._meant(other)).abs().max().item()

    def _meant(self, output: Tensor) -> Tensor:
        return output if self.batch.rows is None else output[self.batch.rows]


def build(architecture: Architecture, spelling: str) -> nn.Module:
    """Return the model with gradients off."""
    return architecture.build(spelling).requires_grad_(False)


def answer(model: nn.Module, situation: Situation, door: Door, size: int) -> Answer:
    """Run the untouched model on the inputs of one size."""
    batch = situation.make(model, size)
    double = _in_double(model)
    with torch.no_grad():
        eager = situation.wrap(model, door)(fresh(batch.inputs))
        with InFloat64():
            exact_inputs = situation.make(double, size).inputs
            exact = situation.wrap(double, door)(_widened(exact_inputs))
    counting = situation.wrap(model, door)
    sites = count_attention(lambda: counting(fresh(batch.inputs)))
    return Answer(batch=batch, eager=eager, exact=exact.double(), sites=sites)


def _in_double(model: nn.Module) -> nn.Module:
    double = copy.deepcopy(model).double()
    for module in double.modules():
        config = getattr(module, "config", None)
        # Grouped products of experts exist up to float32.
        if hasattr(config, "_experts_implementation"):
            config._experts_implementation = "eager"
    return double


def fresh(inputs: Any) -> Any:
    """Return copies, so that no call sees what another wrote."""
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, inputs)


def _widened(inputs: Any) -> Any:
    return tree_map(
        lambda leaf: (
            leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
        ),
        inputs,
    )
