"""``explain``: which attention sites a model has, what their masks are, and why which is dense."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from seer_compile.called_model import called_model
from seer_compile.report import count_sharing, sharing_lines, site_cells
from seer_compile.session import device_of, evaluation_mode, find_session
from seer_compile.site_runner import SiteRunner
from seer_compile.table import render_table
from seer_compile.types import SiteSummary


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What :func:`explain` found."""

    model: str
    graphs: int
    """Graphs that the forward was captured in; more than one means that it breaks."""
    sites: tuple[SiteSummary, ...]

    @property
    def num_sparse(self) -> int:
        """Sites that can be sparse."""
        return sum(site.decision == "sparse" for site in self.sites)

    @property
    def shared_gates(self) -> dict[str, int]:
        """Sites that several calls of the forward share, and so one gate: how many calls."""
        return count_sharing(self.sites)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        """Return a table: site, shapes, mask proved, decision, reason."""
        title = (
            f"{self.model}: {self.num_sparse} of {len(self.sites)} attention sites can be sparse "
            f"({self.graphs} graph{'' if self.graphs == 1 else 's'})"
        )
        header = ("site", "query", "key", "visible", "decision", "reason")
        table = render_table(header, [site_cells(site) for site in self.sites])
        return "\n".join([title, table, *sharing_lines(self.shared_gates)])


def explain(
    model: nn.Module,
    *args: Any,
    draw: str | os.PathLike[str] | None = None,
    **kwargs: Any,
) -> Explanation:
    """List the attention sites of one forward and what :func:`optimize` would do with each.

    The forward runs once, without gradients, in evaluation mode and uncompiled; weights, buffers,
    training flags and random generators are left as they were.

    Args:
        model: Any module, optimized or not; looked at under ``torch.compile`` and data-parallel
            wrappers.
        *args: Positional arguments of the model.
        draw: Where to write a drawing of the sites and what feeds them.
        **kwargs: Keyword arguments of the model.

    Returns:
        The sites, printable as a table.

    Raises:
        PassError: A pass failed on this model.
        ModelStateError: PyTorch ran the forward uncompiled; or a part of the model is optimized and
            the model is not.
    """
    model = called_model(model)
    session = find_session(model)
    runner = SiteRunner(model, "discover", session.options.exclude if session else ())
    with evaluation_mode(model), _same_random_numbers(model):
        runner.run(model, args, kwargs)
    if draw is not None:
        from seer_compile.passes.site_graph import draw_sites

        draw_sites([(result.planned, result.plan) for result in runner.results], draw)
    return Explanation(
        model=type(model).__name__,
        graphs=len(runner.records),
        sites=tuple(site for record in runner.records for site in record.sites),
    )


@contextlib.contextmanager
def _same_random_numbers(model: nn.Module) -> Iterator[None]:
    device = device_of(model)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield
