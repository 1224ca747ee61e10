"""What share of the time of the attention it feeds does a gate take, and over the sites of a model?

    python benchmarks/gate_share.py --gates G.safetensors --out benchmarks/results/resolution.jsonl

One call per size of sub-blocks that calibration may give a site: the whole operator at a tenth of
the blocks, causal, bf16, checked and split into parts as in ``op_speed.py``. Gates are untrained
and tensors random. With a gate file, its sites' sizes say how often each of them counts: the mean
is what the gates of a model of these heads would take of the attention of all its sites.
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import torch
from measuring import Row, add_common_options, context, goal, table, write_rows
from op_speed import Case, measure

from seer_compile.calibration.resolution import candidate_sub_blocks
from seer_compile.calibration.storage import describe_gates
from seer_compile.config import GateConfig

LIMIT = 0.2
"""Of the time of sparse attention at a tenth of the blocks."""

Size = tuple[int, int]


def sizes_of(path: Path | None) -> Counter[Size]:
    """Return how many sites of a gate file have which sub-blocks; the default's, once, if none."""
    if path is None:
        return Counter([GateConfig().sub_blocks])
    sites = describe_gates(path)["store"]["gates"]
    return Counter((int(query), int(key)) for query, key in (site["sub_blocks"] for site in sites))


def size_rows(options: argparse.Namespace, sizes: Counter[Size]) -> Iterator[Row]:
    """Time one call per size."""
    for size in sorted({*candidate_sub_blocks(GateConfig()), *sizes}):
        shape = {name: getattr(options, name) for name in ("heads", "kv_heads", "dim", "length")}
        row = measure(Case(sub_blocks=size, density=options.density, **shape), options.device)
        yield {**row, "sub_blocks": "{},{}".format(*size), "sites": sizes[size], **shares(row)}


def shares(parts: Row) -> Row:
    """Return what gate, and gate and selection, take of the time of attention."""
    gate, selection = (parts[name] / parts["attention_ms"] for name in ("gate_ms", "selection_ms"))
    return {"share": gate, "share_with_selection": gate + selection}


def mean_row(rows: list[Row]) -> Row:
    """Return the parts of all sites together, per site."""
    sites = sum(row["sites"] for row in rows)
    parts = {
        name: sum(row["sites"] * row[name] for row in rows) / sites
        for name in ("attention_ms", "selection_ms", "gate_ms")
    }
    return {
        "sub_blocks": "mean of the sites",
        "sites": sites,
        **{name: round(ms, 4) for name, ms in parts.items()},
        **shares(parts),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gates", type=Path, help="calibrated gates, for the mean over sites")
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    add_common_options(parser)
    options = parser.parse_args()
    about = {"figure": "gate's share of its attention", "length": options.length}
    about |= context(options, "gate_share.py")
    with torch.no_grad():
        rows = write_rows(options.out, size_rows(options, sizes_of(options.gates)), about)
        rows += write_rows(options.out, iter([mean_row(rows)]), about)
    columns = ["sub_blocks", "sites", "density", "attention_ms", "selection_ms", "gate_ms"]
    print(table(rows, [*columns, "share", "share_with_selection"]))
    print(table([goal("gates", rows[-1]["share"], LIMIT)], ["goal", "seen", "reached"]))


if __name__ == "__main__":
    main()
