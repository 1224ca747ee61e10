"""``flex_attention``: its block mask and its score function, where both are plain.

flex_attention(q, k, v, score, (..., numbers, indices, ..., mask), scale)
score     s -> s, or s -> c * tanh(s / c) and other constants
lists     made of a mask in this graph (``block_lists``), or one block of everything
mask      that same mask, once more as a function; ``prove_masks`` compares the two
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node

from seer_compile.passes.axes import AxisBook
from seer_compile.passes.block_lists import listed_mask
from seer_compile.passes.fx_utils import bound_arguments, is_known, packet_of, tensor_shape
from seer_compile.passes.match_fused import logit_axes, products_of
from seer_compile.passes.matches import Match
from seer_compile.passes.mutation import Mutations
from seer_compile.types import MaskFunction, MaskTerm, SkipCode

aten = torch.ops.aten
_RANK = 4
_ENDLESS = 1 << 30
"""PyTorch's size of a block that holds everything; it has a length of that many at most."""


def match_flex(
    owner: GraphModule, node: Node, number: Callable[[Any], float | None], mutations: Mutations
) -> Match:
    """Return the attention of a ``flex_attention`` call.

    Args:
        owner: The graph module that holds the functions of the call.
        node: The call.
        number: Returns the value of a constant.
        mutations: Of the graph.
    """
    arguments: tuple[Any, ...] = node.args
    query, key, value, score, blocks, scale, _, *captured = arguments
    score_reads, mask_reads = (*captured, (), ())[:2]
    output = _only_result(node)
    match = Match("flex", node, node, output or node, AxisBook(), operands=(query, key, value))
    match.products = products_of(match, (query, key, value), is_grouped=True)
    match.scale = number(scale)
    if output is None:
        match.refuse(SkipCode.FLEX, "its sums are used")
    if match.scale is None:
        match.refuse(SkipCode.SCALE, f"`{scale}`")
    elif score_reads or not _apply_score(match, match.scale, _body(owner, score).graph):
        match.refuse(SkipCode.FLEX, "its score function is more than a softcap")
    *lists, query_size, key_size, mask = blocks
    function = MaskFunction(_body(owner, mask), tuple(mask_reads))
    if _writes(_body(owner, score).graph) or _writes(function.body.graph):
        match.refuse(SkipCode.FLEX, "its functions change tensors in place")
    _add_mask(match, lists[2:6], (query_size, key_size), function, mutations)
    return match


def _add_mask(
    match: Match,
    lists: Sequence[Any],
    sizes: tuple[Any, Any],
    function: MaskFunction,
    mutations: Mutations,
) -> None:
    """Note the mask that the lists of blocks were made of; refused where there is none."""
    call = match.reader
    is_plain = not any(mutations.is_written(each) for each in lists if isinstance(each, Node))
    if is_plain and _has_one_block(lists, sizes, call) and _is_true(function.body.graph):
        return
    listed = listed_mask(lists, sizes, call, mutations)
    if listed is None:
        match.refuse(SkipCode.FLEX, "its blocks are listed outside of the graph")
        return
    if any(mutations.is_written(each) for each in function.captured if isinstance(each, Node)):
        match.refuse(SkipCode.MUTATION, "what the mask function reads")
    match.mask_terms.append(
        MaskTerm("attn_mask", listed, axes=logit_axes(_RANK), function=function)
    )


def _only_result(node: Node) -> Node | None:
    """Return the attention's own result; None where the sums beside it are read too."""
    read = [part for part in node.users if part.users]
    is_first = len(read) == 1 and read[0].args[1] == 0
    return read[0] if is_first else None


def _body(owner: GraphModule, function: Any) -> GraphModule:
    body = owner.get_submodule(str(function.target))
    assert isinstance(body, GraphModule)
    return body


def _writes(graph: Graph) -> bool:
    """Whether a function changes anything in place."""
    targets = (node.target for node in graph.nodes)
    return any(target._schema.is_mutable for target in targets if isinstance(target, OpOverload))


def _apply_score(match: Match, scale: float, graph: Graph) -> bool:
    """Fold constants and one hyperbolic tangent on the way of a score into the match.

    ``c * tanh(f * s)`` is ``c * tanh(f * c * s / c)``: the softcap's own form with another scale.
    """
    steps, softcap = _steps(graph), None
    if steps is None:
        return False
    for packet, factor in steps:
        if packet is aten.tanh and softcap is not None:
            return False
        if packet is aten.tanh:
            softcap = 1.0
        elif softcap is None:
            scale *= factor
        else:
            softcap *= factor
    match.scale = scale if softcap is None else scale * softcap
    match.softcap = None if softcap is None else abs(softcap)
    return softcap != 0


def _steps(graph: Graph) -> list[tuple[Any, float]] | None:
    """Return what happens to the first input, in order; None where it is anything else."""
    first, output = next(iter(graph.nodes)), graph.output_node()
    node: Any = output.args[0]
    steps: list[tuple[Any, float]] = []
    while node is not first:
        packet = packet_of(node)
        if packet not in (aten.tanh, aten.mul, aten.div):
            return None
        call = bound_arguments(node)
        other = call.get("other", 1.0)
        is_rounded = call.get("rounding_mode") is not None
        if is_rounded or not isinstance(other, int | float) or other == 0:
            return None
        steps.append((packet, 1 / other if packet is aten.div else float(other)))
        node = call["self"]
    return steps[::-1]


def _has_one_block(lists: Any, sizes: tuple[Any, Any], node: Node) -> bool:
    """Whether the only block, which is listed and not full, holds every query and key."""
    numbers, indices, *full = lists
    lengths = [(tensor_shape(operand) or (0,) * _RANK)[-2] for operand in node.args[:2]]
    holds_all = all(
        is_known(size >= length) or size == _ENDLESS
        for size, length in zip(sizes, lengths, strict=True)
    )
    is_listed = packet_of(numbers) is aten.ones and packet_of(indices) is aten.zeros
    return holds_all and is_listed and full == [None, None]


def _is_true(graph: Graph) -> bool:
    """Whether a mask function hides nothing."""
    output = graph.output_node()
    return packet_of(output.args[0]) is aten.new_ones
