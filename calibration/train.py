"""The optimisation loop: one forward of the frozen model per step, one gate update per site.

Each site is trained on its own, inside the forward, from detached queries and keys: the gradient
of one gate is all that ever exists besides inference. Interrupted runs go on from the last
checkpoint and end with the same bits as runs that were not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from seer_compile.allocation import Allocation, choose_allocation
from seer_compile.calibration import checkpoint as checkpoints
from seer_compile.calibration import distributed
from seer_compile.calibration.budget import tabulate
from seer_compile.calibration.interruption import Interruption
from seer_compile.calibration.record import BatchStream, Run, dense_answer, gate_of
from seer_compile.calibration.report import CalibrationReport, build_report
from seer_compile.calibration.request import (
    DEFAULT_MASS,
    Targets,
    check_allocation,
    checked_curve_data,
    checked_targets,
)
from seer_compile.calibration.resolution import choose_resolutions
from seer_compile.calibration.search import search_shares
from seer_compile.calibration.sensitivity import measure_sensitivity
from seer_compile.calibration.site_trainer import GateTrainer, no_site
from seer_compile.calibration.training_session import TrainingSession
from seer_compile.config import CalibrationConfig, check_type
from seer_compile.errors import NotConvergedError
from seer_compile.gate import AttnGate
from seer_compile.gate_store import GateStore
from seer_compile.types import SiteInputs

_logger = logging.getLogger(__name__)


def fit(
    run: Run,
    store: GateStore,
    data: Iterable[Any],
    config: CalibrationConfig | None = None,
    *,
    density: float | None = None,
    mass: float | None = None,
    max_error: float | None = None,
    latency: float | None = None,
    allocation: Allocation | None = None,
    curve_data: Iterable[Any] = (),
    model: Mapping[str, Any] | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> CalibrationReport:
    """Train every gate that the model's sites need, measure budgets, and choose one.

    Training starts from the identity-initialised gates, whatever the store held, unless the
    configuration says otherwise. What is asked for is checked before. After an error or an
    interruption of training and measuring the store is as it was before; what was trained is in the
    checkpoints, and the same call goes on from there.

    Args:
        run: One forward of the frozen model with a handler that answers the sites.
        store: Gates to train; sites without one get one.
        data: Batches in a fixed order; see :func:`seer_compile.calibration.record.split_batch`.
            Lengths may differ. Under ``torch.distributed`` each process passes its own.
        config: How to train.
        density: Choose budgets that keep this share of the visible blocks, in (0, 1].
        mass: Choose budgets that capture this share of the attention mass at every site; 0.95
            when no target is given.
        max_error: Choose budgets whose relative L2 error of a site's output stays within this.
        latency: Choose budgets that take this share of dense attention's time, gates included.
        allocation: How sites share an average density; see
            :func:`seer_compile.allocation.allocate`.
        curve_data: More held-out batches, for the curves only: longer ones need no training.
        model: Fingerprint of the model, so that a checkpoint of another model is refused.
        checkpoint_dir: Where checkpoints go and are looked for.
        progress: Show a progress bar with the loss and the time left.

    Returns:
        What was learned, per site.

    Raises:
        SeerInputError: More than one target, or one out of range.
        CalibrationDataError: Too little data, or no held-out batch reaches a site.
        NonFiniteLossError: A loss or gradient is NaN or infinite; that step is in no checkpoint.
        ResumeMismatchError: The checkpoints belong to another model, data or configuration.
        CheckpointWriteError: A checkpoint could not be written; where none can be, before training.
        CalibrationError: Another process stopped before the first step, and by what.
        NotConvergedError: No budget keeps the error of some site within ``max_error``, or no
            density is fast enough. The gates are trained then, and keep the default mass.
    """
    config = CalibrationConfig() if config is None else config
    check_type("config", config, CalibrationConfig)
    targets = checked_targets(Targets(density, mass, max_error, latency))
    check_allocation(allocation, targets, config)
    longer = checked_curve_data(curve_data)
    with distributed.together():
        stream = BatchStream(data, holdout=config.holdout_batches)
        if checkpoint_dir is not None and distributed.rank() == 0:
            checkpoints.check_writable(checkpoint_dir)
    with _unchanged_on_error(store):
        trainer = GateTrainer(store, config)
        session = TrainingSession(trainer, stream, model or {}, checkpoint_dir)
        _begin(run, session, progress=progress)
        with Interruption(enabled=checkpoint_dir is not None) as interruption:
            _train(run, session, interruption, progress=progress)
            trainer.finish()
            tables = tabulate(
                run,
                store,
                (*stream.holdout, *longer),
                measure_errors=targets.max_error is not None,
                progress=progress,
            )
            sensitivities = measure_sensitivity(
                run,
                store,
                (*longer, *stream.holdout),
                per_length=config.sensitivity_batches,
                progress=progress,
            )
        for name, table in tables.items():
            gate = trainer.gate(name)
            gate.is_trained, gate.curve = True, table.gate
            gate.sensitivity = sensitivities.get(name)
        searched = search_shares(
            run,
            store,
            (*longer, *stream.holdout),
            evaluations=config.search_evaluations,
            progress=progress,
        )
        for name in tables:
            trainer.gate(name).shares = searched.get(name)
    # What was trained and measured stays, whether or not a budget does what is asked for.
    _set_budget(store, targets, allocation)
    return build_report(
        store,
        tables,
        losses=trainer.loss_history(),
        config=dataclasses.asdict(config),
        target={name: value for name, value in targets._asdict().items() if value is not None},
        allocation=choose_allocation(
            allocation,
            {name: sensitivities.get(name) for name in tables},
            {name: searched.get(name) for name in tables},
        ),
    )


def _set_budget(store: GateStore, targets: Targets, allocation: Allocation | None) -> None:
    """Choose budgets and switch the gates on; at the default target where the other is too much."""
    try:
        store.set_budget(**targets._asdict(), allocation=allocation)
    except NotConvergedError as error:
        store.set_budget(mass=DEFAULT_MASS)
        raise NotConvergedError(
            error.message,
            hint=f"{error.hint or ''} The gates are trained and keep {DEFAULT_MASS} of the mass; "
            "set_budget moves them.".lstrip(),
            context=error.context,
        ) from error
    finally:
        store.set_mode(True)


def _begin(run: Run, session: TrainingSession, *, progress: bool) -> None:
    """Choose resolutions and find the sites, or go on from a checkpoint."""
    trainer, stream, found = session.trainer, session.stream, session.find()
    store, config = trainer.store, trainer.config
    is_by_site = store.config.resolution == "by_site" and config.sensitivity_batches > 0
    if found is not None:
        sites = found.state["sites"]
        trainer.chosen_sub_blocks = {site["name"]: tuple(site["sub_blocks"]) for site in sites}
    elif is_by_site and config.start != "current":
        trainer.chosen_sub_blocks = choose_resolutions(
            run, store, stream.holdout, progress=progress
        )
    _discover(run, trainer, stream)
    if found is not None:
        session.resume(found)


def _discover(run: Run, trainer: GateTrainer, stream: BatchStream) -> None:
    """Run held-out batches until one reaches sites, so that gates exist before the first step."""
    reached: dict[str, AttnGate] = {}

    def answer(inputs: SiteInputs) -> Tensor:
        gate = gate_of(trainer.store, inputs)
        if inputs.name not in reached:
            gate = reached[inputs.name] = trainer.add(inputs.name, inputs)
        return dense_answer(gate, inputs)

    with distributed.together(), torch.no_grad():
        for batch in stream.holdout:
            run(batch, answer)
            if reached:
                break
        if not reached:
            raise no_site()
    for gate in reached.values():
        distributed.broadcast(weight.data for weight in gate.parameters())


def _train(
    run: Run, session: TrainingSession, interruption: Interruption, *, progress: bool
) -> None:
    trainer, config = session.trainer, session.trainer.config
    bar = tqdm(
        total=config.steps,
        initial=trainer.step,
        desc="Calibrating gates",
        unit="step",
        disable=not progress or distributed.rank() != 0,
    )
    with bar:
        while trainer.step < config.steps:
            batch = session.take()
            if batch is None:
                _logger.warning(
                    "The data ended after %d of %d steps; pass data that can be iterated again",
                    trainer.step,
                    config.steps,
                )
                break
            trainer.begin()
            with torch.no_grad():
                run(batch, trainer)
            loss = trainer.end()
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            bar.update()
            is_over = interruption.requested is not None
            is_over = distributed.any_process(is_over, trainer.device)
            if is_over or trainer.step % config.checkpoint_every == 0:
                session.save()
            interruption.check(stops_all=is_over)
    session.save()


@contextlib.contextmanager
def _unchanged_on_error(store: GateStore) -> Iterator[None]:
    """Put the gates back when anything goes wrong, and forget the gates that are new."""
    before = {
        name: (
            gate,
            {key: value.clone() for key, value in gate.state_dict().items()},
            gate.curve,
            gate.sensitivity,
            gate.shares,
            gate.is_trained,
        )
        for name, gate in store.items()
    }
    try:
        yield
    except BaseException:
        for name in store.names():
            if name not in before:
                store.at_sub_blocks(name, *store.config.sub_blocks).reset()
                continue
            gate, state, curve, sensitivity, shares, is_trained = before[name]
            store.replace(name, gate)
            gate.curve, gate.sensitivity, gate.shares = curve, sensitivity, shares
            gate.is_trained = is_trained
            gate.load_state_dict(state)
        store.write_metadata()
        raise
