"""Views after a site that are legal in the layout of its query stay legal once it is rewritten."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import seer_compile
from seer_compile.kernels.gated_attention import MODE_FULL_BUDGET, MODE_SPARSE
from support.models import Attention

WIDTH, HEADS = 32, 4


class Site(Attention):
    """A site whose query lies as it is told, whose answer is merged by views alone."""

    def __init__(self, is_heads_first, merge, attend):
        super().__init__(WIDTH, HEADS)
        self.is_heads_first, self.merge, self.attend = is_heads_first, merge, attend

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = (
            part.view(b, t, self.heads, -1).transpose(1, 2) for part in self.qkv(x).chunk(3, -1)
        )
        q = q.contiguous() if self.is_heads_first else q
        return self.merge(self.attend(q, k, v)) * 2


def fused(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def written_out(q, k, v):
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


def merge_heads(out):
    b, h, t, d = out.shape
    return out.transpose(1, 2).view(b, t, h * d)


def merge_tokens(out):
    b, h, t, d = out.shape
    return out.view(b, h, t * d)


SITES = {
    "fused, token major": (False, merge_heads, fused),
    "fused, heads first": (True, merge_tokens, fused),
    "written out, token major": (False, merge_tokens, written_out),
    "written out, heads first": (True, merge_tokens, written_out),
}
MODES = {"dense": MODE_FULL_BUDGET, "sparse": MODE_SPARSE}


def site(name):
    torch.manual_seed(0)
    return Site(*SITES[name]).eval()


def inputs(length):
    return torch.randn(2, length, WIDTH, generator=torch.Generator().manual_seed(length))


def optimized(name, mode, **options):
    model = seer_compile.optimize(site(name), zero_shot=True, example=inputs(90), **options)
    seer_compile.set_budget(model, mass=1.0)
    for _, gate in model.seer_gates.items():
        gate.mode.fill_(MODES[mode])
    return model


@torch.no_grad()
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SITES)
def test_optimized_model_views_its_answer(name, mode, inner):
    model = optimized(name, mode, inner=inner)
    for length in (90, 200, 33, 1):
        x = inputs(length)
        assert torch.allclose(model(x), Site.forward(model, x), atol=1e-5)
    report = model.seer_report()
    assert report.errors == ()
    assert report.calls


@torch.no_grad()
@pytest.mark.parametrize("name", ["fused, heads first", "written out, token major"])
def test_inductor_views_the_answer(name):
    model = optimized(name, "sparse")
    for length in (90, 200):
        x = inputs(length)
        assert torch.allclose(model(x), Site.forward(model, x), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", SITES)
def test_bare_backend_views_the_answer(name, inner):
    model = site(name)
    torch._dynamo.reset()
    options = {"inner": inner, "zero_shot": True}
    compiled = torch.compile(model, backend="seer", options=options, fullgraph=True)
    for length in (90, 200, 33):
        x = inputs(length)
        assert torch.allclose(compiled(x), model(x), atol=1e-5)
    torch._dynamo.reset()


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SITES)
def test_exported_program_views_the_answer(name, mode):
    model = optimized(name, mode, inner="eager")
    shapes = ({1: torch.export.Dim("tokens", min=2, max=512)},)
    program = seer_compile.export(model, (inputs(100),), dynamic_shapes=shapes)
    operator = torch.ops.seer_compile.gated_attention.v1
    assert sum(node.target is operator for node in program.graph.nodes) == 1
    for length in (2, 100, 333):
        x = inputs(length)
        assert torch.allclose(program.module()(x), Site.forward(model, x), atol=1e-5)


@pytest.mark.parametrize("name", SITES)
def test_training_goes_through_the_views(name):
    model = optimized(name, "sparse", inner="aot_eager")
    gradients = []
    for function in (model, lambda x: Site.forward(model, x)):
        model.qkv.weight.grad = None
        function(inputs(90)).square().sum().backward()
        gradients.append(model.qkv.weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
