"""Decide for every site: sparse, or dense with a reason. Reads the graph, changes nothing.

A site is sparse when its mask is proved, nothing that the finder saw forbids it, its sizes are
what the operators take, and a gate of its name and sizes exists or may be made.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from seer_compile.passes.fx_utils import fake_value, is_known
from seer_compile.passes.gate_source import GateSource
from seer_compile.passes.node_builder import operand_value
from seer_compile.types import (
    AttentionSite,
    MaskProof,
    RewritePlan,
    SiteDecision,
    SiteSummary,
    SkipCode,
    SkipReason,
    is_excluded,
)

MAX_HEAD_DIM = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def plan(
    sites: Sequence[AttentionSite],
    proofs: Sequence[MaskProof],
    *,
    gates: GateSource | None = None,
    exclude: Sequence[str] = (),
) -> RewritePlan:
    """Return one decision per site, in graph order.

    Args:
        sites: What was found.
        proofs: What the mask of each site is, in the same order.
        gates: Where gates come from; None asks for no gate.
        exclude: Shell patterns of site names that stay dense.
    """
    decisions: list[SiteDecision] = []
    for site, proof in zip(sites, proofs, strict=True):
        reason = _first_reason(site, proof, gates, exclude)
        clashes = (_clash(site, other.site) for other in decisions if other.is_sparse)
        if reason is None and any(clashes):
            reason = SkipReason(SkipCode.NO_GATE, _sizes(site))
        decisions.append(SiteDecision(site=site, proof=proof, reason=reason))
    return RewritePlan(decisions=tuple(decisions))


def summarise(decision: SiteDecision) -> SiteSummary:
    """Return the decision as plain data, without graph nodes or symbols."""
    site, proof = decision.site, decision.proof
    return SiteSummary(
        name=site.name,
        kind=site.kind,
        query_shape=_plain_shape(operand_value(site.query)),
        key_shape=_plain_shape(operand_value(site.key)),
        visibility="opaque" if proof.visibility is None else proof.visibility.describe(),
        decision="sparse" if decision.is_sparse else "dense",
        reason=str(decision.reason or ""),
        source=site.source,
    )


def _first_reason(
    site: AttentionSite, proof: MaskProof, gates: GateSource | None, exclude: Sequence[str]
) -> SkipReason | None:
    if is_excluded(site.name, exclude):
        return SkipReason(SkipCode.EXCLUDED)
    if site.obstacles:
        return site.obstacles[0]
    for check in (_check_form, _check_operands):
        reason = check(site)
        if reason is not None:
            return reason
    if proof.visibility is None:
        return proof.reason or SkipReason(SkipCode.OPAQUE_MASK)
    if gates is not None and not gates.has_gate_for(site):
        return SkipReason(SkipCode.NO_GATE, _sizes(site))
    return None


def _clash(site: AttentionSite, other: AttentionSite) -> bool:
    """Whether two sites ask for one gate of two sizes: a shared module split heads otherwise."""
    return site.name == other.name and _sizes(site) != _sizes(other)


def _sizes(site: AttentionSite) -> str:
    return f"{site.heads} heads, {site.kv_heads} key heads, head dim {site.head_dim}"


def _check_form(site: AttentionSite) -> SkipReason | None:
    if site.dropout > 0:
        return SkipReason(SkipCode.DROPOUT, f"p={site.dropout:g}")
    if site.kv_heads < 1 or site.heads % site.kv_heads:
        return SkipReason(SkipCode.HEADS, f"{site.heads} and {site.kv_heads}")
    if max(site.head_dim, site.value_dim) > MAX_HEAD_DIM:
        return SkipReason(SkipCode.HEAD_DIM, f"{site.head_dim} and {site.value_dim}")
    return None


def _check_operands(site: AttentionSite) -> SkipReason | None:
    values = [operand_value(operand) for operand in (site.query, site.key, site.value)]
    output = fake_value(site.output)
    tensors = [value for value in (*values, output) if isinstance(value, Tensor)]
    if len(tensors) < 4 or any(tensor.ndim != 4 for tensor in tensors[:3]):
        return SkipReason(SkipCode.RANK)
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) > 1 or tensors[0].dtype not in DTYPES:
        return SkipReason(SkipCode.DTYPE, ", ".join(sorted(str(dtype) for dtype in dtypes)))
    if is_known(tensors[0].shape[2] == 1):
        return SkipReason(SkipCode.DECODE)
    return None


def _plain_shape(value: Tensor | None) -> tuple[int | str, ...]:
    if value is None:
        return ()
    return tuple(size if isinstance(size, int) else str(size) for size in value.shape)
