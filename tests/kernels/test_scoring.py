"""Pooling, block scores and attention mass on the CPU against the oracle."""

import math
import random

import pytest
import torch

from seer_compile.errors import SeerError
from seer_compile.kernels import reference, scoring
from seer_compile.types import Visibility
from support.assertions import assert_bitwise_equal, poisoned
from support.inputs import Layout, attention_inputs, key_padding, normal, with_layout
from support.kernel_cases import random_case, random_visibility

ops = torch.ops.seer_compile
LAYOUTS: tuple[Layout, ...] = ("contiguous", "tokens_first", "sliced", "expanded_batch")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("length", [1, 7, 8, 9, 64, 129])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pools_are_those_of_the_reference(layout, length, dtype):
    tokens = with_layout(normal(2, 3, length, 5, dtype=dtype), layout)
    padding = key_padding([length, length // 3], length)
    for mask in (None, padding):
        got = ops.pool_blocks.v1(tokens, 8, "max,mean,min", mask)
        expected = reference.pool_blocks(tokens, 8, "max,mean,min", mask)
        assert got.dtype is dtype
        # Means are rounded once, from sums in float32: one unit in the last place.
        torch.testing.assert_close(got, expected, rtol=torch.finfo(dtype).eps, atol=1e-6)
        assert torch.equal(got[..., :5], expected[..., :5])


def test_pools_ignore_padding_and_keep_nan_of_real_tokens():
    tokens, padding = normal(1, 1, 24, 4), key_padding([13], 24)
    clean = ops.pool_blocks.v1(tokens, 8, "mean,max,min", padding)
    for value in (math.nan, math.inf, -math.inf):
        got = ops.pool_blocks.v1(
            poisoned(tokens, ~padding[:, None], value), 8, "mean,max,min", padding
        )
        assert_bitwise_equal(got, clean)
    tokens[0, 0, 20] = math.nan
    assert ops.pool_blocks.v1(tokens, 8, "mean", padding)[0, 0].isnan().any(-1).tolist() == [
        False,
        False,
        True,
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("served", "groups"), [(1, 1), (4, 1), (1, 3), (1, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_are_those_of_the_reference(layout, served, groups, dtype):
    tokens = with_layout(normal(2, 6, 41, 5, dtype=dtype), layout)
    weight = normal(6 * served, 10, 6, seed=1)
    padding = key_padding([41, 13], 41)
    for mask in (None, padding):
        got = ops.pool_features.v1(tokens, weight, 8, "max,mean", mask, groups)
        expected = reference.pool_features(tokens.float(), weight, 8, "max,mean", mask, groups)
        assert got.dtype is torch.float32
        assert got.is_contiguous()
        # Means are rounded once to the dtype before they are multiplied, once per head of a group.
        limit = 8 * groups * torch.finfo(dtype).eps
        torch.testing.assert_close(got, expected, rtol=limit, atol=limit)


@pytest.mark.parametrize(
    ("argument", "weight", "size", "kinds"),
    [
        ("weight.shape", (2, 10, 6), 8, "max,mean"),
        ("weight.shape", (3, 15, 6), 8, "max,mean"),
        ("weight", (3, 10), 8, "max,mean"),
        ("size", (3, 10, 6), 0, "max,mean"),
        ("kinds", (3, 10, 6), 8, "max,middle"),
    ],
)
def test_features_of_a_malformed_call_are_refused_by_name(argument, weight, size, kinds):
    with pytest.raises(SeerError, match=argument):
        ops.pool_features.v1(normal(2, 3, 41, 5), torch.zeros(weight), size, kinds)


@pytest.mark.parametrize(("heads", "groups"), [(3, 0), (3, 2), (6, 3)])
def test_features_of_groups_that_do_not_fit_are_refused(heads, groups):
    with pytest.raises(SeerError, match="groups"):
        ops.pool_features.v1(normal(2, 3, 41, 5), torch.zeros(heads, 5, 6), 8, "mean", None, groups)


@pytest.mark.parametrize("seed", range(40))
def test_block_scores_are_those_of_the_reference(seed):
    rng = random.Random(seed)
    q_len, k_len = rng.choice((1, 15, 64, 130)), rng.choice((1, 31, 64, 193))
    sub_blocks, heads = (rng.choice((1, 4, 8)), rng.choice((4, 8, 16))), rng.choice((1, 4))
    blocks = rng.choice((16, 32, 64)), rng.choice((16, 32, 64))
    query = normal(2, heads, -(-q_len // sub_blocks[0]), 6, seed=seed)
    key = normal(2, heads, -(-k_len // sub_blocks[1]), 6, seed=seed + 1)
    visibility = random_visibility(rng, 2, q_len, k_len)
    sizes = (0.7, *sub_blocks, *blocks, q_len, k_len, rng.choice((1, heads)))
    got = ops.block_scores.v1(query, key, *sizes, *visibility.as_arguments().values())
    expected = reference.block_scores(query.double(), key.double(), *sizes, visibility)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
    assert ((got != 0) <= (expected != 0)).all()


@pytest.mark.parametrize("seed", range(40))
def test_attention_mass_is_that_of_the_reference(seed):
    case, rng = random_case(seed, torch.float32), random.Random(seed)
    query, key, _, scale = case.inputs
    units = (rng.choice((1, 8, 16)), rng.choice((8, 64)))
    reduces = (rng.choice(("mean", "max")), rng.choice(("sum", "max")))
    got = ops.attention_mass.v1(query, key, scale, *units, *reduces, *case.readable)
    expected = reference.attention_mass(
        query.double(), key.double(), scale, *units, *reduces, case.visibility
    )
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-6)
    assert ((got != 0) <= (expected != 0)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mass_of_half_precision_is_computed_in_float32(dtype):
    inputs = attention_inputs(heads=4, kv_heads=2, q_len=96, dtype=dtype)
    got = ops.attention_mass.v1(*inputs[:2], 0.2, 8, 16, "mean", "sum", 0)
    expected = reference.attention_mass(
        inputs.query.double(), inputs.key.double(), 0.2, 8, 16, "mean", "sum", Visibility(upper=0)
    )
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-6)


def test_hidden_keys_do_not_matter_to_scores_and_mass():
    visibility = Visibility(upper=0, key_padding=key_padding([40], 64))
    unread = ~visibility.key_padding[:, None]
    query, key = normal(1, 2, 64, 8), normal(1, 2, 64, 8, seed=1)
    readable = visibility.as_arguments().values()
    clean = ops.attention_mass.v1(query, key, 0.3, 8, 16, "mean", "sum", *readable)
    for value in (math.nan, math.inf):
        dirty = poisoned(key, unread, value)
        got = ops.attention_mass.v1(query, dirty, 0.3, 8, 16, "mean", "sum", *readable)
        assert_bitwise_equal(got, clean)
    features, others = normal(1, 2, 16, 8), normal(1, 2, 8, 8, seed=2)
    sizes = (0.3, 4, 8, 16, 16, 64, 64, 1)
    clean = ops.block_scores.v1(features, others, *sizes, *readable)
    dirty = poisoned(others, unread[..., ::8].expand(1, 2, 8), math.nan)
    assert_bitwise_equal(ops.block_scores.v1(features, dirty, *sizes, *readable), clean)


@pytest.mark.parametrize("name", ["block_scores", "attention_mass"])
def test_results_do_not_depend_on_how_rows_are_streamed(name, monkeypatch):
    query, key = normal(2, 4, 160, 8), normal(2, 4, 160, 8, seed=1)
    visibility = Visibility(upper=0, lower=-50)
    readable = visibility.as_arguments().values()

    def run():
        if name == "attention_mass":
            return ops.attention_mass.v1(query, key, 0.3, 8, 16, "mean", "sum", *readable)
        return ops.block_scores.v1(query, key, 0.3, 8, 8, 16, 16, 1280, 1280, 2, *readable)

    whole = run()
    monkeypatch.setattr(scoring, "_SLAB_ELEMENTS", 1)
    torch.testing.assert_close(run(), whole)


def test_long_inputs_never_hold_a_map_of_tokens(monkeypatch):
    sizes = []
    original = torch.bmm

    def measuring(*args, **kwargs):
        result = original(*args, **kwargs)
        sizes.append(result.numel())
        return result

    monkeypatch.setattr(torch, "bmm", measuring)
    query, key = normal(1, 2, 4096, 8), normal(1, 1, 4096, 8, seed=1)
    ops.attention_mass.v1(query, key, 0.3, 64, 64, "mean", "sum", 0)
    assert sizes
    assert max(sizes) <= scoring._SLAB_ELEMENTS
