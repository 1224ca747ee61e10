"""The Hopper kernel for block scores on a played multiprocessor; see ``test_interpreted.py``."""

# ruff: noqa: E402

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[3] / "benchmarks")]

from interpreter import patch_interpreter

patch_interpreter()

from gluon_language import PlayedKernel
from kernels_cases import BF16, FP16, Draw, with_room
from kernels_checks import check_hopper_scores, run_hopper_scores

from seer_compile.kernels.triton import (
    hopper_attention,
    hopper_launch,
    hopper_score_steps,
    hopper_score_warps,
    hopper_scores,
    hopper_steps,
    hopper_tiles,
    hopper_warps,
)
from seer_compile.types import Visibility

MODULES = (hopper_tiles, hopper_steps, hopper_warps, hopper_launch, hopper_attention)
MODULES = (*MODULES, hopper_score_steps, hopper_score_warps, hopper_scores)
KERNEL = hopper_scores._hopper_scores


@pytest.fixture
def play(monkeypatch):
    """Run calls on the played machine; return a function that chooses the order of its events."""
    monkeypatch.setattr(hopper_scores, "multiprocessors", lambda device: 2)
    monkeypatch.setattr(hopper_scores, "launching_on", lambda *_: contextlib.nullcontext())

    def choose(seed):
        monkeypatch.setattr(hopper_scores, "_hopper_scores", PlayedKernel(KERNEL, MODULES, seed))

    choose(0)
    return choose


def make(seed, q_len, k_len, sub_blocks=(2, 4), blocks=(64, 64), **changes):
    draw = Draw(21, seed)
    settings = {"heads": 2, "groups": 1, "dim": 64, "dtype": FP16, "scale": 0.3, "batch": 1}
    settings |= {name: changes.pop(name) for name in list(changes) if name in settings}
    heads, dim, dtype, batch = (settings[name] for name in ("heads", "dim", "dtype", "batch"))
    band = {"upper": k_len - q_len, **changes}
    shapes = [
        (batch, heads, -(-length // size), dim)
        for length, size in zip((q_len, k_len), sub_blocks, strict=True)
    ]
    rows, columns = (draw.normal(*shape).to(dtype) for shape in shapes)
    return {
        "profile": {"sub_blocks": sub_blocks, "blocks": blocks, "groups": settings["groups"]},
        "rows": rows, "columns": with_room(columns), "lengths": (q_len, k_len),
        "scale": settings["scale"], "visibility": Visibility(**band),
    }  # fmt: skip


CASES = {
    "causal": {"q_len": 1100, "k_len": 1100},
    "whole tiles": {"q_len": 1024, "k_len": 1024, "dtype": BF16},
    "a group": {"q_len": 700, "k_len": 700, "heads": 4, "groups": 4},
    "all keys": {"q_len": 300, "k_len": 1500, "upper": None},
    "window": {"q_len": 1300, "k_len": 1300, "lower": -260},
    "ahead": {"q_len": 200, "k_len": 1030, "batch": 2},
    "crossed": {"q_len": 600, "k_len": 600, "upper": -700},
    "few rows": {"q_len": 5, "k_len": 700},
    "coarse": {"q_len": 900, "k_len": 900, "sub_blocks": (8, 8), "dim": 32},
    "wide": {"q_len": 500, "k_len": 1100, "sub_blocks": (4, 16), "dim": 128, "dtype": BF16},
    "fine": {"q_len": 530, "k_len": 1100, "sub_blocks": (1, 2)},
    "fine keys": {"q_len": 700, "k_len": 700, "sub_blocks": (4, 2), "dim": 32, "lower": -300},
    "four places": {"q_len": 1100, "k_len": 1100, "sub_blocks": (8, 16)},
    "long blocks": {"q_len": 900, "k_len": 900, "sub_blocks": (2, 8), "blocks": (128, 128)},
    "negative": {"q_len": 500, "k_len": 500, "scale": -0.3},
    "offset": {"q_len": 400, "k_len": 800, "upper": 0, "offset": torch.tensor(130)},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", range(2))
def test_scores_are_those_of_the_reference_in_every_order_of_events(name, seed, play):
    inputs = make(seed, **CASES[name])
    (first,) = run_hopper_scores(inputs)
    play(seed + 50)
    check_hopper_scores(inputs)
    assert torch.equal(run_hopper_scores(inputs)[0], first)


def test_a_feature_that_is_nan_spoils_the_scores_of_the_rows_that_see_it(play):
    inputs = make(0, 640, 640, heads=1)
    inputs["columns"][0, 0, 33] = torch.nan
    (scores,) = run_hopper_scores(inputs)
    # Sub-block 33 begins at token 132: the query block of tokens 128 to 191 is the first to see it.
    assert scores.isnan().any(-1)[0, 0].tolist() == [False] * 2 + [True] * 8


def test_logits_that_float16_has_no_room_for_leave_the_best_block_at_one(play):
    inputs = make(0, 320, 320, heads=1)
    inputs["rows"][:] = 40.0
    inputs["columns"][:] = -40.0
    inputs["columns"][0, 0, 3] = 40.0
    inputs["scale"] = 1e4
    (scores,) = run_hopper_scores(inputs)
    assert torch.equal(scores[0, 0, :, 0], torch.ones(5))
    assert (scores[0, 0, :, 1:] == 0).all()


def test_what_ends_within_a_block_or_cannot_be_copied_is_declined():
    inputs = make(0, 100, 100)
    rows, columns = inputs["rows"], inputs["columns"]

    def reason(rows=rows, columns=columns, sub_blocks=(2, 4), k_len=100, is_fine=False):
        return hopper_scores.obstacle(rows, columns, sub_blocks, (64, 64), k_len, is_fine=is_fine)

    assert reason() is None
    assert reason(columns=columns.clone()) == "key_features end within a block of 16 sub-blocks"
    assert reason(columns=columns[:, :, :16].clone()) is None
    reason_of_fine_keys = reason(columns=columns[:, :, :16].clone(), sub_blocks=(2, 2), k_len=32)
    assert reason_of_fine_keys == "key_features end within a block of 32 sub-blocks"
    assert reason(is_fine=True) == "padding or documents"
    assert reason(sub_blocks=(2, 1)) == "32 and 64 sub-blocks per block"
    assert reason(sub_blocks=(2, 5)) == "blocks are no whole number of sub-blocks"
    assert reason(k_len=1 << 25) == f"maxima of {1 << 19} key blocks"
    assert reason(rows=rows[..., :40]) == "gate dim 40"
    assert reason(rows=rows.float()) == "dtype torch.float32"
    assert "contiguous" in reason(rows=rows.transpose(2, 3).contiguous().transpose(2, 3))
