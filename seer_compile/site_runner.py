"""Forwards of a model with its attention sites looked at or answered by Python.

The model's plain forward is captured by Dynamo, rewritten, and run node by node: nothing of it is
compiled further. Graphs are kept per model and serve all lengths.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import types
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.fx import GraphModule
from torch.nn.parallel import DistributedDataParallel

from seer_compile.assumed_buffers import AssumedBuffers, guarded
from seer_compile.callers import warn_caller
from seer_compile.direct_forward import DirectForward, running
from seer_compile.errors import DenseFallbackWarning, ModelStateError, SeerError
from seer_compile.generation import is_decoding_step
from seer_compile.graph_log import GraphRecord
from seer_compile.types import SiteHandler

_numbers = itertools.count()
_ran = threading.local()
_TAKEN_ELSEWHERE = (
    "PyTorch is at its limit of recompiles and answers with a graph that was made to calibrate or "
    "measure, so attention stays dense; raise torch._dynamo.config.recompile_limit."
)


def isolated_entry(model: nn.Module, *, is_forward: bool = False) -> Callable[..., Any]:
    """Return a function that calls the module it is given, with compiled graphs of its own.

    Or, for a forward, what stands in for it.

    Dynamo keeps graphs, and counts recompiles, per code object. ``nn.Module.compile`` goes through
    one that all modules share, where they use up each other's limit; this one belongs to one model
    and its graphs are freed with it.
    """

    def call(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        return type(module)._call_impl(module, *args, **kwargs)

    def forward(stand_in: DirectForward, /, *args: Any, **kwargs: Any) -> Any:
        return stand_in.plain(*args, **kwargs)

    code = (forward if is_forward else call).__code__
    name = f"seer_{type(model).__name__}_{next(_numbers)}"
    return types.FunctionType(code.replace(co_name=name), globals(), name)


class GraphOwner(Protocol):
    """Who rewrites and compiles graphs."""

    def compile(
        self, graph_module: GraphModule, example_inputs: Sequence[Any]
    ) -> Callable[..., Any]:
        """Return what runs instead of a graph."""
        ...

    def note_uncompiled(self) -> None:
        """Learn that PyTorch ran a whole call without any graph."""
        ...


class WeakBackend:
    """Calls a backend that someone else owns: Dynamo keeps every backend it has seen, for good."""

    def __init__(self, owner: GraphOwner) -> None:
        self._owner = weakref.ref(owner)

    def __call__(self, graph_module: GraphModule, example_inputs: Sequence[Any]) -> Any:
        """Compile a graph, or leave it as it came where the owner is gone."""
        owner = self._owner()
        if owner is None:
            return graph_module.forward
        compiled = owner.compile(graph_module, example_inputs)

        def run(*args: Any) -> Any:
            _ran.graphs = _graphs_run() + 1
            return compiled(*args)

        return run

    def note_uncompiled(self) -> None:
        """Tell the owner, if it still exists."""
        owner = self._owner()
        if owner is not None:
            owner.note_uncompiled()


def _changed_buffer(*_: Any) -> Any:
    raise ModelStateError(
        "a buffer that an attention mask is made of has other values than when the forward was "
        "captured",
        hint="Call seer_compile.restore(model) and optimize it again.",
    )


def _graphs_run() -> int:
    """Return how many compiled graphs this thread has run."""
    return getattr(_ran, "graphs", 0)


def compiled_entry(
    model: nn.Module, backend: WeakBackend, *, is_inner: bool = False, is_forward: bool = False
) -> Callable[..., Any]:
    """Return a compiled ``(module, *args, **kwargs)`` whose errors of ours arrive unwrapped.

    A surrounding ``torch.compile`` would trace through it and see plain attention, so it is made
    to break its graph here. Two calls are traced through: one decoding step, which is dense, and a
    call from within the compiled model, whose graph this backend rewrites anyway.
    """
    entry = torch.compile(isolated_entry(model, is_forward=is_forward), backend=backend)
    plain = DirectForward.plain if is_forward else type(model)._call_impl

    def compiled(*args: Any, **kwargs: Any) -> Any:
        before = _graphs_run()
        result = entry(*args, **kwargs)
        if _graphs_run() == before:
            backend.note_uncompiled()
        return result

    # A function of its own: disabling the compiled one would reach through to what it compiles.
    @torch.compiler.disable(reason="seer_compile compiles this call itself")  # type: ignore[call-arg]
    def apart(*args: Any, **kwargs: Any) -> Any:
        with running():
            return compiled(*args, **kwargs)

    def call(*args: Any, **kwargs: Any) -> Any:
        if _is_exporting():
            return _exported(plain, *args, **kwargs)
        if torch.compiler.is_dynamo_compiling():
            if is_inner or is_decoding_step(kwargs):
                return plain(*args, **kwargs)
            return apart(*args, **kwargs)
        try:
            with _one_graph_under_data_parallel(), running():
                return compiled(*args, **kwargs)
        except BackendCompilerFailed as failure:
            if isinstance(failure.inner_exception, SeerError):
                raise failure.inner_exception from failure
            raise

    return call


@torch.compiler.assume_constant_result
def _is_exporting() -> bool:
    """Whether ``torch.export`` runs; asked in Python, as Dynamo of torch 2.11 takes it for True."""
    return torch.compiler.is_exporting()


def _one_graph_under_data_parallel() -> contextlib.AbstractContextManager[Any]:
    """Keep Dynamo from cutting the graph at the gradient buckets of DistributedDataParallel.

    A mask that is made before a cut proves nothing behind it, and every site there would be dense.
    Gradients are reduced after the backward graph instead of during it. A choice of the user's
    (``python_reducer``) stays.
    """
    active = getattr(DistributedDataParallel, "_active_ddp_module", None)
    if active is None or torch._dynamo.config.optimize_ddp not in (True, "ddp_optimizer"):
        return contextlib.nullcontext()
    return torch._dynamo.config.patch(optimize_ddp=False)


def _exported(plain: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_dynamo_compiling():
        return plain(*args, **kwargs)
    warn_caller(
        "torch.export sees an optimized model with dense attention; seer_compile.export "
        "exports the sparse one.",
        DenseFallbackWarning,
    )
    with running():
        return plain(*args, **kwargs)


class SiteRunner:
    """Runs one model with a handler answering its sites, or with none to list them.

    Args:
        model: The model; not held by the runner.
        mode: ``handler`` or ``discover``: what the pipeline does to the graphs.
        exclude: Shell patterns of site names that stay as they are.
    """

    def __init__(self, model: nn.Module, mode: str, exclude: tuple[str, ...] = ()) -> None:
        self.mode, self.exclude = mode, exclude
        self.records: list[GraphRecord] = []
        self.results: list[Any] = []
        """What the pipeline returned per graph; kept in mode ``discover`` only."""
        self._root = weakref.ref(model)
        self._current = threading.local()
        self._running: set[int] = set()  # threads, by their number
        self._entry = compiled_entry(model, WeakBackend(self))

    def run(
        self,
        model: nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        handler: SiteHandler | None = None,
    ) -> Any:
        """Return what the model returns; without gradients.

        Raises:
            PassError: A pass failed.
            ModelStateError: The forward did not go through the rewritten graphs.
        """
        self._current.handler, self._current.sites = handler, 0
        self._running.add(threading.get_ident())
        try:
            with torch.no_grad():
                result = self._entry(model, *args, **kwargs)
            reached = self._current.sites
        finally:
            self._current.handler = None
            self._running.discard(threading.get_ident())
        has_sites = any(
            site.decision == "sparse" for record in self.records for site in record.sites
        )
        if self.mode == "handler" and has_sites and not reached:
            raise ModelStateError(
                "this forward reached no site, though the model has some",
                hint="Too many recompilations let PyTorch run the model uncompiled: see "
                "torch._dynamo.config.recompile_limit, and call with fewer distinct forms.",
            )
        return result

    def note_uncompiled(self) -> None:
        """Refuse a forward that no graph was captured from: nothing of it was looked at."""
        raise ModelStateError(
            "PyTorch ran this forward uncompiled, so its attention could not be looked at",
            hint="It does so in torch.func transforms, under torch.compiler.set_stance and "
            "TORCHDYNAMO_DISABLE, and at torch._dynamo.config.recompile_limit.",
        )

    def compile(
        self, graph_module: GraphModule, example_inputs: Sequence[Any]
    ) -> Callable[..., Any]:
        """Rewrite a graph for this runner; called by Dynamo."""
        from seer_compile.passes import pipeline
        from seer_compile.passes.frames import frame_name, pin_frame
        from seer_compile.passes.site_names import SiteNames

        root = self._root()
        result = pipeline.run(
            graph_module,
            names=SiteNames(root, frame_name(graph_module, example_inputs, root)),
            mode=pipeline.Mode(self.mode),
            handler=self._answerer,
            example_inputs=example_inputs,
            options=pipeline.PipelineOptions(exclude=self.exclude),
        )
        self.records.append(GraphRecord(sites=result.summaries, seconds=result.timings))
        if self.mode == "discover":
            self.results.append(result)
        if result.summaries:
            pin_frame(graph_module)
        if self.mode == "discover":
            return result.graph_module.forward
        rewritten = self._counting_sites(result.graph_module, len(result.summaries))
        if result.assumed:
            buffers = AssumedBuffers(result.assumed, example_inputs)
            rewritten = guarded(rewritten, buffers, _changed_buffer)
        return self._in_own_runs(rewritten, graph_module)

    def _counting_sites(self, rewritten: GraphModule, sites: int) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            self._current.sites = getattr(self._current, "sites", 0) + sites
            return rewritten.forward(*args)

        return run

    def _in_own_runs(self, rewritten: Callable[..., Any], plain: GraphModule) -> Callable[..., Any]:
        """Return a call of the rewritten graph, or of the plain one where this runs nothing.

        At its limit on recompiles Dynamo takes any graph whose guards hold, of whichever backend.
        """

        def run(*args: Any) -> Any:
            if self._running:
                return rewritten(*args)
            warn_caller(_TAKEN_ELSEWHERE, DenseFallbackWarning)
            return plain.forward(*args)

        return run

    def _answerer(self) -> SiteHandler:
        handler = getattr(self._current, "handler", None)
        if handler is None:
            raise ModelStateError("a graph with a site handler ran outside of its runner")
        return handler
