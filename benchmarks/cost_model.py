"""What do gated calls cost on this machine? The prices behind budgets in time.

    python benchmarks/cost_model.py --device cuda [--write] [--out cost_model.jsonl]

Times dense attention and the whole gated operator on causal calls of several shapes, lengths and
densities, and fits the prices of ``kernels/cost_model.py`` to them by least relative squares, none
below 0; ``--write`` puts the entry there. The worst relative error of a time is printed. On a GPU
times are those of the device: what the host needs depends on what else a model asks of it. Before
anything is timed, a full budget must reproduce dense attention.
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import numpy as np
import torch
from gated_calls import CONFIG, Shape, Size, check_full_budget, dense_call, gated_call, operands
from measured_tables import KERNELS, digits, write_entry
from measuring import Row, add_common_options, context, device_ms, table, write_rows

from seer_compile.kernels.cost_model import CallSize, CostModel
from seer_compile.kernels.dense_backends import device_class

LENGTHS = {"cpu": (1024, 2048, 4096), "cuda": (4096, 8192, 16384, 32768)}
SHAPES = {
    "cpu": (Shape(4, 2, 64), Shape(8, 2, 64)),
    "cuda": (Shape(8, 2, 64), Shape(32, 8, 128)),
}
DENSITIES = (0.05, 0.2, 0.5)


def measure(device: torch.device) -> Iterator[Row]:
    """Yield one record per call; ``density`` is None where it is dense."""
    for shape in SHAPES[device.type]:
        for length in LENGTHS[device.type]:
            tensors = operands(shape, Size(length, length), device)
            check_full_budget(shape, tensors)
            for density in (None, *DENSITIES):
                is_dense = density is None
                call = dense_call(tensors) if is_dense else gated_call(shape, tensors, density)
                ms = device_ms(call, device.type)
                yield {**shape._asdict(), "length": length, "density": density, "ms": ms}


def fit(records: list[Row]) -> tuple[CostModel, float]:
    """Return prices of at least 0 and the worst relative error of a predicted time."""
    names = CostModel._fields
    units = [CostModel(*(float(field == name) for field in names)) for name in names]

    def predicted(prices: CostModel, record: Row) -> float:
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


def source_of(prices: CostModel) -> str:
    """Return an entry as it stands in the table."""
    return f"CostModel({', '.join(f'{name}={digits(x)}' for name, x in prices._asdict().items())})"


def main() -> None:
    """Measure, print, and write where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="rewrite kernels/cost_model.py")
    add_common_options(parser)
    options = parser.parse_args()
    device = torch.device(options.device)
    about = {"figure": "cost model", **context(options, "cost_model.py")}
    with torch.no_grad():
        records = write_rows(options.out, measure(device), about)
    print(table(records, ["heads", "kv_heads", "head_dim", "length", "density", "ms"]))
    prices, worst = fit(records)
    key, entry = f'"{device_class(device)}"', source_of(prices)
    print(f"{key}: {entry}   worst relative error {worst:.2f}")
    if options.write:
        write_entry(KERNELS / "cost_model.py", "TABLE", key, entry)


if __name__ == "__main__":
    main()
