"""Logits bounded by a hyperbolic tangent in every spelling, and what only looks like it.

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
from support.near_misses import NearMisses
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


def masked(logits, q, k):
    return logits.masked_fill(~causal(q, k), NEG).softmax(-1)


@near_miss("full")
def divided_bounded_multiplied(q, k, v):
    return (((q @ k.mT) / 30.0).tanh() * 30.0).softmax(-1) @ v


@near_miss("causal")
def bounded_before_the_mask(q, k, v):
    return masked(2.0 * torch.tanh(q @ k.mT * 0.3 / 2.0), q, k) @ v


@near_miss("causal")
def bounded_by_a_negative_number(q, k, v):
    return masked((q @ k.mT / -2.0).tanh() * -2.0, q, k) @ v


@near_miss("causal")
def turned_around_by_the_bound(q, k, v):
    return masked((q @ k.mT / 2.0).tanh() * -2.0, q, k) @ v


@near_miss("causal")
def bounded_elsewhere_than_divided(q, k, v):
    return masked((q @ k.mT * 0.7).tanh() * 3.0 / 2.0, q, k) @ v


@near_miss("causal")
def bounded_by_one(q, k, v):
    return masked((q @ k.mT).tanh(), q, k) @ v


@near_miss("causal")
def scaled_before_the_product(q, k, v):
    return masked((((q * 0.25) @ k.mT) / 2.0).tanh() * 2.0, q, k) @ v


@near_miss("causal")
def bounded_by_a_tensor_of_one_number(q, k, v):
    cap = torch.tensor(2.0)
    return masked((q @ k.mT / cap).tanh() * cap, q, k) @ v


@near_miss("causal")
def shifted_after_the_bound(q, k, v):
    return masked((q @ k.mT / 2.0).tanh() * 2.0 - 1.5, q, k) @ v


@near_miss("causal")
def additive_mask_and_dropout_in_evaluation(q, k, v):
    logits = (q @ k.mT * 0.3 / 2.0).tanh() * 2.0
    logits = logits + torch.zeros(T, T).masked_fill(~causal(q, k), torch.finfo(q.dtype).min)
    weights = F.softmax(logits, dim=-1, dtype=torch.float32).to(q.dtype)
    return F.dropout(weights, 0.1, training=False) @ v


@near_miss("causal", kv_heads=2)
def grouped_heads(q, k, v):
    k, v = repeat_kv(k, 2), repeat_kv(v, 2)
    return masked((q @ k.mT / 2.0).tanh() * 2.0, q, k) @ v


@near_miss("causal", extra=lambda: (draw(H, seed=7),))
def sink_beside_bounded_logits(q, k, v, sink):
    logits = ((q @ k.mT / 2.0).tanh() * 2.0).masked_fill(~causal(q, k), NEG)
    sink = sink.view(1, -1, 1, 1).expand(B, -1, q.shape[-2], -1)
    return torch.cat([logits, sink], -1).softmax(-1)[..., :-1] @ v


@near_miss(SkipCode.SINK_LOGIT, extra=lambda: (draw(H, seed=7),))
def sink_bounded_with_the_logits(q, k, v, sink):
    sink = sink.view(1, -1, 1, 1).expand(B, -1, q.shape[-2], -1)
    joined = torch.cat([q @ k.mT, sink], -1)
    return ((joined / 2.0).tanh() * 2.0).softmax(-1)[..., :-1] @ v


@near_miss(SkipCode.SCALE, extra=lambda: (draw(H, 1, 1, seed=7).exp(),))
def bounded_by_a_number_per_head(q, k, v, cap):
    return masked((q @ k.mT / cap).tanh() * cap, q, k) @ v


@near_miss(SkipCode.SCALE, extra=lambda: (draw(1, seed=7).exp(),))
def bounded_by_a_learned_number(q, k, v, cap):
    return masked((q @ k.mT / cap).tanh() * cap, q, k) @ v


@near_miss(SkipCode.SOFTCAP)
def bounded_after_the_mask(q, k, v):
    logits = (q @ k.mT).masked_fill(~causal(q, k), NEG)
    return ((logits / 2.0).tanh() * 2.0).softmax(-1) @ v


@near_miss(SkipCode.SOFTCAP)
def bounded_twice(q, k, v):
    logits = (q @ k.mT / 2.0).tanh() * 2.0
    return masked((logits / 3.0).tanh() * 3.0, q, k) @ v


@near_miss(SkipCode.SOFTCAP)
def shifted_before_the_bound(q, k, v):
    return masked(((q @ k.mT - 1.5) / 2.0).tanh() * 2.0, q, k) @ v


@near_miss(SkipCode.SOFTCAP)
def maximum_subtracted_before_the_bound(q, k, v):
    logits = q @ k.mT
    logits = logits - logits.amax(-1, keepdim=True)
    return masked((logits / 2.0).tanh() * 2.0, q, k) @ v


@near_miss(SkipCode.SOFTCAP)
def bounded_by_nothing(q, k, v):
    return masked((q @ k.mT).tanh() * 0.0, q, k) @ v


@near_miss(SkipCode.AMBIGUOUS)
def bounded_by_a_sigmoid(q, k, v):
    return masked((q @ k.mT / 2.0).sigmoid() * 2.0, q, k) @ v


@near_miss(SkipCode.AMBIGUOUS)
def bounded_by_a_clamp(q, k, v):
    return masked((q @ k.mT).clamp(-2.0, 2.0), q, k) @ v


@near_miss(SkipCode.WEIGHTS_ESCAPE)
def bounded_logits_returned(q, k, v):
    logits = (q @ k.mT / 2.0).tanh() * 2.0
    return masked(logits, q, k) @ v, logits


@near_miss(SkipCode.WEIGHTS_ESCAPE)
def products_returned_before_the_bound(q, k, v):
    logits = q @ k.mT
    return masked((logits / 2.0).tanh() * 2.0, q, k) @ v, logits.sum()


@near_miss(SkipCode.AMBIGUOUS)
def read_by_two_products(q, k, v):
    weights = masked((q @ k.mT / 2.0).tanh() * 2.0, q, k)
    return weights @ v, weights @ k


@near_miss.parametrized()
def test_near_miss_is_left_alone_or_understood_exactly(name, dynamic):
    near_miss.judge(name, dynamic)


def gemma2(q, k, v):
    k, v = repeat_kv(k, 2), repeat_kv(v, 2)
    logits = q @ k.transpose(2, 3) * 0.7
    logits = torch.tanh(logits / 2.0) * 2.0
    return F.softmax(logits.masked_fill(~causal(q, k), NEG), -1, dtype=torch.float32) @ v


def inputs_of(tokens):
    return qkv(tokens, kv_heads=2)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_soft_capped_site_is_one_call(dynamic):
    captured, store = trace(gemma2, *inputs_of(100), dynamic=dynamic), new_store()
    (site,) = sites_of(captured)
    assert not site.obstacles
    assert (site.softcap, site.scale) == (2.0, pytest.approx(0.7))
    result = rewrite(captured, store)
    assert result.rewritten == ("<root>",)
    wanted = {OPS.gated_attention.v1: 1, aten.tanh.default: 0, aten.softmax.int: 0}
    assert_ops(result.graph_module, wanted)
    with assert_unchanged(result.graph_module):
        assert not plan_of(type(captured)(result.graph_module, captured.inputs)).decisions


@pytest.mark.parametrize("is_sparse", [False, True])
@pytest.mark.parametrize("tokens", [63, 64, 200])
def test_softcaps_reproduce_their_model_with_gradients(tokens, is_sparse):
    store = new_store()
    graph_module = rewrite(trace(gemma2, *inputs_of(100), dynamic=True), store).graph_module
    if is_sparse:
        answer_sparsely(store)
    weight = draw(B, H, tokens, D, seed=9)

    def compute(function, inputs):
        leaves = [tensor.requires_grad_() for tensor in inputs]
        out = function(*leaves)
        return out.detach(), *torch.autograd.grad((out * weight.to(out.dtype)).sum(), leaves)

    def exactly(q, k, v):
        visible = (reference.token_mask(sites[0].visibility, tokens, tokens, q.device),)
        weights, _ = reference.probabilities(q, k, 0.7, *visible, softcap=2.0)
        return weights @ repeat_kv(v, 2)

    sites = []

    def answer(inputs):
        sites.append(inputs)
        rest = (inputs.scale, inputs.visibility, inputs.softcap)
        return reference.dense_attention(inputs.query, inputs.key, inputs.value, *rest)

    handled = rewrite(trace(gemma2, *inputs_of(100)), mode=Mode.HANDLER, handler=lambda: answer)
    torch.testing.assert_close(handled.graph_module(*inputs_of(100)), gemma2(*inputs_of(100)))
    exact = compute(exactly, [tensor.double() for tensor in inputs_of(tokens)])
    eager = compute(gemma2, inputs_of(tokens))
    ours = compute(graph_module, inputs_of(tokens))
    for got, theirs, gold in zip(ours, eager, exact, strict=True):
        assert_equal_within_rounding(got, gold, theirs)
