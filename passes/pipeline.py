"""The order of the passes, and the only place that lints, recompiles, times, dumps and logs.

all       inline_bodies, normalise, find_sites, prove_masks, plan
SPARSE    ... insert_gates, replace_attention, lower, remove_dead, verify, outline_bodies
HANDLER   ... handle_sites, remove_dead, verify, outline_bodies
DISCOVER  ... nothing more
"""

from __future__ import annotations

import enum
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from seer_compile.errors import PassError, SeerInputError
from seer_compile.gate_store import GateStore
from seer_compile.passes.constant_tensors import module_constants
from seer_compile.passes.find_sites import find_sites
from seer_compile.passes.gate_source import GateSource, StoreGates
from seer_compile.passes.handle_sites import CurrentHandler, handle_sites
from seer_compile.passes.inline_bodies import inline_bodies
from seer_compile.passes.insert_gates import insert_gates
from seer_compile.passes.lower import lower
from seer_compile.passes.normalise import normalise
from seer_compile.passes.outline_bodies import outline_bodies
from seer_compile.passes.pipeline_options import PipelineOptions
from seer_compile.passes.plan import plan, summarise
from seer_compile.passes.prove_masks import prove_masks
from seer_compile.passes.remove_dead import remove_dead
from seer_compile.passes.replace_attention import replace_attention
from seer_compile.passes.site_names import SiteNames
from seer_compile.passes.verify import CallingConvention, calling_convention, verify
from seer_compile.types import PassResult, RewritePlan, SiteSummary

logger = logging.getLogger(__name__)


class Mode(enum.Enum):
    """What becomes of the sites that could be sparse."""

    SPARSE = "sparse"
    """One gated-attention call each."""
    HANDLER = "handler"
    """A call of a Python handler each; the graph is to be run in Python."""
    DISCOVER = "discover"
    """Nothing: the plan is the result."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PipelineResult:
    """What a run of the pipeline yields."""

    graph_module: GraphModule
    """The rewritten graph, or the one handed in when no site was rewritten."""
    planned: GraphModule
    """The graph whose nodes the plan names: normalised, and rewritten if the mode rewrites."""
    plan: RewritePlan
    summaries: tuple[SiteSummary, ...]
    rewritten: tuple[str, ...]
    """Names of the rewritten sites, one per call."""
    assumed: tuple[Tensor, ...]
    """Buffers whose values the mask proofs used: the rewritten graph is right while they keep
    them."""
    timings: dict[str, float]
    """Seconds per pass."""


@dataclass(eq=False)
class _Run:
    """State of one run: the current graph, and what each pass took."""

    graph_module: GraphModule
    options: PipelineOptions
    timings: dict[str, float] = field(default_factory=dict)

    def step(self, name: str, action: Callable[[], Any]) -> Any:
        """Run one pass: dump, time, and on failure say which pass it was."""
        self._dump(name, "before")
        start = time.perf_counter()
        try:
            result = action()
        except PassError:
            raise
        except Exception as cause:
            raise PassError(
                f"pass {name!r} failed: {type(cause).__name__}: {cause}", context={"pass": name}
            ) from cause
        if isinstance(result, GraphModule):
            self.graph_module = result
        if isinstance(result, PassResult) and result.rewritten:
            self.graph_module.graph.lint()
            self.graph_module.recompile()
        self.timings[name] = time.perf_counter() - start
        logger.debug("pass %s took %.1f ms", name, 1e3 * self.timings[name])
        self._dump(name, "after")
        return result

    def rewrite(self, name: str, action: Callable[[], PassResult]) -> tuple[str, ...]:
        """Run one pass that changes the graph, unless it is disabled."""
        if name in self.options.disabled:
            return ()
        return self.step(name, action).rewritten

    def _dump(self, name: str, moment: str) -> None:
        if name not in self.options.dump or self.options.dump_directory is None:
            return
        directory = Path(self.options.dump_directory)
        directory.mkdir(parents=True, exist_ok=True)
        number = len(list(directory.glob("*.py")))
        text = self.graph_module.print_readable(print_output=False)
        (directory / f"{number:03d}_{moment}_{name}.py").write_text(text)


def run(
    graph_module: GraphModule,
    *,
    names: SiteNames,
    mode: Mode = Mode.SPARSE,
    gates: GateSource | GateStore | None = None,
    handler: CurrentHandler | None = None,
    example_inputs: Sequence[Any] | None = None,
    options: PipelineOptions | None = None,
) -> PipelineResult:
    """Find the attention of a graph and rewrite what can be rewritten.

    Args:
        graph_module: A captured graph; not changed when ``example_inputs`` are given, rewritten
            in place otherwise.
        names: Names modules.
        mode: What becomes of the sites.
        gates: Where gates come from; needed for :attr:`Mode.SPARSE`.
        handler: Returns the current handler; needed for :attr:`Mode.HANDLER`.
        example_inputs: What Dynamo hands to a backend; its graph is normalised first. None for a
            graph of ``torch.export``, which is normal already.
        options: How to run.

    Raises:
        PassError: A pass failed; the original graph is untouched if it was Dynamo's.
    """
    _check_request(mode, gates, handler)
    source = StoreGates(gates) if isinstance(gates, GateStore) else gates
    current = _Run(graph_module, options or PipelineOptions())
    current.step("inline_bodies", lambda: inline_bodies(graph_module))
    if example_inputs is not None:
        current.step("normalise", lambda: normalise(current.graph_module, example_inputs))
    sites = current.step("find_sites", lambda: find_sites(current.graph_module, names))
    constants = module_constants(current.graph_module, example_inputs or (), names.root)
    proofs = current.step(
        "prove_masks", lambda: prove_masks(current.graph_module, sites, constants)
    )
    decided = current.step(
        "plan",
        lambda: plan(
            sites,
            proofs,
            gates=source if mode is Mode.SPARSE else None,
            exclude=current.options.exclude,
        ),
    )
    summaries = tuple(summarise(decision) for decision in decided.decisions)
    rewritten: tuple[str, ...] = ()
    if mode is not Mode.DISCOVER and decided.sparse:
        before = calling_convention(current.graph_module)
        rewritten = _rewrite(current, decided, mode, source, handler)
        _finish(current, decided, rewritten, before, mode)
    return PipelineResult(
        graph_module=current.graph_module if rewritten else graph_module,
        planned=current.graph_module,
        plan=decided,
        summaries=summaries,
        rewritten=rewritten,
        assumed=_assumed_values(decided, constants) if rewritten else (),
        timings=current.timings,
    )


def _assumed_values(decided: RewritePlan, constants: Mapping[Node, Tensor]) -> tuple[Tensor, ...]:
    names = {name for decision in decided.sparse for name in decision.proof.constants}
    return tuple(tensor for node, tensor in constants.items() if node.name in names)


def _rewrite(
    current: _Run,
    decided: RewritePlan,
    mode: Mode,
    source: GateSource | None,
    handler: CurrentHandler | None,
) -> tuple[str, ...]:
    graph_module = current.graph_module
    if mode is Mode.HANDLER and handler is not None:
        return current.rewrite("handle_sites", lambda: handle_sites(graph_module, decided, handler))
    if source is None or {"insert_gates", "replace_attention"} & set(current.options.disabled):
        return ()
    current.rewrite("insert_gates", lambda: insert_gates(graph_module, decided, source))
    replaced = current.rewrite(
        "replace_attention", lambda: replace_attention(graph_module, decided)
    )
    current.rewrite("lower", lambda: lower(graph_module, current.options.suffix))
    return replaced


def _finish(
    current: _Run,
    decided: RewritePlan,
    rewritten: tuple[str, ...],
    before: CallingConvention,
    mode: Mode,
) -> None:
    if not rewritten:
        return
    graph_module, disabled = current.graph_module, current.options.disabled
    current.rewrite("remove_dead", lambda: remove_dead(graph_module))
    if "verify" not in disabled and "remove_dead" not in disabled:
        is_lowered = mode is Mode.SPARSE and "lower" not in disabled
        current.step(
            "verify",
            lambda: verify(graph_module, decided, rewritten, before, is_lowered=is_lowered),
        )
    current.rewrite("outline_bodies", lambda: outline_bodies(graph_module))


def _check_request(mode: Mode, gates: Any, handler: Any) -> None:
    if mode is Mode.SPARSE and gates is None:
        raise SeerInputError(argument="gates", got=None, expected="a store in mode SPARSE")
    if mode is Mode.HANDLER and handler is None:
        raise SeerInputError(argument="handler", got=None, expected="a callable in mode HANDLER")
