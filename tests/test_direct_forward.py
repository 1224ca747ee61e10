"""``model.forward(...)``, past the call and its hooks, is answered like the call."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
import warnings

import pytest
import torch
from torch import nn

import seer_compile
from seer_compile.errors import DenseFallbackWarning
from support.models import Attention, Decoder, architecture, decoder, token_ids
from support.rewriting import answer_sparsely

SITES = ("layers.0", "layers.1")
ONCE = {name: {"sparse": 1} for name in SITES}
TWICE = {name: {"sparse": 2} for name in SITES}


def optimized(model=None):
    model = decoder() if model is None else model
    seer_compile.optimize(model, zero_shot=True, example=token_ids(80), inner="eager")
    answer_sparsely(model.seer_gates)
    return model


@torch.no_grad()
def test_forward_is_sparse_and_equal():
    model, tokens = optimized(), token_ids(100)
    assert torch.equal(model.forward(tokens), model(tokens))
    assert model.seer_report().calls == TWICE
    assert model.seer_report().errors == ()


@torch.no_grad()
def test_forward_skips_hooks_and_the_call_does_not():
    model, seen = optimized(), []
    model.register_forward_hook(lambda *_: seen.append(1))
    model.forward(token_ids(100))
    assert seen == []
    model(token_ids(100))
    assert seen == [1]


def test_signature_is_the_models_and_nothing_stays():
    model = decoder()
    before = inspect.signature(model.forward)
    optimized(model)
    assert inspect.signature(model.forward) == before
    seer_compile.restore(model)
    assert "forward" not in vars(model)


@torch.no_grad()
@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_answer_for_themselves(way):
    model = optimized()
    other = way(model)
    assert torch.equal(other.forward(token_ids(100)), model(token_ids(100)))
    assert other.seer_report().calls == ONCE
    assert model.seer_report().calls == ONCE
    assert other.forward.model is other


@torch.no_grad()
def test_a_forward_that_somebody_put_on_the_instance_is_kept():
    model, seen = decoder(), []

    def patched(tokens):
        seen.append(tokens.shape)
        return Decoder.forward(model, tokens)

    model.forward = patched
    optimized(model)
    seen.clear()
    model.forward(token_ids(100))
    model(token_ids(100))
    assert len(seen) == 2
    assert model.seer_report().calls == TWICE
    seer_compile.restore(model)
    assert model.forward is patched


@torch.no_grad()
def test_a_forward_wrapped_after_optimize_works_on_and_outlives_it():
    model = optimized()
    ours = model.forward
    model.forward = lambda tokens: ours(tokens) + 1
    plain = decoder()(token_ids(100))
    assert not torch.equal(model(token_ids(100)), plain)
    assert model.seer_report().calls == ONCE
    seer_compile.restore(model)
    assert torch.allclose(model(token_ids(100)), plain + 1, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("way", ["forward", "__call__"])
def test_surrounding_compile_does_not_trace_through(way):
    model = optimized()
    outer = torch.compile(lambda tokens: getattr(model, way)(tokens) * 2, backend="eager")
    expected = model(token_ids(100)) * 2
    assert torch.equal(outer(token_ids(100)), expected)
    assert model.seer_report().calls == TWICE


class Breaking(Decoder):
    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer(self.norm(x))
            torch._dynamo.graph_break()
        return self.head(x)


@torch.no_grad()
def test_graph_breaks_call_nothing_twice():
    torch.manual_seed(0)
    model = optimized(Breaking().eval())
    assert torch.equal(model.forward(token_ids(100)), model(token_ids(100)))
    assert model.seer_report().calls == TWICE


class Outer(nn.Module):
    """Calls its part's forward, as wrappers do."""

    def __init__(self):
        super().__init__()
        self.part = Attention(32, 4)

    def forward(self, x):
        return self.part.forward(x)


@torch.no_grad()
def test_forward_of_an_optimized_part_is_sparse_in_a_plain_model():
    model, x = Outer().eval(), torch.randn(1, 100, 32)
    plain = model(x)
    seer_compile.optimize(model.part, zero_shot=True, example=x, inner="eager")
    answer_sparsely(model.part.seer_gates)
    seer_compile.set_budget(model, mass=1.0)
    assert torch.allclose(model(x), plain, atol=1e-5)
    assert model.part.seer_report().calls == {"<root>": {"sparse": 1}}


def test_gradients_flow():
    model = optimized()
    model.forward(token_ids(100)).sum().backward()
    assert model.embed.weight.grad is not None


@torch.no_grad()
def test_threads_do_not_see_each_other():
    model, tokens, results = optimized(), token_ids(100), []
    model.forward(tokens)
    barrier = threading.Barrier(2)

    def waiting(*_):
        barrier.wait(60)
        barrier.wait(60)

    def call():
        with torch.no_grad():
            results.append(model(tokens))

    handle = model.register_forward_pre_hook(torch.compiler.disable(waiting))
    thread = threading.Thread(target=call)
    thread.start()
    barrier.wait(60)
    try:
        results.append(model.forward(tokens))
    finally:
        barrier.wait(60)
        thread.join()
        handle.remove()
    assert len(results) == 2
    assert model.seer_report().calls == {name: {"sparse": 3} for name in SITES}


@torch.no_grad()
def test_export_warns_once_and_is_dense():
    model = optimized()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        program = torch.export.export(model, (token_ids(100),))
    ours = [each for each in caught if each.category is DenseFallbackWarning]
    assert len(ours) == 1
    assert not [node for node in program.graph.nodes if "seer_compile" in str(node.target)]
    exported = seer_compile.export(model, (token_ids(100),))
    assert [node for node in exported.graph.nodes if "seer_compile" in str(node.target)]


@pytest.mark.slow
@torch.no_grad()
def test_keywords_and_outputs_of_a_real_model():
    model = architecture("llama")
    seer_compile.optimize(model, zero_shot=True, inner="eager")
    names = inspect.signature(model.forward).parameters
    assert "attention_mask" in names
    assert "self" not in names
    output = model.forward(input_ids=token_ids(100), use_cache=False)
    assert torch.equal(output.logits, model(input_ids=token_ids(100), use_cache=False).logits)
    calls = model.seer_report().calls
    assert calls
    assert all(sum(paths.values()) == 2 for paths in calls.values())
