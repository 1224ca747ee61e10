"""Flash attention and cuDNN, called directly: values, gradients, layout, who answered."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from seer_compile.kernels import dense_backends, reference
from seer_compile.kernels.break_even import DENSE, DenseRule
from seer_compile.kernels.dense_backends import answers, fused_attention
from seer_compile.types import Visibility
from support.inputs import attention_inputs, normal

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)
RULES = {
    "flash": DenseRule(flash_below=math.inf, cudnn_from=math.inf),
    "cudnn": DenseRule(flash_below=0.0, cudnn_from=0.0),
}
LIMIT = 3e-2


@pytest.fixture(autouse=True)
def _fresh_counts(monkeypatch):
    monkeypatch.setattr(dense_backends, "_failed", set())
    dense_backends.reset()
    yield
    dense_backends.reset()


def prefer(backend, monkeypatch):
    for head_dim in (64, 128, 256):
        key = (dense_backends.device_class(CUDA), head_dim)
        monkeypatch.setitem(DENSE, key, RULES[backend])


def operands(length, head_dim=64, layout="tokens_first", **sizes):
    return attention_inputs(
        batch=2, heads=8, kv_heads=2, q_len=length, head_dim=head_dim, dtype=torch.bfloat16,
        layout=layout, device=CUDA, **sizes,
    )  # fmt: skip


@pytest.mark.parametrize("layout", ["contiguous", "tokens_first"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("length", "is_causal"), [(256, True), (256, False), (300, True)])
@pytest.mark.parametrize("backend", RULES)
def test_values_and_gradients_are_the_references(
    backend, length, is_causal, head_dim, layout, monkeypatch
):
    prefer(backend, monkeypatch)
    inputs = operands(length, head_dim, layout)
    leaves = [tensor.detach().requires_grad_() for tensor in inputs[:3]]
    out = fused_attention(*leaves, is_causal=is_causal, scale=inputs.scale)
    assert out.stride() == inputs.query.stride()
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs[:3]]
    visibility = Visibility(upper=0) if is_causal else Visibility()
    expected = reference.dense_attention(*wide, inputs.scale, visibility)
    assert (out.double() - expected).norm() / expected.norm() < LIMIT
    grad = torch.empty_like(out).copy_(normal(*out.shape, dtype=torch.bfloat16, device=CUDA))
    ours = torch.autograd.grad(out, leaves, grad)
    theirs = torch.autograd.grad(expected, wide, grad.double())
    for actual, exact in zip(ours, theirs, strict=True):
        assert (actual.double() - exact).norm() / exact.norm() < LIMIT
    (answer,) = answers()
    is_old = (torch.backends.cudnn.version() or 0) < 91501
    if backend == "flash" or not (is_old and length % 128):
        assert answer == backend


def test_what_the_user_switched_off_is_not_called(monkeypatch):
    prefer("cudnn", monkeypatch)
    inputs = operands(256)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = fused_attention(*inputs[:3], is_causal=True, scale=inputs.scale)
    assert answers() == {"sdpa:cudnn does not take the call": 1}
    assert out.shape == inputs.query.shape


@pytest.mark.parametrize("backend", RULES)
@pytest.mark.parametrize("length", [1, 2, 100])
def test_short_calls_are_those_of_sdpa(length, backend, monkeypatch):
    prefer(backend, monkeypatch)
    inputs = operands(length, 128)
    out = fused_attention(*inputs[:3], is_causal=True, scale=inputs.scale)
    expected = F.scaled_dot_product_attention(
        *inputs[:3], is_causal=True, scale=inputs.scale, enable_gqa=True
    )
    torch.testing.assert_close(out, expected, rtol=LIMIT, atol=LIMIT)


@pytest.mark.parametrize("layout", ["contiguous", "tokens_first"])
@pytest.mark.parametrize("backend", RULES)
def test_gated_attention_differentiates_its_dense_answer(backend, layout, monkeypatch):
    prefer(backend, monkeypatch)
    inputs = operands(256, layout=layout)
    weights = [normal(8, 192, 64, seed=seed, scale=0.1, device=CUDA) for seed in (5, 6)]
    gate = (*weights, torch.ones(8, 2, device=CUDA), torch.tensor(0, dtype=torch.int8))
    pools = ("mean,max,min", "mean,max,min")
    rest = (inputs.scale, *pools, 8, 8, 64, 64, "none", "top_p", [128, 4096], "site", 0)
    leaves = [tensor.detach().requires_grad_() for tensor in inputs[:3]]
    out, _ = torch.ops.seer_compile.gated_attention.v1(*leaves, *gate, *rest)
    assert out.stride() == inputs.query.stride()
    grad = normal(*out.shape, dtype=torch.bfloat16, device=CUDA)
    ours = torch.autograd.grad(out, leaves, grad)
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs[:3]]
    expected = reference.dense_attention(*wide, inputs.scale, Visibility(upper=0))
    theirs = torch.autograd.grad(expected, wide, grad.double())
    for actual, exact in zip(ours, theirs, strict=True):
        assert (actual.double() - exact).norm() / exact.norm() < LIMIT
    assert answers() == {backend: 2}
