"""One process of a distributed calibration.

``calibrate_together.py OUT MEETING RANK WORLD [options]``
writes the gates that the process ends with to ``OUT/rank-RANK.safetensors``, and the error that it
ends with to ``OUT/rank-RANK.txt``.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
from pathlib import Path

import torch
import torch.distributed as dist

from seer_compile.calibration import resolution
from seer_compile.calibration.storage import save_gates
from seer_compile.calibration.train import fit
from seer_compile.errors import SeerError
from seer_compile.gate_store import GateStore
from support import lookups
from support.calibrate_planted import GATES, TRAINING
from support.planted import PlantedModel, batches


def main(options: argparse.Namespace) -> None:
    """Calibrate on this process's share of the data and save what it ends with."""
    torch.set_num_threads(1)
    rank = options.rank
    dist.init_process_group(
        "gloo",
        init_method=f"file://{options.meeting}",
        rank=rank,
        world_size=options.world,
        timeout=datetime.timedelta(seconds=30),
    )
    # The data of process 1 ends first: both must stop together.
    count, run = options.batches - 2 * rank, PlantedModel().run
    data, gates, config = batches(count, 160, first=20 * rank), GATES, TRAINING
    if options.model == "lookups":
        run, data = lookups.Lookups(), lookups.data(count, first=20 * rank)
        gates, config = lookups.GATES, lookups.TRAINING
        # So small a call is slower than dense attention at any sub-blocks.
        resolution._is_worth_it = lambda *_: True
    if rank == options.lost:
        run = _reach_nothing
    store = GateStore(gates, seed=rank)
    try:
        report = fit(
            run,
            store,
            iter(data),
            dataclasses.replace(config, steps=4),
            density=0.4,
            checkpoint_dir=options.out / options.checkpoints.format(rank=rank),
            progress=False,
        )
    except SeerError as error:
        (options.out / f"rank-{rank}.txt").write_text(f"{type(error).__name__}: {error}")
    else:
        save_gates(store, options.out / f"rank-{rank}.safetensors", model={"steps": report.steps})
    dist.destroy_process_group()


def _reach_nothing(batch: object, handler: object) -> torch.Tensor:
    return torch.zeros(1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("meeting")
    parser.add_argument("rank", type=int)
    parser.add_argument("world", type=int)
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--model", choices=("planted", "lookups"), default="planted")
    parser.add_argument("--lost", type=int, help="the process whose forward reaches no site")
    parser.add_argument("--checkpoints", default="checkpoints", help="{rank} is filled in")
    main(parser.parse_args())
