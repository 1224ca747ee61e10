"""What would calibrating a Llama-3-8B-shaped model cost? Measured on a slice of its layers.

    python benchmarks/calibration_cost.py --layers 2 4 --length 8192 --out cost.jsonl

Random weights, the real shapes: hidden 4,096, 32 heads and 8 key heads of 128 channels, 128,256
ids. Two numbers of layers tell what a layer costs and what does not depend on layers; times are
extrapolated to 32 layers and the default number of steps. Memory of calibration is that of
inference plus what one site needs at a time, plus gates and their optimizer: both are measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

import seer_compile
from seer_compile.calibration.resolution import candidate_sub_blocks
from seer_compile.calibration.sensitivity import DENSITIES
from seer_compile.config import CalibrationConfig, GateConfig

LAYERS = 32
GIGA = 1e9


def build(layers: int, options: argparse.Namespace) -> nn.Module:
    """Return a model with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    small = options.tiny
    config = LlamaConfig(
        vocab_size=512 if small else 128_256,
        hidden_size=128 if small else 4096,
        intermediate_size=256 if small else 14_336,
        num_hidden_layers=layers,
        num_attention_heads=4 if small else 32,
        num_key_value_heads=2 if small else 8,
        head_dim=32 if small else 128,
        max_position_embeddings=131_072,
        attn_implementation="sdpa",
    )
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    with torch.random.fork_rng(), torch.device(options.device):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).to(dtype).eval()


def peak(run: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Return the seconds that a call takes and the largest memory in use, in GB."""
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    run()
    if is_cuda:
        torch.cuda.synchronize()
    memory = torch.cuda.max_memory_allocated() / GIGA if is_cuda else float("nan")
    return time.perf_counter() - begun, memory


def slice_costs(layers: int, options: argparse.Namespace) -> dict[str, float]:
    """Measure inference and the parts of calibration at one number of layers."""
    # What an earlier slice left behind would count as this one's memory.
    gc.collect()
    device, model = torch.device(options.device), build(layers, options)
    vocabulary = int(model.config.vocab_size)
    generator = torch.Generator().manual_seed(0)
    data: list[dict[str, Any]] = [
        {
            "input_ids": torch.randint(vocabulary, (1, options.length), generator=generator),
            "use_cache": False,
        }
        for _ in range(options.slice_steps + 4)
    ]

    @torch.no_grad()
    def forward() -> Tensor:
        return model(input_ids=data[0]["input_ids"].to(device), use_cache=False).logits

    def calibrate(steps: int) -> None:
        config = CalibrationConfig(
            steps=steps, start="current", holdout_batches=1, sensitivity_batches=0
        )
        seer_compile.calibrate(model, data, config=config, density=0.1, progress=False)

    forward()
    runs = sorted(peak(forward, device) for _ in range(5))
    inference_s, inference_gb = runs[2]
    parameters = sum(p.numel() for p in model.parameters())
    seer_compile.optimize(model, inner="aot_eager")
    calibrate(2)
    measure_s, measure_gb = peak(lambda: calibrate(0), device)
    whole_s, train_gb = peak(lambda: calibrate(options.slice_steps), device)
    gates = list(model.get_submodule("seer_gates").parameters())
    return {
        "layers": layers,
        "inference_s": inference_s,
        "step_s": (whole_s - measure_s) / options.slice_steps,
        "curves_s": measure_s,
        "inference_gb": inference_gb,
        "calibration_gb": max(measure_gb, train_gb),
        "parameters": float(parameters),
        "gate_parameters": float(sum(p.numel() for p in gates)),
    }


def at_all_layers(parts: list[dict[str, float]], name: str) -> float:
    """Extend a straight line through the first and the last slice to all layers."""
    first, last = parts[0], parts[-1]
    slope = (last[name] - first[name]) / (last["layers"] - first["layers"])
    return last[name] + slope * (LAYERS - last["layers"])


def extrapolate(parts: list[dict[str, float]], options: argparse.Namespace) -> dict[str, float]:
    """Return what the whole model would cost."""
    step, forward, curves = (
        at_all_layers(parts, name) for name in ("step_s", "inference_s", "curves_s")
    )
    sensitivity = forward * (1 + LAYERS * len(DENSITIES))
    tried = len(candidate_sub_blocks(GateConfig()))
    resolution = forward * (options.holdout + LAYERS * tried)
    total = step * options.steps + options.holdout * curves + sensitivity + resolution
    inference, calibration = (
        at_all_layers(parts, name) for name in ("inference_gb", "calibration_gb")
    )
    return {
        "steps": options.steps,
        "training_minutes": step * options.steps / 60,
        "curves_minutes": options.holdout * curves / 60,
        "sensitivity_minutes": sensitivity / 60,
        "resolution_minutes": resolution / 60,
        "minutes": total / 60,
        "inference_gb": inference,
        "calibration_gb": calibration,
        "memory_ratio": calibration / inference,
        "gates_share": at_all_layers(parts, "gate_parameters") / at_all_layers(parts, "parameters"),
    }


def main() -> None:
    """Measure the slices, extrapolate, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs=2, default=[2, 4])
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--slice-steps", type=int, default=12, help="steps that are timed")
    parser.add_argument("--steps", type=int, default=CalibrationConfig().steps)
    parser.add_argument("--holdout", type=int, default=CalibrationConfig().holdout_batches)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try the script")
    parser.add_argument("--commit", default="", help="recorded with the result")
    parser.add_argument("--out", type=Path, help="append the result as a JSON line")
    options = parser.parse_args()
    parts = []
    for layers in options.layers:
        parts.append(slice_costs(layers, options))
        print(json.dumps(parts[-1]), flush=True)
    found = extrapolate(parts, options)
    print(json.dumps({name: round(value, 4) for name, value in found.items()}))
    if options.out:
        on_gpu = options.device.startswith("cuda")
        record = {
            "figure": "calibration cost",
            "model": "random weights, Llama-3-8B shapes",
            "length": options.length,
            **found,
            "slices": parts,
            "gpu": torch.cuda.get_device_name() if on_gpu else "none",
            "torch": torch.__version__,
            "commit": options.commit,
        }
        with options.out.open("a") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
