"""The Dynamo backend: captured graph in, graph with gated attention compiled by Inductor out.

``torch.compile(model, backend="seer")`` reaches :func:`seer` through an entry point, without
anyone importing this package; :func:`seer_compile.optimize` uses :class:`SeerBackend`.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn
from torch.fx import GraphModule

from seer_compile.assumed_buffers import AssumedBuffers, guarded
from seer_compile.config import GateConfig
from seer_compile.errors import (
    DtypeError,
    NothingOptimizedError,
    SeerInputError,
    SiteRejectedError,
)
from seer_compile.gate_store import GateStore
from seer_compile.graph_log import GraphLog, GraphRecord, is_unexpected
from seer_compile.inner import (
    InnerCompiler,
    check_inner,
    compile_graph,
    hold_gates_apart,
    inductor_mode,
)
from seer_compile.types import SiteSummary

if TYPE_CHECKING:
    from seer_compile.passes.pipeline import PipelineResult

logger = logging.getLogger(__name__)

UNCALIBRATED = (
    "the gates are not calibrated, so every site is answered densely. Call "
    "seer_compile.calibrate or seer_compile.load_gates, or pass zero_shot=True to let untrained "
    "gates answer."
)

UNCOMPILED = (
    "PyTorch ran a whole call uncompiled, with dense attention. It does so in torch.func "
    "transforms, under torch.compiler.set_stance and TORCHDYNAMO_DISABLE, and at "
    "torch._dynamo.config.recompile_limit."
)


@dataclass(frozen=True, kw_only=True)
class BackendOptions:
    """How graphs are rewritten and compiled."""

    inner: InnerCompiler = "inductor"
    strict: bool = False
    """Raise where a pass fails or a site stays dense unexpectedly."""
    zero_shot: bool = False
    """Let gates answer that were never trained."""
    exclude: tuple[str, ...] = ()
    """Shell patterns of site names that stay dense."""
    disabled_passes: tuple[str, ...] = ()
    dump_passes: tuple[str, ...] = ()
    """Passes around which graphs are written to ``dump_directory``."""
    dump_directory: str | None = None


def as_names(argument: str, given: Any) -> tuple[str, ...]:
    """Return several names as a tuple.

    Raises:
        DtypeError: It is something else, or one text, whose letters would count as names.
    """
    names: tuple[Any, ...] = (None,)
    if isinstance(given, Iterable) and not isinstance(given, str):
        names = tuple(given)
    if not all(isinstance(name, str) for name in names):
        raise DtypeError(argument=argument, got=given, expected="a tuple or list of texts")
    return names


CHANGED_BUFFER = (
    "a buffer that an attention mask is made of has other values than when the graph was "
    "compiled, so the graph runs as it came, with dense attention."
)


class SeerBackend:
    """Rewrites the graphs of one model. Calling it again with the same graph changes nothing more.

    Args:
        store: Owner of the gates.
        root: The model, held weakly; names sites. None where it is unknown.
        options: How to rewrite and compile.
        log: Receives one record per graph.
        settings: Inductor settings for the graphs of this backend.
        suffix: Appended to the site names under which calls are counted.
    """

    def __init__(
        self,
        store: GateStore,
        *,
        root: nn.Module | None = None,
        options: BackendOptions | None = None,
        log: GraphLog | None = None,
        settings: Mapping[str, Any] | None = None,
        suffix: str = "",
    ) -> None:
        self.store = store
        self.suffix = suffix
        self.options = options or BackendOptions()
        check_inner(self.options.inner)
        self.log = log or GraphLog()
        self.settings = dict(settings or {})
        self._root = None if root is None else weakref.ref(root)

    def compile(
        self, graph_module: GraphModule, example_inputs: Sequence[Any]
    ) -> Callable[..., Any]:
        """Compile one graph; where a pass fails, as it came.

        Raises:
            PassError: In strict mode, a pass failed.
            SiteRejectedError: In strict mode, a site stays dense unexpectedly.

        Warns:
            DenseFallbackWarning: Something stays dense; once per site and reason.
        """
        result = self._rewrite(graph_module, example_inputs)
        if result is None or not result.rewritten:
            inner, settings = self.options.inner, self.settings
            return compile_graph(graph_module, example_inputs, inner, settings=settings)
        from seer_compile.passes.frames import pin_frame

        pin_frame(graph_module)
        hold_gates_apart(result.graph_module)
        compiled = compile_graph(
            result.graph_module,
            example_inputs,
            self.options.inner,
            settings=self.settings,
            identity=repr(self.store.config),
        )
        if not result.assumed:
            return compiled
        buffers = AssumedBuffers(result.assumed, example_inputs)
        return guarded(compiled, buffers, self._as_it_came(graph_module))

    __call__ = compile

    def note_uncompiled(self) -> None:
        """Count a call that went past all graphs.

        Warns:
            DenseFallbackWarning: The first time.
        """
        self.log.uncompiled_calls += 1
        self.log.warn_once("", UNCOMPILED)

    def _as_it_came(self, graph_module: GraphModule) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            self.log.warn_once("", CHANGED_BUFFER)
            return graph_module(*args)

        return run

    def _rewrite(
        self, graph_module: GraphModule, example_inputs: Sequence[Any]
    ) -> PipelineResult | None:
        # Inside the function: the passes are needed by those who compile only.
        from seer_compile.passes import pipeline
        from seer_compile.passes.frames import frame_name
        from seer_compile.passes.site_names import SiteNames

        root = self._root() if self._root is not None else None
        try:
            result = pipeline.run(
                graph_module,
                names=SiteNames(root, frame_name(graph_module, example_inputs, root)),
                gates=self._gates(),
                example_inputs=example_inputs,
                options=pipeline.PipelineOptions(
                    disabled=self.options.disabled_passes,
                    exclude=self.options.exclude,
                    suffix=self.suffix,
                    dump=self.options.dump_passes,
                    dump_directory=self.options.dump_directory,
                ),
            )
        except Exception as cause:
            if self.options.strict:
                raise
            logger.warning("a pass failed; compiling the graph as it came", exc_info=True)
            text = f"{type(cause).__name__}: {cause}"
            self.log.add(GraphRecord(sites=(), seconds={}, error=text))
            return None
        if self.options.strict:
            reject_unexpected(result.summaries)
        self.log.add(GraphRecord(sites=result.summaries, seconds=result.timings))
        if result.rewritten:
            warn_if_uncalibrated(self.store, self.log)
        return result

    def _gates(self) -> Any:
        from seer_compile.passes.gate_source import StoreGates

        may_create = self.options.zero_shot or not self.store.is_calibrated
        return StoreGates(self.store, may_create=may_create)


def warn_if_uncalibrated(store: GateStore, log: GraphLog) -> None:
    """Warn once where no gate of a rewritten graph answers, as none was trained."""
    answers = any(int(gate.mode) for _, gate in store.items())
    # Calibrated gates that are switched off are the caller's wish, and no surprise.
    if not answers and not store.is_calibrated:
        log.warn_once("", UNCALIBRATED)


def reject_unexpected(sites: Sequence[SiteSummary]) -> None:
    """Raise where a site stays dense though nobody asked for it and sparsity could have paid."""
    dense = [site for site in sites if is_unexpected(site)]
    if not dense:
        return
    listed = "; ".join(f"{site.name}: {site.reason}" for site in dense)
    text = f"{len(dense)} of {len(sites)} attention sites stay dense: {listed}"
    hint = "Pass strict=False to leave them dense, or exclude them by name."
    if len(dense) == len(sites):
        raise NothingOptimizedError(text, hint=hint)
    raise SiteRejectedError(text, hint=hint)


OPTION_NAMES = frozenset(
    {"gates", "config", "zero_shot", "strict", "inner", "root", "exclude"}
    | {"disabled_passes", "dump_passes", "dump_directory"}
)
_TUPLE_OPTIONS = ("exclude", "disabled_passes", "dump_passes")


def seer(
    graph_module: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile one graph for ``torch.compile(model, backend="seer", options={...})``.

    Args:
        graph_module: What Dynamo captured.
        example_inputs: One value per placeholder.
        options: ``gates``: a gate file or a store; a file written anew is loaded for graphs
            captured from then on, and ``torch._dynamo.reset()`` has all captured anew.
            ``config``: a :class:`GateConfig` for new gates. ``root``: the model, so that sites
            keep their names across graph breaks. ``zero_shot``, ``strict``, ``inner``,
            ``exclude``, ``disabled_passes``, ``dump_passes``, ``dump_directory``: see
            :class:`BackendOptions`.
        mode: As of ``torch.compile``, for Inductor.

    Returns:
        The compiled graph.

    Raises:
        SeerInputError: An option does not exist.
        GateFileError: The gate file cannot be used. Its sites and sizes are checked, the model's
            weights are not: a bare backend does not see the model.
    """
    given = dict(options or {})
    unknown = sorted(set(given) - OPTION_NAMES)
    if unknown:
        raise SeerInputError(
            argument="options", got=unknown, expected=f"keys out of {sorted(OPTION_NAMES)}"
        )
    return _BACKENDS.get(graph_module, example_inputs, given, mode)(graph_module, example_inputs)


def _bare_backend(given: Mapping[str, Any], mode: str | None) -> SeerBackend:
    fields: dict[str, Any] = {
        name: as_names(name, value) if name in _TUPLE_OPTIONS else value
        for name, value in given.items()
        if name not in ("gates", "config", "root")
    }
    options = BackendOptions(**fields)
    store = _store_for(given.get("gates"), given.get("config"), options.exclude)
    if options.zero_shot and not store.is_calibrated:
        store.set_mode(True, untrained=True)
    return SeerBackend(store, root=given.get("root"), options=options, settings=inductor_mode(mode))


class _Known(NamedTuple):
    """A backend, the parameter that it lives as long as, and the gate file that it has loaded."""

    anchor: weakref.ref[Any]
    file_version: tuple[int, ...] | None
    backend: SeerBackend


class _Backends:
    """The backends of models that are compiled without :func:`seer_compile.optimize`.

    A model is known by the identity of its outermost module while one of its parameters lives.
    Graphs without parameters get a store each: new gates depend on names and configuration only.
    A gate file that was written anew is loaded anew, for the graphs captured from then on.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[tuple[Any, ...], _Known] = {}

    def get(
        self,
        graph_module: GraphModule,
        example_inputs: Sequence[Any],
        given: Mapping[str, Any],
        mode: str | None,
    ) -> SeerBackend:
        """Return the backend of the model that a graph was captured from."""
        anchor = next((item for item in example_inputs if isinstance(item, nn.Parameter)), None)
        owner = _outermost_module(graph_module)
        if anchor is None or owner is None:
            return _bare_backend(given, mode)
        key = (owner, mode, *((name, _identity(given[name])) for name in sorted(given)))
        with self._lock:
            known = self._known.get(key)
            # Before the file is read: one that changes in between is loaded again next time.
            version = _file_version(given.get("gates"))
            if known is None or known.anchor() is None or known.file_version != version:
                forget = weakref.ref(anchor, lambda _: self._known.pop(key, None))
                backend = _bare_backend(given, mode)
                known = self._known[key] = _Known(forget, version, backend)
            return known.backend


_BACKENDS = _Backends()


def _identity(option: Any) -> Any:
    return id(option) if isinstance(option, nn.Module) else repr(option)


def _file_version(gates: Any) -> tuple[int, ...] | None:
    """Return what changes with the content of a gate file; None for a store or a missing file."""
    if not isinstance(gates, str | os.PathLike):
        return None
    try:
        found = os.stat(gates)
    except OSError:
        return None  # reading it says what is wrong
    # With device and inode, a relative path is another file in another directory.
    return (found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size)


def _outermost_module(graph_module: GraphModule) -> str | None:
    for node in graph_module.graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if stack:
            return str(next(iter(stack))).partition("@")[0]
    return None


def _store_for(
    gates: str | os.PathLike[str] | GateStore | None,
    config: GateConfig | None,
    exclude: tuple[str, ...],
) -> GateStore:
    if isinstance(gates, GateStore):
        return gates
    store = GateStore(config)
    if gates is not None:
        from seer_compile.calibration import storage

        header = storage.describe_gates(gates)
        storage.load_gates(
            store, gates, model=header["model"], check_weights=False, exclude=exclude
        )
        store.requires_grad_(False)
        store.set_mode(True)
    return store
