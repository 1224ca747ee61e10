"""From which size on is the sparse path worth its overhead on this machine?

    python benchmarks/break_even.py --device cpu [--write] [--json break_even.jsonl]

Times dense attention and the whole gated operator (pooling, scores, selection, attention) on
causal calls of growing length, finds per shape the length from which the gated operator is faster
at the reference density, and prints the entry for ``kernels/break_even.py``; ``--write`` puts it
there. Before anything is timed, a full budget must reproduce dense attention.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import seer_compile.kernels.ops  # noqa: F401  (registers the operators)
from seer_compile.kernels.dense import dense_attention
from seer_compile.types import Visibility

TABLE = Path(__file__).resolve().parent.parent / "kernels" / "break_even.py"
CAUSAL = Visibility(upper=0)
LENGTHS = {
    "cpu": (512, 768, 1024, 1536, 2048, 3072, 4096),
    "cuda": (512, 1024, 2048, 3072, 4096, 6144, 8192, 12288, 16384),
}
DENSITY = 0.2
"""Of the calls timed: at break-even lengths a calibrated gate keeps more than at 32k tokens."""


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
    generator, device = torch.Generator().manual_seed(0), tensors[0].device
    weights = [
        torch.randn(shape.heads, 3 * shape.head_dim, 64, generator=generator).mul_(0.05).to(device)
        for _ in range(2)
    ]
    budget = torch.full((shape.heads, 2), density, device=device)
    mode = torch.tensor(2, dtype=torch.int8)
    pools = ("mean,max,min", "mean,max,min")
    sizes = (8, 64, 64, False, "fraction", [128, 1 << 20], "benchmark")
    scale = shape.head_dim**-0.5
    operator = torch.ops.seer_compile.gated_attention.v1
    return lambda: operator(*tensors, *weights, budget, mode, scale, *pools, *sizes, 0)[0]


def measure(shape: Shape, length: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return one record: times of both paths for one shape and length."""
    tensors = operands(shape, length, device, dtype)

    def dense() -> Tensor:
        return dense_attention(*tensors, scale=shape.head_dim**-0.5, visibility=CAUSAL)

    error = (gated_call(shape, tensors, 1.0)() - dense()).abs().max().item()
    limit = 1e-4 if dtype is torch.float32 else 3e-2
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


def describe(device: torch.device) -> dict[str, Any]:
    """Return what the numbers depend on."""
    is_cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if is_cuda else platform.processor()
    return {
        "device": name or platform.machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "density": DENSITY,
    }


def device_class(device: torch.device) -> str:
    """Return the key of the table."""
    if device.type == "cpu":
        return "cpu"
    major, minor = torch.cuda.get_device_capability(device)
    return f"cuda-{major}{minor}"


def write(entry: str, key: str) -> None:
    """Replace the entry of a device class in the table, or add it."""
    text = TABLE.read_text()
    line = f'    "{key}": {entry},\n'
    pattern = re.compile(rf'^    "{key}": BreakEven\(.*\),\n', re.MULTILINE)
    if pattern.search(text):
        text = pattern.sub(line, text)
    else:
        text = text.replace(
            "TABLE: dict[str, BreakEven] = {\n", f"TABLE: dict[str, BreakEven] = {{\n{line}"
        )
    TABLE.write_text(text)


def main() -> None:
    """Measure, print, and write where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--write", action="store_true", help="rewrite kernels/break_even.py")
    parser.add_argument("--json", type=Path, help="append the records here, one per line")
    options = parser.parse_args()
    device = torch.device(options.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    records = []
    for shape in SHAPES[device.type]:
        for length in LENGTHS[device.type]:
            record = {**measure(shape, length, device, dtype), **describe(device)}
            records.append(record)
            print(
                f"{shape.heads}/{shape.kv_heads} heads, D{shape.head_dim}, {length:6d} tokens: "
                f"dense {record['dense_ms']:8.3f} ms, sparse {record['sparse_ms']:8.3f} ms"
            )
    if options.json:
        with options.json.open("a") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
    k_len, work = break_even(records)
    entry, key = f"BreakEven(q_len=128, k_len={k_len}, work={work:.3g})", device_class(device)
    print(f'"{key}": {entry}')
    if options.write:
        write(entry, key)


if __name__ == "__main__":
    main()
