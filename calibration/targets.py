"""What a gate is trained towards: the true attention map, pooled as the gate pools.

Letters of shapes: see :mod:`seer_compile.types`. R is a choice of query sub-blocks.
"""

from __future__ import annotations

import zlib
from typing import Literal

import torch
from torch import Tensor

from seer_compile.config import GateConfig
from seer_compile.errors import FeatureUnsupportedError
from seer_compile.types import SiteInputs

TargetKind = Literal["mass", "max", "value"]


def attention_mass(
    inputs: SiteInputs,
    *,
    query_unit: int,
    key_unit: int,
    kind: TargetKind = "mass",
) -> Tensor:
    """Return the attention map of a site, reduced over units of queries and keys.

    Args:
        inputs: Operands of the site; its value is read for ``value`` only.
        query_unit: Tokens per query unit.
        key_unit: Tokens per key unit.
        kind: ``mass`` sums over keys and averages over queries, ``max`` takes the largest
            probability of the unit pair (the published map), ``value`` sums over keys weighted by
            the norm of their values, relative to the row's mean of it.

    Returns:
        ``Float32[b h query_units key_units]``; a query unit that reads nothing is all zeros.

    Raises:
        FeatureUnsupportedError: ``value`` of a site with a softcap.
    """
    # Mass is a share of what goes to keys, sinks left out. A sink scales a whole row by one factor:
    # it changes neither the order of blocks nor their shares. A row that gives most to its sink
    # would only weigh less in means over queries; without that weight budgets keep a little more.
    query_reduce, key_reduce = ("max", "max") if kind == "max" else ("mean", "sum")
    query, key = inputs.query.detach(), inputs.key.detach()
    if kind == "value" and inputs.softcap is not None:
        # Norms weigh probabilities as one channel more of the products, which a cap would bend.
        raise FeatureUnsupportedError(
            f"the target 'value' is not to be had where logits are soft-capped ({inputs.name})",
            hint="Choose the target 'mass'.",
        )
    if kind == "value":
        query, key = _with_value_norms(query, key, inputs.value.detach(), inputs.scale)
    return torch.ops.seer_compile.attention_mass.v1(
        query,
        key,
        inputs.scale,
        query_unit,
        key_unit,
        query_reduce,
        key_reduce,
        *inputs.visibility.as_arguments().values(),
        inputs.softcap,
    )


def _with_value_norms(
    query: Tensor, key: Tensor, value: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return operands with one channel more, which multiplies each probability by a value's norm.

    The softmax over logits plus the logarithm of a weight is the weighted softmax.
    """
    norms = value.float().norm(dim=-1, keepdim=True)
    typical = norms.mean(-2, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    # Relative to the mean and bounded, so that bfloat16 holds the logarithm well enough.
    logs = (norms / typical).clamp(min=1e-2, max=1e2).log() / scale
    return (
        torch.cat([query, torch.ones_like(query[..., :1])], -1),
        torch.cat([key, logs.to(key.dtype)], -1),
    )


def far_row_weights(
    target: Tensor, inputs: SiteInputs, config: GateConfig, rows: Tensor | None, *, more: float
) -> Tensor:
    """Return ``Float32[b a R]``: 1, and ``more`` per share of mass that needs a gate to be found.

    Diagonal and sink blocks are kept by every selection: a row that reads nothing else teaches
    little, and a row that looks something up far away is rare.

    Args:
        target: ``Float32[b a R n]``, rows sum to 1.
        inputs: Operands of the site.
        config: Sub-block and block sizes.
        rows: ``Int64[R]``, indices of query sub-blocks; all when None.
        more: Weight per share.
    """
    q_len, k_len = inputs.query.shape[-2], inputs.key.shape[-2]
    if rows is None:
        rows = torch.arange(target.shape[2], device=target.device)
    shift = 0 if inputs.visibility.upper is None else inputs.visibility.upper
    shift = shift + (0 if inputs.visibility.offset is None else inputs.visibility.offset)
    own = (rows * config.query_sub_block).clamp(max=q_len - 1) + shift
    own = own.to(target.device).clamp(0, k_len - 1) // config.block_size.key
    near = target.gather(-1, own[None, None, :, None].expand(*target.shape[:2], -1, 1))[..., 0]
    sink = torch.where(own > 0, target[..., 0], 0.0)
    return 1 + more * (1 - near - sink).clamp(min=0)


def gate_target(
    inputs: SiteInputs,
    config: GateConfig,
    *,
    kind: TargetKind,
    sharpness: float = 1.0,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return a distribution over key blocks for each query sub-block, and which rows count.

    Args:
        inputs: Operands of the site.
        config: Sub-block and block sizes, and what heads share.
        kind: Which map.
        sharpness: Exponent of the shares, after which they are shares again.
        rows: ``Int64[R]``, indices of query sub-blocks; all when None.

    Returns:
        ``Float32[b a R n]``, a the gate heads, each counting row summing to 1, and
        ``Bool[b a R]``: False where the queries read nothing or are padding. Such a row is all
        zeros, never 0/0. A row that holds NaN counts, so that the loss shows it. A shared gate
        learns the mean over the heads of its group.
    """
    target = attention_mass(
        inputs, query_unit=config.query_sub_block, key_unit=config.block_size.key, kind=kind
    )
    if rows is not None:
        target = target[:, :, rows]
    totals = target.sum(-1)
    counts = totals != 0
    target = target / torch.where(counts, totals, 1.0)[..., None]
    if config.sharing == "gate":
        groups = (inputs.key.shape[1], -1)
        # What queries may read is the same for all heads: all or none of a group count.
        target, counts = target.unflatten(1, groups).mean(2), counts.unflatten(1, groups).any(2)
    if sharpness != 1.0:
        target = _sharpened(target, sharpness)
    real = _real_queries(inputs, config.query_sub_block, rows)
    return target, counts if real is None else counts & real[:, None]


def _sharpened(target: Tensor, sharpness: float) -> Tensor:
    """Raise shares to a power and divide by their sum; by the largest first, lest all underflow."""
    tiny = torch.finfo(target.dtype).tiny
    powers = (target / target.amax(-1, keepdim=True).clamp(min=tiny)).pow(sharpness)
    return powers / powers.sum(-1, keepdim=True).clamp(min=1.0)


def _real_queries(inputs: SiteInputs, unit: int, rows: Tensor | None) -> Tensor | None:
    """Return ``Bool[b R]``, False for units of padding only; None where that is not known.

    Key padding tells about queries only in self-attention without a cache.
    """
    padding = inputs.visibility.key_padding
    if padding is None or inputs.query.shape[-2] != inputs.key.shape[-2]:
        return None
    short = -padding.shape[-1] % unit
    real = torch.nn.functional.pad(padding, (0, short)).unflatten(-1, (-1, unit)).any(-1)
    real = real.to(inputs.query.device)
    return real if rows is None else real[:, rows]


def sample_rows(total: int, wanted: int, *, key: str, device: torch.device) -> Tensor | None:
    """Choose query sub-blocks for one step of one site.

    The choice depends on the key alone, so that a resumed run and another process choose alike.

    Args:
        total: Sub-blocks that exist.
        wanted: How many to choose.
        key: Names seed, step and site.
        device: Of the result.

    Returns:
        ``Int64[wanted]`` distinct and ascending, or None for all.
    """
    if total <= wanted:
        return None
    generator = torch.Generator(device="cpu").manual_seed(zlib.crc32(key.encode()))
    order = torch.randperm(total, generator=generator, device="cpu")
    chosen = order[:wanted].sort().values
    if device.type == "cuda":
        # From memory that is not pinned the copy would wait for all that the device has yet to do.
        return chosen.pin_memory().to(device, non_blocking=True)
    return chosen.to(device)
