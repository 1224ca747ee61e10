"""Attention sinks: one logit per head beside the keys, in every operator that attends."""

import math

import pytest
import torch
from torch.library import opcheck

from seer_compile.errors import DeviceError, DtypeError, ShapeError
from seer_compile.kernels import blockwise, counters, every_block, ops, reference
from seer_compile.kernels.dense import dense_attention
from seer_compile.kernels.sinks import sinks_gradient, with_sinks
from seer_compile.types import BlockSelection, BlockSize, Visibility
from support.assertions import assert_bitwise_equal, assert_no_worse_than_eager
from support.inputs import (
    attention_inputs,
    documents,
    key_padding,
    normal,
    random_selection,
    selection_from_map,
)

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


@pytest.fixture(autouse=True)
def _fresh_counters():
    counters.reset()
    yield
    counters.reset()


def operands(dtype=torch.float32, **options):
    options = {
        "batch": 2,
        "heads": HEADS,
        "kv_heads": 2,
        "q_len": LENGTH,
        "head_dim": 16,
        **options,
    }
    inputs = attention_inputs(value_dim=8, dtype=dtype, **options)
    # From a sink that takes nothing to one that takes nearly everything.
    sinks = torch.linspace(-3.0, 6.0, options["heads"]).to(dtype)
    return (*inputs[:3], sinks), inputs.scale


def chosen(density=0.6):
    return random_selection(2, HEADS, -(-LENGTH // 32), -(-LENGTH // 16), density=density)


def sparse(tensors, selection, scale, visibility):
    query, key, value, sinks = tensors
    readable = visibility.as_arguments().values()
    operator = OPERATORS.block_sparse_attention.v1
    return operator(query, key, value, *selection, scale, 32, 16, *readable, None, sinks)


def meant(tensors, selection, scale, visibility):
    *tensors, sinks = tensors
    return reference.block_sparse_attention(
        *tensors, selection, scale, 32, 16, visibility, sinks=sinks
    )


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


def gated(tensors, arguments, visibility):
    readable = visibility.as_arguments().values()
    return OPERATORS.gated_attention.v1(*tensors[:3], *arguments, *readable, None, tensors[3])


def in_float64(function, tensors):
    return function([tensor.detach().double() for tensor in tensors])


def gradients(function, tensors, grad):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    out = function(leaves)
    return torch.autograd.grad(out, leaves, grad.to(out.dtype))


def assert_gradients(got, eager, exact, grad, out):
    """Judge gradients of query, key and value by eager's, and that of sinks by its condition.

    A sink's gradient is one sum over all rows, in which terms of both signs meet: what rounding
    does to it is bounded by the sum of their amounts, of which none exceeds ``|grad| . |out|``.
    """
    for name, *three in zip("qkv", got, eager, exact, strict=False):
        assert_no_worse_than_eager(*three, name=name, head_axis=None)
    amounts = (grad.double().abs() * out.detach().double().abs()).sum((0, 2, 3))
    error = (got[3].double() - exact[3]).abs()
    assert (error <= 2 * torch.finfo(got[3].dtype).eps * amounts + 1e-30).all()


def from_saved_sums(tensors, grad, scale, visibility):
    """Return out and its gradients in plain PyTorch as flash attention has them.

    It keeps log-sum-exps, not probabilities, and takes exponentials in base 2; the rounding of
    these, numbers that may be far from 0, is part of float32's error then.
    """
    query, key, value, sinks = tensors
    mask = reference.token_mask(visibility, LENGTH, LENGTH, query.device)
    keys, values = (tensor.repeat_interleave(2, 1) for tensor in (key, value))
    logits = (query @ keys.mT * scale).masked_fill(~mask, -torch.inf)
    lse = torch.logsumexp(logits, -1)
    plain = (logits - lse.nan_to_num(neginf=0.0)[..., None]).exp() @ values
    out = plain * torch.sigmoid(lse - sinks[:, None])[..., None]
    total = torch.logaddexp(lse, sinks[:, None])[..., None]
    weights = (logits * math.log2(math.e) - total * math.log2(math.e)).exp2()
    delta = (grad * out).sum(-1, keepdim=True)
    grad_logits = weights * (grad @ values.mT - delta)
    return (
        out,
        grad_logits @ keys * scale,
        (grad_logits.mT @ query * scale).unflatten(1, (2, -1)).sum(2),
        (weights.mT @ grad).unflatten(1, (2, -1)).sum(2),
    )


def test_reference_is_a_softmax_over_one_more_column():
    (query, key, value, sinks), scale = operands(torch.float32)
    logits = query @ key.repeat_interleave(2, 1).mT * scale
    column = sinks[:, None, None].expand(2, HEADS, LENGTH, 1)
    weights = torch.cat([logits, column], -1).softmax(-1)[..., :-1]
    expected = weights @ value.repeat_interleave(2, 1)
    got = reference.dense_attention(query, key, value, scale, Visibility(), sinks=sinks)
    torch.testing.assert_close(got, expected)


@every_visibility
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sparse_attention_with_sinks_is_its_reference(dtype, visibility):
    tensors, scale = operands(dtype)
    rest = (chosen(), scale, visibility)
    out, lse = sparse(tensors, *rest)
    gold, gold_lse = in_float64(lambda wide: meant(wide, *rest), tensors)
    eager, _ = meant(tensors, *rest)
    assert_no_worse_than_eager(out, eager, gold)
    torch.testing.assert_close(lse, gold_lse.float(), rtol=1e-5, atol=1e-5)


@every_visibility
def test_gradients_with_sinks_are_those_of_the_reference(visibility):
    tensors, scale = operands()
    rest, grad = (chosen(), scale, visibility), normal(2, HEADS, LENGTH, 8, seed=5)
    got = gradients(lambda leaves: sparse(leaves, *rest)[0], tensors, grad)
    eager = gradients(lambda leaves: meant(leaves, *rest)[0], tensors, grad)
    gold = gradients(lambda leaves: meant(leaves, *rest)[0], [t.double() for t in tensors], grad)
    assert_gradients(got, eager, gold, grad, sparse(tensors, *rest)[0])


@every_visibility
def test_gradients_in_float64_are_those_of_autograd(visibility):
    tensors, scale = operands()
    wide = [tensor.double() for tensor in tensors]
    selection, grad = chosen(), normal(2, HEADS, LENGTH, 8, seed=5).double()
    rest = (*selection, scale, 32, 16, visibility)
    out, lse = with_sinks(blockwise.attention_forward(*wide[:3], *rest), wide[3])
    got = blockwise.attention_backward(grad, *wide[:3], out, lse, *rest)
    got = (*got, sinks_gradient(grad, out, lse, wide[3]))
    exact = gradients(lambda leaves: meant(leaves, selection, scale, visibility)[0], wide, grad)
    for ours, theirs in zip(got, exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("mode", [0, 1, 3])
@every_visibility
def test_dense_answer_of_a_site_with_sinks_is_exact(mode, visibility):
    tensors, scale = operands()
    grad = normal(2, HEADS, LENGTH, 8, seed=5)
    arguments = gate_arguments(mode)
    out, lse = gated(tensors, arguments, visibility)

    def exactly(leaves):
        *leaves, sinks = leaves
        return reference.dense_attention(*leaves, scale, visibility, sinks=sinks)

    gold = in_float64(exactly, tensors)
    eager, *eager_gradients = from_saved_sums(tensors, grad, scale, visibility)
    assert_no_worse_than_eager(out, eager, gold)
    assert out.is_contiguous()
    assert lse.isfinite().all()
    got = gradients(lambda leaves: gated(leaves, arguments, visibility)[0], tensors, grad)
    wide = gradients(exactly, [tensor.double() for tensor in tensors], grad)
    assert_gradients(got, eager_gradients, wide, grad, out)
    (answers,) = counters.snapshot().values()
    assert all(path.startswith("dense:") for path in answers)


def test_full_budget_of_a_site_with_sinks_is_its_dense_answer():
    tensors, _ = operands()
    visibility = VISIBILITIES["causal"]
    everything = gated(tensors, gate_arguments(2, budget=1.0), visibility)
    dense = gated(tensors, gate_arguments(0), visibility)
    for ours, theirs in zip(everything, dense, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert counters.snapshot() == {"site": {"sparse": 1, "dense:mode": 1}}


def test_sparse_answer_in_slabs_takes_sinks_into_every_slab(monkeypatch):
    from seer_compile.kernels import gated_attention

    tensors, _ = operands()
    grad = normal(2, HEADS, LENGTH, 8, seed=5)

    def compute():
        arguments = gate_arguments(2)
        results = gated(tensors, arguments, VISIBILITIES["causal"])
        return *results, *gradients(
            lambda leaves: gated(leaves, arguments, VISIBILITIES["causal"])[0], tensors, grad
        )

    whole = compute()
    monkeypatch.setattr(gated_attention, "_SLAB_BYTES", 1)
    for ours, theirs in zip(compute(), whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@every_visibility
def test_every_block_holds_every_block_of_the_band(visibility):
    query, key = normal(2, HEADS, LENGTH, 4), normal(2, 2, LENGTH, 4)
    selection = every_block.every_block(query, key, visibility)
    mask = reference.band_mask(visibility, LENGTH, LENGTH)
    wanted = reference.blocks_any(mask, *every_block.BLOCKS)
    got = reference.selection_mask(BlockSelection(*selection), wanted.shape[-1])
    assert torch.equal(got, wanted.expand_as(got))


@pytest.mark.parametrize("q_len", [0, 1, 63, 65, 129])
@pytest.mark.parametrize("k_len", [0, 1, 64, 127])
def test_lengths_of_every_kind_are_answered_densely_with_sinks(q_len, k_len):
    (query, key, value, sinks), scale = operands(q_len=q_len, k_len=k_len)
    out = dense_attention(query, key, value, scale=scale, sinks=sinks)
    expected = reference.dense_attention(query, key, value, scale, Visibility(), sinks=sinks)
    torch.testing.assert_close(out, expected)


def test_a_sink_of_minus_infinity_takes_nothing():
    (query, key, value, sinks), scale = operands()
    rest = (chosen(0.3), scale, VISIBILITIES["padded"])
    absent = torch.full_like(sinks, -torch.inf)
    out, lse = sparse((query, key, value, absent), *rest)
    plain, plain_lse = sparse((query, key, value, None), *rest)
    assert_bitwise_equal(out, plain)
    assert_bitwise_equal(lse, plain_lse)


def test_a_row_that_reads_nothing_gives_all_to_the_sink():
    tensors, scale = operands()
    nothing = selection_from_map(torch.zeros(2, HEADS, 5, 10, dtype=torch.bool))
    out, lse = sparse(tensors, nothing, scale, Visibility())
    assert (out == 0).all()
    assert_bitwise_equal(lse, tensors[3][:, None].expand_as(lse).contiguous())
    grad = torch.ones_like(out)
    found = gradients(lambda leaves: sparse(leaves, nothing, scale, Visibility())[0], tensors, grad)
    assert all((gradient == 0).all() for gradient in found)


def test_gradient_of_sinks_keeps_their_dtype_and_their_freezing():
    tensors, scale = operands()
    sinks = tensors[3].to(torch.bfloat16).requires_grad_()
    out, _ = sparse((*tensors[:3], sinks), chosen(), scale, Visibility())
    assert torch.autograd.grad(out.sum(), sinks)[0].dtype is torch.bfloat16
    query = tensors[0].detach().requires_grad_()
    frozen = tensors[3].detach()
    out, _ = sparse((query, *tensors[1:3], frozen), chosen(), scale, Visibility())
    assert torch.autograd.grad(out.sum(), query)[0].isfinite().all()


def test_helpers_agree_with_autograd_of_the_formula():
    lse = normal(2, 3, 7, seed=1).double()
    plain, sinks = normal(2, 3, 7, 4).double(), normal(3, seed=2).double().requires_grad_()
    grad = normal(2, 3, 7, 4, seed=3).double()
    written = plain * torch.sigmoid(lse - sinks[:, None])[..., None]
    out, total = with_sinks((plain.clone(), lse), sinks)
    torch.testing.assert_close(out, written.detach())
    (expected,) = torch.autograd.grad(written, sinks, grad)
    torch.testing.assert_close(sinks_gradient(grad, out, total, sinks), expected)


@pytest.mark.parametrize("name", ["block_sparse_attention", "gated_attention"])
@pytest.mark.parametrize("mode", [0, 2])
def test_operators_with_sinks_pass_opcheck(name, mode):
    tensors, scale = operands()
    query, key, value, sinks = (tensor.requires_grad_() for tensor in tensors)
    readable = tuple(VISIBILITIES["padded"].as_arguments().values())
    if name == "gated_attention":
        arguments = (query, key, value, *gate_arguments(mode), *readable, None, sinks)
    else:
        arguments = (query, key, value, *chosen(), scale, 32, 16, *readable, None, sinks)
    result = opcheck(getattr(OPERATORS, name).v1, arguments)
    assert set(result.values()) == {"SUCCESS"}


def test_compiled_gradients_with_sinks_are_those_of_eager():
    tensors, _ = operands()
    arguments = gate_arguments(2)

    def attend(*leaves):
        return gated(leaves, arguments, VISIBILITIES["causal"])[0]

    torch._dynamo.reset()
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    grad = normal(2, HEADS, LENGTH, 8, seed=5)
    got, wanted = (
        gradients(lambda leaves, function=function: function(*leaves), tensors, grad)
        for function in (compiled, attend)
    )
    for ours, theirs in zip(got, wanted, strict=True):
        assert_bitwise_equal(ours, theirs)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda sinks: sinks[:2], ShapeError),
        (lambda sinks: sinks[None], ShapeError),
        (lambda sinks: sinks.long(), DtypeError),
        (lambda sinks: sinks.tolist(), DtypeError),
        (lambda sinks: sinks.to("meta"), DeviceError),
    ],
)
@pytest.mark.parametrize("name", ["block_sparse_attention", "gated_attention", "dense_attention"])
def test_malformed_sinks_are_refused_by_name(name, change, error):
    (query, key, value, sinks), _ = operands()
    options = {"sinks": change(sinks)}
    if name == "block_sparse_attention":
        options |= {"selection": chosen(), "block_size": BlockSize(query=32, key=16)}
    if name == "gated_attention":
        weights, rest = gate_arguments(2)[:4], gate_arguments(2)[7:]
        names = ("query_weight", "key_weight", "budget", "mode")
        options |= dict(zip(names, weights, strict=True))
        options |= {"query_pools": ("mean",), "key_pools": ("mean",)}
        options |= {"query_sub_block": rest[0], "key_sub_block": rest[1]}
        options |= {"block_size": BlockSize(query=32, key=16), "sharing": "none"}
        options |= {"selector": "top_p", "budget_lengths": [64]}
    with pytest.raises(error, match="sinks"):
        getattr(ops, name)(query, key, value, **options)
