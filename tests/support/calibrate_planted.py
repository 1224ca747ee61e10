"""A calibration in a process of its own, to be killed: ``calibrate_planted.py OUT CHECKPOINTS``.

Writes the gates' bytes, the losses and the optimizer's checkpoint to OUT when it ends.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from seer_compile.calibration.storage import save_gates
from seer_compile.calibration.train import fit
from seer_compile.config import CalibrationConfig, GateConfig
from seer_compile.gate_store import GateStore
from seer_compile.types import POOL_KINDS, BlockSize
from support.planted import BLOCK, PlantedModel, batches

GATES = GateConfig(
    query_pools=POOL_KINDS,
    query_sub_block=8,
    key_sub_block=8,
    gate_dim=32,
    block_size=BlockSize(query=BLOCK, key=BLOCK),
    sharing="none",
    # Two sites have no third one to pay for a finer one of them.
    resolution="uniform",
)
TRAINING = CalibrationConfig(
    steps=40, warmup_steps=4, learning_rate=1e-2, holdout_batches=1, checkpoint_every=3
)


def calibrate(out: Path, checkpoints: Path) -> None:
    """Calibrate with checkpoints after every third step; the last one holds everything."""
    store = GateStore(GATES)
    report = fit(
        PlantedModel().run,
        store,
        batches(9, 160, 96, 200),
        TRAINING,
        density=0.4,
        checkpoint_dir=checkpoints,
        progress=False,
    )
    save_gates(store, out / "gates.safetensors", model={"losses": report.losses})


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.stderr.write("ready\n")
    sys.stderr.flush()
    calibrate(Path(sys.argv[1]), Path(sys.argv[2]))
