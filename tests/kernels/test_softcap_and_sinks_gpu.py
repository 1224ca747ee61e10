"""Softcaps and sinks on CUDA: sparse, dense and attention mass, against the reference."""

import pytest
import torch

from seer_compile.kernels import counters, engines, reference
from seer_compile.types import Visibility
from support.inputs import attention_inputs, key_padding, normal, random_selection

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
OPERATORS = torch.ops.seer_compile
LIMIT = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
HEADS, LENGTH = 8, 700
CAUSAL = Visibility(upper=0)
every_dtype = pytest.mark.parametrize("dtype", LIMIT)
every_form = pytest.mark.parametrize(
    ("softcap", "has_sinks"), [(None, True), (20.0, False), (2.0, True)]
)


def operands(dtype, head_dim=128):
    inputs = attention_inputs(
        batch=2, heads=HEADS, kv_heads=2, q_len=LENGTH, head_dim=head_dim, dtype=dtype, device=CUDA
    )
    return inputs[:3], torch.linspace(-2.0, 4.0, HEADS, device=CUDA), inputs.scale


def judge(function, meant, leaves, dtype):
    """Compare out and gradients with those of the reference in float64."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    out, gold = function(*leaves), meant(*wide)
    grad = normal(*out.shape, dtype=dtype, device=CUDA, seed=4)
    got = (out, *torch.autograd.grad(out, leaves, grad))
    expected = (gold, *torch.autograd.grad(gold, wide, grad.double()))
    for ours, exact in zip(got, expected, strict=True):
        assert (ours.double() - exact).norm() <= LIMIT[dtype] * exact.norm()


@every_dtype
@every_form
@pytest.mark.parametrize("engine", ["auto", "portable"])
def test_sparse_attention_is_its_reference(engine, dtype, softcap, has_sinks):
    tensors, sinks, scale = operands(dtype)
    blocks = -(-LENGTH // 64)
    selection = [
        part.to(CUDA)
        for part in random_selection(2, HEADS, blocks, blocks, density=0.5, min_per_row=1)
    ]
    readable = CAUSAL.as_arguments().values()

    def attend(query, key, value, *sinks):
        arguments = (*selection, scale, 64, 64, *readable, softcap, *sinks)
        return OPERATORS.block_sparse_attention.v1(query, key, value, *arguments)[0]

    def meant(query, key, value, *sinks):
        kept = type(random_selection(1, 1, 1, 1))(*selection)
        rest = (kept, scale, 64, 64, CAUSAL, softcap, *sinks)
        return reference.block_sparse_attention(query, key, value, *rest)[0]

    with engines.attention_engine(engine):
        judge(attend, meant, (*tensors, *([sinks] if has_sinks else [])), dtype)


@every_dtype
@every_form
@pytest.mark.parametrize("mode", [0, 2])
def test_whole_site_at_full_budget_is_its_reference(mode, dtype, softcap, has_sinks):
    tensors, sinks, scale = operands(dtype, head_dim=64)
    weights = [normal(HEADS, 64, 32, seed=s, scale=0.1, device=CUDA) for s in (5, 6)]
    budget, switch = torch.ones(HEADS, 1, device=CUDA), torch.tensor(mode, dtype=torch.int8)
    rest = (scale, "mean", "mean", 8, 8, 64, 64, "none", "top_p", [128], "site")
    readable = CAUSAL.as_arguments().values()

    def attend(query, key, value, *sinks):
        gate = (*weights, budget, switch, *rest)
        return OPERATORS.gated_attention.v1(query, key, value, *gate, *readable, softcap, *sinks)[0]

    def meant(query, key, value, *sinks):
        return reference.dense_attention(query, key, value, scale, CAUSAL, softcap, *sinks)

    counters.reset()
    judge(attend, meant, (*tensors, *([sinks] if has_sinks else [])), dtype)
    assert counters.snapshot() == {"site": {"sparse" if mode else "dense:mode": 1}}
    counters.reset()


@every_dtype
@pytest.mark.parametrize("is_padded", [False, True])
def test_attention_mass_of_capped_logits_is_its_reference(dtype, is_padded):
    (query, key, _), _, scale = operands(dtype)
    padding = key_padding([LENGTH, 300], LENGTH).to(CUDA) if is_padded else None
    visibility = Visibility(upper=0, lower=-400, key_padding=padding)
    units = (scale, 8, 64, "mean", "sum")
    readable = visibility.as_arguments().values()
    got = OPERATORS.attention_mass.v1(query, key, *units, *readable, 2.0)
    gold = reference.attention_mass(query.double(), key.double(), *units, visibility, 2.0)
    torch.testing.assert_close(got.double(), gold, rtol=1e-3, atol=1e-5)
