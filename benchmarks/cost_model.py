"""What do gated calls cost on this machine? The prices behind budgets in time.

    python benchmarks/cost_model.py --device cuda [--write] [--json cost_model.jsonl]

Times dense attention and the whole gated operator on causal calls of several shapes, lengths and
densities, and fits the prices of ``kernels/cost_model.py`` to them by least relative squares, none
below 0; ``--write`` puts the entry there. The worst relative error of a time is printed.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from benchmarks.break_even import (
    CAUSAL,
    CONFIG,
    Shape,
    describe,
    device_class,
    gated_call,
    median_ms,
    operands,
)
from seer_compile.kernels.cost_model import CallSize, CostModel
from seer_compile.kernels.dense import dense_attention

TABLE = Path(__file__).resolve().parent.parent / "kernels" / "cost_model.py"
LENGTHS = {"cpu": (1024, 2048, 4096), "cuda": (4096, 8192, 16384, 32768)}
SHAPES = {
    "cpu": (Shape(4, 2, 64), Shape(8, 2, 64)),
    "cuda": (Shape(8, 2, 64), Shape(32, 8, 128)),
}
DENSITIES = (0.05, 0.2, 0.5)


def measure(device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Return one record per call."""
    records = []
    for shape in SHAPES[device.type]:
        for length in LENGTHS[device.type]:
            tensors = operands(shape, length, device, dtype)
            scale = shape.head_dim**-0.5
            times: dict[float | None, float] = {
                None: median_ms(
                    lambda tensors=tensors, scale=scale: dense_attention(
                        *tensors, scale=scale, visibility=CAUSAL
                    ),
                    device,
                )
            }
            times |= {d: median_ms(gated_call(shape, tensors, d), device) for d in DENSITIES}
            for density, ms in times.items():
                record = {**shape._asdict(), "length": length, "density": density, "ms": ms}
                records.append(record)
                print(record, flush=True)
    return records


def fit(records: list[dict[str, Any]]) -> tuple[CostModel, float]:
    """Return prices of at least 0 and the worst relative error of a predicted time."""
    names = CostModel._fields
    units = [CostModel(*(float(field == name) for field in names)) for name in names]

    def predicted(prices: CostModel, record: dict[str, Any]) -> float:
        size = CallSize(
            heads=record["heads"],
            kv_heads=record["kv_heads"],
            head_dim=record["head_dim"],
            length=record["length"],
            gate_heads=record["kv_heads" if CONFIG.sharing == "gate" else "heads"],
            query_sub_block=CONFIG.query_sub_block,
            key_sub_block=CONFIG.key_sub_block,
            gate_dim=CONFIG.gate_dim,
        )
        if record["density"] is None:
            return prices.dense_time(size)
        return prices.sparse_time(size, record["density"])

    # In units of the measured time, so that short calls count as much as long ones.
    rows = np.array([[predicted(u, r) / (1e3 * r["ms"]) for u in units] for r in records])
    kept = list(range(len(units)))
    while True:
        solution = np.linalg.lstsq(rows[:, kept], np.ones(len(rows)), rcond=None)[0]
        if (solution >= 0).all():
            break
        kept.pop(int(solution.argmin()))
    prices = np.zeros(len(units))
    prices[kept] = solution
    return CostModel(*map(float, prices)), float(np.abs(rows @ prices - 1).max())


def write(entry: str, key: str) -> None:
    """Replace the entry of a device class in the table, or add it."""
    text, line = TABLE.read_text(), f'    "{key}": {entry},\n'
    pattern = re.compile(rf'^    "{key}": CostModel\(.*\),\n', re.MULTILINE)
    head = "TABLE: dict[str, CostModel] = {\n"
    text = pattern.sub(line, text) if pattern.search(text) else text.replace(head, head + line)
    TABLE.write_text(text)


def main() -> None:
    """Measure, print, and write where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--write", action="store_true", help="rewrite kernels/cost_model.py")
    parser.add_argument("--json", type=Path, help="append the records here, one per line")
    options = parser.parse_args()
    device = torch.device(options.device)
    records = measure(device, torch.float32 if device.type == "cpu" else torch.bfloat16)
    prices, worst = fit(records)
    key = device_class(device)
    entry = f"CostModel({', '.join(f'{n}={v:.3g}' for n, v in prices._asdict().items())})"
    print(f'"{key}": {entry}   worst relative error {worst:.2f}')
    if options.json:
        about = {"figure": "cost model", **describe(device), "prices": prices._asdict()}
        with options.json.open("a") as file:
            file.writelines(json.dumps({**record, **about}) + "\n" for record in records)
    if options.write:
        write(entry, key)


if __name__ == "__main__":
    main()
