"""Fold the nodes of one site into one opaque call.

    pool, project, scores, select -> block_sparse_attention   =>   gated_attention

Legal because ``gated_attention`` is defined as exactly that composition, with the dense answer
below break-even and while its ``mode`` is 0. Necessary because a tensor with a block-count axis
in a traced graph guards on that count: a recompile at one block, and no export below two. What
may change at run time (weights, budget, mode) reaches the operator as tensors.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from seer_compile.gate import AttnGate
from seer_compile.passes.node_builder import NodeBuilder, SiteMark, marked
from seer_compile.types import PassResult


def lower(graph_module: GraphModule, suffix: str = "") -> PassResult:
    """Replace the block-sparse attention of every site by one ``gated_attention`` call.

    Args:
        graph_module: Changed in place.
        suffix: Appended to the site name under which calls are counted.

    Returns:
        The names of the sites lowered; a graph without block-sparse attention is unchanged.
    """
    rewritten = []
    for attention, mark in list(marked(graph_module, "attention")):
        if attention.target is not torch.ops.seer_compile.block_sparse_attention.v1:
            continue
        lowered = _gated_attention(graph_module, attention, mark, suffix)
        attention.replace_all_uses_with(lowered)
        for user in lowered.users:
            if user.target is operator.getitem:
                user.meta["val"] = lowered.meta["val"][user.args[1]]
        rewritten.append(mark.site)
    return PassResult(graph_module=graph_module, rewritten=tuple(rewritten))


def _gated_attention(
    graph_module: GraphModule, attention: Node, mark: SiteMark, suffix: str
) -> Node:
    gate = graph_module.get_submodule(mark.gate)
    if not isinstance(gate, AttnGate):
        raise TypeError(f"{mark.gate!r} is a {type(gate).__name__}, not a gate")
    builder = NodeBuilder(graph_module, attention, mark.site, key=mark.key)
    query, key, value, _, _, scale, _, _, *last = attention.args
    tensors = [
        builder.attribute(f"{mark.gate}.{name}", gate=mark.gate)
        for name in ("query_weight", "key_weight", "budget", "mode")
    ]
    constants: dict[str, Any] = gate.constants()
    return builder.call(
        torch.ops.seer_compile.gated_attention.v1,
        *(query, key, value),
        *tensors,
        scale,
        *constants.values(),
        mark.site + suffix,
        *last,
        role="attention",
        gate=mark.gate,
    )
