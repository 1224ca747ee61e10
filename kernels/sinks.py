"""Attention sinks: a learned logit per head that takes its share of the softmax and has no value.

    out[i] = sum_j p[i, j] value[j],  p = softmax over the readable keys' logits and the sink

The sink changes a row by one factor, and the log-sum-exp with the sink in it is all that a backward
needs: ``p = exp(logits - lse)`` and ``delta = grad_out . out`` are as ever. So no kernel knows
sinks; they come in after the forward, and their own gradient is

    dsink[h] = - sum_{b, i} exp(sink[h] - lse[i]) * (grad_out[i] . out[i])

Source:
    Xiao et al., arXiv:2309.17453, named the effect; OpenAI, "gpt-oss-120b & gpt-oss-20b Model
    Card", arXiv:2508.10925, learns the logit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seer_compile.errors import ShapeError
from seer_compile.kernels.checks import check_tensor


def check_sinks(sinks: Tensor | None, query: Tensor) -> None:
    """Check that sinks, where given, are one number per query head on the query's device."""
    if sinks is None:
        return
    check_tensor("sinks", sinks, rank=1, device=query.device)
    if sinks.shape[0] != query.shape[1]:
        raise ShapeError(
            argument="sinks.shape",
            got=tuple(sinks.shape),
            expected=f"({query.shape[1]},): one logit per query head",
        )


def with_sinks(results: tuple[Tensor, Tensor], sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return an attention's out and lse with the sinks taken into its softmax.

    Args:
        results: ``Float[b h q v]``, changed in place, and ``Float[b h q]``, -inf for a row that
            reads nothing.
        sinks: ``Float[h]``; nothing happens when None.
    """
    if sinks is None:
        return results
    out, lse = results
    column = sinks.detach().to(lse.dtype)[:, None]
    # A row that reads nothing stays 0 beside a sink of -inf too, where the difference is NaN.
    share = torch.sigmoid(lse - column).masked_fill(lse == -torch.inf, 0.0)
    return out.mul_(share[..., None]), torch.logaddexp(lse, column)


def sinks_gradient(grad_out: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Return the gradient of the sinks, ``Float[h]`` in their dtype.

    Args:
        grad_out: ``Float[b h q v]``.
        out: ``Float[b h q v]``, the sinks taken in.
        lse: ``Float[b h q]``, the sinks taken in.
        sinks: ``Float[h]``.
    """
    delta = (grad_out.to(lse.dtype) * out).sum(-1)
    share = torch.exp(sinks.detach().to(lse.dtype)[:, None] - lse)
    return -(share * delta).sum((0, 2)).to(sinks.dtype)
