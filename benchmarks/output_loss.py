"""Would gates rank better if they were trained on the output of attention instead of its mass?

    python benchmarks/output_loss.py --model DIR --calibrate C.u16 --tokens T.u16 --out loss.jsonl

Queries, keys and values of some layers are recorded once; fresh gates learn from them by one loss
each, on the same rows in the same order, and are judged on windows of other text with planted keys:

- ``none``: the start, not trained.
- ``kl``: the loss of calibration, of predicted mass against the mass of the group's heads.
- ``mse``: the squared difference of the two.
- ``output``: per head, blocks weigh what the gate says instead of what attention does; the squared
  change of the head's output, over its square. Paid for by the mean of values of every block.

``kept_far`` is the share, of blocks that carry at least 15 % of a head's mass and lie further than
the neighbour, that a row keeps at a density; ``error`` is the relative error of the output.
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import torch
from measuring import Row, add_common_options, context, table, write_rows
from torch import Tensor

import seer_compile
from seer_compile.calibration.losses import row_losses
from seer_compile.config import GateConfig
from seer_compile.gate import AttnGate
from seer_compile.gate_store import GateStore
from seer_compile.kernels.observation import observe
from seer_compile.model_loading import load_model, load_tokenizer
from seer_compile.token_data import CalibrationWindows, planted_windows, read_token_file
from seer_compile.types import SiteInputs

LOSSES = ("none", "kl", "mse", "output")
DENSITIES = (0.05, 0.1)
FAR_MASS = 0.15
_ROWS = {"train": 512, "judge": 1024}
"""Query sub-blocks per step and per judged window."""
_LEAST_MASS = 1e-6


class Truth(NamedTuple):
    """Of some query sub-blocks, means over their queries."""

    mass: Tensor
    """``Float32[g u r n]``: mass of every key block, by the u heads of every group."""
    parts: Tensor
    """``Float32[g u r n v]``: what each key block adds to a head's output."""


def record(options: argparse.Namespace) -> list[list[SiteInputs]]:
    """Return operands by window and layer: those to learn from, then those to judge on."""
    device = torch.device(options.device)
    model = load_model(options.model, device=device, dtype="auto")
    learnt = CalibrationWindows(
        tokens=read_token_file(options.calibrate), lengths=(options.length,), count=options.windows
    )
    judged = planted_windows(
        read_token_file(options.tokens),
        load_tokenizer(options.model),
        length=options.length,
        sequences=options.judged,
        keys=16,
        seed=5,
    )
    windows = [batch["input_ids"] for batch in learnt]
    windows += [torch.from_numpy(window.tokens)[None] for window in judged]
    seer_compile.optimize(model, zero_shot=True, inner="aot_eager")
    store = model.get_submodule("seer_gates")
    assert isinstance(store, GateStore)
    store.set_mode(False)
    recorded = []
    for window in windows:
        seen: list[SiteInputs] = []

        def see(site: SiteInputs, seen: list[SiteInputs] = seen) -> None:
            seen.append(site)

        with observe(see), torch.no_grad():
            model(input_ids=window.to(device), use_cache=False)
        recorded.append([seen[layer] for layer in options.layers])
    return recorded


def truth_of(operands: SiteInputs, rows: Tensor, config: GateConfig) -> Truth:
    """Compute what blocks carry and add for some query sub-blocks, in float32."""
    query, key, value = (x[0].float() for x in (operands.query, operands.key, operands.value))
    size, block = config.query_sub_block, config.block_size.key
    tokens = (rows[:, None] * size + torch.arange(size, device=rows.device)).flatten()
    hidden = torch.arange(key.shape[1], device=rows.device) > tokens[:, None]
    groups = query.shape[0] // key.shape[0]
    mass, parts = [], []
    for head in range(key.shape[0]):
        queries = query[head * groups : (head + 1) * groups, tokens]
        logits = (queries @ key[head].T * operands.scale).masked_fill(hidden, -torch.inf)
        shares = logits.softmax(-1).unflatten(-1, (-1, block)).unflatten(1, (-1, size))
        mass.append(shares.sum(-1).mean(2))
        values = value[head].unflatten(0, (-1, block))
        parts.append(torch.einsum("urqnt,ntv->urnv", shares, values) / size)
    return Truth(torch.stack(mass), torch.stack(parts))


def loss_of(kind: str, log_mass: Tensor, truth: Truth) -> Tensor:
    """Return a loss of predicted log mass ``Float32[g r n]``."""
    if kind == "output":
        ratio = log_mass.exp()[:, None] / truth.mass.clamp(min=_LEAST_MASS)
        change = torch.where(truth.mass > _LEAST_MASS, ratio - 1, 0.0)
        changed = torch.einsum("gurn,gurnv->gurv", change, truth.parts)
        size = truth.parts.sum(3).square().sum(-1).clamp(min=_LEAST_MASS)
        return (changed.square().sum(-1) / size).mean()
    return row_losses(log_mass, truth.mass.mean(1), "mse" if kind == "mse" else "kl").mean()


def predict(gate: AttnGate, operands: SiteInputs, rows: Tensor) -> Tensor:
    """Return the log mass that a gate predicts for some query sub-blocks, ``Float32[g r n]``."""
    visibility = operands.visibility
    return gate.row_log_mass(operands.query, operands.key, operands.scale, visibility, rows)[0]


def train(
    gate: AttnGate, windows: list[SiteInputs], kind: str, options: argparse.Namespace
) -> None:
    """Train a gate in place: AdamW, twenty steps of warm-up, a cosine down to a twentieth."""
    optimizer = torch.optim.AdamW(gate.parameters(), lr=options.rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for step in range(options.steps):
        fall = 0.5 * (1 + math.cos(math.pi * step / options.steps))
        for group in optimizer.param_groups:
            group["lr"] = options.rate * min(1, (step + 1) / 20) * (0.05 + 0.95 * fall)
        operands = windows[step % len(windows)]
        rows = draw_rows("train", operands, gate.config, generator)
        with torch.no_grad():
            truth = truth_of(operands, rows, gate.config)
        log_mass = predict(gate, operands, rows)
        loss = loss_of(kind, log_mass, truth)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(gate.parameters(), 1.0)
        optimizer.step()


def draw_rows(
    purpose: str, operands: SiteInputs, config: GateConfig, generator: torch.Generator
) -> Tensor:
    """Return some query sub-blocks, ascending."""
    number = operands.query.shape[2] // config.query_sub_block
    rows = torch.randperm(number, generator=generator)[: _ROWS[purpose]].sort().values
    return rows.to(operands.query.device)


@torch.no_grad()
def judge(gate: AttnGate, windows: list[SiteInputs]) -> Row:
    """Return what rows keep of the far blocks that matter, and what that costs the output."""
    generator = torch.Generator().manual_seed(1)
    nats, far_blocks = 0.0, 0
    kept = dict.fromkeys(DENSITIES, 0)
    errors = dict.fromkeys(DENSITIES, 0.0)
    for operands in windows:
        rows = draw_rows("judge", operands, gate.config, generator)
        truth = truth_of(operands, rows, gate.config)
        log_mass = predict(gate, operands, rows)
        nats += float(loss_of("kl", log_mass, truth)) / len(windows)
        own = (rows * gate.config.query_sub_block // gate.config.block_size.query)[:, None]
        blocks = torch.arange(log_mass.shape[-1], device=rows.device)
        far = (truth.mass >= FAR_MASS) & (blocks < own - 1) & (blocks > 0)
        far_blocks += int(far.sum())
        forced = (blocks == own) | (blocks == 0)
        scores = log_mass.masked_fill(forced, torch.inf).masked_fill(blocks > own, -torch.inf)
        ranks = scores.argsort(-1, descending=True).argsort(-1)
        whole = truth.parts.sum(3)
        for density in DENSITIES:
            is_kept = (ranks < (density * (own + 1)).ceil().clamp(min=3))[:, None]
            kept[density] += int((far & is_kept).sum())
            mass = torch.where(is_kept, truth.mass, 0.0).sum(-1, keepdim=True)
            out = torch.where(is_kept[..., None], truth.parts, 0.0).sum(3)
            change = out / mass.clamp(min=_LEAST_MASS) - whole
            errors[density] += float(change.square().sum() / whole.square().sum()) / len(windows)
    row: Row = {"nats": nats, "far_blocks": far_blocks}
    row |= {f"kept_far_{density}": kept[density] / max(far_blocks, 1) for density in DENSITIES}
    return row | {f"error_{density}": math.sqrt(errors[density]) for density in DENSITIES}


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """Yield a row per layer and loss."""
    recorded = record(options)
    for place, layer in enumerate(options.layers):
        windows = [window[place] for window in recorded]
        learnt, judged = windows[: options.windows], windows[options.windows :]
        first = windows[0]
        for kind in LOSSES:
            begun = time.perf_counter()
            gate = AttnGate(
                first.query.shape[1],
                first.key.shape[1],
                first.query.shape[3],
                config=GateConfig(),
                scale=first.scale,
                device=first.query.device,
            )
            if kind != "none":
                train(gate, learnt, kind, options)
            seconds = round(time.perf_counter() - begun, 1)
            yield {"layer": layer, "loss": kind, **judge(gate, judged), "seconds": seconds}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibrate", type=Path, required=True, help="token ids to train on")
    parser.add_argument("--tokens", type=Path, required=True, help="token ids to judge on")
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 3, 6, 7])
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--windows", type=int, default=12, help="to train on")
    parser.add_argument("--judged", type=int, default=4, help="windows to judge on")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rate", type=float, default=1e-3)
    add_common_options(parser)
    options = parser.parse_args()
    about = {"figure": "output loss", **context(options, "output_loss.py"), "steps": options.steps}
    rows = write_rows(options.out, measure(options), about)
    columns = ["layer", "loss", "nats", "far_blocks"]
    columns += [f"{name}_{density}" for name in ("kept_far", "error") for density in DENSITIES]
    print(table(rows, [*columns, "seconds"]))


if __name__ == "__main__":
    main()
