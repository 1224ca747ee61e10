"""``export``: a program for another process, attention sparse, budgets still a knob.

``torch.export.export`` on an optimized model would quietly give the dense one, because it traces
the plain forward. Here the plain forward is exported, its graph rewritten, and exported again.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from seer_compile.backend import reject_unexpected, warn_if_uncalibrated
from seer_compile.called_model import called_model
from seer_compile.errors import ExportError, ModelStateError
from seer_compile.gate_store import GateStore
from seer_compile.graph_log import GraphLog, GraphRecord
from seer_compile.provenance import warn_if_stale
from seer_compile.session import STORE_NAME, Session, device_of, find_session, unplugged

_METADATA = f"{STORE_NAME}.metadata"


def export(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    gates: str | os.PathLike[str] | None = None,
) -> ExportedProgram:
    """Export a model with its gates.

    The program can be saved, loaded where this package is imported, and compiled by AOTInductor.
    Its budgets are buffers: :func:`set_budget` works on the program and on its module.

    Args:
        model: An optimized model; or any module, when ``gates`` are given. Taken from under
            ``torch.compile`` and data-parallel wrappers.
        args: Positional arguments to trace with, a tuple.
        kwargs: Keyword arguments to trace with.
        dynamic_shapes: As of ``torch.export.export``.
        gates: Gate file to use in place of the model's own gates.

    Returns:
        The program. Weights are shared with the model, gates are copied.

    Raises:
        ModelStateError: The model is not optimized and no gates are given; or a part of it is
            optimized and the model is not.
        ExportError: The model cannot be exported; the cause tells why.
        SiteRejectedError: The model was optimized strictly and a site stays dense unexpectedly;
            where all do, NothingOptimizedError.
        GateFileError: The gate file does not fit.

    Warns:
        DenseFallbackWarning: A site stays dense, or the gates are not calibrated.
        StaleGatesWarning: The model is no longer the one that its gates were calibrated on.
    """
    model = called_model(model)
    session = find_session(model)
    store = _store_for(model, session, gates)
    keywords = dict(kwargs or {})
    with unplugged(model):
        plain = _export(model, tuple(args), keywords, dynamic_shapes, what="the model")
    module = plain.module(check_guards=False)
    rewritten = _rewrite(module, store, session)
    return _export(rewritten, tuple(args), keywords, dynamic_shapes, what="the rewritten graph")


def exported_store(target: Any) -> GateStore | None:
    """Return a store over the budgets of an exported program or of its module, else None.

    Writing budgets into the store writes them into the program.
    """
    if isinstance(target, ExportedProgram):
        tensors: dict[str, Any] = dict(target.state_dict)
    elif isinstance(target, GraphModule):
        tensors = dict(target.named_buffers())
    else:
        return None
    metadata = tensors.get(_METADATA)
    if metadata is None:
        return None
    store = GateStore()
    store.rebuild(json.loads(bytes(metadata.tolist())), "cpu")
    for path, gate in store.named_modules(prefix=STORE_NAME):
        for name in ("budget", "mode"):
            held = tensors.get(f"{path}.{name}")
            if held is not None:
                gate._buffers[name] = held
    return store


def _store_for(
    model: nn.Module, session: Session | None, gates: str | os.PathLike[str] | None
) -> GateStore:
    if gates is not None:
        from seer_compile.calibration import storage

        store = GateStore().to(device_of(model))
        exclude = session.options.exclude if session is not None else ()
        storage.load_gates(store, gates, model=storage.fingerprint(model), exclude=exclude)
        store.set_mode(True)
        return store.requires_grad_(False)
    if session is None:
        raise ModelStateError(
            f"{type(model).__name__} is not optimized and no gates are given",
            hint="Call seer_compile.optimize(model) first, or pass gates=FILE.",
        )
    warn_if_stale(session.provenance, session.model)
    return copy.deepcopy(session.store)


def _rewrite(module: Any, store: GateStore, session: Session | None) -> GraphModule:
    from seer_compile.passes import pipeline
    from seer_compile.passes.gate_source import StoreGates
    from seer_compile.passes.site_names import SiteNames

    options = session.options if session is not None else None
    may_create = not store.is_calibrated
    result = pipeline.run(
        module,
        names=SiteNames(None),
        gates=StoreGates(store, may_create=may_create),
        options=pipeline.PipelineOptions(exclude=options.exclude if options else ()),
    )
    if options is not None and options.strict:
        reject_unexpected(result.summaries)
    log = GraphLog()
    log.add(GraphRecord(sites=result.summaries, seconds=result.timings))
    if result.rewritten:
        warn_if_uncalibrated(store, log)
        owner = result.graph_module.get_submodule(STORE_NAME)
        store.write_metadata()
        owner.register_buffer("metadata", store.metadata.clone())
    return result.graph_module


def _export(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic_shapes: Any,
    *,
    what: str,
) -> ExportedProgram:
    """Export, with shape relations as guards if they can be, as run-time assertions if not."""
    failures = []
    for defers in (False, True):
        try:
            return torch.export.export(
                module,
                args,
                kwargs,
                dynamic_shapes=dynamic_shapes,
                prefer_deferred_runtime_asserts_over_guards=defers,
            )
        except Exception as cause:
            failures.append(cause)
    first = failures[0]
    raise ExportError(
        f"{what} could not be exported: {type(first).__name__}: {first}",
        hint="Outputs must be tensors (for Hugging Face models pass kwargs={'use_cache': False}) "
        "and lengths must be dynamic where they vary.",
    ) from first


__all__ = ["export", "exported_store"]
