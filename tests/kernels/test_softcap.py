"""Logits bounded by ``softcap * tanh(logits / softcap)``, in every operator that makes them."""

import math

import pytest
import torch
from torch.library import opcheck

from seer_compile.calibration.targets import attention_mass as mass_of
from seer_compile.errors import DtypeError, FeatureUnsupportedError, RangeError
from seer_compile.kernels import blockwise, counters, ops, reference
from seer_compile.kernels.dense import dense_attention
from seer_compile.types import BlockSize, SiteInputs, Visibility
from support.assertions import assert_bitwise_equal, assert_no_worse_than_eager
from support.inputs import attention_inputs, documents, key_padding, normal, random_selection

OPERATORS = torch.ops.seer_compile
HEADS, LENGTH = 4, 150
VISIBILITIES = {
    "full": Visibility(),
    "causal": Visibility(upper=0),
    "window": Visibility(upper=0, lower=-40),
    "nothing": Visibility(upper=0, lower=1),
    "offset": Visibility(upper=-7, offset=torch.tensor(7)),
    "padded": Visibility(upper=0, key_padding=key_padding([LENGTH, 60], LENGTH)),
    "documents": Visibility(
        upper=0,
        query_documents=documents([30, 70], LENGTH).expand(2, -1),
        key_documents=documents([30, 70], LENGTH).expand(2, -1),
    ),
}
every_visibility = pytest.mark.parametrize("visibility", VISIBILITIES.values(), ids=VISIBILITIES)
# From a cap that bends nearly everything to one that bends nearly nothing.
every_cap = pytest.mark.parametrize("softcap", [0.5, 3.0, 50.0])


@pytest.fixture(autouse=True)
def _fresh_counters():
    counters.reset()
    yield
    counters.reset()


def operands(dtype=torch.float32, **options):
    options = {"q_len": LENGTH, **options}
    inputs = attention_inputs(
        batch=2,
        heads=HEADS,
        kv_heads=2,
        head_dim=16,
        value_dim=8,
        dtype=dtype,
        sharpness=4.0,
        **options,
    )
    return inputs[:3], inputs.scale


def chosen():
    return random_selection(2, HEADS, -(-LENGTH // 32), -(-LENGTH // 16), density=0.6)


def sparse(tensors, selection, scale, visibility, softcap):
    readable = visibility.as_arguments().values()
    operator = OPERATORS.block_sparse_attention.v1
    return operator(*tensors, *selection, scale, 32, 16, *readable, softcap)


def meant(tensors, selection, scale, visibility, softcap):
    rest = (selection, scale, 32, 16, visibility)
    return reference.block_sparse_attention(*tensors, *rest, softcap=softcap)


def gate_arguments(mode, budget=0.5):
    return (
        normal(HEADS, 16, 6, seed=1),
        normal(HEADS, 16, 6, seed=2),
        torch.full((HEADS, 1), budget),
        torch.tensor(mode, dtype=torch.int8),
        0.25,
        "mean",
        "mean",
        8,
        8,
        32,
        16,
        "none",
        "top_p",
        [64],
        "site",
    )


def gated(tensors, arguments, visibility, softcap, sinks=None):
    readable = visibility.as_arguments().values()
    return OPERATORS.gated_attention.v1(*tensors, *arguments, *readable, softcap, sinks)


def gradients(function, tensors, grad):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    out = function(leaves)
    return torch.autograd.grad(out, leaves, grad.to(out.dtype))


def wide(tensors):
    return [tensor.double() for tensor in tensors]


def test_reference_bounds_the_logits_before_the_mask():
    (query, key, value), scale = operands()
    logits = query @ key.repeat_interleave(2, 1).mT * scale
    capped = 3.0 * torch.tanh(logits / 3.0)
    hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    weights = capped.masked_fill(hidden, -torch.inf).softmax(-1)
    expected = weights @ value.repeat_interleave(2, 1)
    visibility = VISIBILITIES["causal"]
    got = reference.dense_attention(query, key, value, scale, visibility, softcap=3.0)
    torch.testing.assert_close(got, expected)


@every_cap
@every_visibility
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_soft_capped_sparse_attention_is_its_reference(dtype, visibility, softcap):
    tensors, scale = operands(dtype)
    rest = (chosen(), scale, visibility, softcap)
    out, lse = sparse(tensors, *rest)
    gold, gold_lse = meant(wide(tensors), *rest)
    assert_no_worse_than_eager(out, meant(tensors, *rest)[0], gold)
    torch.testing.assert_close(lse, gold_lse.float(), rtol=1e-5, atol=1e-5)


@every_cap
@every_visibility
def test_gradients_behind_a_softcap_are_those_of_the_reference(visibility, softcap):
    tensors, scale = operands()
    rest, grad = (chosen(), scale, visibility, softcap), normal(2, HEADS, LENGTH, 8, seed=5)
    got = gradients(lambda leaves: sparse(leaves, *rest)[0], tensors, grad)
    gold = gradients(lambda leaves: meant(leaves, *rest)[0], wide(tensors), grad)
    for ours, exact in zip(got, gold, strict=True):
        torch.testing.assert_close(ours, exact.float(), rtol=1e-3, atol=1e-5)


@every_cap
@every_visibility
@pytest.mark.parametrize("scale", [0.25, -0.7])
def test_gradients_in_float64_are_those_of_autograd(visibility, softcap, scale):
    tensors, selection = wide(operands()[0]), chosen()
    grad = normal(2, HEADS, LENGTH, 8, seed=5).double()
    rest = (*selection, scale, 32, 16, visibility, softcap)
    out, lse = blockwise.attention_forward(*tensors, *rest)
    got = blockwise.attention_backward(grad, *tensors, out, lse, *rest)
    exact = gradients(
        lambda leaves: meant(leaves, selection, scale, visibility, softcap)[0], tensors, grad
    )
    for ours, theirs in zip(got, exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("mode", [0, 1, 3])
@every_visibility
def test_dense_answer_of_a_soft_capped_site_is_exact(mode, visibility, has_sinks):
    tensors, scale = operands()
    sinks = torch.linspace(-2.0, 2.0, HEADS) if has_sinks else None
    arguments = gate_arguments(mode)

    def exactly(leaves):
        taken = None if sinks is None else sinks.to(leaves[0].dtype)
        return reference.dense_attention(*leaves, scale, visibility, softcap=3.0, sinks=taken)

    out, lse = gated(tensors, arguments, visibility, 3.0, sinks)
    torch.testing.assert_close(out, exactly(wide(tensors)).float(), rtol=1e-5, atol=1e-6)
    assert out.is_contiguous()
    assert not has_sinks or lse.isfinite().all()
    grad = normal(*out.shape, seed=5)
    rest = (arguments, visibility, 3.0, sinks)
    got = gradients(lambda leaves: gated(leaves, *rest)[0], tensors, grad)
    for ours, exact in zip(got, gradients(exactly, wide(tensors), grad), strict=True):
        torch.testing.assert_close(ours, exact.float(), rtol=1e-4, atol=1e-6)
    (answers,) = counters.snapshot().values()
    assert all(path.startswith("dense:") for path in answers)


def test_sparse_answer_of_a_site_is_capped_in_every_slab(monkeypatch):
    from seer_compile.kernels import gated_attention

    tensors, _ = operands()
    grad = normal(2, HEADS, LENGTH, 8, seed=5)

    def compute():
        arguments = gate_arguments(2)
        results = gated(tensors, arguments, VISIBILITIES["causal"], 3.0)
        return *results, *gradients(
            lambda leaves: gated(leaves, arguments, VISIBILITIES["causal"], 3.0)[0], tensors, grad
        )

    whole = compute()
    monkeypatch.setattr(gated_attention, "_SLAB_BYTES", 1)
    for ours, theirs in zip(compute(), whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_full_budget_of_a_soft_capped_site_is_its_dense_answer():
    tensors, _ = operands()
    visibility = VISIBILITIES["causal"]
    everything, _ = gated(tensors, gate_arguments(2, budget=1.0), visibility, 3.0)
    dense, _ = gated(tensors, gate_arguments(0), visibility, 3.0)
    torch.testing.assert_close(everything, dense, rtol=1e-5, atol=1e-6)
    plain, _ = gated(tensors, gate_arguments(0), visibility, None)
    assert (plain - dense).abs().max() > 0.1


@every_cap
@every_visibility
@pytest.mark.parametrize("reduces", [("mean", "sum"), ("max", "max")])
def test_attention_mass_is_that_of_the_capped_logits(reduces, visibility, softcap):
    (query, key, _), scale = operands()
    units = (8, 16, *reduces)
    readable = visibility.as_arguments().values()
    got = OPERATORS.attention_mass.v1(query, key, scale, *units, *readable, softcap)
    expected = reference.attention_mass(
        query.double(), key.double(), scale, *units, visibility, softcap
    )
    torch.testing.assert_close(got, expected.float(), rtol=1e-4, atol=1e-6)


def test_targets_are_those_of_the_capped_logits_but_for_value_norms():
    (query, key, value), scale = operands()
    inputs = SiteInputs(
        name="site",
        query=query,
        key=key,
        value=value,
        scale=scale,
        visibility=VISIBILITIES["causal"],
        softcap=3.0,
    )
    got = mass_of(inputs, query_unit=8, key_unit=16)
    rest = (scale, 8, 16, "mean", "sum", VISIBILITIES["causal"], 3.0)
    torch.testing.assert_close(got, reference.attention_mass(query, key, *rest))
    with pytest.raises(FeatureUnsupportedError, match="soft-capped"):
        mass_of(inputs, query_unit=8, key_unit=16, kind="value")


@pytest.mark.parametrize("q_len", [0, 1, 65])
@pytest.mark.parametrize("k_len", [0, 1, 127])
def test_lengths_of_every_kind_are_answered_densely_behind_a_softcap(q_len, k_len):
    (query, key, value), scale = operands(q_len=q_len, k_len=k_len)
    out = dense_attention(query, key, value, scale=scale, softcap=2.0)
    expected = reference.dense_attention(query, key, value, scale, Visibility(), softcap=2.0)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("poison", [math.nan, math.inf, 65504.0])
def test_padding_holds_nothing_that_matters_to_capped_logits(poison):
    (query, key, value), scale = operands()
    visibility, selection = VISIBILITIES["padded"], chosen()
    hidden = ~visibility.key_padding[:, None, :, None]

    def compute(key, value):
        tensors, rest = (query, key, value), (selection, scale, visibility, 3.0)
        grad = normal(2, HEADS, LENGTH, 8, seed=5)
        found = gradients(lambda leaves: sparse(leaves, *rest)[0], tensors, grad)
        return *sparse(tensors, *rest), *found

    clean = compute(key, value)
    dirty = compute(key.masked_fill(hidden, poison), value.masked_fill(hidden, poison))
    for ours, theirs in zip(dirty, clean, strict=True):
        assert_bitwise_equal(ours, theirs)


@pytest.mark.parametrize("name", ["block_sparse_attention", "gated_attention", "attention_mass"])
@pytest.mark.parametrize("mode", [0, 2])
def test_operators_with_a_softcap_pass_opcheck(name, mode):
    tensors, scale = operands()
    readable = tuple(VISIBILITIES["padded"].as_arguments().values())
    if name == "attention_mass":
        arguments = (*tensors[:2], scale, 8, 16, "mean", "sum", *readable, 3.0)
    else:
        leaves = [tensor.requires_grad_() for tensor in tensors]
        inner = gate_arguments(mode) if name == "gated_attention" else (*chosen(), scale, 32, 16)
        arguments = (*leaves, *inner, *readable, 3.0)
    result = opcheck(getattr(OPERATORS, name).v1, arguments)
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("softcap", "error"),
    [
        (0.0, RangeError),
        (-30.0, RangeError),
        (math.nan, RangeError),
        (math.inf, RangeError),
        ("30", DtypeError),
        (True, DtypeError),
    ],
)
@pytest.mark.parametrize("name", ["block_sparse_attention", "dense_attention", "attention_mass"])
def test_malformed_softcaps_are_refused_by_name(name, softcap, error):
    (query, key, value), _ = operands()
    if name == "attention_mass":
        arguments, options = (query, key), {"query_unit": 8, "key_unit": 16}
    else:
        arguments, options = (query, key, value), {}
    if name == "block_sparse_attention":
        options = {"selection": chosen(), "block_size": BlockSize(query=32, key=16)}
    with pytest.raises(error, match="softcap"):
        getattr(ops, name)(*arguments, softcap=softcap, **options)
