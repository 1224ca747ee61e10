"""One row per model, spelling and mask: how many sites there are, how many can be sparse."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from seer_compile.passes.capture import capture_graphs
from seer_compile.passes.constant_tensors import module_constants
from seer_compile.passes.find_sites import find_sites
from seer_compile.passes.plan import plan, summarise
from seer_compile.passes.prove_masks import prove_masks
from seer_compile.passes.site_names import SiteNames
from seer_compile.types import SiteSummary


@dataclass(frozen=True, kw_only=True, slots=True)
class SurveyRow:
    """What was found in one call of one model."""

    architecture: str
    spelling: str
    situation: str
    graphs: int
    """Graphs that Dynamo saw in the call."""
    sites: int
    sparse: int
    """Sites that can be sparse."""
    visible: str
    """What the proved masks are, distinct ones joined by ``;``."""
    reason: str
    """Why the others stay dense, distinct reasons joined by ``;``."""


def survey(
    model: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    architecture: str,
    spelling: str,
    situation: str = "default",
    dynamic: bool | None = None,
) -> SurveyRow:
    """Capture one call of a model and count what could be sparse in it; nothing is rewritten.

    Args:
        model: A module or a function.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        architecture: First column.
        spelling: Second column: how the attention is written.
        situation: Third column: padding, cache, training.
        dynamic: Make sizes symbolic; None leaves it to Dynamo.
    """
    root = model if isinstance(model, nn.Module) else None
    with torch.no_grad():
        graphs = capture_graphs(model, args, kwargs, dynamic=dynamic)
    summaries: list[SiteSummary] = []
    for captured in graphs:
        sites = find_sites(captured.graph_module, SiteNames(root))
        constants = module_constants(captured.graph_module, captured.inputs, root)
        decided = plan(sites, prove_masks(captured.graph_module, sites, constants))
        summaries += [summarise(decision) for decision in decided.decisions]
    sparse = [summary for summary in summaries if summary.decision == "sparse"]
    return SurveyRow(
        architecture=architecture,
        spelling=spelling,
        situation=situation,
        graphs=len(graphs),
        sites=len(summaries),
        sparse=len(sparse),
        visible="; ".join(dict.fromkeys(summary.visibility for summary in sparse)),
        reason="; ".join(dict.fromkeys(s.reason for s in summaries if s.decision == "dense")),
    )
