"""How fast is the gated operator as a whole, at every size and shape, beside dense attention?

    python benchmarks/op_speed.py --out results.jsonl
    python benchmarks/op_speed.py --figures short --lengths 1 100 512

Figures, each with its goals:

- ``main``: pooling, scores, selection and attention in one call, causal, bf16, 32 query and 8 key
  heads of 128; beside SDPA's flash and cuDNN; split into parts.
- ``full``: a budget of every block costs no more than the best dense backend.
- ``short``: no length is slower than the plain SDPA call on tensors of the same layout.
- ``memory``: what a call of 131,072 tokens allocates, and a call of 1,048,576 tokens.
- ``shapes``: other head dims, ragged batches, shared selections, windows: TFLOP/s on kept blocks.

Gates are untrained and tensors random; the budget is solved for the density that counters measure.
Every case is compared with float64 on some rows of each selection before it is timed. ``ms`` counts
the calls in a loop, ``device_ms`` replays them in a CUDA graph, ``host_us`` is the caller's thread.
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
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
    devices_ms,
    eager_ms,
    goal,
    host_us,
    peak_bytes,
    table,
    wall_ms,
    write_rows,
)
from op_checks import LIMIT, check_against_dense, check_rows
from torch import Tensor

import seer_compile
from seer_compile.gate import AttnGate
from seer_compile.kernels import counters
from seer_compile.kernels.gated_attention import MODE_AUTO, MODE_FULL_BUDGET, MODE_SPARSE
from seer_compile.types import Sharing, Visibility


@dataclass(frozen=True, kw_only=True)
class Case:
    """The shape of a call."""

    length: int
    density: float = 0.1
    dim: int = 128
    heads: int = 32
    kv_heads: int = 8
    batch: int = 1
    window: int | None = None
    padded: int = 0
    """Keys that are padding in the last batch item; evenly less before."""
    sharing: Sharing = seer_compile.GateConfig().sharing
    selector: str = "top_p"
    sub_blocks: tuple[int, int] = seer_compile.GateConfig().sub_blocks
    layout: str = "token major"
    """``token major``: as models lay out heads, a view of ``b q h d``; or ``heads first``."""
    queries: int | None = None
    """Query tokens; as many as keys when None."""

    def label(self) -> Row:
        """Return the sharing, and the fields that differ from the default."""
        plain = Case(length=0)
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {
            k: v
            for k, v in fields.items()
            if k == "sharing" or (v != getattr(plain, k) and k != "density")
        }


class Operator:
    """One case on a device: its tensors, its gate, and the call."""

    def __init__(self, case: Case, device: str) -> None:
        self.case, self.device = case, device
        draw = torch.Generator(device).manual_seed(0)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32

        def operand(heads: int, length: int) -> Tensor:
            size = (case.batch, length, heads, case.dim)
            if case.layout == "heads first":
                size = (case.batch, heads, length, case.dim)
            values = torch.randn(size, generator=draw, device=device, dtype=dtype)
            return values if case.layout == "heads first" else values.transpose(1, 2)

        self.query = operand(case.heads, case.queries or case.length)
        self.key, self.value = (operand(case.kv_heads, case.length) for _ in range(2))
        self.scale = case.dim**-0.5
        self.shift = case.length - self.query.shape[2]
        padding = None
        if case.padded:
            share = torch.arange(case.batch, device=device) / max(case.batch - 1, 1)
            used = case.length - (share * case.padded).int()
            padding = torch.arange(case.length, device=device) < used[:, None]
        lower = None if case.window is None else self.shift + 1 - case.window
        self.visibility = Visibility(upper=self.shift, lower=lower, key_padding=padding)
        selectors = {"top_p": seer_compile.TopP(), "fraction": seer_compile.Fraction()}
        config = seer_compile.GateConfig(selector=selectors[case.selector], sharing=case.sharing)
        config = config.with_sub_blocks(*case.sub_blocks)
        sizes = (case.heads, case.kv_heads, case.dim)
        self.gate = AttnGate(*sizes, config=config, device=device).requires_grad_(False)

    def arguments(self, mode: int) -> tuple[Any, ...]:
        """Return the operator's arguments after query, key and value, up to the visibility."""
        gate = self.gate
        knob = torch.tensor(mode, dtype=torch.int8)
        tensors = (gate.query_weight, gate.key_weight, gate.budget, knob)
        return (*tensors, self.scale, *gate.constants().values(), "benchmark")

    def call(self, mode: int = MODE_SPARSE) -> Callable[[], Tensor]:
        """Return the operator's call, as a graph makes it."""
        operator = torch.ops.seer_compile.gated_attention.v1
        readable = tuple(self.visibility.as_arguments().values())
        while readable and readable[-1] is None:
            readable = readable[:-1]
        arguments = (self.query, self.key, self.value, *self.arguments(mode), *readable)
        return lambda: operator(*arguments)[0]

    def dense(self, backend: str) -> Callable[[], Tensor]:
        """Return dense causal attention by one of SDPA's backends."""
        attend = BACKENDS[backend]
        tensors = (self.query, self.key, self.value)
        if self.shift:
            # One query: it sees every key.
            return lambda: torch.nn.functional.scaled_dot_product_attention(
                *tensors, scale=self.scale, enable_gqa=True
            )
        return lambda: attend(*tensors, self.scale)

    def measure_density(self) -> tuple[float, float]:
        """Return kept / visible blocks of one call, and the block pairs that heads compute."""
        with counters.collect_density() as meter:
            self.call()()
        kept, visible = meter.totals()["benchmark"]
        return kept / visible, float(kept * self.gate.groups)

    def solve_density(self) -> tuple[float, float]:
        """Set the largest budget whose density is no more than asked; return what is measured."""
        low, high = 0.0, 1.0
        for _ in range(14):
            middle = (low + high) / 2
            self.gate.budget.fill_(middle)
            if self.measure_density()[0] <= self.case.density:
                low = middle
            else:
                high = middle
        self.gate.budget.fill_(low or high)
        return self.measure_density()


def dense_times(operator: Operator) -> Row:
    """Return milliseconds of the dense backends."""
    times: Row = {}
    for name in ("flash", "cudnn") if operator.device == "cuda" else ("default",):
        try:
            times[f"{name}_ms"] = eager_ms(operator.dense(name), operator.device)
        except RuntimeError as error:
            times[f"{name}_error"] = str(error)[:80]
    return times


def best(times: Row) -> float:
    """Return the time of the fastest backend that answered."""
    return min(ms for name, ms in times.items() if name.endswith("_ms"))


def measure(case: Case, device: str) -> Row:
    """Check and time one sparse case."""
    operator = Operator(case, device)
    density, kept = operator.solve_density()
    check_rows(operator)
    call = operator.call()
    row = {**case.label(), "density": round(density, 4), "ms": eager_ms(call, device)}
    row["device_ms"] = device_ms(call, device)
    parts = breakdown(call, device)
    row |= {f"{name}_ms": parts[name] for name in ("attention", "selection", "gate")}
    work = 4 * case.dim * 64 * 64 * kept
    row["tflops"] = work / parts["attention"] / 1e9
    return row


def main_figure(options: argparse.Namespace) -> Iterator[Row]:
    """Time the whole operator."""
    for length in options.lengths or (8192, 32768, 131072):
        dense: Row = {}
        for density in options.densities or (0.1, 0.05):
            case = Case(length=length, density=density, **options.shape)
            if not dense:
                operator = Operator(case, options.device)
                if length <= 8192:
                    check_against_dense(operator)
                dense = dense_times(operator)
                del operator
            row = {"asked": density, **measure(case, options.device), **dense}
            row["over_best"] = best(dense) / row["ms"]
            row["over_flash"] = dense.get("flash_ms", math.nan) / row["ms"]
            yield row


def full(options: argparse.Namespace) -> Iterator[Row]:
    """Time a budget of every block, as the store sets the mode for it."""
    for length in options.lengths or (4096, 8192, 32768):
        operator = Operator(Case(length=length, **options.shape), options.device)
        operator.gate.budget.fill_(1.0)
        dense = dense_times(operator)
        check_against_dense(operator, MODE_FULL_BUDGET)
        row = {"length": length, "ms": eager_ms(operator.call(MODE_FULL_BUDGET), options.device)}
        row["ratio"] = row["ms"] / best(dense)
        if length <= 8192:
            sparse = eager_ms(operator.call(MODE_SPARSE), options.device)
            row["sparse_kernels_ms"] = sparse
        yield {**row, **dense}


SHORT = (1, 2, 17, 64, 100, 128, 256, 512, 777, 1024, 1536, 2048, 3072, 4096)


def short(options: argparse.Namespace) -> Iterator[Row]:
    """Time lengths at which dense attention is the right answer, beside the plain call."""
    device = options.device
    shapes = [(length, None) for length in options.lengths or SHORT]
    for layout in ("token major", "heads first"):
        for length, queries in (*shapes, (4096, 1)):
            case = Case(length=length, queries=queries, layout=layout, **options.shape)
            operator = Operator(case, device)
            operator.gate.budget.fill_(0.2)
            before = counters.snapshot().get("benchmark", {})
            call, plain = operator.call(MODE_AUTO), operator.dense("default")
            out, exact = call().float(), plain().float()
            error = float((out - exact).norm() / exact.norm())
            after = counters.snapshot()["benchmark"]
            path = next(name for name in after if after[name] > before.get(name, 0))
            if path.startswith("dense") and not error <= LIMIT:
                raise SystemExit(f"{length} tokens are off by {error:.3g}")
            ours, theirs = devices_ms((call, plain), device, rounds=15)
            row = {"length": length, "queries": queries, "layout": layout, "path": path}
            row |= {"device_us": ours * 1e3, "sdpa_us": theirs * 1e3, "ratio": ours / theirs}
            row |= {"host_us": host_us(call, device), "sdpa_host_us": host_us(plain, device)}
            yield row


def memory(options: argparse.Namespace) -> Iterator[Row]:
    """Return what calls allocate beyond their operands, and run a million tokens."""
    million = {**options.shape, "heads": 4, "kv_heads": 1}
    lengths = options.lengths or (131072, 1048576)
    for length, shape in zip(lengths, (options.shape, million), strict=False):
        operator = Operator(
            Case(length=length, **{**shape, "selector": "fraction"}), options.device
        )
        operator.gate.budget.fill_(0.05)
        call, base = operator.call(), 0
        row: Row = {**operator.case.label(), "density": operator.measure_density()[0]}
        check_rows(operator)
        if options.device == "cuda":
            torch.cuda.empty_cache()
            base = torch.cuda.memory_allocated()
        gibi, output = 1 << 30, operator.query.numel() * operator.query.element_size()
        row["peak_gib"] = (peak_bytes(call, options.device) - base) / gibi
        row["output_gib"] = output / gibi
        backend = "cudnn" if options.device == "cuda" else "default"
        row["dense_peak_gib"] = (peak_bytes(operator.dense(backend), options.device) - base) / gibi
        row["ms"] = wall_ms(call, options.device)
        row[f"{backend}_ms"] = wall_ms(operator.dense(backend), options.device, repeats=1)
        yield row


def shapes(options: argparse.Namespace) -> Iterator[Row]:
    """Time other shapes; each TFLOP/s beside that of the first."""
    length = (options.lengths or (32768,))[0]
    first = Case(length=length, **options.shape)
    ragged = replace(first, batch=4, length=length // 4, density=0.2)
    cases = {
        "D128": first,
        "D64": replace(first, dim=64),
        "D256": replace(first, dim=256, heads=first.heads // 2, kv_heads=first.kv_heads // 2),
        "one selection per group": replace(first, sharing="selection"),
        "one selection per head": replace(first, sharing="none"),
        "by fraction": replace(first, selector="fraction"),
        "heads first": replace(first, layout="heads first"),
        "batch 4": ragged,
        "batch 4, padded": replace(ragged, padded=length // 8),
        "window": replace(first, window=length // 4, density=0.2),
    }
    base = None
    for name, case in cases.items():
        row = {"what": name, **measure(case, options.device)}
        base = base or row["tflops"]
        yield {**row, "of_first": row["tflops"] / base}


FIGURES: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    "main": main_figure,
    "full": full,
    "short": short,
    "memory": memory,
    "shapes": shapes,
}
PARTS = ["attention_ms", "selection_ms", "gate_ms"]
SPEED_UPS = ["flash_ms", "cudnn_ms", "over_flash", "over_best"]
COLUMNS = {
    "main": ["length", "density", "ms", "device_ms", *PARTS, "tflops", *SPEED_UPS],
    "full": ["length", "ms", "flash_ms", "cudnn_ms", "ratio", "sparse_kernels_ms"],
    "short": ["length", "queries", "layout", "path", "device_us", "sdpa_us", "ratio", "host_us",
              "sdpa_host_us"],
    "memory": ["length", "density", "peak_gib", "output_gib", "dense_peak_gib", "ms", "cudnn_ms"],
    "shapes": ["what", "density", "ms", "device_ms", *PARTS, "tflops", "of_first"],
}  # fmt: skip
MAIN_GOALS = {
    (32768, 0.1): {"ms": 1.9, "over_flash": 13.0, "over_best": 7.2},
    (131072, 0.05): {"ms": 16.0, "over_flash": 26.0},
}


def goals(figure: str, rows: list[Row]) -> Iterator[Row]:
    """Return what was asked of the figures."""
    for row in rows:
        if figure == "main":
            for name, limit in MAIN_GOALS.get((row["length"], row["asked"]), {}).items():
                label = f"{row['length']} tokens, {name}"
                yield goal(label, row[name], limit, at_least=name != "ms")
        elif figure == "full":
            yield goal(f"full budget, {row['length']} tokens", row["ratio"], 1.05)
        elif figure == "shapes":
            yield goal(f"{row['what']}, TFLOP/s of the first", row["of_first"], 0.8, at_least=True)
    if figure == "short":
        for layout in ("token major", "heads first"):
            ratios = [row["ratio"] for row in rows if row["layout"] == layout]
            yield goal(f"worst of {len(ratios)} lengths, {layout}", max(ratios), 1.02)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--figures", nargs="*", choices=sorted(FIGURES), default=list(FIGURES))
    parser.add_argument("--lengths", type=int, nargs="*", default=[])
    parser.add_argument("--densities", type=float, nargs="*", default=[])
    parser.add_argument("--selector", choices=("top_p", "fraction"), default="top_p")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    add_common_options(parser)
    options = parser.parse_args()
    options.shape = {
        name: getattr(options, name) for name in ("heads", "kv_heads", "dim", "selector")
    }
    common, judged, begun = context(options, "op_speed.py"), [], time.perf_counter()
    with torch.no_grad():
        for figure in options.figures:
            about = {"figure": f"operator {figure}", **common}
            rows = write_rows(options.out, FIGURES[figure](options), about)
            judged += goals(figure, rows)
            print(f"{figure}\n{table(rows, COLUMNS[figure])}", flush=True)
            if options.device == "cuda":
                torch.cuda.empty_cache()
    print(table(judged, ["goal", "seen", "reached"]))
    print(f"{time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
