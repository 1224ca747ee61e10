"""Pooling, block scores and attention mass under the interpreter."""

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

from kernels_cases import BF16, PROFILES, Draw, features_inputs, map_inputs, pool_inputs
from kernels_checks import check_features, check_map, check_pool

from seer_compile.errors import DtypeError, RangeError
from seer_compile.kernels import reference
from seer_compile.kernels.triton import (
    attention_mass,
    block_scores,
    pool_blocks,
    pool_features,
    pool_resident,
    tuning,
)
from seer_compile.types import Visibility
from support.assertions import assert_no_worse_than_eager


def small(op):
    return [profile for profile in PROFILES[op] if profile["dtype"] is not BF16]


@pytest.mark.parametrize("profile", small("pool_blocks"), ids=lambda profile: profile["kinds"])
def test_pooling_is_as_exact_as_eager(profile):
    for case in range(2):
        check_pool(pool_inputs(profile, Draw(1, case), "cpu", False))


@pytest.mark.parametrize("profile", small("pool_features"), ids=lambda profile: profile["kinds"])
def test_features_are_as_exact_as_eager(profile):
    for case in range(3):
        check_features(features_inputs(profile, Draw(1, case), "cpu", False))


def test_features_of_a_group_are_the_sum_of_those_of_its_heads():
    tokens = Draw(0, 0).normal(1, 6, 80, 32).half()
    weight = Draw(0, 1).normal(6, 96, 64) / 8
    arguments = (8, "mean,max,min", None)
    whole = pool_features.launch(tokens, weight, *arguments, 3)
    alone = pool_features.launch(tokens, weight, *arguments).float()
    # Those of single heads are rounded once more each.
    torch.testing.assert_close(
        whole.float(), alone.unflatten(1, (-1, 3)).sum(2), rtol=2**-10, atol=2**-8
    )
    with pytest.raises(DtypeError, match="float16 or bfloat16"):
        pool_features.launch(tokens.float(), weight, *arguments)


@pytest.mark.parametrize("kinds", ["mean,max,min", "min,mean,max"])
@pytest.mark.parametrize(("dim", "gate_dim", "size"), [(32, 16, 4), (96, 64, 2), (128, 20, 8)])
@pytest.mark.parametrize("rest", [0, 1, 37])
def test_weights_that_stay_on_the_chip_give_the_features_of_pooling_tile_by_tile(
    dim, gate_dim, size, rest, kinds, monkeypatch
):
    # Two heads of two items, two programs each: five tiles a head, the last one short.
    monkeypatch.setattr(pool_resident, "multiprocessors", lambda device: 8)
    tokens = Draw(0, 0).normal(2, 4 * 64 * size + rest, 2, dim).half().transpose(1, 2)
    weight = Draw(0, 1).normal(2, 3 * dim, 2 * gate_dim)[:, :, :gate_dim] / 8
    exact = reference.pool_features(tokens.double(), weight.double(), size, kinds, None, 1)
    eager = reference.pool_features(tokens, weight.half(), size, kinds, None, 1)
    actual = pool_resident.launch(tokens, weight, size, kinds)
    assert_no_worse_than_eager(actual, eager, exact, name="features")
    tiled = pool_features.launch(tokens, weight, size, kinds)
    torch.testing.assert_close(actual, tiled, rtol=2**-10, atol=2**-12)


@pytest.mark.parametrize(
    ("op", "case"),
    [("block_scores", case) for case in range(7)] + [("attention_mass", case) for case in range(4)],
)
def test_map_is_as_exact_as_float32_allows(op, case):
    profile = small(op)[case]
    check_map(map_inputs(profile, Draw(2, case), "cpu", False))


@pytest.mark.parametrize("scale", [0.5, -0.5])
@pytest.mark.parametrize("reduce", [("mean", "sum"), ("max", "max")])
def test_mass_of_capped_logits_is_that_of_the_reference(reduce, scale):
    query, key = Draw(0, 0).normal(1, 2, 50, 16), Draw(1, 0).normal(1, 1, 70, 16)
    visibility = Visibility(upper=20)
    arguments = (query, key, scale, 10, 16, *reduce)
    actual = attention_mass.launch(*arguments, **visibility.as_arguments(), softcap=1.5)
    exact = reference.attention_mass(
        query.double(), key.double(), scale, 10, 16, *reduce, visibility, 1.5
    )
    torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-7)


def test_mass_of_a_row_is_one_wherever_it_reads_anything():
    query = Draw(0, 0).normal(1, 2, 50, 16)
    mass = attention_mass.launch(query, query, 0.25, 10, 16, "mean", "sum", upper=-3)
    torch.testing.assert_close(mass.sum(-1), torch.ones(1, 2, 5))


def test_scores_of_the_future_are_exactly_zero():
    features = Draw(0, 0).normal(2, 1, 2, 12, 16)
    scores = block_scores.launch(*features, 1.0, 8, 8, 32, 16, 96, 96, 1, upper=0)
    future = torch.arange(6)[None] * 16 > torch.arange(3)[:, None] * 32 + 31
    assert torch.equal(scores == 0, future.expand_as(scores))


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "made again"])
@pytest.mark.parametrize("groups", [1, 2])
def test_scores_are_the_same_however_few_programs_share_the_tiles(groups, keep):
    features = Draw(0, 0).normal(2, 2, 4, 60, 16).half()
    arguments = (*features, 1.0, 8, 8, 16, 32, 470, 475, groups, 3)
    whole = block_scores.launch(*arguments)
    for programs in (1, 3, 7):
        tiling = tuning.ScoresTiling(16, 32, 4, 1, programs, 255, keep)
        scores = block_scores.launch(*arguments, tiling=tiling)
        torch.testing.assert_close(scores, whole, rtol=1e-5, atol=1e-30)


def test_a_feature_that_is_nan_spoils_the_scores_of_the_rows_that_see_it():
    query, key = Draw(0, 0).normal(2, 1, 1, 16, 16)
    key[0, 0, 5] = float("nan")
    scores = block_scores.launch(query, key, 1.0, 8, 8, 16, 32, 128, 128, 1, upper=0)
    # Sub-block 5 begins at token 40: the query block of tokens 32 to 47 is the first to see it.
    spoilt = scores.isnan().any(-1)[0, 0]
    assert spoilt.tolist() == [False, False, True, True, True, True, True, True]


def test_a_shared_selection_takes_the_largest_score_of_its_heads():
    features = Draw(0, 0).normal(2, 1, 4, 12, 16)
    arguments = (*features, 1.0, 8, 8, 32, 32, 96, 96)
    alone = block_scores.launch(*arguments, 1, upper=0)
    shared = block_scores.launch(*arguments, 2, upper=0)
    assert torch.equal(shared, alone.unflatten(1, (2, 2)).amax(2))


@pytest.mark.parametrize(("queries", "keys"), [(0, 8), (8, 0), (0, 0)])
def test_empty_inputs_give_empty_or_zero_maps(queries, keys):
    query, key = torch.zeros(1, 1, queries, 16), torch.zeros(1, 1, keys, 16)
    mass = attention_mass.launch(query, key, 1.0, 8, 8, "max", "max")
    assert mass.shape == (1, 1, -(-queries // 8), -(-keys // 8))
    assert not mass.any()
    assert pool_blocks.launch(key, 8, "mean").shape == (1, 1, -(-keys // 8), 16)


def test_unknown_kinds_and_units_are_refused_by_name():
    tokens = torch.zeros(1, 1, 8, 16)
    with pytest.raises(RangeError, match="kinds"):
        pool_blocks.launch(tokens, 8, "mean,median")
    with pytest.raises(RangeError, match="query_unit=129"):
        attention_mass.launch(tokens, tokens, 1.0, 129, 8, "mean", "sum")
    with pytest.raises(RangeError, match="key_reduce"):
        attention_mass.launch(tokens, tokens, 1.0, 8, 8, "mean", "mean")
    with pytest.raises(RangeError, match="key_sub_block=12"):
        block_scores.launch(tokens, tokens, 1.0, 4, 12, 16, 16, 8, 8, 1)
