"""Few graphs for many lengths, and no graph break where PyTorch itself needs none.

``pytest tests/test_graph_counts.py --all-combinations`` takes every architecture of the zoo, and
1,000 lengths of each; ``benchmarks/graph_counts.py`` keeps what it counts.
"""

from __future__ import annotations

import copy
import random
import warnings

import pytest
import torch
from torch._dynamo.utils import counters

import seer_compile
from support.models import decoder, token_ids
from zoo.__main__ import is_installed
from zoo.graph_counts import KINDS, MOST_GRAPHS, count_graphs
from zoo.registry import ARCHITECTURES

SAMPLE = ("gpt2", "mistral", "falcon", "vit", "timm vit")
"""A table of positions, a window, one key head, pictures of any size, pictures of one size."""
FEW, MANY = 10, 1000
WHOLE = ("llama", "gpt2", "bert", "t5")


def pytest_generate_tests(metafunc):
    """Everything on request, a sample by default."""
    everything = metafunc.config.getoption("--all-combinations")
    if "number" in metafunc.fixturenames:
        metafunc.parametrize("number", [MANY if everything else FEW])
    if "kind" in metafunc.fixturenames:
        metafunc.parametrize("kind", KINDS if everything else SAMPLE)
    if "whole" in metafunc.fixturenames:
        metafunc.parametrize("whole", ARCHITECTURES if everything else WHOLE)


def skip_unless_installed(architecture):
    if not is_installed(architecture.name):
        pytest.skip(f"needs {', '.join(architecture.needs)}")


def test_random_lengths_need_few_graphs(kind, number, record_property):
    """Or as few per frame, or no more than plain ``torch.compile`` needs: ``zoo.graph_counts``."""
    skip_unless_installed(KINDS[kind][0])
    row = count_graphs(kind, number)
    for name, value in row.flat().items():
        record_property(name, value)
    assert row.problems() == []


@torch.no_grad()
def test_random_lengths_to_4096_need_few_graphs(number):
    """Long enough to be sparse by themselves, on a CPU from 1,536 tokens on."""
    model = decoder(layers=1, width=8, heads=2)
    seer_compile.optimize(model, zero_shot=True, inner="eager")
    before = counters["stats"]["unique_graphs"]
    draw = random.Random(0)
    for length in (*(draw.randint(64, 4096) for _ in range(number - 2)), 64, 4096):
        model(token_ids(length))
    report = model.seer_report()
    assert report.errors == ()
    assert 1 <= report.graphs <= MOST_GRAPHS
    assert counters["stats"]["unique_graphs"] - before == report.graphs
    assert {row.site.decision for row in report.rows} == {"sparse"}
    assert all(sum(paths.values()) == number for paths in report.calls.values())


def compile_whole(module, backend, **options):
    """Compile a call that must be one graph; a break raises."""
    torch._dynamo.reset()
    return torch.compile(module, backend=backend, fullgraph=True, **options)


@torch.no_grad()
def test_whole_models_stay_whole(whole):
    known = ARCHITECTURES[whole]
    skip_unless_installed(known)
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
