"""Sinks beside the logits in every spelling, and what only looks like one.

Each is left alone with the true reason, or understood exactly; see ``support.near_misses``.
"""

import pytest
import torch
import torch.nn.functional as F

from seer_compile.kernels import reference
from seer_compile.passes.pipeline import Mode
from seer_compile.types import SkipCode
from support.assertions import assert_ops, assert_unchanged
from support.graphs import NEG, B, D, H, T, causal, draw, qkv, repeat_kv, trace
from support.near_misses import NOT_FOUND, NearMisses
from support.rewriting import (
    OPS,
    answer_sparsely,
    assert_equal_within_rounding,
    new_store,
    plan_of,
    rewrite,
    sites_of,
)

near_miss = NearMisses()
aten = torch.ops.aten


def sinks():
    return (draw(H, seed=7),)


def column(sink, q):
    return sink.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)


def masked(q, k):
    return (q @ k.mT * 0.3).masked_fill(~causal(q, k), NEG)


def weighted(joined, v):
    return joined.softmax(-1)[..., :-1] @ v


@near_miss("causal", extra=sinks)
def appended_and_dropped(q, k, v, sink):
    return weighted(torch.cat([masked(q, k), column(sink, q)], -1), v)


@near_miss("causal", extra=sinks)
def maximum_of_both_subtracted(q, k, v, sink):
    joined = torch.cat([masked(q, k), column(sink, q)], -1)
    weights = F.softmax(joined - joined.max(-1, keepdim=True).values, -1, dtype=joined.dtype)
    return F.dropout(weights[..., :-1], 0.1, training=False).to(v.dtype) @ v


@near_miss("causal", extra=sinks, kv_heads=2)
def grouped_heads(q, k, v, sink):
    k, v = repeat_kv(k, 2), repeat_kv(v, 2)
    return weighted(torch.cat([masked(q, k), column(sink, q)], -1), v)


@near_miss("causal", extra=sinks, kv_heads=2)
def grouped_heads_in_five_dimensions(q, k, v, sink):
    q, sink = q.unflatten(1, (2, 2)), sink.view(2, 2, 1, 1).expand(B, 2, 2, q.shape[2], 1)
    logits = torch.cat([masked(q, k.unsqueeze(2)), sink], -1)
    return weighted(logits, v.unsqueeze(2)).flatten(1, 2)


@near_miss("causal", extra=lambda: (draw(2, seed=7),), kv_heads=2)
def one_sink_per_key_head(q, k, v, sink):
    sink = sink[:, None].expand(2, 2).reshape(-1)
    k, v = repeat_kv(k, 2), repeat_kv(v, 2)
    return weighted(torch.cat([masked(q, k), column(sink, q)], -1), v)


@near_miss("causal", extra=lambda: (draw(1, seed=7),))
def one_sink_for_all_heads(q, k, v, sink):
    sink = sink.view(1, 1, 1, 1).expand(B, H, q.shape[-2], 1)
    return weighted(torch.cat([masked(q, k), sink], -1), v)


@near_miss("causal", extra=sinks)
def appended_in_front(q, k, v, sink):
    joined = torch.cat([column(sink, q), masked(q, k)], -1)
    return joined.softmax(-1)[..., 1:] @ v


@near_miss("full", extra=sinks)
def einsum_over_tokens_first(q, k, v, sink):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k)
    weights = torch.cat([logits, column(sink, q.transpose(1, 2))], -1).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights[..., :-1], v)


@near_miss("full", extra=sinks)
def batch_and_heads_merged(q, k, v, sink):
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    sink = sink.view(1, -1, 1, 1).expand(B, -1, T, 1).reshape(B * H, T, 1)
    return weighted(torch.cat([torch.bmm(q, k.mT), sink], -1), v)


@near_miss("causal", extra=lambda: (draw(H, seed=7),))
def no_batch_and_heads_in_two_dimensions(q, k, v, sink):
    q, k, v = q[0].view(2, 2, T, D), k[0, :2, None], v[0, :2, None]
    return weighted(torch.cat([masked(q, k), sink.view(2, 2, 1, 1).expand(2, 2, T, 1)], -1), v)


@near_miss("full", extra=sinks)
def both_shifted_alike(q, k, v, sink):
    return weighted(torch.cat([q @ k.mT, column(sink, q)], -1) - 1.5, v)


@near_miss("causal", extra=lambda: (draw(H, seed=7).bfloat16(),))
def widened_before_it_joins(q, k, v, sink):
    return weighted(torch.cat([masked(q, k), column(sink.float(), q)], -1), v)


@near_miss("causal", extra=sinks)
def twice_what_is_learned(q, k, v, sink):
    return weighted(torch.cat([masked(q, k), column(sink * 2, q)], -1), v)


@near_miss("causal", extra=sinks)
def in_the_sum_of_exponentials(q, k, v, sink):
    weights = masked(q, k).exp()
    return weights / (weights.sum(-1, keepdim=True) + sink.view(1, -1, 1, 1).exp()) @ v


@near_miss("causal", extra=sinks)
def in_the_sum_below_a_maximum_of_both(q, k, v, sink):
    logits, sink = masked(q, k), sink.view(1, -1, 1, 1)
    largest = torch.maximum(logits.amax(-1, keepdim=True), sink)
    weights = (logits - largest).exp()
    return weights / ((sink - largest).exp() + weights.sum(-1, keepdim=True)) @ v


@near_miss("causal", extra=sinks)
def in_the_logarithm_of_the_sum(q, k, v, sink):
    logits = masked(q, k)
    total = torch.logaddexp(logits.logsumexp(-1, keepdim=True), sink.view(1, -1, 1, 1))
    return (logits - total).exp() @ v


@near_miss("causal")
def exponentials_over_their_sum(q, k, v):
    logits = masked(q, k)
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    return weights / weights.sum(-1, keepdim=True) @ v


@near_miss("causal")
def logits_less_the_logarithm_of_their_sum(q, k, v):
    logits = masked(q, k)
    return (logits - logits.logsumexp(-1, keepdim=True)).exp() @ v


@near_miss(SkipCode.SINK_LOGIT, extra=sinks)
def column_not_dropped(q, k, v, sink):
    joined = torch.cat([masked(q, k), column(sink, q)], -1)
    return joined.softmax(-1) @ F.pad(v, (0, 0, 0, 1))


@near_miss(SkipCode.SINK_LOGIT, extra=sinks)
def another_column_dropped(q, k, v, sink):
    joined = torch.cat([masked(q, k), column(sink, q)], -1)
    return joined.softmax(-1)[..., 1:] @ v


@near_miss(SkipCode.SINK_LOGIT, extra=sinks)
def two_columns_dropped(q, k, v, sink):
    joined = torch.cat([masked(q, k), column(sink, q)], -1)
    return joined.softmax(-1)[..., :-2] @ v[:, :, :-1]


@near_miss(SkipCode.SINK_LOGIT, extra=sinks)
def two_sinks(q, k, v, sink):
    joined = torch.cat([masked(q, k), column(sink, q), column(sink, q)], -1)
    return joined.softmax(-1)[..., :-2] @ v


@near_miss(SkipCode.SINK_LOGIT, extra=lambda: (draw(H, 2, seed=7),))
def two_columns_of_sinks(q, k, v, sink):
    wide = sink.reshape(1, H, 1, 2).expand(B, -1, q.shape[-2], -1)
    return torch.cat([masked(q, k), wide], -1).softmax(-1)[..., :-2] @ v


@near_miss(SkipCode.SINK_LOGIT, extra=sinks)
def joined_before_the_scale(q, k, v, sink):
    return weighted(torch.cat([q @ k.mT, column(sink, q)], -1) * 0.3, v)


@near_miss(SkipCode.SINK_LOGIT, extra=sinks)
def joined_before_the_mask(q, k, v, sink):
    joined = torch.cat([q @ k.mT, column(sink, q)], -1)
    return weighted(joined.masked_fill(~F.pad(causal(q, k), (0, 1), value=True), NEG), v)


@near_miss(SkipCode.SINK_LOGIT, extra=sinks)
def joined_after_the_maximum_was_subtracted(q, k, v, sink):
    logits = masked(q, k)
    logits = logits - logits.amax(-1, keepdim=True)
    return weighted(torch.cat([logits, column(sink, q)], -1), v)


@near_miss(SkipCode.SINK_LOGIT, extra=sinks)
def in_the_sum_without_the_maximum(q, k, v, sink):
    logits = masked(q, k)
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    return weights / (weights.sum(-1, keepdim=True) + sink.view(1, -1, 1, 1).exp()) @ v


@near_miss(SkipCode.SINK_LOGIT, extra=sinks)
def joined_after_a_shift(q, k, v, sink):
    return weighted(torch.cat([masked(q, k) - 1.5, column(sink, q)], -1), v)


@near_miss(SkipCode.AMBIGUOUS)
def sink_that_depends_on_the_logits(q, k, v):
    logits = masked(q, k)
    return weighted(torch.cat([logits, (q @ k.mT).mean(-1, keepdim=True)], -1), v)


@near_miss([SkipCode.SINK_LOGIT])
def sum_with_what_depends_on_the_logits(q, k, v):
    weights = masked(q, k).exp()
    sink = (q @ k.mT).mean(-1, keepdim=True)
    return weights / (weights.sum(-1, keepdim=True) + sink.exp()) @ v


@near_miss(SkipCode.SINK_LOGIT, extra=lambda: (draw(B, T, H, seed=7),))
def sink_of_every_query(q, k, v, sink):
    return weighted(torch.cat([masked(q, k), sink.transpose(1, 2)[..., None]], -1), v)


@near_miss(SkipCode.SINK_LOGIT, extra=lambda: (draw(B, seed=7),))
def sink_of_every_batch_item(q, k, v, sink):
    return weighted(torch.cat([masked(q, k), sink.view(B, 1, 1, 1).expand(B, H, T, 1)], -1), v)


@near_miss(SkipCode.SINK_LOGIT, extra=lambda: (draw(T, seed=7),))
def number_for_every_key_in_the_sum(q, k, v, bias):
    weights = masked(q, k).exp()
    return weights / (weights.sum(-1, keepdim=True) + bias.exp()) @ v


@near_miss(SkipCode.SINK_LOGIT, extra=lambda: (draw(H, seed=7).double(),))
def sink_in_float64(q, k, v, sink):
    return weighted(torch.cat([masked(q, k), column(sink, q)], -1), v.double()).float()


@near_miss(SkipCode.WEIGHTS_ESCAPE, extra=sinks)
def share_of_the_sink_returned(q, k, v, sink):
    weights = torch.cat([masked(q, k), column(sink, q)], -1).softmax(-1)
    return weights[..., :-1] @ v, weights[..., -1].sum()


@near_miss(SkipCode.WEIGHTS_ESCAPE, extra=sinks)
def sum_of_exponentials_returned(q, k, v, sink):
    weights = masked(q, k).exp()
    total = weights.sum(-1, keepdim=True) + sink.view(1, -1, 1, 1).exp()
    return weights / total @ v, total


@near_miss(SkipCode.AMBIGUOUS, extra=sinks)
def read_by_two_products(q, k, v, sink):
    weights = torch.cat([masked(q, k), column(sink, q)], -1).softmax(-1)[..., :-1]
    return weights @ v, weights @ k


@near_miss(SkipCode.MUTATION, extra=sinks)
def sink_changed_in_place_after_it_joined(q, k, v, sink):
    sink = sink.clone()
    joined = torch.cat([masked(q, k), column(sink, q)], -1)
    sink.mul_(2.0)
    return weighted(joined, v)


@near_miss(NOT_FOUND, extra=sinks)
def sum_along_another_axis(q, k, v, sink):
    weights = masked(q, k).exp()
    return weights / (weights.sum(-2, keepdim=True).mT + sink.view(1, -1, 1, 1)) @ v


@near_miss.parametrized()
def test_near_miss_is_left_alone_or_understood_exactly(name, dynamic):
    near_miss.judge(name, dynamic)


def gpt_oss(q, k, v, sink):
    k, v = repeat_kv(k, 2), repeat_kv(v, 2)
    joined = torch.cat([masked(q, k), column(sink, q)], -1)
    joined = joined - joined.max(-1, keepdim=True).values
    return F.softmax(joined, -1, dtype=joined.dtype)[..., :-1] @ v


def inputs_of(tokens):
    return (*qkv(tokens, kv_heads=2), draw(H, seed=7))


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_site_with_sinks_is_one_call(dynamic):
    captured, store = trace(gpt_oss, *inputs_of(100), dynamic=dynamic), new_store()
    (site,) = sites_of(captured)
    assert not site.obstacles
    assert (site.heads, site.kv_heads) == (H, 2)
    result = rewrite(captured, store)
    assert result.rewritten == ("<root>",)
    wanted = {OPS.gated_attention.v1: 1, aten.cat.default: 0, aten.softmax.int: 0}
    assert_ops(result.graph_module, wanted)
    with assert_unchanged(result.graph_module):
        assert rewrite(trace(gpt_oss, *inputs_of(100)), store).rewritten == ("<root>",)
        assert not plan_of(type(captured)(result.graph_module, captured.inputs)).decisions


@pytest.mark.parametrize("is_sparse", [False, True])
@pytest.mark.parametrize("tokens", [63, 64, 200])
def test_sinks_reproduce_their_model_with_gradients(tokens, is_sparse):
    graph_module = rewrite(trace(gpt_oss, *inputs_of(100), dynamic=True), store := new_store())
    graph_module = graph_module.graph_module
    if is_sparse:
        answer_sparsely(store)
    weight = draw(B, H, tokens, D, seed=9)

    def compute(function, dtype):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in inputs_of(tokens)]
        out = function(*leaves)
        return out.detach(), *torch.autograd.grad((out * weight.to(dtype)).sum(), leaves)

    exact = compute(gpt_oss, torch.float64)
    eager = compute(gpt_oss, torch.float32)
    for ours, theirs, gold in zip(compute(graph_module, torch.float32), eager, exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
        if ours.ndim > 1:
            assert_equal_within_rounding(ours, gold, theirs)


def test_a_handler_is_handed_the_sinks():
    seen = []

    def answer(inputs):
        seen.append(inputs)
        operands = (inputs.query, inputs.key, inputs.value, inputs.scale, inputs.visibility)
        return reference.dense_attention(*operands, sinks=inputs.sinks)

    captured = trace(gpt_oss, *inputs_of(70))
    result = rewrite(captured, mode=Mode.HANDLER, handler=lambda: answer)
    inputs = inputs_of(70)
    torch.testing.assert_close(result.graph_module(*inputs), gpt_oss(*inputs))
    assert torch.equal(seen[0].sinks, inputs[3])
    assert seen[0].last_arguments() == (0, None, None, None, None, None, None, seen[0].sinks)


def test_a_reason_names_what_joins_the_logits():
    captured = trace(joined_after_a_shift, *inputs_of(16)[:1] * 3, draw(H))
    (decision,) = plan_of(captured).decisions
    assert str(decision.reason).startswith("sink logit of another form: `expand")
    assert str(decision.reason).endswith("joins logits that were shifted")
