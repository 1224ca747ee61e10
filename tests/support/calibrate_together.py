"""One process of a distributed calibration: ``calibrate_together.py OUT MEETING RANK WORLD``."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from seer_compile.calibration.storage import save_gates
from seer_compile.calibration.train import fit
from seer_compile.gate_store import GateStore
from support.calibrate_planted import GATES, TRAINING
from support.planted import PlantedModel, batches

CONFIG = dataclasses.replace(TRAINING, steps=4)


def main(out: Path, meeting: str, rank: int, world: int) -> None:
    """Calibrate on this process's share of the data and save what it ends with."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    # The data of process 1 ends first: both must stop together.
    data = iter(batches(6 - 2 * rank, 160, first=20 * rank))
    store = GateStore(GATES, seed=rank)
    report = fit(
        PlantedModel().run,
        store,
        data,
        CONFIG,
        density=0.4,
        checkpoint_dir=out / "checkpoints",
        progress=False,
    )
    save_gates(store, out / f"rank-{rank}.safetensors", model={"steps": report.steps})
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
