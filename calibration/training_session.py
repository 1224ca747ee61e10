"""What ties the training of gates to its data and to its checkpoints.

A run that goes on from a checkpoint ends with the bits of one that was not interrupted. Several
processes go on from the same step, or none does: process 0 writes for all, each reads.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from seer_compile.calibration import checkpoint as checkpoints
from seer_compile.calibration import distributed
from seer_compile.calibration.record import BatchStream
from seer_compile.calibration.site_trainer import GateTrainer
from seer_compile.config_json import config_to_json
from seer_compile.errors import ResumeMismatchError
from seer_compile.gate import AttnGate

_logger = logging.getLogger(__name__)
_MOMENTS = ("exp_avg", "exp_avg_sq", "step", "average")


class TrainingSession:
    """What ties a trainer to its data and its checkpoints."""

    def __init__(
        self,
        trainer: GateTrainer,
        stream: BatchStream,
        model: Mapping[str, Any],
        directory: str | os.PathLike[str] | None,
    ) -> None:
        self.trainer, self.stream, self.directory = trainer, stream, directory
        training = dataclasses.asdict(trainer.config)
        # How often to save, and what is measured afterwards, changes nothing of the weights; that
        # nothing is measured leaves sub-blocks as they are configured.
        training["measures_output"] = bool(training["sensitivity_batches"])
        for name in ("checkpoint_every", "sensitivity_batches", "search_evaluations"):
            del training[name]
        digests = distributed.gather(stream.holdout_digest())
        self.identity = {
            "training": training,
            "gates": config_to_json(trainer.store.config),
            "model": dict(model),
            # One process's data alone would be that of no other.
            "data": digests[0] if len(digests) == 1 else digests,
            "processes": distributed.world_size(),
        }
        self._saved = -1
        self._cursor: dict[str, Any] | None = None
        """Where the stream was before a batch that was taken in vain."""

    def find(self) -> checkpoints.Checkpoint | None:
        """Return the newest checkpoint, if there is one.

        Raises:
            ResumeMismatchError: It belongs to another calibration, or other processes have others.
        """
        found = None
        with distributed.together():
            if self.directory is not None:
                found = checkpoints.read_latest(self.directory)
            if found is not None:
                checkpoints.check_identity(found, self.identity)
        steps = distributed.gather("none" if found is None else str(found.step))
        if len(set(steps)) > 1:
            raise ResumeMismatchError(
                f"processes found checkpoints of different steps: steps {', '.join(steps)}",
                hint="checkpoint_dir must be a folder that all processes see.",
            )
        return found

    def resume(self, found: checkpoints.Checkpoint) -> None:
        """Continue from a checkpoint.

        Raises:
            ResumeMismatchError: It lacks sites, or saw other batches.
        """
        with distributed.together():
            self._resume(found)
        _logger.info("Resumed calibration at step %d from %s", found.step, found.path)

    def _resume(self, found: checkpoints.Checkpoint) -> None:
        trainer = self.trainer
        sites = [str(site["name"]) for site in found.state["sites"]]
        absent = set(trainer.optimizers) - set(sites)
        if absent:
            raise ResumeMismatchError(f"the checkpoint lacks the sites {sorted(absent)}")
        for site in found.state["sites"]:
            # A site that only some batches reach may not have been met yet in this process.
            sizes = {key: value for key, value in site.items() if key != "sub_blocks"}
            gate = trainer.store.get_or_create(**sizes, device=trainer.device)
            if site["name"] not in trainer.optimizers:
                gate = trainer.add(site["name"])
            _restore(trainer, site["name"], gate, found.tensors)
        losses = found.tensors["losses"].tolist()
        trainer.losses = [
            {name: value for name, value in zip(sites, row, strict=True) if not math.isnan(value)}
            for row in losses
        ]
        trainer.step = self._saved = found.step
        if distributed.rank() == 0:
            self.stream.seek(found.state["cursor"])
        else:
            # The digest is of process 0's data.
            for _ in zip(range(int(found.state["cursor"]["position"])), self.stream, strict=False):
                pass

    def take(self) -> Any | None:
        """Return the next training batch; None where the data of any process has ended.

        A batch that other processes have no counterpart for is not trained on, and a later run with
        more data begins with it.
        """
        before = self.stream.cursor
        batch = next(self.stream, None)
        if not distributed.any_process(batch is None, self.trainer.device):
            return batch
        self._cursor = before
        return None

    def save(self) -> None:
        """Write a checkpoint of this step, unless it is written already."""
        trainer = self.trainer
        if self.directory is None or distributed.rank() != 0 or self._saved == trainer.step:
            return
        history = trainer.loss_history()
        tensors = {
            "losses": torch.tensor(list(history.values()), dtype=torch.float64).t().contiguous()
        }
        for name, optimizer in trainer.optimizers.items():
            for label, weight in trainer.gate(name).named_parameters():
                tensors[f"{name}.{label}"] = weight
                state = optimizer.state.get(weight) or {}
                tensors |= {f"{name}.{label}.{key}": state[key] for key in _MOMENTS if key in state}
            for label, start in trainer.starts.get(name, {}).items():
                tensors[f"{name}.{label}.start"] = start
        state = {
            "identity": self.identity,
            "cursor": self._cursor or self.stream.cursor,
            "sites": [_site(name, trainer.gate(name)) for name in history],
        }
        checkpoints.write_checkpoint(self.directory, trainer.step, state=state, tensors=tensors)
        self._saved = trainer.step


def _restore(
    trainer: GateTrainer, name: str, gate: AttnGate, tensors: Mapping[str, Tensor]
) -> None:
    optimizer = trainer.optimizers[name]
    is_fused = optimizer.defaults["fused"]
    with torch.no_grad():
        for label, weight in gate.named_parameters():
            weight.copy_(tensors[f"{name}.{label}"])
            if f"{name}.{label}.start" in tensors:
                start = tensors[f"{name}.{label}.start"].to(weight.device)
                trainer.starts.setdefault(name, {})[label] = start
            if f"{name}.{label}.step" not in tensors:
                continue
            keys = [key for key in _MOMENTS if f"{name}.{label}.{key}" in tensors]
            state = {key: tensors[f"{name}.{label}.{key}"] for key in keys}
            optimizer.state[weight] = {
                # AdamW keeps its step count on the CPU unless it is fused.
                key: value if key == "step" and not is_fused else value.to(weight.device)
                for key, value in state.items()
            }


def _site(name: str, gate: AttnGate) -> dict[str, Any]:
    return {
        "name": name,
        "heads": gate.heads,
        "kv_heads": gate.kv_heads,
        "head_dim": gate.head_dim,
        "scale": gate.scale,
        "sub_blocks": list(gate.config.sub_blocks),
    }
