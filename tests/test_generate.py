"""``generate``: the dense tokens at full budget, prefill through the sparse path.

``pytest tests/test_generate.py --all-combinations`` takes all ten architectures.
"""

from __future__ import annotations

import copy
import functools
import warnings

import torch

import seer_compile
from support.models import token_ids
from support.rewriting import answer_sparsely
from zoo.registry import ARCHITECTURES

NAMES = (
    "llama",
    "gpt2",
    "gemma3",
    "qwen3",
    "mistral",
    "phi3",
    "gpt-neox",
    "olmo2",
    "opt",
    "mixtral",
)
SAMPLE = ("llama",)
NEW_TOKENS = 6


def pytest_generate_tests(metafunc):
    """All architectures on request, one by default."""
    if "name" in metafunc.fixturenames:
        everything = metafunc.config.getoption("--all-combinations")
        metafunc.parametrize("name", NAMES if everything else SAMPLE)


def ragged():
    """Four prompts, padded on the left by 0, 7, 40 and 61 tokens."""
    tokens = token_ids(90, batch=4)
    mask = torch.ones_like(tokens)
    for row, padding in enumerate((0, 7, 40, 61)):
        mask[row, :padding] = 0
    return {"input_ids": tokens.masked_fill(mask == 0, 0), "attention_mask": mask}


def repeating():
    """One prompt in which a lookup finds what may come next."""
    tokens = token_ids(30).repeat(1, 3)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


@functools.cache
def model_of(name):
    """A model with plain weights; every test takes copies."""
    return ARCHITECTURES[name].build("sdpa").eval()


def optimized(name, example):
    model = copy.deepcopy(model_of(name))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seer_compile.optimize(model, zero_shot=True, inner="aot_eager", example=example)
    answer_sparsely(model.seer_gates)
    seer_compile.set_budget(model, mass=1.0)
    return model


def generate(model, inputs, **options):
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, **options)


WAYS = {
    "greedy": {},
    "beam": {"num_beams": 3},
    "static": {"cache_implementation": "static"},
}


def test_ragged_batch_gives_the_dense_tokens(name):
    inputs = ragged()
    plain, model = copy.deepcopy(model_of(name)), optimized(name, inputs)
    for way, options in WAYS.items():
        before = calls_of(model)
        expected = generate(plain, inputs, **options)
        assert torch.equal(generate(model, inputs, **options), expected), way
        assert_prefill_was_sparse(model, before, way)
    report = model.seer_report()
    assert report.errors == ()
    prefill = {row.site.name for row in report.rows if row.site.decision == "sparse"}
    dense = [row.site for row in report.rows if row.site.decision == "dense"]
    assert {site.reason for site in dense} == {"one query token (decode)"}
    assert prefill == set(model.seer_gates.names())


def test_assisted_generation_gives_the_dense_tokens(name):
    inputs = repeating()
    plain, model = copy.deepcopy(model_of(name)), optimized(name, inputs)
    draft = copy.deepcopy(model_of("llama"))
    ways = {
        "lookup": {"prompt_lookup_num_tokens": 3},
        "draft": {"assistant_model": draft},
    }
    for way, options in ways.items():
        before = calls_of(model)
        expected = generate(plain, inputs, **options)
        assert torch.equal(generate(model, inputs, **options), expected), way
        assert_prefill_was_sparse(model, before, way)
    assert model.seer_report().errors == ()


def calls_of(model):
    calls = model.seer_report().calls
    return {name: calls.get(name, {}).get("sparse", 0) for name in model.seer_gates.names()}


def assert_prefill_was_sparse(model, before, way):
    after = calls_of(model)
    assert before
    assert all(after[name] > number for name, number in before.items()), (way, before, after)
    paths = {path for paths in model.seer_report().calls.values() for path in paths}
    assert paths == {"sparse"}, (way, paths)
