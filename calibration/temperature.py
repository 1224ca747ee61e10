"""Untrained gates as sure of themselves as the attention that they predict.

The logits of means are the attention's own, averaged; sharp attention has means that are far too
sure, and a gate that is sure beyond what float32 tells from 1 cannot be given more blocks. One
factor per head, on both sides in equal parts, changes the order of no row's blocks.

Letters of shapes: see :mod:`seer_compile.types`. R is a choice of query sub-blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seer_compile.calibration.targets import gate_target, sample_rows
from seer_compile.gate import AttnGate
from seer_compile.gate_scores import block_logits, visible_units
from seer_compile.types import SiteInputs

_ROWS = 512
_FACTORS = tuple(2 ** (power / 4) for power in range(-28, 9))
"""From 1/128 to 4, in steps of a fifth."""


def fit_temperature(gate: AttnGate, inputs: SiteInputs, *, seed: str = "") -> None:
    """Scale a gate's logits, head by head, to predict the site's map as well as they can.

    Args:
        gate: Whose weights are scaled, in place.
        inputs: Operands of the site.
        seed: Chooses the rows.

    Cost:
        The target of a training step, and ``Float32[R c]`` per head.
    """
    config = gate.config
    lengths = (inputs.query.shape[-2], inputs.key.shape[-2])
    rows = sample_rows(
        -(-lengths[0] // config.query_sub_block),
        _ROWS,
        key=f"{seed}:temperature",
        device=inputs.query.device,
    )
    with torch.no_grad():
        target, counts = gate_target(inputs, config, kind="mass", rows=rows)
        visible = visible_units(
            inputs.visibility,
            units=config.sub_blocks,
            lengths=lengths,
            device=inputs.query.device,
            rows=rows,
        )
        query, key = gate.features(inputs.query, inputs.key, inputs.visibility.key_padding)
        query = query if rows is None else query[:, :, rows]
        per_block = config.block_size.key // config.key_sub_block
        groups = gate.heads // gate.gate_heads
        for head in range(gate.gate_heads):
            logits = block_logits(
                query[:, head], key[:, head], inputs.scale, visible[:, 0], per_block
            )
            is_counted = counts[:, head]
            factor = _best_factor(logits[is_counted], target[:, head][is_counted])
            gate.query_weight[head * groups : (head + 1) * groups].mul_(factor.sqrt())
            gate.key_weight[head].mul_(factor.sqrt())


def _best_factor(logits: Tensor, target: Tensor) -> Tensor:
    """Return ``Float32[]``: the factor whose softmax diverges least; 1 where no row counts.

    The divergence is convex in the factor.
    """
    factors = torch.tensor(_FACTORS, dtype=torch.float32, device=logits.device)
    if not len(logits):
        return torch.ones_like(factors[0])
    losses = [-(target * (logits * factor).log_softmax(-1)).sum() for factor in factors]
    return factors[torch.stack(losses).argmin()]
