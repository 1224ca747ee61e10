"""Who should answer dense calls on this GPU, flash attention or cuDNN?

    python benchmarks/dense_rules.py [--write] [--out break_even.jsonl]

Times both on causal calls of growing length, and what cuDNN's plan for a shape that it has not seen
costs. It prints the entries of ``DENSE`` in ``kernels/break_even.py``; ``--write`` puts them there.
Before anything is timed, both must give the same answer.
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import torch
from gated_calls import Operands, Shape, Size, operands
from measured_tables import FASTER, KERNELS, above, digits, floor_of, write_entry
from measuring import BACKENDS, Row, add_common_options, context, device_ms, table, write_rows

from seer_compile.kernels.break_even import DenseRule
from seer_compile.kernels.dense_backends import device_class

LENGTHS = (128, 512, 1024, 2048, 4096, 8192, 16384, 32768)
HEAD_DIMS = (64, 128, 256)
PLAN_CALLS = 32
"""Calls among which the cost of one plan of cuDNN is shared: the layers of a model."""
SDPA_CHOICES = {0: "math", 1: "flash", 2: "efficient", 3: "cudnn"}


def measure(head_dim: int, length: int, device: torch.device) -> Row:
    """Return times of both kernels for one head dim and length, and of a plan."""
    shape = Shape(32, 8, head_dim)
    tensors = operands(shape, Size(length, length), device)
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


def plan_ms(tensors: Operands, scale: float) -> float:
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


def rule_of(records: list[Row]) -> DenseRule | None:
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

    flash = itertools.takewhile(lambda r: r["flash_ms"] < FASTER * r["cudnn_ms"], records)
    cudnn_from = first_of_the_rest(
        lambda r: r["cudnn_ms"] + r["plan_ms"] / PLAN_CALLS < FASTER * r["flash_ms"]
    )
    return DenseRule(
        flash_below=above(max((record["work"] for record in flash), default=0.0)),
        cudnn_from=floor_of(cudnn_from),
    )


def source_of(rule: DenseRule) -> str:
    """Return a rule as it stands in the table."""
    flash_below, cudnn_from = map(digits, rule)
    return f"DenseRule(flash_below={flash_below}, cudnn_from={cudnn_from})"


def main() -> None:
    """Measure, print, and write where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="rewrite kernels/break_even.py")
    add_common_options(parser)
    options = parser.parse_args()
    if options.device != "cuda":
        parser.error("only a GPU has more than one fused kernel")
    device, begun = torch.device("cuda", torch.cuda.current_device()), time.perf_counter()

    def rows() -> Iterator[Row]:
        for head_dim in HEAD_DIMS:
            yield from (measure(head_dim, length, device) for length in LENGTHS)

    about = {"figure": "dense backends", **context(options, "dense_rules.py")}
    with torch.no_grad():
        records = write_rows(options.out, rows(), about)
    columns = ["head_dim", "length", "sdpa", "flash_ms", "cudnn_ms", "plan_ms", "difference"]
    print(table(records, columns))
    for head_dim in HEAD_DIMS:
        rule = rule_of([record for record in records if record["head_dim"] == head_dim])
        if rule is None:
            print(f"head dim {head_dim}: one of the kernels does not answer, SDPA chooses")
            continue
        key, entry = f'("{device_class(device)}", {head_dim})', source_of(rule)
        print(f"{key}: {entry}")
        if options.write:
            write_entry(KERNELS / "break_even.py", "DENSE", key, entry)
    print(f"{time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
