"""lower: the nodes of a site become one gated_attention call."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from seer_compile.passes.lower import lower
from seer_compile.passes.node_builder import marked
from support.assertions import assert_ops, assert_unchanged
from support.graphs import qkv, sdpa_flag, trace
from support.rewriting import OPS, answer_sparsely, new_store, rewrite

LOWERED = {
    OPS.gated_attention.v1: 1,
    OPS.block_sparse_attention.v1: 0,
    OPS.pool_blocks.v1: 0,
    OPS.block_scores.v1: 0,
    OPS.select_blocks.v1: 0,
}


def windowed(q, k, v):
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(j <= i) & (j > i - 70))


@pytest.mark.parametrize("function", [sdpa_flag, windowed])
@pytest.mark.parametrize("dynamic", [False, True])
def test_lower_leaves_one_call_per_site(function, dynamic):
    captured, store = trace(function, *qkv(tokens=100), dynamic=dynamic), new_store()
    result = rewrite(captured, store)
    assert result.rewritten == ("<root>",)
    assert_ops(result.graph_module, LOWERED)


def test_lower_leaves_a_graph_without_block_sparse_attention_unchanged():
    captured = trace(sdpa_flag, *qkv())
    with assert_unchanged(captured.graph_module):
        assert lower(captured.graph_module).rewritten == ()


def test_lower_twice_lowers_once():
    captured, store = trace(sdpa_flag, *qkv()), new_store()
    result = rewrite(captured, store)
    with assert_unchanged(result.graph_module):
        assert lower(result.graph_module).rewritten == ()


@pytest.mark.parametrize("function", [sdpa_flag, windowed])
@pytest.mark.parametrize("mass", [1.0, 0.3])
def test_lowered_graph_equals_the_graph_it_came_from(function, mass):
    q, k, v = qkv(tokens=300)
    results = []
    for disabled in ((), ("lower",)):
        store = new_store(mass)
        graph_module = rewrite(trace(function, q, k, v), store, disabled=disabled).graph_module
        answer_sparsely(store)
        results.append(graph_module(q, k, v))
    dense = function(q, k, v)
    assert torch.allclose(*results, atol=2e-6)
    assert torch.allclose(results[0], dense, atol=2e-6) == (mass == 1.0)


def test_no_value_of_the_lowered_graph_counts_blocks():
    """A block-count axis would guard: a recompile at one block, no export below two."""
    captured, store = trace(sdpa_flag, *qkv(tokens=100), dynamic=True), new_store()
    fake = next(iter(captured.graph_module.graph.nodes)).meta["val"]
    graph_module = rewrite(captured, store).graph_module
    for node in graph_module.graph.nodes:
        value = node.meta.get("val")
        for part in value if isinstance(value, tuple) else (value,):
            assert "//" not in str(getattr(part, "shape", "")), node
    # Heads and head dim are fixed by guards; nothing may depend on the length.
    guards = [str(guard.expr) for guard in fake.fake_mode.shape_env.guards]
    assert not [guard for guard in guards if str(fake.shape[2]) in guard]


def test_knobs_reach_the_lowered_graph_without_another_pass():
    q, k, v = qkv(tokens=400)
    store = new_store()
    graph_module = rewrite(trace(sdpa_flag, q, k, v), store).graph_module
    answer_sparsely(store)
    dense = sdpa_flag(q, k, v)
    assert torch.allclose(graph_module(q, k, v), dense, atol=2e-6)
    gate = store.get("<root>")
    with torch.no_grad():
        gate.budget.fill_(0.2)
    assert not torch.allclose(graph_module(q, k, v), dense, atol=1e-3)
    gate.mode.fill_(0)
    assert torch.equal(graph_module(q, k, v), dense)


def test_gradients_of_the_lowered_graph_are_those_of_dense_attention():
    q, k, v = (x.requires_grad_() for x in qkv(tokens=130))
    store = new_store()
    graph_module = rewrite(trace(sdpa_flag, *qkv(tokens=130)), store).graph_module
    answer_sparsely(store)
    weight = torch.randn(2, 4, 130, 8, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad((sdpa_flag(q, k, v) * weight).sum(), (q, k, v))
    got = torch.autograd.grad((graph_module(q, k, v) * weight).sum(), (q, k, v))
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    assert all(parameter.grad is None for parameter in store.parameters())


def test_lowered_call_takes_its_gate_as_tensors():
    captured, store = trace(sdpa_flag, *qkv()), new_store()
    graph_module = rewrite(captured, store).graph_module
    ((call, _),) = marked(graph_module, "attention")
    read = [node.target for node in call.args[3:7]]
    names = ("query_weight", "key_weight", "budget", "mode")
    assert [target.rpartition(".")[2] for target in read] == list(names)
    held = dict(graph_module.named_parameters()) | dict(graph_module.named_buffers())
    assert all(
        held[target] is getattr(store.get("<root>"), name)
        for target, name in zip(read, names, strict=True)
    )
