"""Selection, and its transposition for the backward, under the interpreter."""

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

from kernels_cases import PROFILES, Draw, select_inputs
from kernels_checks import check_select

from seer_compile.errors import RangeError
from seer_compile.kernels.budgets import only
from seer_compile.kernels.triton import select_blocks
from seer_compile.kernels.triton.transpose_selection import transpose_selection


def kept(scores, budget, selector, **visibility):
    """Return the kept blocks of one row of 16-token blocks."""
    scores = torch.tensor(scores)[None, None, None]
    length = 16 * scores.shape[-1]
    indices, counts = select_blocks.launch(
        scores, only(torch.tensor([budget])), selector, 16, 16, 16, length, **visibility
    )
    return indices[0, 0, 0, : int(counts)].tolist()


@pytest.mark.parametrize("profile", PROFILES["select_blocks"][:1] + PROFILES["select_blocks"][3:5])
def test_selection_matches_the_reference(profile):
    for case in range(4):
        check_select(select_inputs(profile, Draw(3, case), "cpu", False))


@pytest.mark.parametrize("case", range(6))
def test_rows_of_which_the_band_shows_a_part_match_the_reference(case):
    # Rows of up to 512 blocks come in three widths, which start where the band does.
    profile = PROFILES["select_blocks"][1 if case % 2 else 4]
    check_select(select_inputs(profile, Draw(6, case), "cpu", True))


@pytest.mark.parametrize("selector", ["top_k", "threshold"])
def test_selection_by_number_and_ratio_matches_the_reference(selector):
    profile = {"selector": selector, "blocks": (32, 16), "columns": (1, 40), "padding": True}
    for case in range(4):
        check_select(select_inputs(profile, Draw(4, case), "cpu", False))


def test_a_wide_row_is_selected_in_one_pass():
    scores = torch.rand(1, 1, 1, 16_384, generator=torch.Generator().manual_seed(0))
    indices, counts = select_blocks.launch(
        scores, only(torch.tensor([100.0])), "top_k", 64, 64, 64, 64 * 16_384
    )
    expected = set(scores[0, 0, 0].topk(99).indices.tolist()) | {0}
    assert set(indices[0, 0, 0, : int(counts)].tolist()) == expected or int(counts) == 100


def test_mass_is_reached_with_the_fewest_blocks_and_ties_stay():
    assert kept([0.1, 0.4, 0.2, 0.2, 0.1], 0.5, "top_p") == [0, 1]
    assert kept([0.1, 0.4, 0.2, 0.2, 0.1], 0.6, "top_p") == [0, 1, 2, 3]
    assert kept([0.0, 0.5, 0.0, 0.5], 1.0, "top_p") == [0, 1, 2, 3]


def test_number_of_blocks_is_exact_and_ties_go_to_the_lower_index():
    assert kept([0.2] * 6, 3.0, "top_k") == [0, 1, 2]
    assert kept([0.1, 0.1, 0.3, 0.3, 0.3], 3.0, "top_k") == [0, 2, 3]
    assert kept([0.1] * 10, 0.3, "fraction") == [0, 1, 2]


def test_negative_scores_rank_as_numbers():
    assert kept([-3.0, -1.0, -2.0, 0.5, -0.0], 4.0, "top_k") == [0, 1, 3, 4]


def test_diagonal_and_sink_are_kept_whatever_their_scores():
    scores = [0.0, 0.0, 0.9, 0.0, 0.0, 0.0]
    assert kept(scores, 0.1, "top_p", upper=64) == [0, 2, 4]
    padding = torch.arange(96)[None] >= 20
    assert kept(scores, 0.1, "top_p", upper=64, key_padding=padding) == [1, 2, 4]


def test_blocks_outside_the_band_are_neither_read_nor_kept():
    scores = [float("nan"), 0.1, 0.6, 0.3, float("nan")]
    assert kept(scores, 1.0, "top_p", upper=48, lower=31) == [1, 2, 3]
    assert kept(scores, 1.0, "top_p", upper=0, lower=1) == []


def test_a_score_that_is_nan_keeps_the_whole_row():
    assert kept([0.1, float("nan"), 0.1, 0.1], 0.1, "top_p") == [0, 1, 2, 3]


def test_transposed_lists_hold_the_same_pairs_in_order():
    generator = torch.Generator().manual_seed(0)
    pairs = torch.rand(2, 3, 70, 40, generator=generator) < 0.3
    counts = pairs.sum(-1, dtype=torch.int32)
    indices = torch.argsort(~pairs, dim=-1, stable=True).int()
    lists, lengths = transpose_selection(indices, counts, 40)
    assert torch.equal(lengths, pairs.sum(2, dtype=torch.int32))
    expected = torch.argsort(~pairs.mT, dim=-1, stable=True).int()
    used = torch.arange(70) < lengths[..., None]
    assert torch.equal(lists[used], expected[used])


def test_unknown_selectors_are_refused_by_name():
    with pytest.raises(RangeError, match="selector='best'"):
        kept([0.5, 0.5], 0.5, "best")


@pytest.mark.parametrize("decades", [3, 6, 9, 12])
def test_top_p_tells_shares_next_to_one_apart(decades):
    # Each block carries a tenth of the one before: one block more for every decade of the rest.
    scores = torch.logspace(0, -15, 16).reshape(1, 1, 1, 16)
    budget = torch.tensor([1 - 2 * 10.0**-decades], dtype=torch.float64)
    _, counts = select_blocks.launch(scores, only(budget), "top_p", 16, 16, 16, 256)
    assert counts.item() == decades
