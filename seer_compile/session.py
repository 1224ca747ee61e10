"""What :func:`seer_compile.optimize` attaches to a model, and how it comes off again.

Attached are: the store of the gates as submodule ``seer_gates``, this session, ``seer_report``,
a compiled call and forward, and hooks that leave the gates out of the model's state dict and look
at weights that are loaded. A copy or an unpickled model carries a session of its own, bound to it,
with a store of its own.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from seer_compile.backend import BackendOptions, SeerBackend
from seer_compile.config import GateConfig
from seer_compile.direct_forward import attach_forwards, detach_forwards
from seer_compile.errors import DtypeError, ModelStateError
from seer_compile.gate_store import GateStore
from seer_compile.generation import attach_masks, detach_masks, entry_modules
from seer_compile.graph_log import GraphLog
from seer_compile.kernels import counters
from seer_compile.provenance import Provenance, look_after_loading
from seer_compile.site_runner import SiteRunner, WeakBackend, compiled_entry
from seer_compile.types import SiteHandler

STORE_NAME = "seer_gates"
_SESSION = "_seer_session"
_REPORT = "seer_report"
_COMPILED = "_compiled_call_impl"
_CALL = "_call_impl"
_DDP_IGNORED = "_ddp_params_and_buffers_to_ignore"


class Session:
    """The state of one optimized model.

    Args:
        model: The model, held weakly.
        store: Its gates.
        options: How its graphs are rewritten and compiled.
    """

    def __init__(self, model: nn.Module, store: GateStore, options: BackendOptions) -> None:
        self.store = store
        self.options = options
        self.provenance = Provenance()
        self.distillations = 0
        """How often the gates' loss was asked for; draws other rows each time."""
        entries = entry_modules(model)
        self.previous_calls = [entry.__dict__.get(_COMPILED) for entry in entries]
        self._bind(entries)
        attach_forwards(entries, self)

    def _bind(self, entries: Sequence[nn.Module]) -> None:
        self._entries = [weakref.ref(entry) for entry in entries]
        self.log = GraphLog()
        self._runner: SiteRunner | None = None
        self.number = next(n for n in itertools.count(1) if n not in _LIVE)
        _LIVE[self.number] = self
        self.store.watch(self._renew_graphs)
        self.calls_before: dict[str, dict[str, int]] = counters.snapshot()
        """Counts of calls that are not this model's, or were made to train it."""
        self.renew()

    @property
    def model(self) -> nn.Module:
        """The model that this session is attached to."""
        return self.entries[0]

    @property
    def entries(self) -> list[nn.Module]:
        """The modules whose calls are compiled; the first is the model."""
        entries = [entry for reference in self._entries if (entry := reference()) is not None]
        if len(entries) < len(self._entries):
            raise ModelStateError("the optimized model no longer exists")
        return entries

    def renew(self) -> None:
        """Compile the model's call anew: the next call captures graphs afresh."""
        self.backend = SeerBackend(
            self.store, root=self.model, options=self.options, log=self.log, suffix=self.suffix
        )
        backend = WeakBackend(self.backend)
        self.forwards: dict[int, Callable[..., Any]] = {}
        for number, entry in enumerate(self.entries):
            is_inner = entry is not self.model
            compiled = functools.partial(compiled_entry, entry, backend, is_inner=is_inner)
            entry.__dict__[_COMPILED] = functools.partial(compiled(), entry)
            self.forwards[number] = compiled(is_forward=True)
        # Dynamo would trace a surrounding torch.compile straight into forward, past the compiled
        # call; a call implementation of the instance's own makes it go through the call.
        model = self.model
        model.__dict__[_CALL] = functools.partial(type(model)._call_impl, model)

    def _renew_graphs(self) -> None:
        """Compile anew where graphs of a model that is still optimized hold replaced gates."""
        model = self._entries[0]()
        if self.log.records and model is not None and find_session(model) is self:
            self.renew()

    @property
    def suffix(self) -> str:
        """What tells this model's calls from those of others that are optimized now."""
        return "" if self.number == 1 else f"@{self.number}"

    def unplug(self) -> None:
        """Give every entry the call and the forward back that it had."""
        self.forwards.clear()
        detach_forwards(self.entries)
        self.model.__dict__.pop(_CALL, None)
        for entry, previous in zip(self.entries, self.previous_calls, strict=True):
            entry.__dict__.pop(_COMPILED, None)
            if previous is not None:
                entry.__dict__[_COMPILED] = previous

    def runner(self) -> SiteRunner:
        """Return what runs the model with handlers; its graphs are kept."""
        if self._runner is None:
            self._runner = SiteRunner(self.model, "handler", self.options.exclude)
        return self._runner

    @contextlib.contextmanager
    def uncounted(self) -> Iterator[None]:
        """Leave the calls made in the block out of the report, of this model and of others.

        What runs a model with handlers counts under plain site names, which another has as well.
        """
        before = counters.snapshot()
        try:
            yield
        finally:
            for site, paths in counters.snapshot().items():
                for path, number in paths.items():
                    new = number - before.get(site, {}).get(path, 0)
                    for session in {self, *_LIVE.values()}:
                        known = session.calls_before.setdefault(site, {})
                        known[path] = known.get(path, 0) + new

    def calls(self, site: str) -> dict[str, int]:
        """Return how many calls of a site took which path since it was optimized."""
        site += self.suffix
        before, now = self.calls_before.get(site, {}), counters.snapshot().get(site, {})
        counts = {path: number - before.get(path, 0) for path, number in now.items()}
        return {path: number for path, number in counts.items() if number > 0}

    @contextlib.contextmanager
    def gates_may_change(self) -> Iterator[None]:
        """Renew the compiled call afterwards if graphs hold gates that no longer count."""
        before = self._signature()
        try:
            yield
        finally:
            self.store.requires_grad_(False)
            if self._signature() != before:
                self._renew_graphs()

    def _signature(self) -> dict[str, tuple[int, str]]:
        return {name: (id(gate), repr(gate.constants())) for name, gate in self.store.items()}

    def __getstate__(self) -> dict[str, Any]:
        """Keep what a copy needs; compiled code, logs and runners are made anew."""
        return {
            "entries": self.entries,
            "store": self.store,
            "options": self.options,
            "provenance": self.provenance,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.store, self.options = state["store"], state["options"]
        self.provenance = state["provenance"]
        self.distillations = 0
        self.previous_calls = [None] * len(state["entries"])
        self._bind(state["entries"])


_LIVE: weakref.WeakValueDictionary[int, Session] = weakref.WeakValueDictionary()


class ReportCall:
    """``model.seer_report()``: the report of the model that it is attached to."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def __call__(self) -> Any:
        """Return a :class:`seer_compile.report.SeerReport`."""
        from seer_compile.report import build_report

        return build_report(self.session)


class GateTensorNames:
    """Names that ``DistributedDataParallel`` leaves alone: the gates', and the model's own list.

    Gates get no gradient from the model's loss, and their mode stays on the CPU, where some
    collectives cannot reach it.
    """

    def __init__(self, store: GateStore, others: Sequence[str] | None) -> None:
        self.store, self.others = store, others

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names that exist now."""
        yield from self.others or ()
        for name in self.store.state_dict(keep_vars=True):
            yield f"{STORE_NAME}.{name}"


def attach(model: nn.Module, config: GateConfig | None, options: BackendOptions) -> Session:
    """Attach a store and a session to a model and compile its call.

    Raises:
        ModelStateError: The model or a part of it is optimized already, or uses one of the names.
    """
    if find_session(model) is not None:
        raise ModelStateError(
            "the model is optimized already",
            hint="Call seer_compile.restore(model) first to change the configuration.",
        )
    parts = optimized_parts(model)
    if parts:
        raise ModelStateError(
            f"parts of {type(model).__name__} are optimized already: {list(parts)}",
            hint="A part keeps gates and graphs of its own; restore it to optimize the whole.",
        )
    taken = [name for name in (STORE_NAME, _SESSION, _REPORT) if hasattr(model, name)]
    if taken:
        raise ModelStateError(f"{type(model).__name__} has attributes of its own named {taken}")
    store = GateStore(config)
    store.to(device_of(model))
    session = Session(model, store, options)
    model.add_module(STORE_NAME, store)
    model.__dict__[_SESSION] = session
    model.__dict__[_REPORT] = ReportCall(session)
    model._register_state_dict_hook(leave_gates_out)
    model.register_load_state_dict_post_hook(look_after_loading)
    for entry in session.entries:
        attach_masks(entry)
    ignored = model.__dict__.get(_DDP_IGNORED)
    model.__dict__[_DDP_IGNORED] = GateTensorNames(store, ignored)
    return session


def detach(model: nn.Module) -> None:
    """Take off everything that :func:`attach` put on; the model is as it was."""
    session = require_session(model)
    del model._modules[STORE_NAME]
    session.unplug()
    for name in (_SESSION, _REPORT):
        model.__dict__.pop(name, None)
    for entry in session.entries:
        detach_masks(entry)
    ignored = model.__dict__.pop(_DDP_IGNORED, None)
    if isinstance(ignored, GateTensorNames) and ignored.others is not None:
        model.__dict__[_DDP_IGNORED] = ignored.others
    for hooks in (model._state_dict_hooks, model._load_state_dict_post_hooks):
        ours = [key for key, hook in hooks.items() if hook in (leave_gates_out, look_after_loading)]
        for key in ours:
            del hooks[key]


def check_module(model: Any) -> None:
    """Raise a DtypeError for what is no module."""
    if not isinstance(model, nn.Module):
        raise DtypeError(argument="model", got=type(model).__name__, expected="a torch.nn.Module")


def find_session(model: nn.Module) -> Session | None:
    """Return the session of a model, or None where it is not optimized."""
    session = model.__dict__.get(_SESSION)
    return session if isinstance(session, Session) else None


def require_session(model: Any) -> Session:
    """Return the session of a model, looking through compile and data-parallel wrappers.

    Raises:
        ModelStateError: The model is not optimized, or several of its parts are, each for itself.
    """
    parts = optimized_parts(model) if isinstance(model, nn.Module) else {}
    if "" in parts:
        return parts[""]
    if not parts:
        raise ModelStateError(
            f"{type(model).__name__} is not optimized",
            hint="Call seer_compile.optimize(model) first.",
        )
    if len(parts) > 1:
        raise ModelStateError(
            f"{type(model).__name__} has several optimized parts: {list(parts)}",
            hint="Name the part that is meant.",
        )
    return next(iter(parts.values()))


def optimized_parts(model: nn.Module) -> dict[str, Session]:
    """Return the sessions of a model and of its parts, by name."""
    found = ((name, find_session(part)) for name, part in model.named_modules())
    return {name: session for name, session in found if session is not None}


@contextlib.contextmanager
def unplugged(model: nn.Module) -> Iterator[None]:
    """Take the gates and the compiled call off an optimized model for a while, in place."""
    session = find_session(model)
    if session is None:
        yield
        return
    modules = dict(model._modules)
    forwards = dict(session.forwards)
    session.forwards.clear()
    compiled = [(entry, entry.__dict__[_COMPILED]) for entry in session.entries]
    for entry, _ in compiled:
        entry.__dict__[_COMPILED] = None
    del model._modules[STORE_NAME]
    try:
        yield
    finally:
        model._modules.clear()
        model._modules.update(modules)
        for entry, call in compiled:
            entry.__dict__[_COMPILED] = call
        session.forwards.update(forwards)


def run_with_handler(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], handler: SiteHandler
) -> Any:
    """Run a forward of the original model with every provable site answered by a handler.

    Args:
        model: An optimized model or any other; its training mode stays.
        args: Positional arguments.
        kwargs: Keyword arguments.
        handler: Called once per site in every forward, with tensors; returns the site's output.

    Returns:
        What the model returns. No gradients are recorded outside of the handler.

    Raises:
        PassError: A pass failed.

    Cost:
        The first call of a kind captures a graph (about 0.1 s per layer); later calls, of any
        length, run it.
    """
    return runner_of(model).run(model, args, kwargs, handler)


_RUNNERS: weakref.WeakKeyDictionary[nn.Module, SiteRunner] = weakref.WeakKeyDictionary()


def runner_of(model: nn.Module) -> SiteRunner:
    """Return the runner of a model; one is kept per model for as long as the model lives."""
    session = find_session(model)
    if session is not None:
        return session.runner()
    if model not in _RUNNERS:
        _RUNNERS[model] = SiteRunner(model, "handler")
    return _RUNNERS[model]


def leave_gates_out(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any
) -> None:
    """State-dict hook: the base model is written as it was; gates have a file of their own."""
    del module, local_metadata
    gates = f"{prefix}{STORE_NAME}."
    for key in [key for key in state_dict if key.startswith(gates)]:
        del state_dict[key]
    metadata = getattr(state_dict, "_metadata", {})
    for key in [key for key in metadata if f"{key}.".startswith(gates)]:
        del metadata[key]


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter or buffer; the CPU where there is none."""
    tensors = [*model.parameters(), *model.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode, and each back as it was."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training
