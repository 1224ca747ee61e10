"""verify: every broken promise of a rewrite is an error that names it."""

from __future__ import annotations

import operator

import pytest
import torch

from seer_compile.errors import PassError
from seer_compile.gate import AttnGate
from seer_compile.passes.node_builder import MARK, marked
from seer_compile.passes.verify import CallingConvention, calling_convention, verify
from support.assertions import assert_unchanged
from support.graphs import qkv, sdpa_flag, trace
from support.rewriting import new_store, rewrite


@pytest.fixture
def rewritten():
    result = rewrite(trace(sdpa_flag, *qkv(tokens=100)), new_store())
    return result, calling_convention(result.graph_module)


def check(rewritten, *, names=None, before=None, is_lowered=True):
    result, convention = rewritten
    verify(
        result.graph_module,
        result.plan,
        result.rewritten if names is None else names,
        before or convention,
        is_lowered=is_lowered,
    )


def the_call(rewritten):
    ((call, mark),) = marked(rewritten[0].graph_module, "attention")
    return call, mark


def test_verify_accepts_a_rewritten_graph_and_changes_nothing(rewritten):
    with assert_unchanged(rewritten[0].graph_module):
        check(rewritten)
        check(rewritten)


def test_verify_accepts_an_untouched_graph():
    captured = trace(sdpa_flag, *qkv())
    result = rewrite(captured, new_store(), exclude=("*",))
    assert result.graph_module is captured.graph_module
    verify(
        result.graph_module,
        result.plan,
        (),
        calling_convention(captured.graph_module),
        is_lowered=True,
    )


def test_verify_rejects_another_calling_convention(rewritten):
    before = CallingConvention(placeholders=("x",), outputs=rewritten[1].outputs)
    with pytest.raises(PassError, match="calling convention changed"):
        check(rewritten, before=before)


def test_verify_rejects_a_site_that_was_not_answered(rewritten):
    with pytest.raises(PassError, match="sites answered"):
        check(rewritten, names=("<root>", "<root>#1"))


def test_verify_rejects_a_site_answered_against_the_plan(rewritten):
    call, mark = the_call(rewritten)
    call.meta[MARK] = mark._replace(site="other")
    with pytest.raises(PassError, match="against the plan"):
        check(rewritten, names=("other",))


def test_verify_rejects_a_former_answer_that_is_still_computed():
    result = rewrite(trace(sdpa_flag, *qkv()), new_store(), disabled=("lower", "remove_dead"))
    with pytest.raises(PassError, match="is still computed"):
        check((result, calling_convention(result.graph_module)), is_lowered=False)


def test_verify_rejects_a_node_without_traced_value(rewritten):
    call, _ = the_call(rewritten)
    del call.meta["val"]
    with pytest.raises(PassError, match="no traced value"):
        check(rewritten)


def test_verify_rejects_a_node_without_reader(rewritten):
    call, mark = the_call(rewritten)
    with rewritten[0].graph_module.graph.inserting_after(call):
        orphan = rewritten[0].graph_module.graph.call_function(operator.getitem, (call, 1))
    orphan.meta.update({"val": call.meta["val"][1], MARK: mark._replace(role="output")})
    with pytest.raises(PassError, match="no reader"):
        check(rewritten)


def test_verify_rejects_a_gate_under_two_names(rewritten):
    graph_module = rewritten[0].graph_module
    gate = next(module for module in graph_module.modules() if isinstance(module, AttnGate))
    graph_module.add_submodule("alias", gate)
    with pytest.raises(PassError, match="under two names"):
        check(rewritten)


def test_verify_rejects_a_gate_without_reader(rewritten):
    store = new_store()
    orphan = store.get_or_create("b", heads=4, kv_heads=4, head_dim=8)
    rewritten[0].graph_module.add_submodule("orphan", orphan)
    with pytest.raises(PassError, match="gate orphan has no reader"):
        check(rewritten)


def test_verify_rejects_gate_nodes_where_the_graph_should_be_lowered():
    result = rewrite(trace(sdpa_flag, *qkv()), new_store(), disabled=("lower",))
    both = (result, calling_convention(result.graph_module))
    check(both, is_lowered=False)
    with pytest.raises(PassError, match="was not folded"):
        check(both)


def test_verified_graph_still_computes(rewritten):
    q, k, v = qkv(tokens=100)
    assert torch.allclose(rewritten[0].graph_module(q, k, v), sdpa_flag(q, k, v), atol=2e-6)
