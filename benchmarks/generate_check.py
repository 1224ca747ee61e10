"""Does ``generate`` of an optimized model give the dense tokens, and is its prefill sparse?

    python benchmarks/generate_check.py --model DIR --tokens FILE.u16

A batch of three prompts, padded on the left, is continued greedily with a dynamic and with a static
cache. With a full budget, through the sparse kernels and as users set it, the tokens must be those
of the model before ``optimize``; where they differ, the row says how far apart the dense model's
two best logits are at the first difference. With ``--density`` of the blocks it must run, and the
counters must show that every layer's prefill went through the sparse operator. float32 by default:
in 16 bits two dense kernels disagree on near ties.
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import torch
from measuring import Row, add_common_options, context, table, write_rows
from torch import Tensor

import seer_compile
from seer_compile.kernels import counters
from seer_compile.model_loading import load_model
from seer_compile.token_data import read_token_file, window_starts

CACHES: dict[str, dict[str, Any]] = {"dynamic": {}, "static": {"cache_implementation": "static"}}


def prompts(options: argparse.Namespace, vocabulary: int) -> dict[str, Tensor]:
    """Return three texts of a file, the second and third shorter, padded on the left."""
    stream = read_token_file(options.tokens, vocabulary=vocabulary)
    length = options.length
    ids = torch.zeros(3, length, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, start in enumerate(window_starts(len(stream), length, 3)):
        used = length - row * (length // 3) - row
        text = torch.from_numpy(stream[start : start + used].astype("int64"))
        ids[row, length - used :], mask[row, length - used :] = text, 1
    return {"input_ids": ids.to(options.device), "attention_mask": mask.to(options.device)}


def generate(model: Any, inputs: dict[str, Tensor], options: argparse.Namespace, cache: str) -> Any:
    """Return tokens and logits of a greedy continuation."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.generate(
            **inputs,
            **CACHES[cache],
            max_new_tokens=options.new_tokens,
            min_new_tokens=options.new_tokens,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
            disable_compile=options.disable_compile,
        )


def compare(result: Any, dense: Any, prompt: int) -> Row:
    """Return how many of the new tokens agree, and how clear the first difference was."""
    ours, theirs = result.sequences[:, prompt:], dense.sequences[:, prompt:]
    agrees = ours == theirs
    row: Row = {"agree": float(agrees.float().mean()), "equal": bool(agrees.all())}
    if not row["equal"]:
        steps = (~agrees).int().argmax(1) + agrees.all(1) * ours.shape[1]
        item = int(steps.argmin())
        row["step"] = int(steps[item])
        best = dense.logits[row["step"]][item].float().topk(2).values
        row["margin"] = float(best[0] - best[1])
    return row


class Run:
    """One model, optimized, and what the dense one said."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        device = torch.device(options.device)
        self.model = load_model(options.model, device=device, dtype=options.dtype)
        self.inputs = prompts(options, self.model.config.vocab_size)
        self.dense = {cache: generate(self.model, self.inputs, options, cache) for cache in CACHES}
        config = seer_compile.GateConfig(selector=seer_compile.Fraction())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if options.gates:
                seer_compile.optimize(self.model, gates=options.gates, inner=options.inner)
            else:
                example = {name: tensor[:, :64] for name, tensor in self.inputs.items()}
                seer_compile.optimize(
                    self.model, config=config, zero_shot=True, inner=options.inner, example=example
                )

    def row(self, what: str, cache: str, *, density: float, at_any_size: bool) -> Row:
        """Generate with one budget and cache."""
        seer_compile.set_budget(self.model, density=density)
        self.model.seer_gates.set_mode(True, at_any_size=at_any_size)
        before, begun = calls_of(self.model), time.perf_counter()
        with counters.collect_density() as meter:
            result = generate(self.model, self.inputs, self.options, cache)
        totals = meter.totals().values()
        visible = sum(seen for _, seen in totals)
        after = calls_of(self.model)
        calls = {path: after[path] - before.get(path, 0) for path in after}
        return {
            "what": what,
            "cache": cache,
            "seconds": round(time.perf_counter() - begun, 2),
            "density": sum(kept for kept, _ in totals) / visible if visible else None,
            **compare(result, self.dense[cache], self.inputs["input_ids"].shape[1]),
            "calls": {path: number for path, number in sorted(calls.items()) if number},
        }

    def problems(self, row: Row, *, must_agree: bool, sparse: bool) -> list[str]:
        """Return what a row should not be."""
        found = []
        layers = len(self.model.seer_gates.names())
        if must_agree and not row["equal"]:
            found.append(f"{row['what']}, {row['cache']}: other tokens than dense attention's")
        if sparse and row["calls"] != {"sparse": layers}:
            found.append(
                f"{row['what']}, {row['cache']}: prefill of {layers} layers: {row['calls']}"
            )
        return found


def calls_of(model: Any) -> dict[str, int]:
    """Return calls of all sites by path."""
    totals: dict[str, int] = {}
    for paths in model.seer_report().calls.values():
        for path, number in paths.items():
            totals[path] = totals.get(path, 0) + number
    return totals


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of a causal language model")
    parser.add_argument("--tokens", required=True, type=Path, help="16-bit token ids")
    parser.add_argument("--gates", help="gate file; untrained gates without")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--inner", default="inductor")
    parser.add_argument("--disable-compile", action="store_true", help="as generate's argument")
    add_common_options(parser)
    options = parser.parse_args()
    common, begun = context(options, "generate_check.py"), time.perf_counter()
    run, rows, problems = Run(options), [], []
    for cache in CACHES:
        for what, density, at_any_size in (
            ("full budget, sparse kernels", 1.0, True),
            ("full budget", 1.0, False),
            ("sparse", options.density, True),
        ):
            row = run.row(what, cache, density=density, at_any_size=at_any_size)
            is_full = density == 1.0
            problems += run.problems(row, must_agree=is_full, sparse=at_any_size)
            rows.append(row)
    report = run.model.seer_report()
    problems += [f"compiled as it came: {error}" for error in report.errors]
    write_rows(options.out, rows, {"figure": "generate", "length": options.length, **common})
    columns = ["what", "cache", "seconds", "density", "agree", "step", "margin", "calls"]
    print(table(rows, columns))
    print("\n".join(problems) or f"all as it should be; {report.graphs} graphs")
    print(f"{time.perf_counter() - begun:.0f} s")
    return int(bool(problems))


if __name__ == "__main__":
    raise SystemExit(main())
