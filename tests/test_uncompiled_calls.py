"""Calls that PyTorch runs past every compiled graph: dense, and never without a word."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import seer_compile
from seer_compile.errors import DenseFallbackWarning, ModelStateError
from support.models import Attention
from support.rewriting import answer_sparsely


def optimized(model, *further):
    example = (torch.randn(1, 130, 32), *further)
    seer_compile.optimize(model, zero_shot=True, inner="eager", example=example)
    answer_sparsely(model.seer_gates)
    return model


def derivative(model, x):
    return torch.func.grad(lambda y: model(y).square().sum())(x)


def mapped(model, x):
    with torch.no_grad():
        return torch.vmap(model)(x.unsqueeze(0))


def by_stance(model, x):
    with torch.compiler.set_stance("force_eager"):
        return model(x)


def through_forward(model, x):
    with torch.compiler.set_stance("force_eager"):
        return model.forward(x)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("way", [derivative, mapped, by_stance, through_forward])
def test_a_call_past_all_graphs_is_dense_warns_once_and_is_counted(way):
    torch.manual_seed(0)
    plain, x = Attention(32, 4), torch.randn(1, 130, 32)
    expected = way(plain, x)
    model = optimized(plain)
    with pytest.warns(DenseFallbackWarning, match="uncompiled") as caught:
        results = [way(model, x) for _ in range(2)]
    assert all(torch.allclose(result, expected, atol=1e-6) for result in results)
    assert sum("uncompiled" in str(warning.message) for warning in caught) == 1
    report = model.seer_report()
    assert report.uncompiled_calls == 2
    assert "2 calls ran uncompiled" in str(report)


class Named(nn.Module):
    """One graph for each name that it is called with."""

    def __init__(self):
        super().__init__()
        self.attention = Attention(32, 4)

    def forward(self, x, name):
        return self.attention(x) if name else x


def test_calls_beyond_the_limit_of_recompiles_say_so():
    model, x = optimized(Named(), "a"), torch.randn(1, 130, 32)
    with torch._dynamo.config.patch(recompile_limit=2):
        for name in "ab":
            model(x, name)
        with pytest.warns(DenseFallbackWarning, match="recompile_limit"):
            model(x, "c")
    report = model.seer_report()
    assert report.uncompiled_calls == 1
    assert report.calls == {"attention": {"sparse": 2}}


@pytest.mark.parametrize("is_optimized", [False, True])
def test_what_cannot_be_looked_at_is_not_explained(is_optimized):
    model, x = Attention(32, 4), torch.randn(1, 130, 32)
    if is_optimized:
        optimized(model)
    with (
        torch.compiler.set_stance("force_eager"),
        pytest.raises(ModelStateError, match="uncompiled"),
    ):
        seer_compile.explain(model, x)
    assert seer_compile.explain(model, x).num_sparse == 1
