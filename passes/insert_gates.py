"""Give every sparse site its gate: pool, project, score, select.

    query, key, value                 query -> pool -> project --.
        |                     =>      key   -> pool -> project --> scores -> select -> indices,
    attention                         attention                                        counts

Legal because it only adds nodes, all of them pure, in front of the attention; the attention is
not touched yet. Declines nothing: the plan did.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

import seer_compile.kernels.ops  # noqa: F401  (registers the operators inserted below)
from seer_compile.gate import AttnGate
from seer_compile.passes.fx_utils import fake_value
from seer_compile.passes.gate_source import GateSource
from seer_compile.passes.materialise import materialise
from seer_compile.passes.node_builder import NodeBuilder, marked, traced_value
from seer_compile.types import PassResult, RewritePlan, SiteDecision, Visibility

OPERANDS = "seer_operands"
"""Metadata key, on the selection of a site, of its query, key, value and sinks (or None) in the
site's layout."""
ops = torch.ops.seer_compile


def insert_gates(graph_module: GraphModule, plan: RewritePlan, gates: GateSource) -> PassResult:
    """Insert the gate of each sparse site in front of it.

    Args:
        graph_module: Changed in place; receives the gates as submodules under ``seer_gates``.
        plan: What to rewrite; its sites are nodes of this graph.
        gates: Where gates come from.

    Returns:
        The names of the sites that received a gate.
    """
    gated = {mark.key for _, mark in marked(graph_module, "select")}
    rewritten = []
    for decision in plan.sparse:
        if decision.site.output.name not in gated:
            _insert_gate(graph_module, decision, gates)
            rewritten.append(decision.site.name)
    return PassResult(graph_module=graph_module, rewritten=tuple(rewritten))


def _insert_gate(graph_module: GraphModule, decision: SiteDecision, gates: GateSource) -> None:
    site = decision.site
    builder = NodeBuilder(graph_module, site.output, site.name)
    query, key = builder.replay(site.query), builder.replay(site.key)
    value = builder.replay(site.value)
    sinks = None if site.sinks is None else builder.replay(site.sinks)
    path, gate = gates.provide(site, fake_value(query).device)
    builder.add_submodule(path, gate)
    visibility = materialise(decision.proof, site, graph_module.graph)
    readable = list(visibility.as_arguments().values())
    scores = _insert_scores(builder, (query, key), gate, path, visibility, site.scale)
    lengths = [_length(tensor) for tensor in (query, key)]
    budget = builder.call(
        budget_at,
        builder.attribute(f"{path}.budget", gate=path),
        list(gate.budget_lengths),
        lengths[1],
        role="gate",
        value=traced_value(Tensor.new_empty, (scores, (gate.selection_heads,))),
    )
    config = gate.config
    builder.call(
        ops.select_blocks.v1,
        *(scores, budget, config.selector.name, config.block_size.query, config.block_size.key),
        *lengths,
        *readable,
        role="select",
        gate=path,
    ).meta[OPERANDS] = (query, key, value, sinks)


def _insert_scores(
    builder: NodeBuilder,
    operands: tuple[Node, Node],
    gate: AttnGate,
    path: str,
    visibility: Visibility,
    scale: float,
) -> Node:
    config, (query, key) = gate.config, operands
    pooled_query = builder.call(
        ops.pool_blocks.v1,
        *(query, config.query_sub_block, ",".join(config.query_pools), None),
        role="gate",
    )
    pooled_key = builder.call(
        ops.pool_blocks.v1,
        *(key, config.key_sub_block, ",".join(config.key_pools), visibility.key_padding),
        role="gate",
    )
    # A softcap bends the logits of attention, not those of a gate: it keeps their order, and the
    # gate learns the shares that it leaves.
    features = [
        builder.call(
            project, pooled, builder.attribute(f"{path}.{name}", gate=path), groups, role="gate"
        )
        for pooled, name, groups in (
            (pooled_query, "query_weight", gate.heads // gate.gate_heads),
            (pooled_key, "key_weight", 1),
        )
    ]
    lengths = [_length(tensor) for tensor in operands]
    return builder.call(
        ops.block_scores.v1,
        *features,
        *(scale, config.query_sub_block, config.key_sub_block),
        *(config.block_size.query, config.block_size.key, *lengths),
        gate.gate_heads // gate.selection_heads,
        *visibility.as_arguments().values(),
        role="gate",
    )


def _length(tensor: Node) -> Any:
    return fake_value(tensor).shape[2]


def project(pooled: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
    """Project pooled tokens per head, or per group of heads.

    Args:
        pooled: ``Float[b x t P]``, x query heads or key heads.
        weight: ``Float32[h P e]``; x divides h.
        groups: Consecutive heads whose projections are added up.

    Returns:
        ``Float32[b h//groups t e]``.
    """
    pooled = pooled.float().repeat_interleave(weight.shape[0] // pooled.shape[1], dim=1)
    pooled, weight = pooled.unflatten(1, (-1, groups)), weight.unflatten(0, (-1, groups))
    return torch.einsum("baurp,aupe->bare", pooled, weight)


def budget_at(budget: Tensor, lengths: list[int], k_len: int) -> Tensor:
    """Return ``Float32[s]``: a budget table at one key length.

    Args:
        budget: ``Float32[s L]``.
        lengths: Key lengths of the columns, ascending, in tokens.
        k_len: Key length, in tokens.
    """
    positions = [math.log2(length) for length in lengths]
    place = min(max(math.log2(max(k_len, 1)), positions[0]), positions[-1])
    right = next(i for i, position in enumerate(positions) if position >= place)
    left = max(right - 1, 0)
    width = positions[right] - positions[left]
    share = (place - positions[left]) / width if width else 0.0
    return torch.lerp(budget[:, left], budget[:, right], share)
