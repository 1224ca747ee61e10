"""Which kernels of the backward are right, and which are the fastest?

    python benchmarks/backward_speed.py --out benchmarks/results/backward_speed.jsonl
    python benchmarks/backward_speed.py --compile        with no GPU: fill Triton's cache

Every tiling of the two Hopper kernels is checked by itself on ragged cases against float64, beside
the error of the portable kernels, with a second run that must give the same bits and one with
numbers that are not finite where nothing may be read; then each is timed by itself, after its
result was compared with the portable one. bf16, 32 query and 8 key heads, 32,768 tokens, causal,
10 % of the blocks kept; medians; TFLOP/s count three products per kept block for queries, four for
keys, seven for the whole. Jobs run in a process of their own, which is killed when a job says
nothing for ``--patience`` seconds.
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [
    str(Path(__file__).resolve().parent),
    *(str(Path(__file__).resolve().parents[1] / name) for name in (".", "tests")),
]

import engines
import kernels_speed
from backward_jobs import (
    SELECTIONS,
    Job,
    check_case,
    check_jobs,
    portable_jobs,
    run_job,
    time_jobs,
    timed_case,
)
from kernels_speed import machine


def work_off(jobs: list[Job]) -> None:
    """Be the process that runs jobs: one line per job, as it ends."""
    for job in jobs:
        rows = run_job(job)
        print("ROWS " + json.dumps(rows), flush=True)
        if any("CUDA" in row.get("failed", "") for row in rows):
            # Whatever this process does next on the device fails too.
            print("AGAIN", flush=True)
            return


def compile_job(job: Job) -> list[str]:
    """Compile the kernels of one job into Triton's cache; return their resources."""
    from kernels_compile import offline_compilation

    kernels_speed.DEVICE = "cpu"
    check_case.cache_clear()
    timed_case.cache_clear()
    with offline_compilation() as compiled:
        rows = run_job(job)
    failed = [f"FAILED {row['failed']}" for row in rows if "failed" in row]
    return failed + [kernel.describe() for kernel in compiled]


def compile_jobs(jobs: list[Job], describe: bool) -> None:
    """Compile all jobs on all cores; what fails here fails again, and is reported, when it runs."""
    start = time.perf_counter()
    workers = min(len(jobs), len(os.sched_getaffinity(0)))
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        results = list(pool.map(compile_job, jobs))
    seen = set()
    for job, lines in zip(jobs, results, strict=True):
        for line in lines:
            label = (line, str(job.get("tiling")))
            if ("FAILED" in line or (describe and "_kernel" in line)) and label not in seen:
                seen.add(label)
                print(line, job["kind"], job.get("tiling"), flush=True)
    print(f"compiled {len(jobs)} jobs in {time.perf_counter() - start:.0f} s", flush=True)


def line_of(job: Job, row: Job) -> str:
    """Return one compact line for a reader."""
    side = job["side"] + (f" {row['part']}" if "part" in row else "")
    tiling = ",".join(map(str, job["tiling"])) if "tiling" in job else ""
    label = f"{job['kind']:5} {job['sharing']:9} D{job['dim']:<3} {side:14} {tiling:20}"
    if "failed" in row:
        return f"{label} FAILED {row['failed']}"
    if job["kind"] == "check":
        return f"{label} ok {row['error']} (portable {row['portable_error']})"
    return f"{label} {row['ms']:8.3f} ms  {row.get('tflops', '')}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=("check", "time"), default=["check", "time"])
    parser.add_argument("--sharing", nargs="*", choices=tuple(SELECTIONS), default=[*SELECTIONS])
    parser.add_argument("--dims", nargs="*", type=int, default=[128, 64])
    parser.add_argument("--quick", action="store_true", help="the tuning table's tilings only")
    parser.add_argument("--compile", action="store_true", help="compile only")
    parser.add_argument("--compiled", action="store_true", help="the cache is warm already")
    parser.add_argument("--patience", type=float, default=30.0, help="seconds without a line")
    parser.add_argument("--commit", default="", help="recorded with each row")
    parser.add_argument("--out", type=Path, help="append rows as JSON lines")
    parser.add_argument("--jobs", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.jobs:
        work_off(json.loads(arguments.jobs))
        return
    jobs = check_jobs(arguments.quick) if "check" in arguments.only else []
    jobs += time_jobs(arguments.quick) if "time" in arguments.only else []
    jobs = [
        job for job in jobs
        if job["sharing"] in arguments.sharing and job["dim"] in arguments.dims
    ]  # fmt: skip
    if not arguments.compiled:
        others = portable_jobs() if "check" in arguments.only else []
        compile_jobs([*others, *jobs], arguments.compile)
    if arguments.compile:
        return
    context = {**machine([], arguments.commit), "command": "python benchmarks/backward_speed.py"}
    failures = 0
    begun = time.perf_counter()
    best: dict[tuple[Any, ...], float] = {}
    for job, rows in engines.supervise(jobs, arguments.patience, __file__):
        for row in rows:
            failures += "failed" in row
            if "ms" in row and job["side"] in ("query", "key"):
                place = (job["sharing"], job["dim"], job["side"])
                best[place] = min(best.get(place, row["ms"]), row["ms"])
            print(line_of(job, row), flush=True)
            if arguments.out:
                with arguments.out.open("a") as file:
                    file.write(json.dumps({**job, **row, **context}) + "\n")
    for (sharing, dim, side), ms in best.items():
        print(f"best  {sharing:9} D{dim:<3} {side:14} {ms:8.3f} ms", flush=True)
    print(f"{failures} failed, {time.perf_counter() - begun:.0f} s", flush=True)
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
