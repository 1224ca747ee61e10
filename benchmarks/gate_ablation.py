"""Which idea makes gates better? One idea per line, all judged on the same windows in one run.

    python benchmarks/gate_ablation.py --model DIR --calibrate C.u16 --tokens T.u16 \\
        --experiments base own_gates --allocations uniform sensitivity --out results.jsonl

An experiment is what it changes of the gate, of the training and of the windows; ``--list`` shows
them, and ``copies_4+average_0.99`` is both. Gates are trained once per experiment and judged under
every allocation. ``seconds`` is the whole calibration: training, curves, sensitivity.

Started by ``torchrun --nproc-per-node N``, N processes train together, each on its own windows, as
many steps as are asked for; the first one judges.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

import seer_compile
from seer_compile.allocation import ALLOCATIONS
from seer_compile.calibration import distributed
from seer_compile.calibration.report import CalibrationReport
from seer_compile.config import CalibrationConfig, GateConfig
from seer_compile.evaluate import Evaluator
from seer_compile.evaluation_methods import parse_method
from seer_compile.gate_store import GateStore
from seer_compile.model_loading import load_model, load_tokenizer
from seer_compile.retrieval import PlantedTokens
from seer_compile.token_data import CalibrationWindows, as_batches, planted_windows, read_token_file
from seer_compile.types import POOL_KINDS

FORWARD = {"use_cache": False}


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What one idea changes."""

    gate: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    windows: dict[str, Any] = field(default_factory=dict)


def _sub_blocks(tokens: int) -> dict[str, Any]:
    """Return sub-blocks alike for queries and keys, and the pools that tell so many apart."""
    sizes = {"query_sub_block": tokens, "key_sub_block": tokens}
    return {**sizes, "query_pools": POOL_KINDS}


EXPERIMENTS: dict[str, Experiment] = {
    "base": Experiment(),
    "same_cut": Experiment(windows={"cuts": 1}),
    "mixed_lengths": Experiment(windows={"lengths": (2048, 8192, 16384)}),
    "length_8192": Experiment(windows={"lengths": (8192,)}),
    "sub_blocks_2_2": Experiment(gate={"query_sub_block": 2, "key_sub_block": 2}),
    "sub_blocks_4_4": Experiment(gate=_sub_blocks(4)),
    "sub_blocks_8_8": Experiment(gate=_sub_blocks(8)),
    "gate_dim_32": Experiment(gate={"gate_dim": 32}),
    "gate_dim_128": Experiment(gate={"gate_dim": 128}),
    "own_gates": Experiment(gate={"sharing": "none"}),
    "shared_selection": Experiment(gate={"sharing": "selection"}),
    "shared_gate": Experiment(gate={"sharing": "gate"}),
    "mean_pools": Experiment(gate={"query_pools": ("mean",), "key_pools": ("mean",)}),
    "all_pools": Experiment(gate={"query_pools": POOL_KINDS}),
    "sharpness_0.7": Experiment(training={"sharpness": 0.7}),
    "sharpness_1.6": Experiment(training={"sharpness": 1.6}),
    "sharpness_2": Experiment(training={"sharpness": 2.0}),
    "max_target": Experiment(training={"target": "max"}),
    "squared_error": Experiment(training={"loss": "mse"}),
    "rate_3e-4": Experiment(training={"learning_rate": 3e-4}),
    "rate_1e-3": Experiment(training={"learning_rate": 1e-3}),
    "rate_1e-4": Experiment(training={"learning_rate": 1e-4}),
    "rate_2e-4": Experiment(training={"learning_rate": 2e-4}),
    "rate_5e-4": Experiment(training={"learning_rate": 5e-4}),
    "rate_3e-3": Experiment(training={"learning_rate": 3e-3}),
    "decay_0.01": Experiment(training={"weight_decay": 0.01}),
    "decay_0.1": Experiment(training={"weight_decay": 0.1}),
    "rows_1024": Experiment(training={"rows_per_step": 1024}),
    "rows_4096": Experiment(training={"rows_per_step": 4096}),
    "linear_schedule": Experiment(training={"schedule": "linear"}),
    "flat_schedule": Experiment(training={"schedule": "flat"}),
    "average_0.99": Experiment(training={"average": 0.99}),
    "average_0.995_rate_3e-3": Experiment(training={"average": 0.995, "learning_rate": 3e-3}),
    "average_0.99_flat": Experiment(training={"average": 0.99, "schedule": "flat"}),
    "start_share_0": Experiment(training={"start_share": 0.0}),
    "start_share_0.5": Experiment(training={"start_share": 0.5}),
    "copies_1": Experiment(windows={"copies": 1.0}),
    "copies_4": Experiment(windows={"copies": 4.0}),
    "copies_8": Experiment(windows={"copies": 8.0}),
    "value_target": Experiment(training={"target": "value"}),
    "far_rows_4": Experiment(training={"far_rows": 4.0}),
    "far_rows_20": Experiment(training={"far_rows": 20.0}),
    "tied_keys": Experiment(training={"tie_keys": True}),
    "shared_first_100": Experiment(training={"shared_steps": 100}),
    "temperature_start": Experiment(training={"start": "temperature"}),
    "uniform_resolution": Experiment(gate={"resolution": "uniform"}),
    "statistics_start": Experiment(training={"start": "statistics"}),
    "searched": Experiment(training={"search_evaluations": 40}),
    "zero_shot": Experiment(training={"steps": 0.0}),
    "zero_shot_statistics": Experiment(training={"steps": 0.0, "start": "statistics"}),
    "sub_blocks_8_8_gate_dim_128": Experiment(gate={"gate_dim": 128, **_sub_blocks(8)}),
    "candidate": Experiment(
        training={"start": "statistics", "average": 0.99, "far_rows": 4.0, "learning_rate": 2e-3},
        windows={"copies": 2.0, "lengths": (4096, 8192, 16384)},
    ),
    "half_the_steps": Experiment(training={"steps": 0.5}),
    "twice_the_steps": Experiment(training={"steps": 2.0}),
}
"""``steps`` of an experiment multiply those of the command line."""


def composed(name: str) -> Experiment:
    """Return the experiment of a name, or of several names joined by ``+``; later ones win."""
    parts = name.split("+")
    unknown = [part for part in parts if part not in EXPERIMENTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no experiment {unknown[0]!r}; --list shows them")
    merged: dict[str, dict[str, Any]] = {"gate": {}, "training": {}, "windows": {}}
    for part in parts:
        for kind, changes in dataclasses.asdict(EXPERIMENTS[part]).items():
            merged[kind] |= changes
    return Experiment(**merged)


def known_name(name: str) -> str:
    """Check the name of an experiment."""
    composed(name)
    return name


@dataclass(frozen=True)
class OwnShare:
    """The windows that one of several processes trains on; all of them hold out the first one."""

    windows: CalibrationWindows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the first batch, then every so many-th one."""
        batches = iter(self.windows)
        yield next(batches)
        yield from itertools.islice(batches, distributed.rank(), None, distributed.world_size())


class Laboratory:
    """The model, its data, and the windows on which every experiment is judged."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        device = torch.device(options.device)
        self.model: nn.Module = load_model(options.model, device=device, dtype=options.dtype)
        self.tokenizer = load_tokenizer(options.model)
        self.training_tokens = read_token_file(options.calibrate)
        held_out = read_token_file(options.tokens)
        self.windows = {
            length: self._planted(held_out, length, options.sequences, seed=options.seed)
            for length in options.lengths
        }
        self.evaluator = Evaluator(self.model, self.windows, model_arguments=FORWARD)
        self.dense = {
            length: self.evaluator.run(parse_method("dense"), length, None)
            for length in options.lengths
        }

    def calibrate(self, experiment: Experiment) -> tuple[GateStore, CalibrationReport, float]:
        """Train gates from the start; return them, the report and the seconds it took."""
        options = self.options
        if hasattr(self.model, "seer_gates"):
            seer_compile.restore(self.model)
        training = dict(experiment.training)
        steps = round(options.steps * training.pop("steps", 1))
        windows: dict[str, Any] = {"lengths": (options.calibration_length,)} | experiment.windows
        data = CalibrationWindows(tokens=self.training_tokens, seed=options.seed, **windows)
        # Other keys than those that are asked for.
        curves = [
            batch
            for length in options.lengths
            for batch in as_batches(
                self._planted(self.training_tokens, length, 2, seed=options.seed + 1), FORWARD
            )
        ]
        seer_compile.optimize(self.model, config=GateConfig(**experiment.gate), inner=options.inner)
        begun = time.perf_counter()
        report = seer_compile.calibrate(
            self.model,
            OwnShare(data),
            config=CalibrationConfig(
                **({"steps": steps, "seed": options.seed, "holdout_batches": 1} | training)
            ),
            density=options.densities[0],
            curve_data=curves,
            progress=False,
        )
        seconds = time.perf_counter() - begun
        store = self.model.get_submodule("seer_gates")
        assert isinstance(store, GateStore)
        return store, report, seconds

    def judge(self, store: GateStore, allocation: str) -> Iterator[dict[str, Any]]:
        """Yield the quality at every length and density."""
        self.evaluator.allocation = allocation  # pyright: ignore[reportAttributeAccessIssue]
        for length in self.options.lengths:
            for density in self.options.densities:
                row = self.evaluator.run(parse_method("gate"), length, density, store)
                dense = self.dense[length]
                yield {
                    "length": length,
                    "asked_density": density,
                    "density": round(row.density, 4),
                    "ratio": round(row.ratio, 4),
                    "retrieval": row.retrieval,
                    "dense_retrieval": dense.retrieval,
                    "attention_ms": round(row.attention_ms, 3),
                }

    def _planted(
        self, tokens: np.ndarray, length: int, sequences: int, *, seed: int
    ) -> list[PlantedTokens]:
        return planted_windows(
            tokens,
            self.tokenizer,
            length=length,
            sequences=sequences,
            keys=self.options.retrieval,
            seed=seed,
        )


def context(options: argparse.Namespace) -> dict[str, Any]:
    """Return what a figure depends on besides the code."""
    commit = (
        options.commit
        or subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip()
    )
    on_gpu = options.device.startswith("cuda")
    return {
        "gpu": torch.cuda.get_device_name() if on_gpu else "none",
        "torch": torch.__version__,
        "commit": commit,
        "command": "python benchmarks/gate_ablation.py " + shlex.join(sys.argv[1:]),
        "model": Path(options.model).name,
        "steps": options.steps,
        "sequences": options.sequences,
        "processes": distributed.world_size(),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--list", action="store_true", help="show the experiments")
    parser.add_argument("--model")
    parser.add_argument("--calibrate", type=Path, help="token ids to train on")
    parser.add_argument("--tokens", type=Path, help="token ids to judge on")
    parser.add_argument("--experiments", nargs="+", type=known_name, default=["base"])
    parser.add_argument(
        "--allocations", nargs="+", choices=ALLOCATIONS, default=["uniform", "sensitivity"]
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.2, 0.1, 0.05])
    parser.add_argument("--calibration-length", type=int, default=16384)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--sequences", type=int, default=6)
    parser.add_argument("--retrieval", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--inner", default="aot_eager")
    parser.add_argument("--commit", default="", help="recorded with each row")
    parser.add_argument("--save", type=Path, help="folder for the gates, a file per experiment")
    parser.add_argument("--out", type=Path, help="append rows as JSON lines")
    return parser.parse_args()


def join_processes(device: str) -> None:
    """Join the other processes, where ``torchrun`` started several."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")


def main() -> None:
    options = parse()
    if options.list:
        for name, experiment in EXPERIMENTS.items():
            print(f"{name:18s} {dataclasses.asdict(experiment)}")
        return
    join_processes(options.device)
    laboratory, about = Laboratory(options), context(options)
    run(laboratory, about)
    if dist.is_initialized():
        dist.destroy_process_group()


def run(laboratory: Laboratory, about: dict[str, Any]) -> None:
    """Train and judge what was asked for."""
    options = laboratory.options
    for name in options.experiments:
        store, report, seconds = laboratory.calibrate(composed(name))
        if distributed.rank():
            continue
        if options.save:
            options.save.mkdir(parents=True, exist_ok=True)
            seer_compile.save_gates(laboratory.model, options.save / f"{name}.safetensors")
        for allocation in options.allocations:
            for figures in laboratory.judge(store, allocation):
                row = {"experiment": name, "allocation": allocation, **figures}
                row |= {
                    "loss": round(report.losses[-1], 4) if report.losses else None,
                    "seconds": round(seconds, 1),
                }
                print(json.dumps(row), flush=True)
                if options.out:
                    with options.out.open("a") as file:
                        file.write(json.dumps({"figure": "gate ablation", **row, **about}) + "\n")


if __name__ == "__main__":
    main()
