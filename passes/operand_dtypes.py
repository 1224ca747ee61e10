"""In which dtype an operand of a site is handed over: that in which its product computes."""

from __future__ import annotations

import torch
from torch.fx import Node

from seer_compile.passes.fx_utils import fake_value, packet_of
from seer_compile.types import LayoutStep, Operand

aten = torch.ops.aten


def dtype_of(output: Node) -> torch.dtype:
    """Return the dtype of a site's output."""
    value = fake_value(output)
    # flex_attention returns its sums beside its output.
    return (value[0] if isinstance(value, tuple | list) else value).dtype


def in_dtype(operand: Operand, product: Node, output: Node) -> Operand:
    """Return the operand in the dtype that its product computes in.

    Autocast rounds operands inside the product; that becomes a step. Operands widened for the
    product alone are taken before: the operators accumulate in float32 anyway.
    """
    if not isinstance(fake_value(output), torch.Tensor):
        return operand
    dtype, computed = fake_value(operand.node).dtype, dtype_of(product)
    if dtype == fake_value(output).dtype:
        return operand
    source = operand.node.args[0] if packet_of(operand.node) in (aten.to, aten._to_copy) else None
    if isinstance(source, Node) and fake_value(source).dtype == fake_value(output).dtype:
        is_wider = torch.promote_types(fake_value(source).dtype, dtype) == dtype
        return Operand(node=source, steps=operand.steps) if is_wider else operand
    if dtype == computed:
        return operand
    cast = LayoutStep(aten.to.dtype, (computed,))
    return Operand(node=operand.node, steps=(*operand.steps, cast))
