"""Random configurations of every Triton kernel against float64.

    python benchmarks/fuzz_kernels.py [--device cuda] [--cases 500] [--seed 0] [--ops ...]
    python benchmarks/fuzz_kernels.py --ops attention --seed 0 --case 17      one case again
    TRITON_INTERPRET=1 python benchmarks/fuzz_kernels.py --device cpu --cases 20

Each case draws lengths, bands, selections, padding, documents and numbers at random. What a
kernel is compiled for comes from the short lists ``PROFILES``, compiled beforehand on all cores,
or compilation would take most of the time. A result passes when it is no worse than plain PyTorch
in the same dtype, both measured against float64 (``tests/support/assertions.py``); when numbers
that must not be read are replaced by NaN, infinity or 65504 and no bit of it changes; and when a
second run gives the same bits. Exit status 1 when a case fails; each failure prints its replay.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from kernels_cases import (
    BF16,
    PROFILES,
    Draw,
    attention_inputs,
    features_inputs,
    hopper_scores_inputs,
    map_inputs,
    pool_inputs,
    select_inputs,
)
from kernels_checks import (
    check_attention,
    check_features,
    check_hopper_scores,
    check_map,
    check_pool,
    check_select,
    run_attention,
    run_features,
    run_hopper_scores,
    run_map,
    run_pool,
    run_select,
)

OPS: dict[str, tuple[Callable, Callable, Callable]] = {
    "attention": (attention_inputs, run_attention, check_attention),
    "block_scores": (map_inputs, run_map, check_map),
    "hopper_scores": (hopper_scores_inputs, run_hopper_scores, check_hopper_scores),
    "attention_mass": (map_inputs, run_map, check_map),
    "pool_blocks": (pool_inputs, run_pool, check_pool),
    "pool_features": (features_inputs, run_features, check_features),
    "select_blocks": (select_inputs, run_select, check_select),
}


def compile_ahead(task: tuple[str, int]) -> float:
    """Compile the kernels of one profile into Triton's cache; return the seconds it took."""
    from kernels_compile import offline_compilation

    op, number = task
    start = time.perf_counter()
    inputs, run, _ = OPS[op]
    with offline_compilation():
        # A few draws: the sign of a scale and the kind of a diagonal are compiled in.
        for case in range(4):
            run(inputs(PROFILES[op][number], Draw(0, case), "cpu", True))
    return time.perf_counter() - start


def compile_all(ops: list[str]) -> None:
    """Compile every profile of some operators on all cores."""
    tasks = [(op, number) for op in ops for number in range(len(PROFILES[op]))]
    start = time.perf_counter()
    workers = min(len(tasks), len(os.sched_getaffinity(0)))
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        longest = max(pool.map(compile_ahead, tasks))
    seconds = time.perf_counter() - start
    print(f"compiled {len(tasks)} profiles in {seconds:.0f} s, longest {longest:.0f} s", flush=True)


def run_case(op: str, case: int, arguments: argparse.Namespace) -> str | None:
    """Run one case; return what failed."""
    inputs, _, check = OPS[op]
    profiles = PROFILES[op]
    if arguments.device == "cpu":
        # The interpreter multiplies the bit patterns of bfloat16 numbers.
        profiles = [profile for profile in profiles if profile.get("dtype") is not BF16]
    profile = profiles[case % len(profiles)]
    is_full = arguments.device == "cuda"
    try:
        check(inputs(profile, Draw(arguments.seed, case), arguments.device, is_full))
    except Exception as error:
        replay = f"--ops {op} --seed {arguments.seed} --case {case} --device {arguments.device}"
        kind = type(error).__name__
        return f"{replay}: {kind}: {str(error)[:400]} [{profile}]"
    return None


def run_share(task: tuple[str, int, argparse.Namespace]) -> tuple[int, int]:
    """Run one worker's share of the cases, until they or their time are over.

    Returns:
        Cases run, and how many of them failed.
    """
    op, worker, arguments = task
    start = time.perf_counter()
    every = range(worker, arguments.cases, arguments.workers)
    done = failed = 0
    for case in every if arguments.case is None else [arguments.case]:
        if time.perf_counter() - start > arguments.seconds:
            break
        failure = run_case(op, case, arguments)
        done += 1
        if failure:
            failed += 1
            print("FAILED", failure, flush=True)
    return done, failed


def run_op(op: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the cases of one operator, on several processes where asked for."""
    start = time.perf_counter()
    workers = 1 if arguments.case is not None else arguments.workers
    tasks = [(op, worker, arguments) for worker in range(workers)]
    if workers == 1:
        shares = [run_share(tasks[0])]
    else:
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
            shares = list(pool.map(run_share, tasks))
    cases, failures = (sum(column) for column in zip(*shares, strict=True))
    seconds = round(time.perf_counter() - start, 1)
    result = {"op": op, "seed": arguments.seed, "cases": cases, "failures": failures}
    return {**result, "seconds": seconds, "device": arguments.device}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--ops", nargs="*", choices=sorted(OPS), default=list(OPS))
    parser.add_argument("--compile", action="store_true", help="compile only, with no GPU")
    parser.add_argument("--compiled", action="store_true", help="the cache is warm already")
    parser.add_argument("--cases", type=int, default=500, help="cases per operator")
    parser.add_argument("--case", type=int, help="run this one only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1e9, help="at most, per operator")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the cases")
    parser.add_argument("--out", type=Path, help="append results as JSON lines")
    arguments = parser.parse_args()
    is_long = arguments.device == "cuda" and arguments.case is None
    if arguments.compile or (is_long and not arguments.compiled):
        compile_all(arguments.ops)
    if arguments.compile:
        return
    machine = {}
    if arguments.device == "cuda":
        machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    failures = 0
    for op in arguments.ops:
        result = {**run_op(op, arguments), **machine}
        failures += result["failures"]
        print(json.dumps(result), flush=True)
        if arguments.out:
            with arguments.out.open("a") as file:
                file.write(json.dumps(result) + "\n")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
