"""Whether the mask function of ``flex_attention`` and a mask in the graph are the same."""

from __future__ import annotations

from torch import Tensor
from torch.fx import Node

from seer_compile.passes.fx_utils import fake_value, tensor_shape
from seer_compile.passes.index_ranges import as_expression
from seer_compile.passes.interpret_masks import ZERO, Index, MaskInterpreter, broadcast_index
from seer_compile.passes.mask_domain import Value
from seer_compile.types import MaskFunction


def agrees(function: MaskFunction, mask: Node, index: Index, interpreter: MaskInterpreter) -> bool:
    """Whether a mask function is known to answer what a mask holds.

    Args:
        function: The function.
        mask: ``Bool[b h q k]``, which may broadcast.
        index: Batch item, head, query and key.
        interpreter: Of the graph that holds the mask.
    """
    literal = interpreter.literal()
    index = tuple(ZERO if literal.ranges.is_at_most_zero(part) else part for part in index)
    captured: list[Value | Node] = []
    for given in function.captured:
        value = fake_value(given)
        if isinstance(value, float):
            return False
        captured.append(given if isinstance(value, Tensor) else as_expression(value))
    inner = literal.of_function(function.body.graph, [*index, *captured])
    output = function.body.graph.output_node().args[0]
    shape = tensor_shape(mask)
    if not isinstance(output, Node) or shape is None:
        return False
    held = literal.element(mask, broadcast_index(index, shape))
    return held == inner.element(output, ())
