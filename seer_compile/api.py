"""The verbs on a model: optimize, calibrate, set a budget, save and load gates, report, restore."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from seer_compile.allocation import Allocation
from seer_compile.backend import BackendOptions, as_names
from seer_compile.config import CalibrationConfig, GateConfig
from seer_compile.errors import FeatureUnsupportedError, NotConvergedError, NothingOptimizedError
from seer_compile.inner import InnerCompiler
from seer_compile.provenance import Provenance, warn_if_stale
from seer_compile.session import (
    attach,
    check_module,
    detach,
    device_of,
    evaluation_mode,
    require_session,
    run_with_handler,
)
from seer_compile.types import SiteHandler, SiteInputs

if TYPE_CHECKING:
    from seer_compile.calibration.report import CalibrationReport
    from seer_compile.report import SeerReport

Model = TypeVar("Model", bound=nn.Module)


def optimize(
    model: Model,
    *,
    gates: str | os.PathLike[str] | None = None,
    config: GateConfig | None = None,
    example: Any = None,
    zero_shot: bool = False,
    strict: bool = False,
    inner: InnerCompiler = "inductor",
    exclude: Iterable[str] = (),
) -> Model:
    """Compile a model in place so that its attention can be block-sparse.

    The model keeps its class, signature, weights, hooks, ``generate`` and ``save_pretrained``;
    :func:`restore` undoes everything. Until :func:`calibrate` or :func:`load_gates`, and unless
    ``zero_shot`` is set, every site is answered densely.

    Calls, ``model.forward(...)`` and ``generate`` go through the rewritten graphs; other methods
    that compute on their own, such as ``get_text_features``, run as they came.

    Args:
        model: Any module.
        gates: Gate file to load.
        config: Shape of the gates and the selector; the measured best when None. A gate file
            brings its own.
        example: One input, as for calibration: a tensor, a tuple of positional arguments or a
            mapping of keyword arguments. Finds the sites now instead of in the first call.
        zero_shot: Let untrained gates answer: they rank blocks by mean-pooled queries and keys.
        strict: Raise where a pass fails or a site stays dense unexpectedly.
        inner: Who compiles the rewritten graph.
        exclude: Shell patterns of site names that stay dense.

    Returns:
        The same object.

    Raises:
        DtypeError: An argument has the wrong type.
        FeatureUnsupportedError: The model is a TorchScript module.
        ModelStateError: The model, or a part of it, is optimized already.
        NothingOptimizedError: In strict mode with an example: no site can be sparse.
        GateFileError: The gate file does not fit.

    Cost:
        None here without ``example``; capture and compilation happen in the first call.
    """
    check_module(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise FeatureUnsupportedError(
            "a TorchScript module cannot be captured", hint="Optimize the module it was made from."
        )
    options = BackendOptions(
        inner=inner, strict=strict, zero_shot=zero_shot, exclude=as_names("exclude", exclude)
    )
    session = attach(model, config, options)
    try:
        if gates is not None:
            load_gates(model, gates)
        elif zero_shot:
            session.store.set_mode(True, untrained=True)
        if example is not None:
            _create_gates(model, example, strict=strict)
    except BaseException:
        detach(model)
        raise
    return model


def restore(model: Model) -> Model:
    """Undo :func:`optimize`: attributes, state dict, compiled call and saved files are as before.

    Returns:
        The same object.

    Raises:
        ModelStateError: The model is not optimized.
    """
    detach(require_session(model).model)
    return model


def calibrate(
    model: nn.Module,
    data: Iterable[Any],
    *,
    config: CalibrationConfig | None = None,
    density: float | None = None,
    mass: float | None = None,
    max_error: float | None = None,
    latency: float | None = None,
    allocation: Allocation | None = None,
    curve_data: Iterable[Any] = (),
    checkpoint_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> CalibrationReport:
    """Train the gates of an optimized model, measure what budgets buy, and set one.

    The model itself is frozen: it runs in evaluation mode without gradients, and each gate learns
    from the queries and keys that pass by. Afterwards the gates answer.

    Args:
        model: An optimized model.
        data: Batches of inputs in a fixed order: tensors, tuples or mappings.
        config: How to train.
        density: Target share of the visible blocks to keep, in (0, 1].
        mass: Target share of the attention mass to capture at every site, in (0, 1]; 0.95 when no
            target is given.
        max_error: Target relative L2 error of a site's output, in (0, 1].
        latency: Target share of dense attention's time, in (0, 1]; see :func:`set_budget`.
        allocation: How sites share a density: ``uniform``, ``sensitivity``, ``searched``,
            ``equal_marginal`` or ``equal_budget``; None is the best that was measured.
        curve_data: More held-out batches on which budgets are measured and nothing is trained, such
            as sequences longer than those in ``data``.
        checkpoint_dir: Where to keep checkpoints; an interrupted call goes on from the last one.
        progress: Show a progress bar.

    Returns:
        What was learned per site.

    Raises:
        ModelStateError: The model is not optimized.
        SeerInputError: A malformed target, allocation or configuration; before anything is trained.
        NotConvergedError: The target is out of reach; the gates are trained, and keep 0.95 of the
            mass.
        CalibrationError: Training could not go on; the gates are as they were.
    """
    from seer_compile.calibration import record, storage, train

    session = require_session(model)
    base = session.model
    device, owner = device_of(base), storage.fingerprint(base)

    def run(batch: Any, handler: SiteHandler) -> Any:
        args, kwargs = record.split_batch(batch, device=device)
        return run_with_handler(base, args, kwargs, handler)

    with session.gates_may_change(), session.uncounted(), evaluation_mode(base):
        session.store.requires_grad_(True)
        try:
            report = train.fit(
                run,
                session.store,
                data,
                config,
                density=density,
                mass=mass,
                max_error=max_error,
                latency=latency,
                allocation=allocation,
                curve_data=curve_data,
                model=owner,
                checkpoint_dir=checkpoint_dir,
                progress=progress,
            )
        except NotConvergedError as error:
            # The gates are trained, on this model, for another target than was asked for.
            session.provenance = Provenance(calibration={"error": str(error)}, model=owner)
            raise
    session.provenance = Provenance(calibration=report.summary(), model=owner)
    return report


def set_budget(
    model: nn.Module,
    *,
    density: float | None = None,
    mass: float | None = None,
    max_error: float | None = None,
    latency: float | None = None,
    allocation: Allocation | None = None,
) -> None:
    """Set how much attention to keep: a knob for run time, without recompiling or retraining.

    Args:
        model: An optimized model, or the module of an exported program.
        density: Average share of the visible blocks to keep, in (0, 1].
        mass: Share of the attention mass to capture at every site, in (0, 1].
        max_error: Largest relative L2 error of a site's output, in (0, 1].
        latency: Share of dense attention's time that the sites may take at each length, gates
            included, in (0, 1], by the measured prices of the model's device.
        allocation: How sites share a density: ``uniform`` gives every site the same,
            ``sensitivity`` spends blocks where the model's output suffers most without them,
            ``searched`` as a search with all sites sparse found best, ``equal_marginal`` where
            captured mass rises fastest, ``equal_budget`` gives every site the same budget of the
            selector; None is the best that was measured.

    Raises:
        SeerInputError: Not exactly one target is given, or it is out of range.
        ModelStateError: The model is not optimized, has no gates yet, or no curve that translates
            the target.

    Warns:
        DensityNotReachedWarning: What every selection keeps is more than ``density``; the least
            stands, and the warning says what that is at each measured length.
    """
    from seer_compile.exporting import exported_store

    store = exported_store(model) or require_session(model).store
    store.set_budget(
        density=density, mass=mass, max_error=max_error, latency=latency, allocation=allocation
    )


def save_gates(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the gates of an optimized model to a safetensors file, atomically, with provenance.

    The file names the model that the gates were calibrated on. Where weights have changed since,
    it fits the model as it was then, and not as it is.

    Raises:
        ModelStateError: The model is not optimized, or has no gates yet.
        CheckpointWriteError: The file could not be written; an older one is intact.

    Warns:
        StaleGatesWarning: The model is no longer the one that the gates were calibrated on.
    """
    from seer_compile.calibration import storage

    session = require_session(model)
    provenance = session.provenance
    owner = storage.fingerprint(session.model)
    if provenance.model is not None and warn_if_stale(provenance, session.model):
        owner = provenance.model
    storage.save_gates(session.store, path, model=owner, calibration=provenance.calibration)


def load_gates(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load gates into an optimized model; they answer from the next call on.

    Raises:
        ModelStateError: The model is not optimized.
        GateFileError: The file is damaged or belongs to another model; nothing was loaded.
    """
    from seer_compile.calibration import storage

    session = require_session(model)
    with session.gates_may_change():
        owner = storage.fingerprint(session.model)
        summary = storage.load_gates(
            session.store, path, model=owner, exclude=session.options.exclude
        )
        session.store.set_mode(True)
    session.provenance = Provenance(calibration=summary, model=owner)


def seer_report(model: nn.Module) -> SeerReport:
    """Return what became of each attention site, and how its calls were answered so far.

    Raises:
        ModelStateError: The model is not optimized.
    """
    from seer_compile.report import build_report

    return build_report(require_session(model))


def _create_gates(model: nn.Module, example: Any, *, strict: bool) -> None:
    from seer_compile.calibration import record

    session = require_session(model)
    args, kwargs = record.split_batch(example, device=device_of(model))

    def answer(inputs: SiteInputs) -> Tensor:
        gate = record.gate_of(session.store, inputs)
        return record.dense_answer(gate, inputs)

    with session.gates_may_change(), session.uncounted(), evaluation_mode(model):
        run_with_handler(model, args, kwargs, answer)
    if strict and not session.store.names():
        raise NothingOptimizedError(
            "no attention site can be sparse",
            hint="seer_compile.explain(model, example) gives the reasons.",
        )
