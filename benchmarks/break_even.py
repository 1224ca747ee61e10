"""From which size on is the sparse path worth its overhead on this machine?

    python benchmarks/break_even.py --device cpu [--write] [--out break_even.jsonl]

On a GPU it first times the fused kernels of dense attention, flash and cuDNN, on causal calls of
growing length, and what cuDNN's plan for a shape that it has not seen costs: who answers dense
calls. Then dense attention, by those rules, and the whole gated operator (pooling, scores,
selection, attention): from which length on the gated operator is faster at the reference density.
It prints the entries for ``kernels/break_even.py``; ``--write`` puts them there. Before anything is
timed, a full budget must reproduce dense attention, and the backends each other.
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import math
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import torch
from measuring import BACKENDS, Row, add_common_options, context, device_ms, table, write_rows
from torch import Tensor

import seer_compile.kernels.ops  # noqa: F401  (registers the operators)
from seer_compile.config import Fraction, GateConfig
from seer_compile.gate import AttnGate
from seer_compile.kernels.break_even import DENSE, DenseRule
from seer_compile.kernels.dense import dense_attention
from seer_compile.kernels.dense_backends import device_class
from seer_compile.types import Visibility

TABLE = Path(__file__).resolve().parent.parent / "kernels" / "break_even.py"
CAUSAL = Visibility(upper=0)
LENGTHS = {
    "cpu": (512, 768, 1024, 1536, 2048, 3072, 4096),
    "cuda": (512, 1024, 2048, 3072, 4096, 6144, 8192, 12288, 16384),
}
DENSITY = 0.2
"""Of the calls timed: at break-even lengths a calibrated gate keeps more than at 32k tokens."""


CONFIG = GateConfig(selector=Fraction())
"""The gate that is timed: the default one, with the same share of the blocks in every row."""


class Shape(NamedTuple):
    """Heads, key heads and head dim of a call."""

    heads: int
    kv_heads: int
    head_dim: int


SHAPES = {
    "cpu": (Shape(4, 2, 64), Shape(8, 2, 64), Shape(8, 8, 128)),
    "cuda": (Shape(8, 2, 64), Shape(32, 8, 128), Shape(16, 16, 64)),
}


def median_ms(run: Callable[[], Any], device: torch.device, repeats: int = 7) -> float:
    """Return the median wall time of a call in milliseconds."""
    times = []
    for attempt in range(repeats + 2):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if attempt > 1:
            times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2] * 1e3


def operands(shape: Shape, length: int, device: torch.device, dtype: torch.dtype):
    """Return query, key and value of one call."""
    generator = torch.Generator().manual_seed(length)

    def draw(heads: int) -> Tensor:
        values = torch.randn(1, length, heads, shape.head_dim, generator=generator)
        return values.to(device, dtype).transpose(1, 2)

    return draw(shape.heads), draw(shape.kv_heads), draw(shape.kv_heads)


def gated_call(
    shape: Shape, tensors: tuple[Tensor, Tensor, Tensor], density: float
) -> Callable[[], Tensor]:
    """Return a call of the gated operator that answers sparsely whatever the size."""
    gate = AttnGate(*shape, config=CONFIG, device=tensors[0].device).requires_grad_(False)
    gate.budget.fill_(density)
    knobs = (gate.query_weight, gate.key_weight, gate.budget, torch.tensor(2, dtype=torch.int8))
    arguments = (*knobs, shape.head_dim**-0.5, *gate.constants().values(), "benchmark")
    operator = torch.ops.seer_compile.gated_attention.v1
    return lambda: operator(*tensors, *arguments, 0)[0]


def measure(shape: Shape, length: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return one record: times of both paths for one shape and length."""
    tensors = operands(shape, length, device, dtype)

    def dense() -> Tensor:
        return dense_attention(*tensors, scale=shape.head_dim**-0.5, visibility=CAUSAL)

    exact = dense().float()
    error = float((gated_call(shape, tensors, 1.0)().float() - exact).norm() / exact.norm())
    limit = 1e-4 if dtype is torch.float32 else 1e-2
    if not error <= limit:
        raise SystemExit(f"a full budget is off by {error:.3g} from dense attention: {shape}")
    return {
        **shape._asdict(),
        "length": length,
        "dense_ms": median_ms(dense, device),
        "sparse_ms": median_ms(gated_call(shape, tensors, DENSITY), device),
        "work": float(2 * shape.heads * shape.head_dim * length**2),
    }


def break_even(records: list[dict[str, Any]]) -> tuple[int, float]:
    """Return the key length and the work from which every measured call gains."""
    losing = [record for record in records if record["sparse_ms"] >= record["dense_ms"]]
    gaining = [record for record in records if record not in losing]
    if not gaining:
        raise SystemExit("the sparse path never pays on this machine")
    k_len = min(record["length"] for record in gaining)
    worst = max((record["work"] for record in losing if record["length"] >= k_len), default=0.0)
    work = min((record["work"] for record in gaining if record["work"] > worst), default=worst)
    return k_len, work


BACKEND_LENGTHS = (128, 512, 1024, 2048, 4096, 8192, 16384, 32768)
HEAD_DIMS = (64, 128, 256)
PLAN_CALLS = 32
"""Calls among which the cost of one plan of cuDNN is shared: the layers of a model."""
FASTER = 0.98
"""Of the other's time: what is not clearly faster is not preferred."""
SDPA_CHOICES = {0: "math", 1: "flash", 2: "efficient", 3: "cudnn"}


def measure_backends(head_dim: int, length: int, device: torch.device) -> Row:
    """Return times of the fused kernels for one head dim and length, and of a plan."""
    shape = Shape(32, 8, head_dim)
    tensors = operands(shape, length, device, torch.bfloat16)
    scale = head_dim**-0.5
    choice = torch._fused_sdp_choice(*tensors, None, 0.0, True, scale=None, enable_gqa=True)
    row: Row = {"head_dim": head_dim, "length": length, "sdpa": SDPA_CHOICES.get(choice, choice)}
    row["work"] = float(2 * shape.heads * head_dim * length**2)
    outputs = {}
    for name in ("flash", "cudnn"):
        try:
            outputs[name] = BACKENDS[name](*tensors, scale).float()
        except RuntimeError as error:
            row[f"{name}_error"] = str(error)[:60]
            continue
        call = BACKENDS[name]
        row[f"{name}_ms"] = device_ms(lambda call=call: call(*tensors, scale), device.type)
    if len(outputs) == 2:
        difference = outputs["flash"] - outputs["cudnn"]
        row["difference"] = float(difference.norm() / outputs["flash"].norm())
        if not row["difference"] <= 1e-2:
            raise SystemExit(f"flash and cuDNN differ by {row['difference']:.3g}: {row}")
        row["plan_ms"] = plan_ms(tensors, scale)
    return row


def plan_ms(tensors: tuple[Tensor, Tensor, Tensor], scale: float) -> float:
    """Return what the first call of a new length costs more than the second, the smaller of two."""
    costs = []
    for short in (3, 5):
        cut = tuple(tensor[:, :, : tensor.shape[2] - short] for tensor in tensors)
        times = []
        for _ in range(2):
            torch.cuda.synchronize()
            begun = time.perf_counter()
            BACKENDS["cudnn"](*cut, scale)
            torch.cuda.synchronize()
            times.append((time.perf_counter() - begun) * 1e3)
        costs.append(times[0] - times[1])
    return min(costs)


def dense_rule(records: list[Row]) -> DenseRule | None:
    """Return the rule of one head dim; None where one of the kernels does not answer."""
    records = sorted(records, key=lambda record: record["work"])
    if not records or not all("plan_ms" in record for record in records):
        return None

    def first_of_the_rest(gains: Callable[[Row], bool]) -> float:
        """Return the work from which every measured call gains."""
        start = math.inf
        for record in reversed(records):
            if not gains(record):
                break
            start = record["work"]
        return start

    return DenseRule(
        flash_below=first_of_the_rest(lambda r: r["cudnn_ms"] < FASTER * r["flash_ms"]),
        cudnn_from=first_of_the_rest(
            lambda r: r["cudnn_ms"] + r["plan_ms"] / PLAN_CALLS < FASTER * r["flash_ms"]
        ),
    )


def rules_of(records: list[Row], key: str) -> dict[tuple[str, int], DenseRule]:
    """Return the rules of every head dim that has one."""
    found = {}
    for head_dim in HEAD_DIMS:
        rule = dense_rule([record for record in records if record["head_dim"] == head_dim])
        if rule is not None:
            found[key, head_dim] = rule
    return found


def floor_of(work: float) -> float:
    """Return a little less: the table's three digits must not leave out the call that gained."""
    return 0.99 * work


def source_of(rule: DenseRule) -> str:
    """Return a rule as it stands in the table."""
    bounds = (f"{floor_of(x):.3g}" if math.isfinite(x) else 'float("inf")' for x in rule)
    below, start = (bound if "." in bound or '"' in bound else f"{bound}.0" for bound in bounds)
    return f"DenseRule(flash_below={below}, cudnn_from={start})"


def write_entry(text: str, dictionary: str, key: str, entry: str) -> str:
    """Return the table's source with one entry replaced, or added at the top."""
    line = f"    {key}: {entry},\n"
    pattern = re.compile(rf"^    {re.escape(key)}: \w+\(.*\),\n", re.MULTILINE)
    if pattern.search(text):
        return pattern.sub(lambda _: line, text)
    head = re.search(rf"^{dictionary}: .* = {{\n", text, re.MULTILINE)
    assert head is not None, dictionary
    return text[: head.end()] + line + text[head.end() :]


def measure_sparse(device: torch.device) -> Iterator[Row]:
    """Time both paths for every shape and length."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    for shape in SHAPES[device.type]:
        for length in LENGTHS[device.type]:
            yield {**measure(shape, length, device, dtype), "density": DENSITY}


def main() -> None:
    """Measure, print, and write where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="rewrite kernels/break_even.py")
    add_common_options(parser)
    options = parser.parse_args()
    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
    key, text, begun = device_class(device), TABLE.read_text(), time.perf_counter()
    common = context(options, "break_even.py")
    backends: list[Row] = []
    with torch.no_grad():
        if device.type == "cuda":
            measured = (
                measure_backends(head_dim, length, device)
                for head_dim in HEAD_DIMS
                for length in BACKEND_LENGTHS
            )
            backends = write_rows(options.out, measured, {"figure": "dense backends", **common})
        rules = rules_of(backends, key)
        # What is dense below is dense by these rules.
        DENSE.update(rules)
        about = {"figure": "break-even", **common}
        records = write_rows(options.out, measure_sparse(device), about)
    columns = ["head_dim", "length", "sdpa", "flash_ms", "cudnn_ms", "plan_ms", "difference"]
    print(table(backends, columns))
    print(table(records, ["heads", "kv_heads", "head_dim", "length", "dense_ms", "sparse_ms"]))
    k_len, work = break_even(records)
    entry = f"BreakEven(q_len=128, k_len={k_len}, work={floor_of(work):.3g})"
    text = write_entry(text, "TABLE", f'"{key}"', entry)
    print(f'"{key}": {entry}')
    for (name, head_dim), rule in rules.items():
        text = write_entry(text, "DENSE", f'("{name}", {head_dim})', source_of(rule))
        print(f'("{name}", {head_dim}): {source_of(rule)}')
    if options.write:
        TABLE.write_text(text)
    print(f"{time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
