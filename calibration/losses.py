"""The loss of one gate at one site, and its gradient in bounded memory.

Letters of shapes: see :mod:`seer_compile.types`. R is a choice of query sub-blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from seer_compile.gate import AttnGate
from seer_compile.gate_scores import block_log_mass, visible_units
from seer_compile.types import SiteInputs

LossKind = Literal["kl", "mse"]

LOGITS_BYTES = 256 * 2**20
"""Bytes of gate logits held at once; backward holds about three times as much."""


def row_losses(log_mass: Tensor, target: Tensor, kind: LossKind) -> Tensor:
    """Return the loss of each row.

    Args:
        log_mass: ``Float32[b a R n]``, log of the predicted distribution, finite.
        target: ``Float32[b a R n]``, a distribution or all zeros.
        kind: ``kl`` is the divergence of the prediction from the target in nats, 0 when equal.
            ``mse`` is the sum of squared differences of the probabilities.

    Returns:
        ``Float32[b a R]``.
    """
    if kind == "kl":
        return (torch.special.xlogy(target, target) - target * log_mass).sum(-1)
    return (log_mass.exp() - target).square().sum(-1)


def backward(
    gate: AttnGate,
    inputs: SiteInputs,
    target: Tensor,
    counts: Tensor,
    *,
    kind: LossKind,
    rows: Tensor | None = None,
    weights: Tensor | None = None,
    logits_bytes: int = LOGITS_BYTES,
) -> Tensor:
    """Return the mean loss over the rows that count, and add its gradient to the gate's weights.

    Heads and rows are taken in chunks, so memory does not grow with their number.

    Args:
        gate: Whose weights are trained.
        inputs: Operands of the site; nothing is differentiated through them.
        target: ``Float32[b a R n]``.
        counts: ``Bool[b a R]``.
        kind: Which loss.
        rows: ``Int64[R]``, indices of query sub-blocks; all when None.
        weights: ``Float32[b a R]``, how much each row counts; 1 when None.
        logits_bytes: Bound on the logits of one chunk.

    Returns:
        ``Float32[]``; 0 with no gradient when no row counts.

    Cost:
        Three products ``R x c x e`` per head and batch item, float32.
    """
    with torch.enable_grad():
        loss = differentiable_loss(
            gate,
            inputs,
            target,
            counts,
            kind=kind,
            rows=rows,
            weights=weights,
            logits_bytes=logits_bytes,
        )
        torch.autograd.backward(loss)
    return loss.detach()


def differentiable_loss(
    gate: AttnGate,
    inputs: SiteInputs,
    target: Tensor,
    counts: Tensor,
    *,
    kind: LossKind,
    rows: Tensor | None = None,
    weights: Tensor | None = None,
    logits_bytes: int = LOGITS_BYTES,
) -> Tensor:
    """Return the mean loss over the rows that count, differentiable in the gate's weights.

    The gradient is computed at once, chunk by chunk, and waits in the result; the graph behind it
    is the projection of pooled tokens alone. Arguments and cost are those of :func:`backward`.

    Returns:
        ``Float32[]``.
    """
    visible = visible_units(
        inputs.visibility,
        units=(gate.config.query_sub_block, gate.config.key_sub_block),
        lengths=(inputs.query.shape[-2], inputs.key.shape[-2]),
        device=inputs.query.device,
        rows=rows,
    )
    pooled = gate.pool_query(inputs.query)
    pooled = pooled if rows is None else pooled[:, :, rows]
    # A padded query may hold NaN, and 0 * NaN in the backward would reach the weights.
    pooled = pooled.unflatten(1, (gate.gate_heads, -1))
    pooled = torch.where(counts[:, :, None, :, None], pooled, 0.0).flatten(1, 2)
    with torch.enable_grad():
        query = gate.project_query(pooled)
        key = gate.project_key(gate.pool_key(inputs.key, inputs.visibility.key_padding))
        # Chunks meet at the features, so that each chunk's graph is freed at once.
        query_leaf, key_leaf = (part.detach().requires_grad_() for part in (query, key))
        if weights is None:
            weights = torch.ones_like(target[..., 0])
        weights = torch.where(counts, weights, 0.0)
        divisor = weights.sum().clamp(min=torch.finfo(torch.float32).tiny)
        total = torch.zeros((), dtype=torch.float32, device=query.device)
        for heads, part in _chunks(query, key, logits_bytes):
            log_mass = block_log_mass(
                query_leaf[:, heads, part],
                key_leaf[:, heads],
                inputs.scale,
                visible[:, :, part],
                gate.config.block_size.key // gate.config.key_sub_block,
            )
            losses = row_losses(log_mass, target[:, heads, part], kind)
            losses = torch.where(counts[:, heads, part], losses, 0.0)
            loss = (losses * weights[:, heads, part]).sum() / divisor
            torch.autograd.backward(loss)
            total += loss.detach()
        return _KnownGradients.apply(total, query_leaf.grad, key_leaf.grad, query, key)


class _KnownGradients(torch.autograd.Function):
    """A number whose gradients with respect to two tensors are known already."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, query_grad: Tensor, key_grad: Tensor, query: Tensor, key: Tensor
    ) -> Tensor:
        del query, key
        ctx.save_for_backward(query_grad, key_grad)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        query_grad, key_grad = ctx.saved_tensors
        return None, None, None, grad_outputs[0] * query_grad, grad_outputs[0] * key_grad


def _chunks(query: Tensor, key: Tensor, logits_bytes: int) -> Iterator[tuple[slice, slice]]:
    batch, heads, rows, _ = query.shape
    row_bytes = 4 * batch * key.shape[-2]
    row_step = max(1, min(rows, logits_bytes // max(1, row_bytes)))
    head_step = max(1, logits_bytes // max(1, row_bytes * rows))
    for head in range(0, heads, head_step):
        for row in range(0, rows, row_step):
            yield slice(head, head + head_step), slice(row, row + row_step)
