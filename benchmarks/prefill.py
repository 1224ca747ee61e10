"""How much faster is the prefill of a whole model, and what does it cost in memory?

    python benchmarks/prefill.py --length 32768 --density 0.10 --out results.jsonl
    python benchmarks/prefill.py --length 131072 --density 0.05 --layers 2 4

A model of the shape of Llama-3-8B with random weights, bf16, batch 1, no cache, logits of the last
token only: optimized by ``seer_compile`` and, in the same process on the same weights, under
``torch.compile`` with dense causal attention, by the faster of SDPA's flash and cuDNN backends and
without any mask. (What Transformers itself hands to SDPA is slower yet: ``--shipped``.)

Weights that know nothing give gates nothing to learn: the untrained gates rank blocks, and the
budget is set to what keeps the asked density, as measured by the counters. Time depends on shapes
and density only. First a full budget through the sparse kernels must give the dense model's logits
(above ``--check-length`` tokens the dense path of the operators must). With several ``--layers``,
slopes per layer are printed as well; with one, a layer's time is broken down by the profiler.
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import torch
from measuring import (
    BACKENDS,
    Row,
    add_common_options,
    breakdown,
    context,
    device_ms,
    goal,
    peak_bytes,
    table,
    wall_ms,
    write_rows,
)
from torch import Tensor, nn

import seer_compile
from seer_compile.kernels import counters
from seer_compile.types import SHARINGS

GOALS = {(32768, 0.1): 1.35, (131072, 0.05): 2.4}
MEMORY_GOAL_GB = 1.5
LIMIT = 0.05
"""Largest relative difference of last-token logits: in bf16 two dense backends come to 0.01."""


def fastest_backend(options: argparse.Namespace) -> tuple[str, Row]:
    """Time one call of each backend at the measured shape; return the name and the times."""
    if options.device == "cpu":
        return "default", {}
    shape = (1, options.length, options.heads, options.hidden // options.heads)
    draw = torch.Generator(options.device).manual_seed(0)

    def operand(heads: int) -> Tensor:
        size = (shape[0], shape[1], heads, shape[3])
        values = torch.randn(size, generator=draw, device=options.device, dtype=torch.bfloat16)
        return values.transpose(1, 2)

    tensors = (operand(options.heads), operand(options.kv_heads), operand(options.kv_heads))
    scale, times = shape[3] ** -0.5, {}
    for name in ("flash", "cudnn"):
        try:
            run = BACKENDS[name]
            times[name] = device_ms(lambda run=run: run(*tensors, scale), options.device)
        except RuntimeError as error:
            print(f"dense backend {name} does not answer: {str(error)[:100]}")
    return min(times, key=lambda name: times[name]), {
        f"attention_{name}_ms": round(ms, 3) for name, ms in times.items()
    }


def attention_function(name: str) -> Callable[..., Any]:
    """Return an attention of Transformers that is causal and takes no mask."""
    attend = BACKENDS[name]

    def forward(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **named):
        out = attend(query, key, value, named.get("scaling") or query.shape[-1] ** -0.5)
        return out.transpose(1, 2).contiguous(), None

    return forward


def build(options: argparse.Namespace, layers: int) -> nn.Module:
    """Return the model, on its device, with random weights."""
    from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

    for name in BACKENDS:
        AttentionInterface.register(f"bare_{name}", attention_function(name))
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        head_dim=options.hidden // options.heads,
        max_position_embeddings=max(131072, options.length),
        use_cache=False,
    )
    torch.manual_seed(0)
    with torch.device(options.device):
        dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
        model = LlamaForCausalLM._from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval()


class Prefill:
    """One model, its tokens, and how its forward is called."""

    def __init__(self, options: argparse.Namespace, layers: int) -> None:
        self.options = options
        self.model = build(options, layers)
        self.tokens = torch.randint(
            4, options.vocabulary, (1, options.length), device=options.device
        )

    def call(self, model: Callable[..., Any]) -> Tensor:
        """Return the logits of the last token."""
        return model(input_ids=self.tokens, use_cache=False, logits_to_keep=1).logits

    def measure(self, model: Callable[..., Any]) -> Row:
        """Return time and peak memory of a model that is compiled already."""
        device, times = self.options.device, []

        def repeat() -> None:
            for _ in range(self.options.repeats):
                times.append(wall_ms(lambda: self.call(model), device, repeats=1, warm_up=0))

        peak = peak_bytes(repeat, device)
        return {"ms": round(statistics.median(times), 2), "peak_gb": peak / 1e9}

    def compiled(self, model: Callable[..., Any]) -> tuple[Tensor, float]:
        """Return logits and seconds of the first call."""
        begun = time.perf_counter()
        logits = self.call(model).float().cpu()
        return logits, round(time.perf_counter() - begun, 1)

    def dense(self, implementation: str) -> tuple[Row, Tensor]:
        """Measure the model under ``torch.compile`` with an attention of Transformers."""
        torch._dynamo.reset()
        self.model.set_attn_implementation(implementation)
        model = torch.compile(self.model)
        logits, seconds = self.compiled(model)
        row = {"what": f"dense {implementation}", "compile_s": seconds, **self.measure(model)}
        return {**row, **self.profile(model)}, logits

    def sparse(self, exact: Tensor) -> Row:
        """Optimize, check, and measure."""
        torch._dynamo.reset()
        self.model.set_attn_implementation("sdpa")
        density = self.options.density
        selector = seer_compile.Fraction(density=density)
        config = seer_compile.GateConfig(selector=selector, sharing=self.options.sharing)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = seer_compile.optimize(self.model, config=config, zero_shot=True)
            _, seconds = self.compiled(model)
        error = self.check(model, exact)
        measured = self.set_density(model, density)
        before = counters.snapshot()
        row = {
            "what": "seer_compile",
            "compile_s": seconds,
            "density": round(measured, 5),
            "error_full_budget": round(error, 5),
            **self.measure(model),
            **self.profile(model),
        }
        calls = _calls_since(before)
        if set(calls) != {"sparse"}:
            raise SystemExit(f"not every call was answered sparsely: {calls}")
        return {**row, "calls": calls}

    def check(self, model: Any, exact: Tensor) -> float:
        """Compare a full budget with the dense model."""
        sparsely = self.options.length <= self.options.check_length
        seer_compile.set_budget(model, density=1.0)
        model.seer_gates.set_mode(True, at_any_size=sparsely)
        logits = self.call(model).float().cpu()
        error = float((logits - exact).norm() / exact.norm())
        if not error <= LIMIT:
            raise SystemExit(f"a full budget is off by {error:.3g} from the dense model")
        return error

    def set_density(self, model: Any, wanted: float) -> float:
        """Set the budget that keeps a density, and return the density measured.

        A share is rounded up in every row, so the first guess keeps a little more.
        """
        model.seer_gates.set_mode(True, at_any_size=True)
        asked = wanted
        for _ in range(3):
            seer_compile.set_budget(model, density=min(asked, 1.0))
            with counters.collect_density() as meter:
                self.call(model)
            totals = meter.totals().values()
            measured = sum(kept for kept, _ in totals) / max(sum(seen for _, seen in totals), 1)
            if measured <= wanted:
                break
            asked *= 0.998 * wanted / measured
        return measured

    def profile(self, model: Callable[..., Any]) -> Row:
        """Return milliseconds per layer of each part."""
        layers = len(self.model.model.layers)
        parts = breakdown(lambda: self.call(model), self.options.device)
        return {f"{name}_ms_per_layer": ms / layers for name, ms in parts.items()}


def _calls_since(before: dict[str, dict[str, int]]) -> Row:
    calls: Row = {}
    for site, paths in counters.snapshot().items():
        for path, count in paths.items():
            new = count - before.get(site, {}).get(path, 0)
            if new:
                calls[path] = calls.get(path, 0) + new
    return calls


def run(options: argparse.Namespace, layers: int) -> list[Row]:
    """Measure one depth; return its rows, the dense one first."""
    backend, times = fastest_backend(options)
    prefill = Prefill(options, layers)
    rows, base = [], {"layers": layers, "length": options.length}
    dense, exact = prefill.dense(f"bare_{backend}")
    rows.append({**base, **dense, **times})
    if options.shipped:
        rows.append({**base, **prefill.dense("sdpa")[0]})
    sparse = prefill.sparse(exact)
    ratio = dense["ms"] / sparse["ms"]
    memory = sparse["peak_gb"] - dense["peak_gb"]
    rows.append({**base, **sparse, "speed_up": ratio, "memory_over_dense_gb": memory})
    del prefill
    gc.collect()
    torch._dynamo.reset()
    if options.device == "cuda":
        torch.cuda.empty_cache()
    return rows


def slopes(rows: list[Row]) -> list[Row]:
    """Return milliseconds per layer between the first and the last depth, and their ratio."""
    depths = sorted({row["layers"] for row in rows})
    if len(depths) < 2:
        return []

    def slope(what: str) -> float:
        first, last = (
            next(row["ms"] for row in rows if row["layers"] == depth and what in row["what"])
            for depth in (depths[0], depths[-1])
        )
        return (last - first) / (depths[-1] - depths[0])

    dense, sparse = slope("dense bare"), slope("seer")
    row = {"what": "slope per layer", "length": rows[0]["length"], "layers": str(depths)}
    return [{**row, "dense_ms": dense, "sparse_ms": sparse, "speed_up": dense / sparse}]


def goals(rows: list[Row], options: argparse.Namespace) -> list[Row]:
    """Return what was asked of these figures."""
    judged = []
    limit = GOALS.get((options.length, options.density))
    for row in rows:
        if limit and "speed_up" in row:
            name = f"{row['layers']} layers, {row['what']}: speed-up"
            judged.append(goal(name, row["speed_up"], limit, at_least=True))
        if limit and "memory_over_dense_gb" in row:
            name = f"{row['layers']} layers: GB over dense"
            judged.append(goal(name, row["memory_over_dense_gb"], MEMORY_GOAL_GB))
    return judged


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--density", type=float, default=0.1, help="kept / visible blocks")
    parser.add_argument("--layers", type=int, nargs="+", default=[32])
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=14336)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--sharing", choices=SHARINGS, default=seer_compile.GateConfig().sharing)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--check-length", type=int, default=32768)
    parser.add_argument("--shipped", action="store_true", help="also as Transformers calls SDPA")
    add_common_options(parser)
    options = parser.parse_args()
    begun = time.perf_counter()
    common, rows = context(options, "prefill.py"), []
    with torch.no_grad():
        for layers in options.layers:
            new = run(options, layers)
            write_rows(options.out, new, {"figure": "prefill", **common})
            rows += new
    new = slopes(rows)
    write_rows(options.out, new, {"figure": "prefill", **common})
    parts = [f"{name}_ms_per_layer" for name in ("attention", "selection", "gate", "rest")]
    print(table(rows, ["layers", "what", "ms", "speed_up", "density", "peak_gb", "compile_s"]))
    print(table(rows, ["layers", "what", *parts, "error_full_budget"]))
    if new:
        print(table(new, ["what", "layers", "dense_ms", "sparse_ms", "speed_up"]))
    print(table(goals([*rows, *new], options), ["goal", "seen", "reached"]))
    print(f"{time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
