"""Numbers that a graph holds as tensors, symbols or calls: scales, fills, dropout rates."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from seer_compile.passes.constant_tensors import literal_tensors
from seer_compile.passes.fx_utils import fake_value, is_known, tensor_shape
from seer_compile.passes.index_ranges import IndexRanges
from seer_compile.passes.interpret_masks import MaskInterpreter
from seer_compile.passes.mask_rules import RULES
from seer_compile.passes.mutation import Mutations


class ConstantScalars:
    """Answers what number a value of the graph is, if it is the same in every run.

    Args:
        graph_module: The graph; literal tensors are read from it.
        mutations: Of the graph.
    """

    def __init__(self, graph_module: GraphModule, mutations: Mutations) -> None:
        literals = literal_tensors(graph_module)
        self._interpreter = MaskInterpreter(RULES, IndexRanges({}), mutations, literals)

    def __call__(self, value: Any) -> float | None:
        """Return the number; None where it is a tensor of more than one or unknown elements.

        A symbolic number is made constant, which guards the graph on it: the scale of a model is
        symbolic only because everything was asked to be.
        """
        if isinstance(value, (bool, int, float)):
            return float(value)
        fake = fake_value(value)
        if isinstance(fake, (torch.SymInt, torch.SymFloat)):
            try:
                return float(fake)
            except GuardOnDataDependentSymNode:
                return None
        shape = tensor_shape(value)
        if not isinstance(value, Node) or shape is None:
            return None
        if not all(is_known(size == 1) for size in shape):
            return None
        element = self._interpreter.element(value, (sympy.Integer(0),) * len(shape))
        is_number = isinstance(element, float)
        is_number = is_number or (isinstance(element, sympy.Expr) and bool(element.is_number))
        return float(element) if is_number else None  # pyright: ignore[reportArgumentType]
