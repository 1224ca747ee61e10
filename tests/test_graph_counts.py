"""Few graphs for many lengths, and no graph break where PyTorch itself needs none.

``pytest tests/test_graph_counts.py --all-combinations`` takes 1,000 lengths per model, and every
architecture of the zoo.
"""

from __future__ import annotations

import copy
import random
import warnings

import pytest
import torch
from torch._dynamo.utils import counters

import seer_compile
from support.models import architecture, decoder, token_ids
from zoo.__main__ import is_installed
from zoo.registry import ARCHITECTURES

MOST_GRAPHS = 3
SHORTEST, LONGEST = 64, 4096
COUNTED = ("decoder", "llama", "gpt2", "mistral", "bert")
FEW, MANY = 10, 1000
WHOLE = ("llama", "gpt2", "bert", "t5")


def pytest_generate_tests(metafunc):
    """Everything on request, a sample by default."""
    everything = metafunc.config.getoption("--all-combinations")
    if "number" in metafunc.fixturenames:
        metafunc.parametrize("number", [MANY if everything else FEW])
        metafunc.parametrize("name", COUNTED)
    elif "whole" in metafunc.fixturenames:
        metafunc.parametrize("whole", ARCHITECTURES if everything else WHOLE)


def lengths(number):
    """The two ends and random lengths between them."""
    draw = random.Random(0)
    return [*(draw.randint(SHORTEST, LONGEST) for _ in range(number - 2)), SHORTEST, LONGEST]


@torch.no_grad()
def test_random_lengths_need_few_graphs(name, number, record_property):
    if name == "decoder":
        model, keywords = decoder(layers=1, width=8, heads=2), {}
    else:
        model = architecture(name)
        keywords = {} if name == "bert" else {"use_cache": False}
    seer_compile.optimize(model, zero_shot=True, inner="eager")
    before = counters["stats"]["unique_graphs"]
    for length in lengths(number):
        model(token_ids(length), **keywords)
    report = model.seer_report()
    graphs = counters["stats"]["unique_graphs"] - before
    record_property("graphs", graphs)
    assert report.errors == ()
    assert 1 <= graphs <= MOST_GRAPHS
    assert report.graphs <= MOST_GRAPHS
    assert {row.site.decision for row in report.rows} == {"sparse"}
    assert all(sum(paths.values()) == number for paths in report.calls.values())


def compile_whole(module, backend, **options):
    """Compile a call that must be one graph; a break raises."""
    torch._dynamo.reset()
    return torch.compile(module, backend=backend, fullgraph=True, **options)


@torch.no_grad()
def test_whole_models_stay_whole(whole):
    known = ARCHITECTURES[whole]
    if not is_installed(whole):
        pytest.skip(f"needs {', '.join(known.needs)}")
    situation = known.situations[0]
    model = known.build("sdpa" if "sdpa" in known.spellings else known.spellings[0]).eval()
    inputs = situation.make(model, situation.sizes[0]).inputs
    module = situation.wrap(model, "dynamo")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Not the module itself: models may ask whether they are compiled, and answer otherwise.
        try:
            expected = compile_whole(module, "eager")(copy.deepcopy(inputs))
        except Exception as refusal:
            pytest.skip(f"plain torch.compile cannot: {str(refusal).splitlines()[0]}")
        options = {"inner": "eager", "root": module}
        got = compile_whole(module, "seer", options=options)(copy.deepcopy(inputs))
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4)
