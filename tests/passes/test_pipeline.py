"""The pipeline: order, modes, options, what happens when a pass fails."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from seer_compile.errors import PassError, RangeError, SeerInputError, ShapeError
from seer_compile.passes import pipeline
from seer_compile.passes.pipeline import Mode, PipelineOptions
from seer_compile.passes.remove_dead import remove_dead
from seer_compile.passes.site_names import SiteNames
from seer_compile.types import Visibility
from support.assertions import assert_ops, assert_unchanged
from support.graphs import draw, qkv, sdpa_flag, trace
from support.rewriting import (
    OPS,
    answer_sparsely,
    assert_equal_within_rounding,
    new_store,
    rewrite,
)

aten = torch.ops.aten


def two_layers(q, k, v):
    first = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return F.scaled_dot_product_attention(first, k, v)


def handled(function, *inputs, answer):
    captured = trace(function, *inputs)
    return rewrite(captured, mode=Mode.HANDLER, handler=lambda: answer)


def test_pipeline_rewrites_every_site_of_a_graph():
    q, k, v = qkv(tokens=150)
    store = new_store()
    result = rewrite(trace(two_layers, q, k, v), store)
    answer_sparsely(store)
    assert result.rewritten == store.names() == ("<root>", "<root>#1")
    assert_ops(result.graph_module, {OPS.gated_attention.v1: 2})
    assert [summary.visibility for summary in result.summaries] == ["causal", "full"]
    exact = two_layers(q.double(), k.double(), v.double())
    assert_equal_within_rounding(result.graph_module(q, k, v), exact, two_layers(q, k, v))


def test_pipeline_hands_back_the_same_graph_where_nothing_can_be_sparse():
    captured = trace(two_layers, *qkv(tokens=1))
    with assert_unchanged(captured.graph_module):
        result = rewrite(captured, new_store())
    assert result.graph_module is captured.graph_module
    assert result.rewritten == ()
    assert {summary.decision for summary in result.summaries} == {"dense"}


def test_second_run_rewrites_nothing():
    store = new_store()
    first = rewrite(trace(two_layers, *qkv(tokens=80)), store)
    again = pipeline.run(first.graph_module, names=SiteNames(None), gates=store)
    assert again.rewritten == again.summaries == ()


def test_discover_changes_nothing_and_makes_no_gate():
    captured = trace(two_layers, *qkv())
    with assert_unchanged(captured.graph_module):
        result = rewrite(captured, mode=Mode.DISCOVER)
    assert [summary.decision for summary in result.summaries] == ["sparse", "sparse"]


def test_handler_answers_sites_with_their_inputs():
    q, k, v = qkv(tokens=20, kv_heads=2)
    seen = []

    def answer(inputs):
        seen.append(inputs)
        return inputs.query * 2

    def grouped(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True) + 1

    result = handled(grouped, q, k, v, answer=answer)
    assert torch.equal(result.graph_module(q, k, v), q * 2 + 1)
    (inputs,) = seen
    assert inputs.name == "<root>"
    assert inputs.visibility == Visibility(upper=0)
    assert inputs.scale == pytest.approx(8**-0.5)
    assert torch.equal(inputs.key, k)
    assert_ops(result.graph_module, {aten.scaled_dot_product_attention.default: 0})


def test_handler_result_of_another_shape_is_refused():
    result = handled(sdpa_flag, *qkv(), answer=lambda inputs: inputs.query[:, :, 1:])
    with pytest.raises(ShapeError, match="handler result"):
        result.graph_module(*qkv())


def test_pipeline_needs_gates_or_a_handler():
    captured = trace(sdpa_flag, *qkv())
    for mode, argument in ((Mode.SPARSE, "gates"), (Mode.HANDLER, "handler")):
        with pytest.raises(SeerInputError, match=argument):
            rewrite(captured, mode=mode)


@pytest.mark.parametrize("name", ["insert_gates", "replace_attention"])
def test_disabled_rewriting_leaves_the_graph_dense(name):
    captured = trace(sdpa_flag, *qkv())
    with assert_unchanged(captured.graph_module):
        result = rewrite(captured, new_store(), disabled=(name,))
    assert result.rewritten == ()


@pytest.mark.parametrize("disabled", ["lower", "remove_dead", "verify"])
def test_graph_is_right_without_an_optional_pass(disabled):
    q, k, v = qkv(tokens=100)
    store = new_store()
    result = rewrite(trace(sdpa_flag, q, k, v), store, disabled=(disabled,))
    answer_sparsely(store)
    assert torch.allclose(result.graph_module(q, k, v), sdpa_flag(q, k, v), atol=2e-6)
    assert disabled not in result.timings


def test_unknown_pass_names_are_refused():
    for option in ({"disabled": ("plan",)}, {"dump": ("frobnicate",), "dump_directory": "x"}):
        with pytest.raises(RangeError):
            PipelineOptions(**option)
    with pytest.raises(SeerInputError, match="dump_directory"):
        PipelineOptions(dump=("lower",))


def test_dumps_show_the_graph_around_a_pass(tmp_path):
    rewrite(
        trace(sdpa_flag, *qkv()), new_store(), dump=("lower",), dump_directory=str(tmp_path / "d")
    )
    before, after = sorted((tmp_path / "d").iterdir())
    assert before.name == "000_before_lower.py"
    assert after.name == "001_after_lower.py"
    assert "select_blocks" in before.read_text()
    assert "gated_attention" in after.read_text()


def test_pass_times_are_data():
    result = rewrite(trace(sdpa_flag, *qkv()), new_store())
    assert set(result.timings) == {
        "inline_bodies",
        "find_sites",
        "prove_masks",
        "plan",
        "insert_gates",
        "replace_attention",
        "lower",
        "remove_dead",
        "verify",
        "outline_bodies",
    }
    assert all(seconds >= 0 for seconds in result.timings.values())


def test_failing_pass_is_named(monkeypatch):
    def broken(*_):
        raise KeyError("lost")

    monkeypatch.setattr(pipeline, "lower", broken)
    with pytest.raises(PassError, match="pass 'lower' failed: KeyError") as caught:
        rewrite(trace(sdpa_flag, *qkv()), new_store())
    assert isinstance(caught.value.__cause__, KeyError)
    assert caught.value.context == {"pass": "lower"}


def test_watched_buffers_are_reported():
    class Triangle(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.ones(32, 32).tril())

        def forward(self, x):
            size = x.shape[2]
            scores = (x @ x.mT).masked_fill(self.seen[:size, :size] == 0, float("-inf"))
            return scores.softmax(-1) @ x

    model = Triangle()
    program = torch.export.export(model, (draw(2, 4, 16, 8),))
    result = pipeline.run(
        program.module(check_guards=False), names=SiteNames(None), gates=new_store()
    )
    assert [summary.visibility for summary in result.summaries] == ["causal"]
    assert [tuple(tensor.shape) for tensor in result.assumed] == [(32, 32)]


def test_remove_dead_takes_writes_that_nothing_reads():
    def function(x):
        unread, read, noise = (torch.zeros_like(x) for _ in range(3))
        unread[1:].add_(x[1:]).mul_(2)
        read[1:].add_(x[1:])
        noise.normal_()
        return read * 1

    captured = trace(function, x := torch.randn(4, 4))
    remove_dead(captured.graph_module)
    assert_ops(
        captured.graph_module,
        {aten.add_.Tensor: 1, aten.mul_.Tensor: 0, aten.normal_.default: 1},
    )
    assert torch.equal(captured.graph_module(x), function(x))


def test_remove_dead_keeps_writes_and_real_dropout():
    def function(x):
        x.add_(1)
        F.dropout(x, 0.5, training=False)
        F.dropout(x, 0.5, training=True)
        torch.matmul(x, x)
        return x * 1

    captured = trace(function, torch.randn(4, 4))
    remove_dead(captured.graph_module)
    assert_ops(
        captured.graph_module,
        {aten.add_.Tensor: 1, aten.matmul.default: 0, aten.dropout.default: 1},
    )
