"""insert_gates: pool, project, score, select in front of each sparse site."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from seer_compile.gate import AttnGate
from seer_compile.passes.insert_gates import budget_at, insert_gates
from seer_compile.passes.node_builder import marked
from seer_compile.passes.verify import calling_convention
from seer_compile.types import RewritePlan
from support.assertions import assert_ops, assert_unchanged
from support.graphs import qkv, repeat_kv, sdpa_flag, trace
from support.rewriting import OPS, new_store, plan_of, source

GATE_OPS = {
    OPS.pool_blocks.v1: 2,
    OPS.block_scores.v1: 1,
    OPS.select_blocks.v1: 1,
}


def inserted(function, *inputs, dynamic=False, exclude=()):
    captured, store = trace(function, *inputs, dynamic=dynamic), new_store()
    decided = plan_of(captured, exclude=exclude)
    result = insert_gates(captured.graph_module, decided, source(store))
    captured.graph_module.graph.lint()
    captured.graph_module.recompile()
    return captured, store, decided, result


def selections(captured):
    return [node for node, _ in marked(captured.graph_module, "select")]


@pytest.mark.parametrize("dynamic", [False, True])
def test_insert_gates_adds_one_gate_per_site(dynamic):
    captured, store, _, result = inserted(sdpa_flag, *qkv(), dynamic=dynamic)
    assert result.rewritten == store.names() == ("<root>",)
    assert_ops(captured.graph_module, GATE_OPS)
    gates = [m for m in captured.graph_module.modules() if isinstance(m, AttnGate)]
    assert gates == [store.get("<root>")]


def test_insert_gates_declines_what_the_plan_left_dense():
    captured, store, _, result = inserted(sdpa_flag, *qkv(), exclude=("*",))
    assert result.rewritten == store.names() == ()
    assert_ops(captured.graph_module, dict.fromkeys(GATE_OPS, 0))


def test_insert_gates_leaves_a_graph_without_sites_unchanged():
    captured = trace(lambda x: x.relu() + 1, torch.randn(3))
    with assert_unchanged(captured.graph_module):
        result = insert_gates(captured.graph_module, RewritePlan(decisions=()), source(new_store()))
    assert result.rewritten == ()


def test_insert_gates_twice_adds_nothing_more():
    captured, store, decided, _ = inserted(sdpa_flag, *qkv())
    with assert_unchanged(captured.graph_module):
        assert insert_gates(captured.graph_module, decided, source(store)).rewritten == ()


def test_insert_gates_leaves_the_answer_to_the_attention():
    q, k, v = qkv(tokens=100)
    expected = sdpa_flag(q, k, v)
    captured, *_ = inserted(sdpa_flag, q, k, v)
    assert torch.equal(captured.graph_module(q, k, v), expected)


def test_inserted_nodes_select_what_the_gate_selects():
    """The nodes of the graph and ``AttnGate.select`` are the same computation."""
    q, k, v = qkv(tokens=200, kv_heads=2)

    def grouped(q, k, v):
        return F.scaled_dot_product_attention(q, repeat_kv(k, 2), repeat_kv(v, 2), is_causal=True)

    captured, store, *_ = inserted(grouped, q, k, v)
    gate = store.get("<root>")
    with torch.no_grad():
        gate.budget.fill_(0.4)
    graph = captured.graph_module.graph
    (selection,) = selections(captured)
    output = next(node for node in graph.nodes if node.op == "output")
    output.args = (selection,)
    captured.graph_module.recompile()
    indices, counts = captured.graph_module(q, k, v)
    from seer_compile.types import SiteInputs, Visibility

    expected = gate.select(
        SiteInputs(
            name="<root>", query=q, key=k, value=v, scale=8**-0.5, visibility=Visibility(upper=0)
        )
    )
    assert torch.equal(counts, expected.counts)
    kept = torch.arange(indices.shape[-1]) < counts[..., None]
    assert torch.equal(indices[kept], expected.indices[kept])
    assert (counts < torch.arange(1, 5)).any(), "everything is kept: the test would prove nothing"


def test_inserted_nodes_carry_shapes_and_provenance():
    captured, *_ = inserted(sdpa_flag, *qkv(tokens=100))
    (selection,) = selections(captured)
    indices, counts = selection.meta["val"]
    assert tuple(counts.shape) == (2, 4, 2)
    assert indices.dtype is torch.int32
    (site,) = [n for n in captured.graph_module.graph.nodes if "scaled_dot" in str(n.target)]
    assert selection.meta.get("stack_trace") == site.meta.get("stack_trace")


@pytest.mark.parametrize("heads", [1, 4])
def test_inserting_gates_adds_no_guard_on_symbolic_lengths(heads):
    """Scores of one head are what PyTorch asks for their memory format, by their block counts."""
    captured = trace(sdpa_flag, *qkv(tokens=100, heads=heads), dynamic=True)
    fake = next(iter(captured.graph_module.graph.nodes)).meta["val"]
    shape_env = fake.fake_mode.shape_env
    before = calling_convention(captured.graph_module)
    decided = plan_of(captured)
    guards = [str(guard.expr) for guard in shape_env.guards]
    insert_gates(captured.graph_module, decided, source(new_store()))
    assert [str(guard.expr) for guard in shape_env.guards] == guards
    assert calling_convention(captured.graph_module).agrees_with(before)


def test_budget_at_is_linear_in_log_length():
    table = torch.tensor([[0.2, 0.4, 0.8], [1.0, 1.0, 1.0]])
    lengths = [128, 256, 512]
    for k_len, expected in ((1, 0.2), (128, 0.2), (181, 0.3), (256, 0.4), (9999, 0.8)):
        got = budget_at(table, lengths, k_len)
        assert torch.allclose(got, torch.tensor([expected, 1.0]), atol=2e-3), k_len
