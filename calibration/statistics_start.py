"""A gate from statistics of queries and keys, without training: convex fits per head.

Logits ``sum_d (sum_p a[p, d] q[p, d]) (sum_p b[p, d] k[p, d])`` compare pooled tokens channel by
channel, each side by its own mixture of mean and extremes; mean pooling is one of them. Given
either side their divergence from the true map is convex in the other: a few Newton steps in turn,
from mean pooling on, over a sample of rows.

Letters of shapes: see :mod:`seer_compile.types`. P and P' are the pools of queries and keys, U the
query heads of a gate head, R a choice of query sub-blocks, C a choice of key sub-blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from seer_compile.calibration.targets import attention_mass, sample_rows
from seer_compile.gate import AttnGate
from seer_compile.gate_scores import HIDDEN_LOGIT, visible_units
from seer_compile.types import PoolKind, SiteInputs

_ROWS, _COLUMNS = 128, 2048
_ROUNDS, _STEPS = 3, 3
_HALVINGS = 4
_TEMPERATURES = (1.0, 0.7, 0.5, 0.35, 0.25, 0.12)
# Of the mean curvature: how strongly the fit is held to mean pooling.
_PRIOR = 1e-2
_MAP_BYTES = 1 << 30
_CHUNK_ROWS = 32


class _Sample(NamedTuple):
    """What one head is fitted to."""

    query: Tensor
    """``Float32[R U*P d]`` of U heads that share the gate, the factor on the logits included."""
    key: Tensor
    """``Float32[C P' d]``."""
    target: Tensor
    """``Float32[R C]``: rows sum to 1."""
    hidden: Tensor
    """``Bool[R C]``."""


def fit_to_statistics(gate: AttnGate, inputs: SiteInputs, *, seed: str = "") -> bool:
    """Set a gate's weights to the best per-channel comparison of pooled tokens.

    The gate stays as it is where the fit predicts the sample no better, or the map of the site
    would take more than 1 GB.

    Args:
        gate: Whose weights are written, in place.
        inputs: Operands of the site; the first batch item is read.
        seed: Chooses the rows.

    Returns:
        Whether any head was written.

    Cost:
        One attention map at sub-block resolution, and per head nine sums over 128 rows of
        ``C x (P' d)**2`` products.
    """
    units = [
        -(-tensor.shape[-2] // unit)
        for tensor, unit in zip((inputs.query, inputs.key), _units(gate), strict=True)
    ]
    if 4 * gate.heads * units[0] * units[1] > _MAP_BYTES or units[0] < 2:
        return False
    groups = gate.heads // gate.gate_heads
    changed = False
    with torch.no_grad():
        for head, sample in _samples(gate, inputs, seed):
            found = _weights(gate, *_fit_in_turn(gate, sample), sample)
            members = slice(head * groups, (head + 1) * groups)
            before = (gate.query_weight[members].flatten(0, 1), gate.key_weight[head])
            if _loss_of(found, sample) < _loss_of(before, sample):
                gate.query_weight[members] = found[0].unflatten(0, (groups, -1))
                gate.key_weight[head] = found[1]
                changed = True
    return changed


def _units(gate: AttnGate) -> tuple[int, int]:
    return gate.config.query_sub_block, gate.config.key_sub_block


def _samples(gate: AttnGate, inputs: SiteInputs, seed: str) -> Iterator[tuple[int, _Sample]]:
    """Yield each gate head with what it is fitted to."""
    units, device = _units(gate), inputs.query.device
    mass = attention_mass(inputs, query_unit=units[0], key_unit=units[1])[0]
    mass = mass.unflatten(0, (gate.gate_heads, -1)).mean(1)
    rows, columns = (
        _choice(total, wanted, f"{seed}:{name}", device)
        for name, total, wanted in (
            ("rows", mass.shape[1], _ROWS),
            ("columns", mass.shape[2], _COLUMNS),
        )
    )
    visible = visible_units(
        inputs.visibility,
        units=units,
        lengths=(inputs.query.shape[-2], inputs.key.shape[-2]),
        device=device,
        rows=rows,
    )[0, 0][:, columns]
    # Of heads that share a gate the pools of one count as further pools of the other.
    query = gate.pool_query(inputs.query)[0][:, rows].unflatten(0, (gate.gate_heads, -1))
    query = query.unflatten(-1, (len(gate.config.query_pools), -1)).transpose(1, 2).flatten(2, 3)
    key = gate.pool_key(inputs.key, inputs.visibility.key_padding)[0][:, columns]
    for head in range(gate.gate_heads):
        target = mass[head][rows][:, columns]
        counts = target.sum(-1) > 0
        if not bool(counts.any()):
            continue
        target = target[counts] / target[counts].sum(-1, keepdim=True)
        yield (
            head,
            _Sample(
                inputs.scale * query[head][counts],
                key[head * gate.kv_heads // gate.gate_heads].unflatten(
                    -1, (len(gate.config.key_pools), -1)
                ),
                target,
                ~visible[counts],
            ),
        )


def _choice(total: int, wanted: int, key: str, device: torch.device) -> Tensor:
    chosen = sample_rows(total, wanted, key=key, device=device)
    return torch.arange(total, device=device) if chosen is None else chosen


def _means(kinds: tuple[PoolKind, ...], sample: _Sample) -> Tensor:
    """Return ``Float32[P d]`` of mean pooling; extremes count evenly where there is no mean."""
    shares = [float(kind == "mean") if "mean" in kinds else 1 / len(kinds) for kind in kinds]
    column = torch.tensor(shares, dtype=torch.float32, device=sample.key.device)[:, None]
    return column.repeat(1, sample.key.shape[-1])


def _fit_in_turn(gate: AttnGate, sample: _Sample) -> tuple[Tensor, Tensor]:
    """Return how the sides mix their pools: ``Float32[P d]`` and ``Float32[P' d]``."""
    groups = gate.heads // gate.gate_heads
    left = _means(gate.config.query_pools, sample).repeat(groups, 1) / groups
    right = _means(gate.config.key_pools, sample)
    # Means of sharp attention are too sure of themselves, and flat far from the truth.
    starts = [left * factor for factor in _TEMPERATURES]
    form = right[None]
    left = min(starts, key=lambda start: _loss(start[:, None] * form, sample))
    for _ in range(_ROUNDS):
        keys = (sample.key * right).sum(1, keepdim=True)
        left = _fit(sample._replace(key=keys), left[:, None])[:, 0]
        queries = (sample.query * left).sum(1, keepdim=True)
        right = _fit(sample._replace(query=queries), right[None])[0]
    return left, right


def _fit(sample: _Sample, start: Tensor) -> Tensor:
    """Return ``Float32[P P' d]``: Newton steps with halving, held to the start by a weak prior."""
    best, loss = start, _loss(start, sample)
    for _ in range(_STEPS):
        gradient, curvature = _derivatives(best, sample)
        prior = _PRIOR * curvature.diagonal().mean()
        gradient = gradient + prior * (best - start).flatten()
        curvature.diagonal().add_(prior)
        # Where shares are all 0 or 1 there is no curvature to go by.
        step, failed = torch.linalg.solve_ex(curvature, gradient)
        if int(failed) or not bool(step.isfinite().all()):
            return best
        step = step.view_as(best)
        for halving in range(_HALVINGS):
            candidate = best - step / 2**halving
            reached = _loss(candidate, sample)
            if reached < loss:
                best, loss = candidate, reached
                break
        else:
            return best
    return best


def _derivatives(form: Tensor, sample: _Sample) -> tuple[Tensor, Tensor]:
    """Return gradient and curvature of the loss with respect to the flattened form."""
    shares = _log_shares(form, sample).exp()
    key = sample.key.flatten(1)
    error = (shares - sample.target) @ key
    gradient = torch.einsum("rpd,rqd->pqd", sample.query, error.unflatten(-1, sample.key.shape[1:]))
    size = form.numel()
    curvature = form.new_zeros(size, size)
    for part in range(0, len(shares), _CHUNK_ROWS):
        rows = slice(part, part + _CHUNK_ROWS)
        weighted = shares[rows, :, None] * key
        mean = weighted.sum(1)
        moments = weighted.mT @ key - mean[:, :, None] * mean[:, None]
        # Each entry of the form multiplies one pooled query with one pooled key of its channel.
        query = sample.query[rows]
        left = query[:, :, None].expand(-1, -1, sample.key.shape[1], -1).flatten(1)
        moments = (
            moments[:, None, :, None]
            .expand(-1, query.shape[1], -1, query.shape[1], -1)
            .reshape(len(query), size, size)
        )
        curvature += torch.einsum("rx,rxy,ry->xy", left, moments, left)
    return gradient.flatten() / len(shares), curvature / len(shares)


def _log_shares(form: Tensor, sample: _Sample) -> Tensor:
    query = torch.einsum("rpd,pqd->rqd", sample.query, form).flatten(1)
    logits = (query @ sample.key.flatten(1).mT).masked_fill(sample.hidden, HIDDEN_LOGIT)
    return logits.log_softmax(-1)


def _loss(form: Tensor, sample: _Sample) -> float:
    return float(-(sample.target * _log_shares(form, sample)).sum(-1).mean())


def _loss_of(weights: tuple[Tensor, Tensor], sample: _Sample) -> float:
    query = sample.query.flatten(1) @ weights[0]
    key = sample.key.flatten(1) @ weights[1]
    shares = (query @ key.mT).masked_fill(sample.hidden, HIDDEN_LOGIT).log_softmax(-1)
    return float(-(sample.target * shares).sum(-1).mean())


def _weights(gate: AttnGate, left: Tensor, right: Tensor, sample: _Sample) -> tuple[Tensor, Tensor]:
    """Return ``Float32[P*d e]`` and ``Float32[P'*d e]``, a gate channel for each head channel.

    Where the gate has fewer, those stay whose products vary most over the sample.
    """
    spread = (sample.query * left).sum(1).std(0) * (sample.key * right).sum(1).std(0)
    channels = spread.topk(min(gate.config.gate_dim, len(spread))).indices
    slots = torch.arange(len(channels), device=left.device)
    weights = []
    for side in (left, right):
        weight = side.new_zeros(*side.shape, gate.config.gate_dim)
        weight[:, channels, slots] = side[:, channels]
        weights.append(weight.flatten(0, 1))
    return weights[0], weights[1]
