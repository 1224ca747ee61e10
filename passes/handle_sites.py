"""Let a Python handler answer every site that could be sparse.

    query, key, value -> attention   =>   query, key, value -> site call -> handler

Legal for graphs that are run node by node in Python, without further tracing: calibration and
evaluation look inside the model this way. The mask travels as :class:`Visibility`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from seer_compile.errors import ShapeError
from seer_compile.passes.fx_utils import fake_value
from seer_compile.passes.materialise import materialise
from seer_compile.passes.node_builder import NodeBuilder
from seer_compile.passes.splice import splice
from seer_compile.types import (
    VISIBILITY_ARGUMENTS,
    Operand,
    PassResult,
    RewritePlan,
    SiteHandler,
    SiteInputs,
    Visibility,
)

CurrentHandler = Callable[[], SiteHandler]


class SiteCall(nn.Module):
    """Hands one site's operands to whichever handler is current.

    Args:
        name: Site name.
        scale: Factor on the logits.
        softcap: Bound of the logits, if any.
        handler: Returns the handler; asked in every call.
    """

    def __init__(
        self, name: str, scale: float, softcap: float | None, handler: CurrentHandler
    ) -> None:
        super().__init__()
        self.name, self.scale, self.softcap, self.handler = name, scale, softcap, handler

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, *visibility: Any
    ) -> Tensor:
        """Return ``Float[b h q v]``, token major, whatever the handler chose: as traced."""
        inputs = SiteInputs(
            name=self.name,
            query=query,
            key=key,
            value=value,
            scale=self.scale,
            visibility=Visibility(**dict(zip(VISIBILITY_ARGUMENTS, visibility, strict=True))),
            softcap=self.softcap,
            sinks=sinks,
        )
        output = self.handler()(inputs)
        expected = (*query.shape[:3], value.shape[3])
        if tuple(output.shape) != expected or output.dtype is not query.dtype:
            raise ShapeError(
                argument="handler result",
                got=f"{output.dtype} {tuple(output.shape)}",
                expected=f"{query.dtype} {expected}",
                context={"site": self.name},
            )
        return output.transpose(1, 2).contiguous().transpose(1, 2)


def handle_sites(
    graph_module: GraphModule, plan: RewritePlan, handler: CurrentHandler
) -> PassResult:
    """Replace the output of each sparse site by a call of the current handler.

    Args:
        graph_module: Changed in place; receives one submodule per site.
        plan: What to rewrite; its sites are nodes of this graph.
        handler: Returns the handler to call.

    Returns:
        The names of the sites that the handler answers.
    """
    rewritten = []
    # The output of one site may be the query of the next.
    moved: dict[Node, Node] = {}
    for number, decision in enumerate(plan.sparse):
        site = decision.site
        if not site.output.users:
            continue
        builder = NodeBuilder(graph_module, site.output, site.name)
        operands = [
            builder.replay(Operand(node=moved.get(item.node, item.node), steps=item.steps))
            if item is not None
            else None
            for item in (site.query, site.key, site.value, site.sinks)
        ]
        visibility = materialise(decision.proof, site, graph_module.graph)
        call = SiteCall(site.name, site.scale, site.softcap, handler)
        path = builder.add_submodule(f"seer_sites.site_{number}", call)
        query, value = fake_value(operands[0]), fake_value(operands[2])
        b, h, q, _ = query.shape
        result = builder.call_module(
            path,
            *operands,
            *visibility.as_arguments().values(),
            role="attention",
            value=query.new_empty((b, q, h, value.shape[3])).transpose(1, 2),
        )
        moved[site.output] = splice(builder, site, result)
        rewritten.append(site.name)
    return PassResult(graph_module=graph_module, rewritten=tuple(rewritten))
