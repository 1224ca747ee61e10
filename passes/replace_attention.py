"""Answer every gated site by block-sparse attention over the blocks that its gate selected.

    indices, counts                        indices, counts
    query, key, value -> attention   =>    query, key, value -> block_sparse_attention

Legal because the operator computes the same softmax over the same keys, less the blocks that were
not selected; what the mask hides, a softcap of the logits, and sinks beside the keys are arguments
of the operator. The former region loses its users and goes with ``remove_dead``.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import GraphModule, Node

from seer_compile.passes.insert_gates import OPERANDS
from seer_compile.passes.node_builder import NodeBuilder, marked
from seer_compile.passes.splice import splice
from seer_compile.types import PassResult, RewritePlan


def replace_attention(graph_module: GraphModule, plan: RewritePlan) -> PassResult:
    """Replace the output of each site that has a selection.

    Args:
        graph_module: Changed in place.
        plan: The plan by which the gates were inserted.

    Returns:
        The names of the sites replaced; sites without a selection are left alone.
    """
    selections = {mark.key: (node, mark) for node, mark in marked(graph_module, "select")}
    rewritten = []
    # The output of one site may be the query of the next.
    moved: dict[Node, Node] = {}
    for decision in plan.sparse:
        site = decision.site
        if site.output.name not in selections or not site.output.users:
            continue
        selection, mark = selections[site.output.name]
        builder = NodeBuilder(graph_module, site.output, site.name)
        indices, counts = (
            builder.call(operator.getitem, selection, index, role="select_part", gate=mark.gate)
            for index in range(2)
        )
        _, _, _, query_block, key_block, _, _, *visibility = selection.args
        *operands, sinks = (moved.get(operand, operand) for operand in selection.meta[OPERANDS])
        attention = builder.call(
            torch.ops.seer_compile.block_sparse_attention.v1,
            *operands,
            *(indices, counts, site.scale, query_block, key_block),
            *visibility,
            site.softcap,
            sinks,
            role="attention",
            gate=mark.gate,
        )
        output = builder.call(operator.getitem, attention, 0, role="output", gate=mark.gate)
        moved[site.output] = splice(builder, site, output)
        rewritten.append(site.name)
    return PassResult(graph_module=graph_module, rewritten=tuple(rewritten))
