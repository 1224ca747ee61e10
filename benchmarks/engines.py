"""Which engine of block-sparse attention is the faster one, and is it right?

    python benchmarks/engines.py --out benchmarks/results/engines.jsonl
    python benchmarks/engines.py --only check --cases 200
    python benchmarks/engines.py --compile        with no GPU: fill Triton's cache, print resources

First every tiling of the Hopper engine is checked on random configurations against float64, with
NaN where nothing may be read and a second run that must give the same bits; then tilings of both
engines are timed on the same tensors, each after a comparison with float32 on some rows and with
the portable engine on all. bf16, causal, random selections with diagonal and first block among
them, unless the row says otherwise; medians; TFLOP/s count kept blocks.

A kernel that waits for ever would take the GPU with it, so jobs run in a process of their own,
which is killed when a job says nothing for ``--patience`` seconds; the next ones run in a new one,
until three were killed.
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import json
import multiprocessing
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path[:0] = [
    str(Path(__file__).resolve().parent),
    *(str(Path(__file__).resolve().parents[1] / name) for name in (".", "tests")),
]

import kernels_speed
import torch
from kernels_cases import BF16, FP16, Draw, attention_inputs
from kernels_checks import _check_bits, _check_lse, _poison_unread
from kernels_speed import Bench, machine, peers, timed

from seer_compile.kernels import reference
from seer_compile.kernels.triton import attention_forward, hopper_attention, tuning
from support.assertions import assert_no_worse_than_eager

Job = dict[str, Any]

MOST_KILLED = 3
"""After as many hung jobs the rest would hang too, and cost the machine's time."""

# consumers, heads, tiles, stages, query in registers, programs, registers
TILINGS: dict[str, dict[int, list[tuple[Any, ...]]]] = {
    "per head": {64: [], 128: [(1, 1, 2, 3, True, 1, 168)], 256: []},
    "per group": {
        64: [],
        128: [(2, 2, 2, 3, False, 1, 168), (2, 2, 1, 6, True, 1, 168)],
        256: [],
    },
    "128 rows": {64: [], 128: [], 256: []},
}
"""By how rows share key tiles, and head dim: what else than the tuning table's may be fast."""

LAYOUTS = {
    "per head": {"blocks": (64, 64), "selections": 32},
    "per group": {"blocks": (64, 64), "selections": 8},
    "128 rows": {"blocks": (128, 64), "selections": 32},
}


def tilings_of(sharing: str, dim: int) -> list[tuple[Any, ...]]:
    """Return the tuning table's tiling, then the others."""
    layout = LAYOUTS[sharing]
    heads = tuning.head_layout(32, 8, layout["selections"])
    first = tuple(tuning.hopper_tiling(heads, layout["blocks"][0], dim))
    return [first, *(tiling for tiling in TILINGS[sharing][dim] if tiling != first)]


def check_jobs(cases: int) -> list[Job]:
    """Return the checks: every tiling on every kind of rule."""
    rules = [{}, {"padding": True}, {"documents": True}, {"offset": True}]
    jobs = []
    for sharing, by_dim in TILINGS.items():
        for dim in by_dim:
            for number, tiling in enumerate(tilings_of(sharing, dim)):
                profile = {
                    "dtype": "bf16" if number % 2 == 0 else "fp16",
                    "dims": (dim, dim),
                    "heads": {"per head": (8, 2, 8), "per group": (8, 2, 2)}.get(
                        sharing, (4, 2, 4)
                    ),
                    "blocks": (128, 64) if sharing == "128 rows" else (64, 64 << number % 2),
                    "layout": ("heads first", "tokens first", "fused")[number % 3],
                    "longest": 1030,
                }
                jobs += [
                    {"kind": "check", "profile": {**profile, **rule}, "tiling": tiling,
                     "cases": cases}
                    for rule in (rules if number == 0 else rules[:1])
                ]  # fmt: skip
    return jobs


def time_jobs(quick: bool) -> list[Job]:
    """Return the timings, the shape that decides first."""
    main = {"length": 32768}
    jobs: list[Job] = [{"kind": "peers", "shape": main}]
    jobs += _timings(main, 0.1, ("per group", "128 rows", "per head"), 128)
    if quick:
        return jobs
    first = {"first_only": True}
    jobs += _timings({"length": 8192}, 0.1, tuple(LAYOUTS), 128, **first)
    jobs += _timings({"length": 131072}, 0.1, tuple(LAYOUTS), 128, **first)
    for density in (0.5, 0.3, 0.05):
        jobs += _timings(main, density, ("per group", "128 rows"), 128, **first)
    jobs += _timings({**main, "dim": 64}, 0.1, tuple(LAYOUTS), 64)
    wide = {**main, "dim": 256, "heads": 16, "kv_heads": 4}
    jobs += _timings(wide, 0.1, tuple(LAYOUTS), 256)
    for rules in ({"lower": -8192}, {"padded": 1000}):
        jobs += _timings({"length": 16384, "batch": 4}, 0.1, tuple(LAYOUTS), 128, rules, **first)
    return jobs


def _timings(
    shape: Job,
    density: float,
    sharings: tuple[str, ...],
    dim: int,
    rules: Job | None = None,
    first_only: bool = False,
) -> list[Job]:
    jobs = []
    for sharing in sharings:
        tilings = tilings_of(sharing, dim)
        for tiling in (None, *tilings[: 1 if first_only else None]):
            jobs.append(
                {"kind": "time", "shape": shape, "density": density, "sharing": sharing,
                 "tiling": tiling, "rules": rules or {}}
            )  # fmt: skip
    return jobs


def _tiling(job: Job) -> tuning.HopperTiling:
    return tuning.HopperTiling(*job["tiling"])


def _attend(inputs: dict[str, Any], tiling: tuning.HopperTiling) -> tuple[Any, ...]:
    tensors = [inputs[name] for name in ("query", "key", "value")]
    rest = (*inputs["selection"], inputs["scale"], *inputs["blocks"])
    visibility = inputs["visibility"].as_arguments()
    return hopper_attention.launch(*tensors, *rest, **visibility, tiling=tiling)


def check(job: Job) -> Job:
    """Run one tiling on random configurations."""
    dtypes = {"bf16": BF16, "fp16": FP16}
    profile = {**job["profile"], "dtype": dtypes[job["profile"]["dtype"]]}
    device, cases = kernels_speed.DEVICE, job["cases"] if kernels_speed.DEVICE == "cuda" else 8
    for case in range(cases):
        inputs = attention_inputs(profile, Draw(21, case), device, True)
        actual = _attend(inputs, _tiling(job))
        if device == "cpu":
            continue
        try:
            _judge(inputs, actual, job)
        except AssertionError as error:
            return {"failed": f"case {case}: {str(error)[:300]}", "cases": case}
    return {"cases": cases}


def _judge(inputs: dict[str, Any], actual: tuple[Any, ...], job: Job) -> None:
    tensors = [inputs[name] for name in ("query", "key", "value")]
    rest = (inputs["selection"], inputs["scale"], *inputs["blocks"], inputs["visibility"])
    gold, gold_lse = reference.block_sparse_attention(*(t.double() for t in tensors), *rest)
    eager, _ = reference.block_sparse_attention(*tensors, *rest)
    assert_no_worse_than_eager(actual[0], eager, gold, name="out")
    _check_lse(actual[1], gold_lse)
    _check_bits(actual, _attend(inputs, _tiling(job)), ("out", "lse"), "second run")
    _poison_unread(inputs)
    poisoned = _attend(inputs, _tiling(job))
    _check_bits(actual, poisoned, ("out", "lse"), f"{inputs['poison']} in unread positions")


def measure(job: Job, benches: dict[str, Bench]) -> Job:
    """Time one engine and tiling after comparing its result."""
    key = json.dumps(job["shape"])
    if key not in benches:
        benches.clear()
        benches[key] = Bench(**job["shape"])
    bench, layout = benches[key], LAYOUTS[job["sharing"]]
    blocks, dim = layout["blocks"], bench.query.shape[3]
    groups = bench.query.shape[1] if layout["selections"] == 32 else bench.key.shape[1]
    bench.generator.manual_seed(1)
    indices, counts = bench.select(job["density"], *blocks, groups)
    tensors = (bench.query, bench.key, bench.value, indices, counts, bench.scale, *blocks)
    rules: dict[str, Any] = {"upper": 0, "lower": job["rules"].get("lower")}
    if "padded" in job["rules"]:
        position = torch.arange(bench.key.shape[2], device=bench.key.device)
        used = bench.key.shape[2] - job["rules"]["padded"] * torch.arange(bench.key.shape[0])
        rules["key_padding"] = position < used.to(position.device)[:, None]

    def run() -> tuple[Any, ...]:
        if job["tiling"] is None:
            return attention_forward.launch(*tensors, **rules)
        return hopper_attention.launch(*tensors, **rules, tiling=_tiling(job))

    out, lse = run()
    if kernels_speed.DEVICE == "cuda":
        if not job["rules"]:
            bench.check(out, (indices, counts), blocks)
        other, other_lse = attention_forward.launch(*tensors, **rules)
        error = float((out.float() - other.float()).norm() / other.float().norm())
        # Two roundings to bfloat16 apart, 2^-9 each at most, and of the probabilities.
        assert error < 1e-2, f"relative difference from the portable engine {error}"
        torch.testing.assert_close(lse, other_lse, rtol=1e-4, atol=1e-4)
        del other, other_lse
    kept = float(counts.double().sum()) * bench.query.shape[1] / groups
    work = 4 * dim * blocks[0] * blocks[1] * kept
    return timed(run, 0.0 if job["rules"] else work)


def run_job(job: Job, benches: dict[str, Bench]) -> list[Job]:
    """Run one job; return its rows."""
    try:
        if job["kind"] == "peers":
            return list(peers(Bench(**job["shape"])))
        return [check(job) if job["kind"] == "check" else measure(job, benches)]
    except Exception as error:
        return [{"failed": f"{type(error).__name__}: {str(error)[:300]}"}]


def work_off(jobs: list[Job]) -> None:
    """Be the process that runs jobs: one line per job, as it ends."""
    benches: dict[str, Bench] = {}
    for job in jobs:
        rows = run_job(job, benches)
        print("ROWS " + json.dumps(rows), flush=True)
        if any("CUDA" in row.get("failed", "") for row in rows):
            # Whatever this process does next on the device fails too.
            print("AGAIN", flush=True)
            return


def supervise(
    jobs: list[Job], patience: float, program: str = __file__
) -> Iterator[tuple[Job, list[Job]]]:
    """Run jobs in another process, in a new one after a death, and yield each with its rows.

    The jobs left after :data:`MOST_KILLED` were killed get a row that says so.
    """
    jobs, killed = list(jobs), 0
    while jobs and killed < MOST_KILLED:
        command = [sys.executable, program, "--jobs", json.dumps(jobs)]
        worker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_drain, args=(worker, lines), daemon=True).start()
        while jobs:
            try:
                line = lines.get(timeout=patience)
            except queue.Empty:
                killed += 1
                yield jobs.pop(0), [{"failed": f"nothing for {patience} s: killed"}]
                break
            if line is None:
                yield jobs.pop(0), [{"failed": f"the process ended with {worker.wait()}"}]
                break
            if line.startswith("ROWS "):
                yield jobs.pop(0), json.loads(line[5:])
            if line == "AGAIN\n":
                break
        worker.kill()
        # A process whose kernel hangs may take long to go; the next one need not wait for it.
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.wait(timeout=30)
    for job in jobs:
        yield job, [{"failed": "not run: too many jobs hung"}]


def _drain(worker: subprocess.Popen, lines: queue.Queue[str | None]) -> None:
    assert worker.stdout is not None
    with worker.stdout:
        for line in worker.stdout:
            lines.put(line)
    lines.put(None)


def compile_job(job: Job) -> list[str]:
    """Compile the kernels of one job into Triton's cache; return their resources."""
    from kernels_compile import offline_compilation

    if job["kind"] == "peers":
        return []
    kernels_speed.DEVICE = "cpu"
    with offline_compilation() as compiled:
        rows = run_job(job, {})
    failed = [f"FAILED {row['failed']}" for row in rows if "failed" in row]
    return failed + [kernel.describe() for kernel in compiled]


def compile_jobs(jobs: list[Job]) -> bool:
    """Compile all jobs on all cores; return whether all did."""
    distinct = {json.dumps([job.get("tiling"), job.get("profile"), job.get("sharing"),
                            job.get("shape", {}).get("dim"), job.get("rules")]): job
                for job in jobs if job.get("tiling")}  # fmt: skip
    start = time.perf_counter()
    workers = min(max(len(distinct), 1), len(os.sched_getaffinity(0)))
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        results = list(pool.map(compile_job, distinct.values()))
    for job, lines in zip(distinct.values(), results, strict=True):
        for line in dict.fromkeys(lines):
            if "_hopper" in line or "FAILED" in line:
                print(line, job["tiling"], flush=True)
    print(f"compiled {len(distinct)} jobs in {time.perf_counter() - start:.0f} s", flush=True)
    return not any("FAILED" in line for lines in results for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=("check", "time"), default=["check", "time"])
    parser.add_argument("--cases", type=int, default=12, help="random cases per check")
    parser.add_argument("--quick", action="store_true", help="time 32,768 tokens, head dim 128")
    parser.add_argument("--compile", action="store_true", help="compile only")
    parser.add_argument("--compiled", action="store_true", help="the cache is warm already")
    parser.add_argument("--patience", type=float, default=40.0, help="seconds without a line")
    parser.add_argument("--commit", default="", help="recorded with each row")
    parser.add_argument("--out", type=Path, help="append rows as JSON lines")
    parser.add_argument("--jobs", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.jobs:
        work_off(json.loads(arguments.jobs))
        return
    jobs = check_jobs(arguments.cases) if "check" in arguments.only else []
    jobs += time_jobs(arguments.quick) if "time" in arguments.only else []
    if not arguments.compiled and not compile_jobs(jobs):
        sys.exit(1)
    if arguments.compile:
        return
    context = {**machine([], arguments.commit), "command": "python benchmarks/engines.py"}
    failures = 0
    for job, rows in supervise(jobs, arguments.patience):
        for row in rows:
            failures += "failed" in row
            print(json.dumps({**job, **row}), flush=True)
            if arguments.out:
                with arguments.out.open("a") as file:
                    file.write(json.dumps({**job, **row, **context}) + "\n")
    print(f"{failures} failed", flush=True)
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
