"""The bench of engines outlives a kernel that waits for ever, and one that ends its process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

sys.path[:0] = [str(Path(__file__).parents[3] / "benchmarks")]

WORKER = """
import json, os, sys, time
for job in json.loads(sys.argv[2]):
    if job == "hang":
        time.sleep(60)
    if job == "die":
        os._exit(3)
    print("a line of no concern")
    print("ROWS " + json.dumps([{"did": job}]), flush=True)
    if job == "broken":
        print("AGAIN", flush=True)
        os._exit(0)
"""


def test_jobs_after_a_hang_and_a_death_run_all_the_same(tmp_path):
    from engines import supervise

    program = tmp_path / "worker.py"
    program.write_text(WORKER)
    jobs = ["first", "hang", "broken", "second", "die", "third"]
    rows = dict(supervise(jobs, 3.0, str(program)))
    assert list(rows) == jobs
    assert [rows[name] for name in ("first", "broken", "second", "third")] == [
        [{"did": name}] for name in ("first", "broken", "second", "third")
    ]
    assert rows["hang"] == [{"failed": "nothing for 3.0 s: killed"}]
    assert rows["die"] == [{"failed": "the process ended with 3"}]


def test_many_hangs_end_the_run(tmp_path):
    from engines import MOST_KILLED, supervise

    program = tmp_path / "worker.py"
    program.write_text(WORKER.replace('job == "hang"', 'job.startswith("hang")'))
    jobs = [f"hang {number}" for number in range(MOST_KILLED)] + ["first", "second"]
    rows = dict(supervise(jobs, 0.5, str(program)))
    assert list(rows) == jobs
    assert all("killed" in rows[job][0]["failed"] for job in jobs[:MOST_KILLED])
    assert all("not run" in rows[job][0]["failed"] for job in jobs[MOST_KILLED:])


def test_every_tiling_of_the_table_is_checked_and_timed():
    from engines import TILINGS, check_jobs, time_jobs

    from seer_compile.kernels.triton.tuning import head_layout, hopper_tiling

    shared = {"per head": (8, 64), "per group": (2, 64), "128 rows": (8, 128)}
    checked = {job["tiling"] for job in check_jobs(1)}
    timed = {job["tiling"] for job in time_jobs(False) if job["kind"] == "time"}
    for sharing, (selections, query_block) in shared.items():
        for dim, tilings in TILINGS[sharing].items():
            table = hopper_tiling(head_layout(8, 2, selections), query_block, dim)
            assert {tuple(table), *tilings} <= checked & timed
