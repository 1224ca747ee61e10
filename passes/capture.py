"""From a model and an example to graphs of ATen calls: by Dynamo, or by ``torch.export``.

Dynamo follows one real call and may see several graphs; its graphs are normalised. ``torch.export``
gives one graph, in that dialect already. Neither changes the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from seer_compile.passes.inline_bodies import inline_bodies
from seer_compile.passes.normalise import normalise

# A model captured many times must not run into Dynamo's limit and then be seen in no graph.
_MOST_CAPTURES = 1024


@dataclass(frozen=True, eq=False, slots=True)
class CapturedGraph:
    """A graph and what it was captured with."""

    graph_module: GraphModule
    inputs: tuple[Any, ...]
    """One value per placeholder."""


def capture_graphs(
    model: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic: bool | None = None,
) -> tuple[CapturedGraph, ...]:
    """Run a model once under Dynamo and return the graphs of that call, normalised.

    Args:
        model: A module or a function.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        dynamic: Make sizes symbolic; None leaves it to Dynamo.

    Returns:
        The graphs in the order of execution; none where the call holds no tensor operation.
    """
    graphs: list[CapturedGraph] = []

    def record(graph_module: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        fresh = normalise(inline_bodies(graph_module), example_inputs)
        graphs.append(CapturedGraph(fresh, tuple(example_inputs)))
        return graph_module.forward

    with torch._dynamo.config.patch(recompile_limit=_MOST_CAPTURES):
        torch.compile(model, backend=record, dynamic=dynamic)(*args, **(kwargs or {}))
    return tuple(graphs)


def capture_export(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> CapturedGraph:
    """Export a model and return the graph of the exported program.

    Args:
        model: The module.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
    """
    program = torch.export.export(model, tuple(args), dict(kwargs or {}))
    module = program.module(check_guards=False)
    assert isinstance(module, GraphModule)
    return CapturedGraph(module, tuple(pytree.tree_leaves((tuple(args), dict(kwargs or {})))))
