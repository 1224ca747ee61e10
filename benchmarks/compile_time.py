"""What does ``optimize`` add to the first compilation of a model?

    python benchmarks/compile_time.py --out benchmarks/results/compile_time.jsonl

Times ``torch.compile(model)`` and ``seer_compile.optimize(model)``, each with the first call, turn
by turn, every time in a process of its own with empty caches (``--warm`` keeps them). Imports and a
first compilation of something else come before the clock, for both. The figure is the ratio of the
medians; beside it, what our passes alone took, and the ratio in processor time (this process and
the compilers that it ran), which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIMIT = 1.2
WAYS = ("plain", "optimized")
HERE = Path(__file__).resolve()


def build(layers: int, dtype: str):
    """Return a Llama-like model with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=8192,
    )
    return LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Time one way in this process."""
    import torch

    import seer_compile

    device = torch.device(options.device)
    model = build(options.layers, options.dtype).to(device)
    tokens = torch.randint(4, 1000, (1, options.tokens), device=device)
    with torch.no_grad():
        torch.compile(lambda x: x.sin() + 1, backend=options.inner)(torch.ones(8, device=device))
        model(input_ids=tokens, use_cache=False)
        start, busy = time.perf_counter(), processor_seconds()
        if options.way == "plain":
            call = torch.compile(model, backend=options.inner)
        else:
            call = seer_compile.optimize(model, zero_shot=True, inner=options.inner)
        call(input_ids=tokens, use_cache=False)
        seconds, busy = time.perf_counter() - start, processor_seconds() - busy
    passes = model.seer_report().pass_seconds if options.way == "optimized" else {}
    return {"seconds": seconds, "processor": busy, "passes": sum(passes.values()), **passes}


def processor_seconds() -> float:
    """Return user and system time so far."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in used)


def in_a_process(way: str, options: argparse.Namespace, cache: str) -> dict[str, float]:
    """Time one way in a process of its own."""
    arguments = [sys.executable, "-W", "ignore", str(HERE), "--way", way]
    for name in ("layers", "tokens", "inner", "device", "dtype"):
        arguments += [f"--{name}", str(getattr(options, name))]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "HF_HUB_OFFLINE": "1"}
    # In one process, so that its time can be read.
    environment.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def compare(options: argparse.Namespace) -> dict[str, object]:
    """Time both ways, turn by turn, and return the record."""
    import torch
    import transformers

    times: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as kept:
        if options.warm:
            for way in WAYS:
                in_a_process(way, options, kept)
        for _ in range(options.repeats):
            for way in WAYS:
                with tempfile.TemporaryDirectory() as fresh:
                    cache = kept if options.warm else fresh
                    times[way].append(in_a_process(way, options, cache))
    medians = {way: statistics.median(t["seconds"] for t in times[way]) for way in WAYS}
    busy = {way: statistics.median(t["processor"] for t in times[way]) for way in WAYS}
    return {
        "figure": "compile_time",
        "ratio": round(medians["optimized"] / medians["plain"], 3),
        "ratio_processor": round(busy["optimized"] / busy["plain"], 3),
        **{f"{way}_s": round(medians[way], 2) for way in WAYS},
        **{f"{way}_all_s": [round(t["seconds"], 2) for t in times[way]] for way in WAYS},
        "passes_s": round(statistics.median(t["passes"] for t in times["optimized"]), 2),
        "caches": "warm" if options.warm else "empty",
        **{name: getattr(options, name) for name in ("layers", "tokens", "inner", "device")},
        "machine": machine(options.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit(),
        "command": shlex.join(["python", "benchmarks/compile_time.py", *sys.argv[1:]]),
    }


def machine(device: str) -> str:
    """Return what the figures were measured on."""
    import torch

    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {os.cpu_count()} cores"


def commit() -> str:
    """Return the commit of the sources."""
    command = ["git", "-C", str(HERE.parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def main() -> int:
    """Print the record; return 1 where the ratio exceeds the limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--inner", default="inductor")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warm", action="store_true", help="keep Inductor's caches")
    parser.add_argument("--out", type=Path, help="append the record here")
    parser.add_argument("--way", choices=WAYS, help="time one way in this process")
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options)))
        return 0
    record = compare(options)
    print(json.dumps(record))
    if options.out:
        with options.out.open("a") as file:
            file.write(json.dumps(record) + "\n")
    return int(record["ratio"] > LIMIT)  # type: ignore[operator]


if __name__ == "__main__":
    raise SystemExit(main())
