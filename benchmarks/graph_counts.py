"""How many graphs does each architecture need for a thousand random lengths?

    PYTHONPATH=.:tests python -W ignore benchmarks/graph_counts.py \\
        --out benchmarks/results/graph_counts.jsonl

What ``tests/test_graph_counts.py --all-combinations -k random_lengths`` asserts, kept as rows.
Beside the graphs of the optimized model stand those of plain ``torch.compile`` for the same calls.
"""

from __future__ import annotations

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from measuring import add_common_options, context, table, write_rows

from zoo.__main__ import is_installed
from zoo.graph_counts import KINDS, count_graphs

COLUMNS = (
    *("model", "varies", "longest", "distinct", "graphs", "plain_graphs", "plain_aot_graphs"),
    *("first", "frames", "most_per_frame", "verdict", "sites", "sparse", "uncompiled_calls"),
    "seconds",
)


def count_apart(name: str, lengths: int) -> dict[str, Any]:
    """Count in a process of its own: what Dynamo learned from one model it applies to the next."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(count, name, lengths).result()


def count(name: str, lengths: int) -> dict[str, Any]:
    """Return the row of one architecture."""
    return count_graphs(name, lengths).flat()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", type=int, default=1000, help="calls per architecture")
    parser.add_argument("--only", default="", help="architectures, separated by semicolons")
    add_common_options(parser)
    options = parser.parse_args()
    common, rows = {"figure": "graph counts", **context(options, "graph_counts.py")}, []
    for name in [name for name in options.only.split(";") if name] or KINDS:
        if not is_installed(KINDS[name][0].name):
            print(f"not run: {name}, whose library is absent")
            continue
        row = count_apart(name, options.lengths)
        rows.append(row)
        # At once: a run of half an hour that is stopped keeps what it has.
        write_rows(options.out, [row], common)
        print(table([row], COLUMNS).splitlines()[1], flush=True)
    print(table(rows, COLUMNS))
    problems = [f"{row['model']}: {problem}" for row in rows for problem in row["problems"]]
    print("\n".join(problems) or "all as it should be")
    return int(bool(problems))


if __name__ == "__main__":
    raise SystemExit(main())
