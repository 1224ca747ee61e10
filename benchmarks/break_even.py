"""From which size on is the sparse path worth its overhead on this machine?

    python benchmarks/break_even.py --device cpu [--write] [--out break_even.jsonl]
    python benchmarks/break_even.py --rows break_even.jsonl --write

Times dense attention, by whoever answers dense calls (``dense_rules.py``), and the whole gated
operator (pooling, scores, selection, attention), on causal calls of growing length, of one sequence
and of several, and on the last queries of long ones: from which sizes on the gated operator is
faster at the reference density.
What is timed is what a caller waits for, from an idle device to an idle device. It prints the
entries of ``TABLE`` in ``kernels/break_even.py``; ``--write`` puts them there, ``--rows`` reads the
last runs of a file instead of measuring. Before anything is timed, a full budget must reproduce
dense attention.
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import torch
from gated_calls import Shape, Size, check_full_budget, dense_call, gated_call, operands
from measured_tables import FASTER, KERNELS, digits, floor_of, write_entry
from measuring import Row, add_common_options, context, table, walls_ms, write_rows

from seer_compile.kernels.break_even import BreakEven, head_dim_class
from seer_compile.kernels.dense_backends import device_class

LENGTHS = {
    "cpu": (512, 768, 1024, 1536, 2048, 3072, 4096),
    "cuda": (1024, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 32768),
}
LAST_QUERIES = {
    "cpu": ((64, 128, 512), (4096,)),
    "cuda": ((64, 256, 512, 1024, 2048, 4096), (8192, 32768, 131072)),
}
"""Numbers of queries, and of the keys whose last ones they are."""
BATCHES = {"cpu": ((1024, 2048), (4,)), "cuda": ((512, 1024, 2048, 3072, 4096, 8192), (16,))}
"""Lengths of several sequences, and how many."""
SHAPES = {
    "cpu": (Shape(4, 2, 64), Shape(8, 2, 64), Shape(4, 2, 128), Shape(8, 8, 128), Shape(4, 2, 256)),
    "cuda": (
        Shape(8, 2, 64),
        Shape(32, 8, 64),
        Shape(8, 2, 128),
        Shape(32, 8, 128),
        Shape(8, 2, 256),
        Shape(16, 4, 256),
    ),
}
NEVER = BreakEven(q_len=1, k_len=1, work=math.inf)
DENSITY = 0.2
"""Of the calls timed: at break-even lengths a calibrated gate keeps more than at 32k tokens."""
REPEATS = {"cpu": 7, "cuda": 15}


def sizes_of(device: str) -> list[Size]:
    """Return the sizes that are timed."""
    last = itertools.starmap(Size, itertools.product(*LAST_QUERIES[device]))
    several = (Size(length, length, batch) for length, batch in itertools.product(*BATCHES[device]))
    return [*(Size(length, length) for length in LENGTHS[device]), *last, *several]


def measure(shape: Shape, size: Size, device: torch.device) -> Row:
    """Return one record: times of both paths for one shape and size."""
    tensors = operands(shape, size, device)
    check_full_budget(shape, tensors)
    calls = (dense_call(tensors), gated_call(shape, tensors, DENSITY))
    repeats = REPEATS[device.type]
    dense_ms, sparse_ms = walls_ms(calls, device.type, repeats=repeats, warm_up=3)
    times = {"dense_ms": dense_ms, "sparse_ms": sparse_ms}
    work = float(2 * size.batch * shape.heads * shape.head_dim * size.q_len * size.k_len)
    about = {"density": DENSITY, "device_class": device_class(device)}
    return {**shape._asdict(), **size._asdict(), **times, "work": work, **about}


def _gains(record: Row) -> bool:
    return record["sparse_ms"] < FASTER * record["dense_ms"]


def _kind(record: Row) -> tuple[bool, bool]:
    """Return the kind of a call: all queries or the last ones, and one sequence or several."""
    return record["q_len"] == record["k_len"], record["batch"] > 1


def break_even(records: list[Row]) -> BreakEven:
    """Return the limits above which every measured call gains, and most is gained.

    A gain is the logarithm of dense time over sparse time. The kinds of calls count alike, however
    many of each were measured.

    Returns:
        Limits that no call reaches, where none admit a call without admitting one that loses.
    """
    gaining = [record for record in records if _gains(record)]
    losing = [record for record in records if not _gains(record)]
    gains = [math.log(record["dense_ms"] / record["sparse_ms"]) for record in gaining]
    kinds = [_kind(record) for record in gaining]
    sums = {kind: sum(g for g, k in zip(gains, kinds, strict=True) if k == kind) for kind in kinds}
    shares = [gain / sums[kind] for gain, kind in zip(gains, kinds, strict=True)]
    found: list[tuple[float, int, BreakEven]] = []
    starts = (sorted({record[name] for record in gaining}) for name in BreakEven._fields)
    for limits in itertools.starmap(BreakEven, itertools.product(*starts)):
        if any(_admits(limits, record) for record in losing):
            continue
        rows = zip(shares, gaining, strict=True)
        total = sum(share for share, record in rows if _admits(limits, record))
        if total:
            # Of limits that admit the same calls the tightest, but for the queries: what was not
            # measured are few queries of several sequences, and their work says enough of them.
            found.append((total, -limits.q_len, limits))
    return max(found)[-1] if found else NEVER


def _admits(limits: BreakEven, record: Row) -> bool:
    places = zip(BreakEven._fields, limits, strict=True)
    return all(record[name] >= limit for name, limit in places)


def entries_of(records: list[Row]) -> dict[tuple[str, int], BreakEven]:
    """Return the limits of every device class and head dim class."""
    kinds: dict[tuple[str, int], list[Row]] = {}
    for record in records:
        key = (record["device_class"], head_dim_class(record["head_dim"]))
        kinds.setdefault(key, []).append(record)
    entries = {key: break_even(alike) for key, alike in sorted(kinds.items())}
    return {key: entry._replace(work=floor_of(entry.work)) for key, entry in entries.items()}


def source_of(entry: BreakEven) -> str:
    """Return an entry as it stands in the table."""
    sizes = f"q_len={entry.q_len}, k_len={entry.k_len}"
    return f"BreakEven({sizes}, work={digits(entry.work)})"


def last_runs(path: Path) -> list[Row]:
    """Return the records of the last commit of every device class in a file."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [row for row in rows if row["figure"] == "break-even" and "device_class" in row]
    if not rows:
        raise SystemExit(f"{path} holds no records of break_even.py")
    last = {row["device_class"]: row["commit"] for row in rows}
    return [row for row in rows if row["commit"] == last[row["device_class"]]]


def main() -> None:
    """Measure, print, and write where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="rewrite kernels/break_even.py")
    parser.add_argument("--rows", type=Path, help="read records here instead of measuring")
    add_common_options(parser)
    options = parser.parse_args()
    begun = time.perf_counter()
    if options.rows:
        records = last_runs(options.rows)
    else:
        device = torch.device(options.device)

        def measured() -> Iterator[Row]:
            for shape in SHAPES[device.type]:
                yield from (measure(shape, size, device) for size in sizes_of(device.type))

        about = {"figure": "break-even", **context(options, "break_even.py")}
        with torch.no_grad():
            records = write_rows(options.out, measured(), about)
    columns = [*Shape._fields, *Size._fields, "dense_ms", "sparse_ms"]
    print(table(records, columns))
    for (name, head_dim), entry in entries_of(records).items():
        key = f'("{name}", {head_dim})'
        print(f"{key}: {source_of(entry)}")
        if options.write:
            write_entry(KERNELS / "break_even.py", "TABLE", key, source_of(entry))
    print(f"{time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
