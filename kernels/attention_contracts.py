"""Block-sparse attention as an operator: schema, fake, kernels and autograd, once each.

``ops`` is the typed front of it; ``gated_contracts`` holds the operator of a whole site, and
``contracts`` those of the gate. The answer of an attention lies like its query, as SDPA's fused
kernels return it (see :mod:`seer_compile.result_layout`). ``lse`` has no gradient; where there are
sinks, they are in it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from seer_compile.errors import ShapeError
from seer_compile.kernels import by_device
from seer_compile.kernels.checks import (
    check_attention,
    check_blocks,
    check_scale,
    check_selection,
    check_softcap,
    check_tensor,
    check_visibility,
)
from seer_compile.kernels.contracts import DEVICES, NAMESPACE
from seer_compile.kernels.sinks import check_sinks, sinks_gradient
from seer_compile.result_layout import empty_like_query
from seer_compile.types import BlockSelection, Visibility


def fake_attention(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return out and lse of an attention, unfilled."""
    batch, heads, q_len, _ = query.shape
    lse = query.new_empty((batch, heads, q_len), dtype=torch.float32)
    return empty_like_query(query, value), lse


def fake_gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of some tensors, unfilled."""
    return tuple(tensor.new_empty(tensor.shape) for tensor in tensors)


@custom_op(f"{NAMESPACE}::block_sparse_attention.v1", mutates_args=(), device_types=DEVICES)
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    counts: Tensor,
    scale: float,
    query_block: int,
    key_block: int,
    upper: int | None = None,
    lower: int | None = None,
    offset: Tensor | None = None,
    key_padding: Tensor | None = None,
    query_documents: Tensor | None = None,
    key_documents: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Both devices."""
    readable = (upper, lower, offset, key_padding, query_documents, key_documents)
    arguments = (query, key, value, indices, counts, scale, query_block, key_block, *readable)
    visibility = _check(*arguments)
    check_sinks(sinks, query)
    check_softcap(softcap)
    selection, blocks = (indices, counts), (query_block, key_block)
    operands = (query, key, value, selection, scale, blocks)
    return by_device.block_sparse_attention(*operands, visibility, softcap, sinks)


@block_sparse_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return fake_attention(query, value)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    counts: Tensor,
    scale: float,
    query_block: int,
    key_block: int,
    *readable: Any,
) -> Visibility:
    check_attention(query, key, value)
    check_scale(scale)
    check_blocks(query_block, key_block)
    selection = BlockSelection(indices, counts)
    check_selection(selection, query, query_block=query_block, kv_heads=key.shape[1])
    visibility = Visibility.from_arguments(*readable)
    lengths = {"q_len": query.shape[2], "k_len": key.shape[2]}
    check_visibility(visibility, batch=query.shape[0], device=query.device, **lengths)
    return visibility


@custom_op(
    f"{NAMESPACE}::block_sparse_attention_backward.v1", mutates_args=(), device_types=DEVICES
)
def block_sparse_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    indices: Tensor,
    counts: Tensor,
    scale: float,
    query_block: int,
    key_block: int,
    upper: int | None = None,
    lower: int | None = None,
    offset: Tensor | None = None,
    key_padding: Tensor | None = None,
    query_documents: Tensor | None = None,
    key_documents: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Both devices."""
    readable = (upper, lower, offset, key_padding, query_documents, key_documents)
    arguments = (query, key, value, indices, counts, scale, query_block, key_block, *readable)
    visibility = _check(*arguments)
    check_results(query, value, grad_out=grad_out, out=out, lse=lse)
    check_softcap(softcap)
    operands = (grad_out, query, key, value, out, lse, (indices, counts), scale)
    blocks = (query_block, key_block)
    return by_device.block_sparse_attention_backward(*operands, blocks, visibility, softcap)


@block_sparse_attention_backward.register_fake
def _(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    return fake_gradients(query, key, value)


def check_results(query: Tensor, value: Tensor, **results: Tensor) -> None:
    """Check what a forward returned, and the gradient of it."""
    for name, tensor in results.items():
        shape = query.shape[:3] if name == "lse" else (*query.shape[:3], value.shape[3])
        dtype = torch.float32 if name == "lse" else query.dtype
        check_tensor(name, tensor, rank=len(shape), dtypes=(dtype,), device=query.device)
        if tuple(tensor.shape) != tuple(shape):
            raise ShapeError(
                argument=f"{name}.shape", got=tuple(tensor.shape), expected=f"{tuple(shape)}"
            )


def save_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep tensors as saved tensors and everything else beside them, in the order of the inputs."""
    ctx.mark_non_differentiable(output[1])
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    ctx.save_for_backward(*output, *tensors)
    ctx.others = [None if isinstance(value, Tensor) else (value,) for value in inputs]


def saved_inputs(ctx: Any) -> tuple[tuple[Tensor, Tensor], list[Any]]:
    """Return what the forward returned, and its inputs."""
    out, lse, *tensors = ctx.saved_tensors
    remaining = iter(tensors)
    return (out, lse), [next(remaining) if other is None else other[0] for other in ctx.others]


def _attention_gradients(ctx: Any, grad_out: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    results, (*inputs, sinks) = saved_inputs(ctx)
    operator = torch.ops.seer_compile.block_sparse_attention_backward.v1
    gradients = operator(grad_out, *inputs[:3], *results, *inputs[3:])
    return (
        *gradients,
        *(None for _ in inputs[3:]),
        gradient_of_sinks(ctx, grad_out, results, sinks),
    )


def gradient_of_sinks(
    ctx: Any, grad_out: Tensor, results: tuple[Tensor, Tensor], sinks: Tensor | None
) -> Tensor | None:
    """Return the gradient of an operator's last input where it is asked for."""
    if sinks is None or not ctx.needs_input_grad[-1]:
        return None
    return sinks_gradient(grad_out, *results, sinks)


block_sparse_attention.register_autograd(_attention_gradients, setup_context=save_inputs)
