"""Put a new result where a site's output was: layout, stride order, users, provenance."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.fx import Node

from seer_compile.errors import PassError
from seer_compile.passes.fx_utils import fake_value, is_known
from seer_compile.passes.node_builder import NodeBuilder
from seer_compile.types import AttentionSite, Operand

aten = torch.ops.aten
# Any length above one orders the strides of a permuted contiguous tensor as every other does.
_TYPICAL_SIZE = 64


def splice(builder: NodeBuilder, site: AttentionSite, result: Node) -> Node:
    """Replace a site's output by ``result``, ``Float[b h q v]``.

    Views further down are legal for the strides that were traced, so the stride order of the
    replaced node is kept, by a copy where the operator's own order, that of its query, differs.

    Returns:
        The node that the former users of the output now read.

    Raises:
        PassError: Shape or dtype would change.
    """
    result = builder.replay(Operand(node=result, steps=site.output_steps))
    old, new = fake_value(site.output), fake_value(result)
    is_same = (
        isinstance(new, Tensor)
        and new.dtype is old.dtype
        and new.ndim == old.ndim
        and all(is_known(ours == theirs) for ours, theirs in zip(new.shape, old.shape, strict=True))
    )
    if not is_same:
        raise PassError(
            f"the replacement of {site.name} is {_describe(new)}, not {_describe(old)}",
            context={"node": site.output.name},
        )
    result = _with_stride_order(builder, result, stride_order(old))
    site.output.replace_all_uses_with(result)
    return result


def stride_order(tensor: Tensor) -> tuple[int, ...]:
    """Return the axes from the largest stride to the smallest, without adding a guard."""
    strides = [_measure(stride) for stride in tensor.stride()]
    return tuple(sorted(range(tensor.ndim), key=lambda axis: (-strides[axis], axis)))


def _with_stride_order(builder: NodeBuilder, node: Node, order: tuple[int, ...]) -> Node:
    if stride_order(fake_value(node)) == order:
        return node
    inverse = sorted(range(len(order)), key=order.__getitem__)
    permuted = builder.call(aten.permute.default, node, list(order))
    # Not contiguous(), which vanishes from a trace where the tensor happens to be contiguous.
    layout = {"memory_format": torch.contiguous_format}
    dense = builder.call(aten.clone.default, permuted, keywords=layout)
    return builder.call(aten.permute.default, dense, inverse)


def _measure(stride: Any) -> int:
    if not isinstance(stride, SymInt):
        return stride
    expression = stride.node.expr
    symbols = sorted(expression.free_symbols, key=str)
    # Sizes of experts are differences of offsets: sizes that are all equal may divide by nothing.
    for step in (0, 1, -1):
        sizes = {symbol: _TYPICAL_SIZE + step * place for place, symbol in enumerate(symbols)}
        with contextlib.suppress(ZeroDivisionError):
            return int(expression.xreplace(sizes))
    raise PassError(f"the stride {expression} has no size that could be compared")


def _describe(value: Any) -> str:
    if not isinstance(value, Tensor):
        return str(type(value).__name__)
    return f"{str(value.dtype).removeprefix('torch.')}{[str(size) for size in value.shape]}"
