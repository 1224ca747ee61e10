"""Attention forward and backward under the interpreter; started by ``test_interpreted.py``."""

# ruff: noqa: E402

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[3] / "benchmarks")]

from interpreter import patch_interpreter

patch_interpreter()

# NumPy warns where a kernel multiplies by the NaN that a test put there.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

import triton
import triton.language as tl
from kernels_cases import BF16, PROFILES, Draw, attention_inputs
from kernels_checks import check_attention

from seer_compile.errors import (
    DtypeError,
    FeatureUnsupportedError,
    HeadConfigError,
    InterpreterUnsupportedError,
)
from seer_compile.kernels import reference
from seer_compile.kernels.triton import attention_backward, attention_forward, primitives
from seer_compile.types import BlockSelection, Visibility

SMALL = [profile for profile in PROFILES["attention"] if profile["dtype"] is not BF16]
BLOCK = 16


def full_selection(queries, keys, heads=1, batch=1):
    shape = (batch, heads, -(-queries // BLOCK), -(-keys // BLOCK))
    indices = torch.arange(shape[3], dtype=torch.int32).expand(shape).contiguous()
    return indices, torch.full(shape[:3], shape[3], dtype=torch.int32)


def attend(query, key, value, indices, counts, **visibility):
    return attention_forward.launch(
        query, key, value, indices, counts, 0.25, BLOCK, BLOCK, **visibility
    )


def inputs(queries=40, keys=40, dim=16, heads=1, kv_heads=1, dtype=torch.float32):
    draw = Draw(0, 0)
    shapes = ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    return [draw.normal(1, count, tokens, dim).to(dtype) for count, tokens in shapes]


@pytest.mark.parametrize("case", range(len(SMALL)))
def test_random_configuration_is_as_exact_as_eager(case):
    profile = {**SMALL[case], "blocks": tuple(min(size, 32) for size in SMALL[case]["blocks"])}
    profile["heads"] = (2, 1, min(2, profile["heads"][2]))
    check_attention(attention_inputs(profile, Draw(5, case), "cpu", False))


def test_every_query_reads_exactly_the_keys_it_may():
    queries, keys = 40, 56
    query, key, _ = inputs(queries, keys)
    value = torch.eye(keys)[None, None]
    indices = torch.tensor([[[[0, 2, 9, 9], [1, 2, 3, 9], [0, 3, 9, 9]]]], dtype=torch.int32)
    counts = torch.tensor([[[2, 3, 2]]], dtype=torch.int32)
    padding = torch.ones(1, keys, dtype=torch.bool)
    padding[:, 3:5] = False
    out, _ = attend(query, key, value, indices, counts, upper=16, lower=-20, key_padding=padding)
    distance = torch.arange(keys)[None] - torch.arange(queries)[:, None]
    expected = (distance <= 16) & (distance >= -20) & padding
    for block, kept in enumerate(([0, 2], [1, 2, 3], [0, 3])):
        selected = torch.isin(torch.arange(keys) // BLOCK, torch.tensor(kept))
        expected[block * BLOCK : (block + 1) * BLOCK] &= selected
    assert torch.equal(out[0, 0] != 0, expected)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 65504.0])
def test_a_key_that_some_queries_may_not_read_changes_none_of_their_bits(poison):
    query, key, value = inputs()
    clean, _ = attend(query, key, value, *full_selection(40, 40), upper=0)
    key[0, 0, 21], value[0, 0, 21] = poison, poison
    spoilt, _ = attend(query, key, value, *full_selection(40, 40), upper=0)
    assert torch.equal(clean[:, :, :21], spoilt[:, :, :21])
    assert not torch.equal(clean[:, :, 21:], spoilt[:, :, 21:])


def test_a_value_that_is_not_finite_spoils_every_query_that_reads_it():
    query, key, value = inputs()
    value[0, 0, 21, 3] = float("nan")
    out, _ = attend(query, key, value, *full_selection(40, 40), upper=0)
    assert out[0, 0, :21].isfinite().all()
    assert out[0, 0, 21:, 3].isnan().all()


def test_rows_that_read_nothing_are_zero_with_log_sum_minus_infinity():
    query, key, value = inputs(heads=2)
    indices, counts = full_selection(40, 40, heads=2)
    counts[0, 0, 1] = 0
    padding = torch.zeros(1, 40, dtype=torch.bool)
    for visibility in ({}, {"upper": -17}, {"key_padding": padding}, {"lower": 60}):
        out, lse = attend(query, key, value, indices, counts, **visibility)
        empty = lse == -torch.inf
        assert empty[0, 0, 16:32].all()
        assert torch.equal(out[empty], torch.zeros_like(out[empty]))
        assert out.isfinite().all()
    gradients = attention_backward.launch(
        torch.ones_like(out), query, key, value, out, lse, indices, counts, 0.25, BLOCK, BLOCK,
        lower=60,
    )  # fmt: skip
    for gradient in gradients:
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize(("queries", "keys"), [(0, 8), (8, 0), (1, 1)])
def test_empty_and_single_token_inputs(queries, keys):
    query, key, value = inputs(queries, keys)
    indices, counts = full_selection(queries, keys)
    out, lse = attend(query, key, value, indices, counts)
    assert out.shape == (1, 1, queries, 16)
    expected = value.expand_as(out) if queries and keys else torch.zeros_like(out)
    torch.testing.assert_close(out, expected)
    gradients = attention_backward.launch(
        torch.ones_like(out), query, key, value, out, lse, indices, counts, 0.25, BLOCK, BLOCK
    )
    assert [gradient.shape for gradient in gradients] == [query.shape, key.shape, value.shape]


def test_an_offset_tensor_means_the_same_as_shifted_bounds():
    query, key, value = inputs(20, 60)
    selection = full_selection(20, 60)
    shifted = attend(query, key, value, *selection, upper=40, lower=20)
    offset = torch.tensor(37)
    moved = attend(query, key, value, *selection, upper=3, lower=-17, offset=offset)
    assert torch.equal(shifted[0], moved[0])
    assert torch.equal(shifted[1], moved[1])


@triton.jit
def _tanh(values_ptr, result_ptr, SIZE: tl.constexpr):
    places = tl.arange(0, SIZE)
    tl.store(result_ptr + places, primitives.tanh(tl.load(values_ptr + places)))


def test_tanh_is_exact_to_float32():
    steps = torch.logspace(-8, 2, 508, dtype=torch.float64)
    ends = torch.tensor([0.0, 0.625, torch.inf, torch.nan], dtype=torch.float64)
    values = torch.cat([steps, -steps, ends, -ends]).float()
    result = torch.empty_like(values)
    _tanh[(1,)](values, result, SIZE=1024)
    exact = values.double().tanh()
    torch.testing.assert_close(result.double(), exact, rtol=2.5e-7, atol=0.0, equal_nan=True)


CAPPED = {
    "full": {},
    "causal": {"upper": 0},
    "window": {"upper": 0, "lower": -20},
    "nothing": {"upper": 0, "lower": 1},
    "padded": {"upper": 0, "key_padding": torch.arange(70)[None] >= 30},
}


@pytest.mark.parametrize("readable", CAPPED.values(), ids=CAPPED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("scale", "softcap"), [(0.25, 50.0), (2.0, 3.0), (-0.5, 1.0)])
def test_soft_capped_attention_is_as_exact_as_eager(scale, softcap, dtype, readable):
    query, key, value = inputs(70, 70, heads=4, kv_heads=2, dtype=dtype)
    selection = full_selection(70, 70)
    rest = (*selection, scale, BLOCK, BLOCK)
    out, lse = attention_forward.launch(query, key, value, *rest, **readable, softcap=softcap)
    grad = Draw(1, 0).normal(*out.shape).to(dtype)
    results = (grad, query, key, value, out, lse)
    got = attention_backward.launch(*results, *rest, **readable, softcap=softcap)

    def meant(to):
        leaves = [tensor.to(to).requires_grad_() for tensor in (query, key, value)]
        wanted, total = reference.block_sparse_attention(
            *leaves,
            BlockSelection(*selection),
            *(scale, BLOCK, BLOCK, Visibility(**readable)),
            softcap=softcap,
        )
        gradients = torch.autograd.grad(wanted, leaves, grad.to(to))
        return wanted.detach(), total.detach(), *gradients

    gold, eager = meant(torch.float64), meant(dtype)
    for ours, theirs, exact in zip((out, lse, *got), eager, gold, strict=True):
        worst = (theirs.double() - exact).where(exact.isfinite(), 0.0).abs().max()
        floor = 8 * torch.finfo(ours.dtype).eps * exact.where(exact.isfinite(), 0.0).abs().max()
        error = (ours.double() - exact).where(exact.isfinite(), 0.0).abs().max()
        assert error <= 2 * worst + floor
        assert torch.equal(ours.double()[~exact.isfinite()], exact[~exact.isfinite()])


def test_heads_that_share_a_selection_get_what_they_get_alone():
    query, key, value = inputs(heads=4, kv_heads=2, dtype=torch.float16)
    indices, counts = full_selection(40, 40, heads=2)
    counts[0, 0] = torch.tensor([1, 2, 1])
    together, _ = attend(query, key, value, indices, counts, upper=0)
    alone = [indices.repeat_interleave(2, 1), counts.repeat_interleave(2, 1)]
    apart, _ = attend(query, key, value, *alone, upper=0)
    assert torch.equal(together, apart)


def test_output_lies_like_the_query():
    query, key, value = inputs(heads=2)
    selection = full_selection(40, 40, heads=2)
    heads_first, _ = attend(query, key, value, *selection)
    assert heads_first.is_contiguous()
    query = query.transpose(1, 2).contiguous().transpose(1, 2)
    token_major, _ = attend(query, key, value, *selection)
    assert token_major.transpose(1, 2).is_contiguous()
    assert torch.equal(heads_first, token_major)


def test_what_kernels_cannot_do_is_refused_by_name():
    query, key, value = inputs(heads=3)
    selection = full_selection(40, 40, heads=2)
    with pytest.raises(HeadConfigError, match="selection heads=2"):
        attend(query, key, value, *selection)
    with pytest.raises(FeatureUnsupportedError, match="head_dim=257"):
        attend(*inputs(dim=257), *full_selection(40, 40))
    with pytest.raises(DtypeError, match="query"):
        attend(*inputs(dtype=torch.float64), *full_selection(40, 40))
    with pytest.raises(InterpreterUnsupportedError, match="query"):
        attend(*inputs(dtype=torch.bfloat16), *full_selection(40, 40))
