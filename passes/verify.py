"""Check what the rewrite promised about a finished graph; a broken promise is a bug of a pass.

- the calling convention is the one that was captured: same placeholders, same outputs;
- every sparse site is answered exactly once, and nothing of its former answer is left;
- every gate is held under one name and read by some call (a module under two names corrupts its
  parameters when the graph is traced again);
- every node that a pass inserted has a traced value.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from seer_compile.errors import PassError
from seer_compile.gate import AttnGate
from seer_compile.passes.fx_utils import fake_value, is_known
from seer_compile.passes.node_builder import MARK, marked
from seer_compile.types import RewritePlan

ANSWER_ROLES = ("attention",)
INTERNAL_ROLES = ("gate", "select", "select_part")


class CallingConvention(NamedTuple):
    """How a graph is called, as far as its callers can tell."""

    placeholders: tuple[str, ...]
    outputs: tuple[Any, ...]
    """Dtype and sizes of each tensor, the type of anything else."""

    def agrees_with(self, other: CallingConvention) -> bool:
        """Whether callers cannot tell the two apart; sizes may be symbols known to be equal."""
        return (
            self.placeholders == other.placeholders
            and len(self.outputs) == len(other.outputs)
            and all(map(_agree, self.outputs, other.outputs))
        )


def calling_convention(graph_module: GraphModule) -> CallingConvention:
    """Return the names of the placeholders and the traced types of the outputs."""
    nodes = list(graph_module.graph.nodes)
    flat_outputs = tree_leaves(nodes[-1].args)
    return CallingConvention(
        placeholders=tuple(str(node.target) for node in nodes if node.op == "placeholder"),
        outputs=tuple(_describe(fake_value(value)) for value in flat_outputs),
    )


def verify(
    graph_module: GraphModule,
    plan: RewritePlan,
    rewritten: Sequence[str],
    before: CallingConvention,
    *,
    is_lowered: bool,
) -> None:
    """Raise when a postcondition does not hold.

    Args:
        graph_module: The rewritten graph.
        plan: What was to be done.
        rewritten: Names of the sites that the passes say they rewrote.
        before: Calling convention of the graph as captured.
        is_lowered: Whether each site must be one opaque call.

    Raises:
        PassError: Names the postcondition, the site and the node.
    """
    for problem in _problems(graph_module, plan, rewritten, before, is_lowered):
        raise PassError(problem, context={"pass": "verify", "torch": torch.__version__})


def _problems(
    graph_module: GraphModule,
    plan: RewritePlan,
    rewritten: Sequence[str],
    before: CallingConvention,
    is_lowered: bool,
) -> Iterator[str]:
    after = calling_convention(graph_module)
    if not after.agrees_with(before):
        yield f"the calling convention changed from {before} to {after}"
    answers = Counter(mark.site for role in ANSWER_ROLES for _, mark in marked(graph_module, role))
    if answers != Counter(rewritten):
        yield f"sites answered {dict(answers)}, rewritten {list(rewritten)}"
    unplanned = set(rewritten) - {decision.site.name for decision in plan.sparse}
    if unplanned:
        yield f"sites rewritten against the plan: {sorted(unplanned)}"
    left = set(graph_module.graph.nodes)
    for decision in plan.sparse:
        if decision.site.name in rewritten and decision.site.output in left:
            yield f"{decision.site.output.name} of {decision.site.name} is still computed"
    yield from _value_problems(graph_module)
    yield from _gate_problems(graph_module)
    if is_lowered:
        for role in INTERNAL_ROLES:
            for node, mark in marked(graph_module, role):
                if node.op != "get_attr":
                    yield f"{node.name} of {mark.site} was not folded into the site's operator"


def _value_problems(graph_module: GraphModule) -> Iterator[str]:
    for node in graph_module.graph.nodes:
        mark = node.meta.get(MARK)
        if mark is None:
            continue
        if node.meta.get("val") is None:
            yield f"{node.name} of {mark.site} has no traced value"
        if not node.users and mark.role != "attention":
            yield f"{node.name} of {mark.site} has no reader"


def _gate_problems(graph_module: GraphModule) -> Iterator[str]:
    read = {mark.gate for node in graph_module.graph.nodes if (mark := node.meta.get(MARK))}
    paths: dict[int, str] = {}
    for path, module in graph_module.named_modules(remove_duplicate=False):
        if not isinstance(module, AttnGate):
            continue
        if id(module) in paths:
            yield f"one gate is held under two names, {paths[id(module)]} and {path}"
        paths[id(module)] = path
        if path not in read:
            yield f"gate {path} has no reader"


def _describe(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (value.dtype, *value.shape)
    return type(value).__name__


def _agree(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, str) or isinstance(theirs, str):
        return ours == theirs
    return (
        ours[0] is theirs[0]
        and len(ours) == len(theirs)
        and all(is_known(a == b) for a, b in zip(ours[1:], theirs[1:], strict=True))
    )
