"""Train a model and its gates together, sparse, and compare with the frozen dense model.

    python benchmarks/joint_finetune.py --model DIR --calibrate C.u16 --tokens T.u16 --out J.jsonl

Gates are calibrated on the frozen model first. Then all weights learn through block-sparse
attention to predict what the frozen dense model predicts (``--objective teacher``) or the text
itself (``task``), and the gates' own loss on the same forward keeps them up with queries and keys
that move. Budgets are measured anew on the way and at the end. ``ratio`` is against the frozen
dense model, ``ratio_own`` against the trained model answering densely.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import seer_compile
from seer_compile.config import CalibrationConfig
from seer_compile.evaluate import EvaluationRow, Evaluator
from seer_compile.evaluation_methods import parse_method
from seer_compile.gate_store import GateStore
from seer_compile.kernels import counters
from seer_compile.model_loading import load_model, load_tokenizer
from seer_compile.retrieval import PlantedTokens
from seer_compile.token_data import CalibrationWindows, as_batches, planted_windows, read_token_file

FORWARD: dict[str, Any] = {"use_cache": False}
_TOKENS_AT_ONCE = 2048


class MasterWeights:
    """AdamW over float32 copies of the weights: the model itself stays in its dtype.

    In bfloat16 an update of less than 1/256 of a weight would be lost.
    """

    def __init__(self, model: nn.Module, gates: list[nn.Parameter], rate: float, gate_rate: float):
        ours = {id(gate) for gate in gates}
        self.weights = [p for p in model.parameters() if id(p) not in ours]
        self.gates = gates
        self.masters = [weight.detach().float().clone() for weight in self.weights]
        self.rates = (rate, gate_rate)
        groups: list[dict[str, Any]] = [{"params": self.masters}, {"params": gates}]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)

    def step(self, share: float) -> None:
        """Update with a share of the full rates, from the gradients that the model holds."""
        for master, weight in zip(self.masters, self.weights, strict=True):
            master.grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None
        for parts in (self.masters, self.gates):
            nn.utils.clip_grad_norm_(parts, 1.0)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * share
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for master, weight in zip(self.masters, self.weights, strict=True):
                weight.copy_(master)


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean over tokens of KL(teacher, student) in nats; ``Float[t vocabulary]``."""
    total = torch.zeros((), device=student.device)
    for ours, theirs in zip(
        student.split(_TOKENS_AT_ONCE), teacher.split(_TOKENS_AT_ONCE), strict=True
    ):
        target, guess = theirs.float().log_softmax(-1), ours.float().log_softmax(-1)
        total = total + F.kl_div(guess, target, log_target=True, reduction="sum")
    return total / student.shape[0]


class Experiment:
    """Two copies of the model, the data, and the windows on which they are judged."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        device = torch.device(options.device)
        self.teacher = load_model(options.model, device=device, dtype=options.dtype)
        self.student = load_model(options.model, device=device, dtype=options.dtype)
        self.teacher.requires_grad_(False)
        self.tokenizer = load_tokenizer(options.model)
        self.training_tokens = read_token_file(options.calibrate)
        held_out = read_token_file(options.tokens)
        self.windows = {
            length: self._planted(held_out, length, options.sequences, options.seed)
            for length in options.lengths
        }
        curve_lengths = dict.fromkeys((options.train_length, *options.lengths))
        # Other keys than those that are asked for.
        self.curves = [
            batch
            for length in curve_lengths
            for batch in as_batches(
                self._planted(self.training_tokens, length, 2, options.seed + 1), FORWARD
            )
        ]
        self.evaluator = Evaluator(self.student, self.windows, model_arguments=FORWARD)
        frozen = Evaluator(self.teacher, self.windows, model_arguments=FORWARD)
        self.frozen = {n: frozen.run(parse_method("dense"), n, None) for n in options.lengths}
        seer_compile.optimize(self.student, inner=options.inner)
        self.store = self.student.get_submodule("seer_gates")

    def data(self, length: int) -> CalibrationWindows:
        """Return training windows of a length."""
        options = self.options
        return CalibrationWindows(
            tokens=self.training_tokens,
            lengths=(length,),
            seed=options.seed,
            copies=options.copies,
            model_arguments=tuple(FORWARD.items()),
        )

    def calibrate(self, steps: int, start: str) -> None:
        """Train gates on the student as it is, or only measure what budgets buy."""
        options = self.options
        seer_compile.calibrate(
            self.student,
            self.data(options.calibration_length),
            config=CalibrationConfig(
                steps=steps,
                start=start,  # pyright: ignore[reportArgumentType]
                holdout_batches=1,
                seed=options.seed,
            ),
            density=options.train_density,
            curve_data=self.curves,
            progress=False,
        )

    def train(self) -> int:
        """Train model and gates together for some minutes; return the steps."""
        options, store = self.options, self.store
        assert isinstance(store, GateStore)
        gates = list(store.requires_grad_(True).parameters())
        weights = MasterWeights(self.student, gates, options.rate, options.gate_rate)
        windows = iter(self.data(options.train_length))
        distilling = CalibrationConfig(rows_per_step=options.rows, seed=options.seed)
        begun, step, measured, away = time.perf_counter(), 0, 0, 0.0
        while (done := (time.perf_counter() - begun - away) / (60 * options.minutes)) < 1:
            if done >= (measured + 1) / (options.measurements + 1):
                measured, left = measured + 1, time.perf_counter()
                self.calibrate(0, "current")
                store.requires_grad_(True)
                away += time.perf_counter() - left
            store.set_mode(True, at_any_size=True)
            batch = next(windows, None)
            if batch is None:
                windows = iter(self.data(options.train_length))
                continue
            tokens = batch["input_ids"].to(options.device)
            task, gate, density = self._backward(tokens, distilling)
            weights.step(min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * done)))
            if step % 20 == 0:
                print(
                    f"step {step:4d} loss {task:.5f} gates {gate:.4f} density {density:.4f}",
                    flush=True,
                )
            step += 1
        return step

    def _backward(
        self, tokens: Tensor, distilling: CalibrationConfig
    ) -> tuple[float, float, float]:
        student = self.student.train()
        with (
            counters.collect_density() as meter,
            seer_compile.distillation(student, config=distilling) as sites,
        ):
            logits = student(input_ids=tokens, **FORWARD).logits[0]
        if self.options.objective == "teacher":
            with torch.no_grad():
                target = self.teacher(input_ids=tokens, **FORWARD).logits[0]
            task = divergence(logits, target)
        else:
            task = F.cross_entropy(logits[:-1].float(), tokens[0, 1:])
        gate = sites.loss()
        (task + gate).backward()
        student.eval()
        densities = meter.densities().values()
        return task.item(), gate.item(), sum(densities) / max(len(densities), 1)

    def judge(self, stage: str) -> Iterator[dict[str, Any]]:
        """Yield the student's quality, dense and sparse."""
        store = self.store
        assert isinstance(store, GateStore)
        for length in self.options.lengths:
            store.set_mode(False)
            own = self.evaluator.run(parse_method("dense"), length, None)
            yield self._row(stage, own)
            for density in self.options.densities:
                row = self.evaluator.run(parse_method("gate"), length, density, store)
                yield self._row(stage, row)

    def _row(self, stage: str, row: EvaluationRow) -> dict[str, Any]:
        frozen = self.frozen[row.length]
        return {
            "stage": stage,
            "method": row.method,
            "length": row.length,
            "asked_density": row.asked_density,
            "density": round(row.density, 4),
            "ratio": round(math.exp(row.loss - frozen.loss), 4),
            "ratio_own": round(row.ratio, 4),
            "retrieval": row.retrieval,
            "frozen_retrieval": frozen.retrieval,
        }

    def _planted(self, tokens: Any, length: int, sequences: int, seed: int) -> list[PlantedTokens]:
        keys = self.options.retrieval
        return planted_windows(
            tokens, self.tokenizer, length=length, sequences=sequences, keys=keys, seed=seed
        )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibrate", type=Path, required=True, help="token ids to train on")
    parser.add_argument("--tokens", type=Path, required=True, help="token ids to judge on")
    parser.add_argument("--minutes", type=float, default=4.0, help="of joint training")
    parser.add_argument("--objective", choices=("teacher", "task"), default="teacher")
    parser.add_argument("--train-length", type=int, default=16384)
    parser.add_argument("--train-density", type=float, default=0.1)
    parser.add_argument("--calibration-length", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=600, help="of the first calibration")
    parser.add_argument("--measurements", type=int, default=2, help="of budgets on the way")
    parser.add_argument("--copies", type=float, default=2.0, help="planted spans per 1,024 tokens")
    parser.add_argument("--rate", type=float, default=3e-5)
    parser.add_argument("--gate-rate", type=float, default=2e-4)
    parser.add_argument("--rows", type=int, default=1024, help="of the gates' loss, per site")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.2, 0.1, 0.05])
    parser.add_argument("--sequences", type=int, default=6)
    parser.add_argument("--retrieval", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--inner", default="aot_eager")
    parser.add_argument("--commit", default="", help="recorded with each row")
    parser.add_argument("--save", type=Path, help="folder for the trained model and its gates")
    parser.add_argument("--out", type=Path, help="append rows as JSON lines")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    options = parse(argv)
    head = ["git", "rev-parse", "--short", "HEAD"]
    found = subprocess.run(head, capture_output=True, text=True, check=False)
    about = {
        "gpu": torch.cuda.get_device_name() if options.device.startswith("cuda") else "none",
        "torch": torch.__version__,
        "commit": options.commit or found.stdout.strip(),
        "command": "python benchmarks/joint_finetune.py " + shlex.join(argv or sys.argv[1:]),
        "model": Path(options.model).name,
        "sequences": options.sequences,
    }
    begun = time.perf_counter()
    experiment, rows = Experiment(options), []
    experiment.calibrate(options.steps, "identity")

    def report(stage: str, **more: Any) -> None:
        for figures in experiment.judge(stage):
            row = figures | more | {"seconds": round(time.perf_counter() - begun, 1)}
            rows.append(row)
            print(json.dumps(row), flush=True)
            if options.out:
                with options.out.open("a") as file:
                    file.write(json.dumps({"figure": "joint fine-tuning", **row, **about}) + "\n")

    report("gates alone")
    steps = experiment.train()
    experiment.calibrate(0, "current")
    report("joint", steps=steps)
    if options.save:
        experiment.student.save_pretrained(options.save)
        seer_compile.save_gates(experiment.student, options.save / "gates.safetensors")
    return rows


if __name__ == "__main__":
    main()
