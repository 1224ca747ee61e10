"""What bounds each kernel, as Nsight Compute counts it?

    python benchmarks/profile_kernels.py --out benchmarks/results/profile.jsonl

``ncu`` runs this script again for every case, at its own clock, and counts the last launch of the
kernel: how busy tensor cores, exponential units, issue slots, L2 and memory are, in percent of what
they could do, and what a warp waits for, in cycles per instruction that is issued. 32,768 tokens,
32 and 8 heads, causal, 10 % of the blocks at random, one selection per key head, unless the case
says otherwise.
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import csv
import io
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import torch
from kernels_speed import Bench
from measuring import Row, add_common_options, context, table, write_rows
from torch import Tensor

from seer_compile.kernels import engines

DENSITY = 0.1
STALLS = (
    "barrier", "wait", "long_scoreboard", "short_scoreboard", "no_instruction", "gmma",
    "math_pipe_throttle", "mio_throttle", "not_selected",
)  # fmt: skip
METRICS = {
    "us": "gpu__time_duration.sum",
    "cycles": "sm__cycles_elapsed.max",
    "instructions": "smsp__inst_executed.sum",
    "tensor_percent": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "exponential_percent": "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_elapsed",
    "issue_percent": "smsp__issue_active.avg.pct_of_peak_sustained_elapsed",
    "l2_percent": "lts__t_sectors.avg.pct_of_peak_sustained_elapsed",
    "dram_percent": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    **{name: f"smsp__average_warps_issue_stalled_{name}_per_issue_active.ratio" for name in STALLS},
}
COLUMNS = (
    "case", "kernel", "us", "tensor_percent", "exponential_percent", "issue_percent", "error",
)  # fmt: skip


Arguments = tuple[Any, ...]


def attend(
    length: int = 32768, dim: int = 128, heads: int = 32
) -> tuple[Arguments, Arguments, tuple[Tensor, Tensor]]:
    """Launch the forward; return its tensors, its other arguments, and what it answers."""
    bench = Bench(length, dim, heads, heads // 4)
    tensors = (bench.query, bench.key, bench.value)
    about = (*bench.select(DENSITY, 64, 64, heads // 4), bench.scale, 64, 64, 0)
    return tensors, about, engines.forward(*tensors, *about)


def differentiate() -> None:
    """Launch the forward and the backward."""
    tensors, about, (out, lse) = attend()
    engines.backward(torch.randn_like(out), *tensors, out, lse, *about)


CASES: dict[str, tuple[str, Callable[[], Any]]] = {
    "D128": ("_hopper_attention", attend),
    "D128, 8,192 tokens": ("_hopper_attention", lambda: attend(8192)),
    "D64": ("_hopper_attention", lambda: attend(dim=64)),
    "D256, 16 and 4 heads": ("_hopper_attention", lambda: attend(dim=256, heads=16)),
    "gradient of queries, D128": ("query_gradient_kernel", differentiate),
    "gradients of keys and values, D128": ("key_gradient_kernel", differentiate),
}
"""The kernel that is counted, and what launches it."""


def profiled(names: list[str], ncu: str) -> Iterator[Row]:
    """Yield the counts of every case."""
    for name in names:
        kernel = CASES[name][0]
        command = [ncu, "--csv", "--page", "raw", "--metrics", ",".join(METRICS.values())]
        command += ["--kernel-name", f"regex:^{kernel}", "--launch-skip", "1"]
        command += ["--launch-count", "1", sys.executable, __file__, "--launch", name]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        yield {"figure": "profile", "kernel": kernel, "case": name, **counts(result)}


def counts(result: subprocess.CompletedProcess[str]) -> Row:
    """Return the counts that ncu printed, or what it said instead."""
    lines = [line for line in result.stdout.splitlines() if line.startswith('"')]
    rows = list(csv.DictReader(io.StringIO("\n".join(lines))))
    if result.returncode or len(rows) < 2:
        return {"error": (result.stdout + result.stderr).strip()[-300:]}
    units, seen = rows[0], rows[-1]
    found: Row = {}
    for name, metric in METRICS.items():
        text = (seen.get(metric) or "").replace(",", "")
        found[name] = float(text) if text.replace(".", "", 1).isdigit() else None
    if units.get(METRICS["us"]) in {"ns", "nsecond"} and found["us"] is not None:
        found["us"] /= 1e3
    return found


def main() -> None:
    """Count every case, write rows as they come, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--launch", choices=list(CASES), help="what ncu calls: only launch")
    add_common_options(parser)
    options = parser.parse_args()
    if options.launch:
        for _ in range(2):
            CASES[options.launch][1]()
        torch.cuda.synchronize()
        return
    ncu = shutil.which("ncu") or shutil.which("/usr/local/cuda/bin/ncu")
    if ncu is None:
        raise SystemExit("counts are taken by ncu of the CUDA toolkit, which is not on PATH")
    common = context(options, "profile_kernels.py")
    rows = write_rows(options.out, profiled(options.cases, ncu), common)
    print(table(rows, COLUMNS))
    if any("error" in row for row in rows):
        raise SystemExit("ncu did not count every case")


if __name__ == "__main__":
    main()
