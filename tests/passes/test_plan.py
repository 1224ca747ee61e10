"""plan: one decision per site, each dense one with its reason; nothing is changed."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from seer_compile.passes.plan import plan, summarise
from seer_compile.types import MaskProof, SiteSummary, SkipCode, SkipReason, Visibility
from support.assertions import assert_unchanged
from support.graphs import qkv, sdpa_flag, trace
from support.rewriting import new_store, plan_of, sites_of, source

PROVED = MaskProof(visibility=Visibility(upper=0))


def one_site(**changes):
    captured = trace(sdpa_flag, *qkv())
    (site,) = sites_of(captured)
    return captured, dataclasses.replace(site, **changes)


def reason_for(site, proof=PROVED, **options):
    (decision,) = plan([site], [proof], **options).decisions
    return decision.reason


def test_plan_makes_a_proved_site_sparse():
    captured = trace(sdpa_flag, *qkv())
    decided = plan_of(captured)
    assert [decision.is_sparse for decision in decided.decisions] == [True]
    assert decided.sparse == decided.decisions


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"kind": "flex", "obstacles": (SkipReason(SkipCode.FLEX),)}, SkipCode.FLEX),
        ({"dropout": 0.1}, SkipCode.DROPOUT),
        ({"kv_heads": 3}, SkipCode.HEADS),
        ({"head_dim": 320}, SkipCode.HEAD_DIM),
        ({"value_dim": 257}, SkipCode.HEAD_DIM),
        ({"obstacles": (SkipReason(SkipCode.WEIGHTS_ESCAPE),)}, SkipCode.WEIGHTS_ESCAPE),
    ],
)
def test_plan_declines_with_the_reason(changes, code):
    _, site = one_site(**changes)
    assert reason_for(site).code is code


def test_plan_declines_decoding():
    captured = trace(sdpa_flag, *qkv(tokens=1, keys=16))
    assert plan_of(captured).decisions[0].reason.code is SkipCode.DECODE


def test_plan_declines_float64():
    captured = trace(sdpa_flag, *qkv(dtype=torch.float64))
    assert plan_of(captured).decisions[0].reason.code is SkipCode.DTYPE


def test_plan_passes_on_why_a_mask_is_opaque():
    _, site = one_site()
    reason = SkipReason(SkipCode.FLOAT_BIAS, "values of `bias`")
    assert reason_for(site, MaskProof(visibility=None, reason=reason)) is reason


def test_plan_declines_an_excluded_name():
    _, site = one_site(name="model.layers.3.self_attn")
    assert reason_for(site, exclude=("*.layers.3.*",)).code is SkipCode.EXCLUDED
    assert reason_for(site, exclude=("*.layers.4.*",)) is None


def test_plan_declines_a_site_without_gate_where_none_may_be_made():
    _, site = one_site()
    store = new_store()
    assert reason_for(site, gates=source(store, may_create=False)).code is SkipCode.NO_GATE
    assert reason_for(site, gates=source(store)) is None
    assert store.names() == (), "planning made a gate"


def test_plan_declines_a_gate_of_other_sizes():
    _, site = one_site()
    store = new_store()
    store.get_or_create(site.name, heads=site.heads, kv_heads=1, head_dim=site.head_dim)
    assert reason_for(site, gates=source(store)).code is SkipCode.NO_GATE


def test_plan_makes_no_second_gate_of_other_sizes_under_one_name():
    _, site = one_site()
    other = dataclasses.replace(site, kv_heads=1)
    sites, proofs = [site, other, site], [PROVED] * 3
    codes = [decision.reason and decision.reason.code for decision in plan(sites, proofs).decisions]
    assert codes == [None, SkipCode.NO_GATE, None]


def test_plan_of_a_graph_without_attention_is_empty():
    captured = trace(lambda x: F.relu(x).softmax(-1), torch.randn(4, 8))
    assert plan_of(captured).decisions == ()


def test_plan_changes_no_graph_and_repeats_itself():
    captured = trace(sdpa_flag, *qkv())
    with assert_unchanged(captured.graph_module):
        first, second = plan_of(captured), plan_of(captured)
    assert [d.reason for d in first.decisions] == [d.reason for d in second.decisions]


def test_summary_is_plain_data():
    captured = trace(sdpa_flag, *qkv(), dynamic=True)
    summary = summarise(plan_of(captured).decisions[0])
    for field in dataclasses.fields(SiteSummary):
        value = getattr(summary, field.name)
        flat = value if isinstance(value, tuple) else (value,)
        assert all(type(item) in (str, int) for item in flat), field.name
    assert summary.decision == "sparse"
    assert summary.visibility == "causal"
