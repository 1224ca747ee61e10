"""The tables of ``kernels/`` that benchmarks write are what their records say."""

from __future__ import annotations

import ast
import importlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import break_even  # noqa: E402
import cost_model  # noqa: E402
import dense_rules  # noqa: E402
import gated_calls  # noqa: E402
import measured_tables  # noqa: E402
from measured_tables import write_entry  # noqa: E402

from seer_compile.kernels.break_even import DENSE, TABLE, BreakEven, DenseRule  # noqa: E402
from seer_compile.kernels.cost_model import TABLE as PRICES  # noqa: E402
from seer_compile.kernels.cost_model import CallSize, CostModel  # noqa: E402
from seer_compile.kernels.dense import dense_reason  # noqa: E402

RESULTS = BENCHMARKS / "results"
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", sorted(path.stem for path in BENCHMARKS.glob("*.py")))
def test_every_script_can_be_imported(name):
    assert importlib.import_module(name).__doc__


def record(q_len, k_len, work, *, gain=2.0, head_dim=64, batch=1):
    times = {"dense_ms": 2.0, "sparse_ms": 2.0 / gain}
    sizes = {"q_len": q_len, "k_len": k_len, "batch": batch, "work": work, "head_dim": head_dim}
    return {**sizes, **times, "device_class": "cpu"}


def test_no_call_that_loses_is_admitted_and_all_others_are():
    records = [
        record(64, 64, 1e3),
        record(128, 128, 4e3, gain=1.01),
        record(256, 256, 16e3),
        record(512, 512, 64e3),
        record(16, 4096, 65e3, gain=0.5),
        record(128, 4096, 512e3),
    ]
    assert break_even.break_even(records) == BreakEven(q_len=64, k_len=256, work=16e3)


def test_many_calls_of_one_kind_do_not_decide_over_the_others():
    last = [record(64 * n, 4096, 1e6 * n, gain=1.2) for n in (1, 2, 3)]
    whole = [record(512, 512, 1e4), record(1024, 1024, 1e5)]
    # Either all of the first are left out, or all of the others.
    between = record(256, 512, 1e5, gain=0.5)
    several = [record(512, 512, 1e5, batch=4)]
    assert break_even.break_even([*last, *whole, *several, between]) == BreakEven(512, 512, 1e4)


def test_where_nothing_gains_dense_attention_answers_every_call():
    (entry,) = break_even.entries_of([record(128, 128, 1e4, gain=0.9)]).values()
    assert entry.work == math.inf
    assert break_even.source_of(entry) == 'BreakEven(q_len=1, k_len=1, work=float("inf"))'
    sizes = {"q_len": 2**20, "k_len": 2**20, "heads": 128, "dims": (64, 64)}
    assert dense_reason(**sizes, device=CPU, table={("cpu", 64): entry}) == "short"


def test_head_dims_have_entries_of_their_own():
    records = [
        record(128, 128, 1e4, head_dim=40),
        record(128, 128, 1e4, gain=0.9, head_dim=64),
        record(256, 256, 4e4, head_dim=64),
        record(512, 512, 2e5, head_dim=128),
    ]
    assert break_even.entries_of(records) == {
        ("cpu", 64): BreakEven(128, 256, 0.99 * 4e4),
        ("cpu", 128): BreakEven(512, 512, 0.99 * 2e5),
    }


def test_the_last_run_of_every_device_counts(tmp_path):
    path = tmp_path / "rows.jsonl"
    names = ("figure", "device_class", "commit", "k_len")
    runs = [("cpu", "a", 1), ("gpu", "a", 2), ("gpu", "b", 3), ("gpu", "b", 4)]
    rows = [dict(zip(names, ("break-even", *run), strict=True)) for run in runs]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"figure": "other"}]))
    assert [row["k_len"] for row in break_even.last_runs(path)] == [1, 3, 4]


@pytest.mark.parametrize("size", [(256, 256, 1), (64, 256, 1), (128, 128, 3)])
def test_both_paths_are_timed_at_a_size(size):
    with torch.no_grad():
        row = break_even.measure(gated_calls.Shape(2, 1, 32), gated_calls.Size(*size), CPU)
    assert row["dense_ms"] > 0 < row["sparse_ms"]
    assert row["work"] == 2 * 32 * 2 * math.prod(size)


def test_a_wrong_answer_is_not_timed(monkeypatch):
    shape = gated_calls.Shape(2, 1, 32)
    tensors = gated_calls.operands(shape, gated_calls.Size(192, 192), CPU)
    gated_calls.check_full_budget(shape, tensors)
    monkeypatch.setattr(gated_calls, "gated_call", lambda *_: lambda: tensors[0])
    with pytest.raises(SystemExit, match="a full budget is off"):
        gated_calls.check_full_budget(shape, tensors)


def test_dense_rules_start_where_every_larger_call_gains():
    times = [(1e6, 1.0, 2.0), (1e9, 2.0, 1.0), (1e10, 9.0, 8.5), (1e11, 60.0, 40.0)]
    records = [
        {"work": work, "flash_ms": flash, "cudnn_ms": cudnn, "plan_ms": 32.0}
        for work, flash, cudnn in times
    ]
    assert dense_rules.rule_of(records) == DenseRule(flash_below=1.01e6, cudnn_from=0.99e11)
    # Of what is smaller than all that was measured nothing is known.
    assert dense_rules.rule_of(records[1:]).flash_below == 0.0
    del records[0]["plan_ms"]
    assert dense_rules.rule_of(records) is None


def test_flash_attention_that_is_never_faster_gets_no_call():
    records = [
        {"work": work, "flash_ms": flash, "cudnn_ms": 0.99 * flash, "plan_ms": 32.0}
        for work, flash in ((1e6, 1.0), (1e9, 10.0))
    ]
    assert dense_rules.rule_of(records) == DenseRule(flash_below=0.0, cudnn_from=math.inf)
    source = dense_rules.source_of(DenseRule(flash_below=2.02e9, cudnn_from=math.inf))
    assert source == 'DenseRule(flash_below=2.02e09, cudnn_from=float("inf"))'


@pytest.mark.parametrize("value", [0.0, 2e9, 3.0e12, 44.6, 7.0, 1.43, math.inf])
def test_numbers_of_tables_are_literals_of_floats(value):
    text = measured_tables.digits(value)
    assert isinstance(ast.literal_eval(text) if math.isfinite(value) else float("inf"), float)
    assert eval(text) == value


def test_prices_are_found_again_from_the_times_they_make():
    prices = CostModel(call=700.0, token=1.3, gate=2.5, kept=1.6, dense=1.7)
    records = []
    for shape in cost_model.SHAPES["cuda"]:
        for length in cost_model.LENGTHS["cuda"]:
            config = cost_model.CONFIG
            blocks = (config.query_sub_block, config.key_sub_block, config.gate_dim)
            size = CallSize(*shape, length, shape.kv_heads, *blocks)
            for density in (None, *cost_model.DENSITIES):
                us = prices.dense_time(size) if density is None else None
                us = us or prices.sparse_time(size, density)
                common = {**shape._asdict(), "length": length, "density": density}
                records.append({**common, "ms": us / 1e3})
    found, worst = cost_model.fit(records)
    assert found == pytest.approx(prices, rel=1e-6)
    assert worst < 1e-6


def in_three_digits(number):
    return float(f"{number:.3g}")


def test_the_tables_are_what_the_records_say():
    entries = break_even.entries_of(break_even.last_runs(RESULTS / "break_even.jsonl"))
    assert {device for device, _ in entries} == {"cpu", "cuda-90"}
    for key, entry in entries.items():
        assert TABLE[key] == entry._replace(work=in_three_digits(entry.work))

    lines = map(json.loads, (RESULTS / "break_even.jsonl").read_text().splitlines())
    dense = [line for line in lines if line["figure"] == "dense backends"]
    for (device, head_dim), rule in DENSE.items():
        assert device == "cuda-90"
        found = dense_rules.rule_of([line for line in dense if line["head_dim"] == head_dim])
        assert rule == DenseRule(*map(in_three_digits, found))

    lines = map(json.loads, (RESULTS / "cost_model.jsonl").read_text().splitlines())
    prices, worst = cost_model.fit(list(lines))
    assert PRICES["cuda-90"] == CostModel(*map(in_three_digits, prices))
    assert worst < 0.52


def test_an_entry_is_replaced_or_added(tmp_path):
    path = tmp_path / "table.py"
    before, after = 'FIRST: dict = {\n    "a": 0,\n}\n', 'LAST: dict = {\n    "a": 0,\n}\n'
    path.write_text(before + 'TABLE: dict = {\n    "a": 1,\n    "b": 2,\n}\n' + after)
    write_entry(path, "TABLE", '"a"', "3")
    write_entry(path, "TABLE", '("c", 1)', "4")
    written = 'TABLE: dict = {\n    "a": 3,\n    "b": 2,\n    ("c", 1): 4,\n}\n'
    assert path.read_text() == before + written + after
    with pytest.raises(SystemExit, match="no table 'THIRD'"):
        write_entry(path, "THIRD", '"a"', "3")
