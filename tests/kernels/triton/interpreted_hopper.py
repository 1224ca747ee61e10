"""The Hopper engine on a played multiprocessor; started by ``test_interpreted.py``."""

# ruff: noqa: E402

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[3] / "benchmarks")]

from interpreter import patch_interpreter

patch_interpreter()

from gluon_language import PlayedKernel
from kernels_cases import BF16, FP16, Draw, attention_inputs
from kernels_checks import _read_mask

from seer_compile.kernels import reference
from seer_compile.kernels.triton import (
    hopper_attention,
    hopper_launch,
    hopper_steps,
    hopper_tiles,
    hopper_turns,
    hopper_warps,
)
from seer_compile.kernels.triton.hopper_plan import plan, tile_rules
from seer_compile.kernels.triton.primitives import launching_on, make_band
from seer_compile.kernels.triton.tuning import HopperTiling
from seer_compile.result_layout import empty_like_query
from seer_compile.types import BlockSelection, Visibility
from support.assertions import assert_no_worse_than_eager

MODULES = (hopper_tiles, hopper_turns, hopper_steps, hopper_warps, hopper_launch, hopper_attention)
KERNEL = hopper_attention._hopper_attention

ORDERS = int(os.environ.get("SEER_EVENT_ORDERS", "2"))
"""Orders of events per case; each is one seed of the machine."""

SHARED_ROWS = HopperTiling(2, 1, 2, 3, True, 1, 168)
SHARED_HEADS = HopperTiling(2, 2, 2, 3, True, 1, 168)
ONE_GROUP = HopperTiling(1, 1, 1, 3, True, 2, 128)
WIDE_HEADS = HopperTiling(2, 2, 1, 2, False, 1, 168)
ONE_OF_128 = HopperTiling(1, 1, 1, 3, False, 2, 128)
ONE_SLOT = HopperTiling(2, 2, 1, 1, True, 1, 168)


@pytest.fixture
def play(monkeypatch):
    """Return a function that runs one call on the played machine, with a seed for its events."""
    monkeypatch.setattr(hopper_attention, "multiprocessors", lambda device: 2)
    monkeypatch.setattr(hopper_attention, "launching_on", lambda *_: contextlib.nullcontext())

    def run(inputs, tiling, seed):
        kernel = PlayedKernel(KERNEL, MODULES, seed)
        monkeypatch.setattr(hopper_attention, "_hopper_attention", kernel)
        return hopper_attention.launch(
            *(inputs[name] for name in ("query", "key", "value")),
            *inputs["selection"],
            inputs["scale"],
            *inputs["blocks"],
            **inputs["visibility"].as_arguments(),
            tiling=tiling,
        )

    return run


def profile(dtype, dim, blocks, heads, layout="heads first", longest=330, **rules):
    return {
        "dtype": dtype, "dims": (dim, dim), "blocks": blocks, "heads": heads, "layout": layout,
        "longest": longest, **rules,
    }  # fmt: skip


def expected(inputs, dtype):
    tensors = (inputs[name].to(dtype) for name in ("query", "key", "value"))
    rest = (inputs["selection"], inputs["scale"], *inputs["blocks"], inputs["visibility"])
    return reference.block_sparse_attention(*tensors, *rest)


def check(inputs, result):
    out, lse = result
    gold, gold_lse = expected(inputs, torch.float64)
    eager, _ = expected(inputs, inputs["query"].dtype)
    stride = empty_like_query(inputs["query"], inputs["value"]).stride()
    assert_no_worse_than_eager(out, eager, gold, name="out", stride=stride)
    assert torch.equal(lse == -torch.inf, gold_lse == -torch.inf)
    torch.testing.assert_close(lse.double(), gold_lse, rtol=1e-5, atol=1e-5)


CASES = {
    "shared rows": (profile(FP16, 64, (128, 64), (4, 2, 4)), SHARED_ROWS),
    "shared heads": (profile(FP16, 64, (64, 64), (4, 2, 2), "tokens first"), SHARED_HEADS),
    "one group": (profile(BF16, 64, (64, 64), (4, 2, 4), "fused"), ONE_GROUP),
    "wide": (profile(BF16, 256, (64, 128), (4, 2, 2), longest=200), WIDE_HEADS),
    "one slot": (profile(BF16, 64, (64, 64), (4, 1, 1)), ONE_SLOT),
    "one group of 128": (profile(BF16, 128, (64, 64), (4, 2, 4)), ONE_OF_128),
    "padding": (profile(FP16, 64, (64, 64), (4, 2, 2), padding=True), SHARED_HEADS),
    "documents": (profile(BF16, 64, (128, 128), (2, 2, 2), documents=True), SHARED_ROWS),
    "offset": (profile(FP16, 128, (128, 64), (2, 1, 2), offset=True), SHARED_ROWS),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", range(3))
def test_random_lengths_bands_and_lists(name, seed, play):
    settings, tiling = CASES[name]
    inputs = attention_inputs(settings, Draw(11, seed), "cpu", True)
    check(inputs, play(inputs, tiling, seed))


def long_inputs(name, seed, q_len=200, k_len=1000, **visibility):
    """Draw inputs with many tiles in each list, so that the rings turn several times."""
    settings, tiling = CASES[name]
    draw = Draw(12, seed)
    heads, kv_heads, selections = settings["heads"]
    query_block, key_block = settings["blocks"]
    dtype, dim, layout = settings["dtype"], settings["dims"][0], settings["layout"]
    shape = (1, selections, -(-q_len // query_block), -(-k_len // key_block))
    mask = draw.flags(*shape, share=0.8)
    counts = mask.sum(-1, dtype=torch.int32)
    indices = torch.argsort(~mask, dim=-1, stable=True).int()
    sizes = {"query": (heads, q_len), "key": (kv_heads, k_len), "value": (kv_heads, k_len)}
    tensors = {
        kind: draw.tokens(1, count, length, dim, dtype, layout)
        for kind, (count, length) in sizes.items()
    }
    band = {"upper": k_len - q_len, **visibility}
    return {
        **tensors, "scale": dim**-0.5, "blocks": settings["blocks"],
        "selection": BlockSelection(indices, counts), "visibility": Visibility(**band),
    }, tiling  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_every_order_of_events_gives_attention(name, play):
    inputs, tiling = long_inputs(name, 1)
    first = play(inputs, tiling, 0)
    check(inputs, first)
    # Sums are taken in the order of the lists whatever happens when.
    for seed in range(1, ORDERS):
        for ours, theirs in zip(first, play(inputs, tiling, 100 * seed), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("poison", [float("nan"), float("-inf")])
@pytest.mark.parametrize("name", ["shared rows", "shared heads", "one group", "wide", "one slot"])
def test_what_is_not_finite_spoils_exactly_its_readers(name, poison, play):
    inputs, tiling = long_inputs(name, 7, q_len=250, k_len=250, lower=-90)
    gold, gold_lse = expected(inputs, torch.float64)
    inputs["value"][:, :, 100, 3] = poison
    inputs["value"][:, :, 240:, -1] = poison
    inputs["key"][:, :, 200] = poison
    is_spoilt = torch.zeros(250, dtype=torch.bool)
    is_spoilt[[100, 200, *range(240, 250)]] = True
    is_reader = (_read_mask(inputs) & is_spoilt).any(-1)
    assert is_reader.any()
    assert not is_reader.all()
    for seed in range(ORDERS):
        out, lse = play(inputs, tiling, seed)
        assert torch.equal(~out.isfinite().all(-1), is_reader)
        # Tolerance of a 16-bit output; what leaks from a spoilt row would not be finite.
        torch.testing.assert_close(out[~is_reader].double(), gold[~is_reader], rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(
            lse[~is_reader].double(), gold_lse[~is_reader], rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("name", ["shared heads", "one group"])
def test_the_largest_finite_value_spoils_nothing(name, play):
    inputs, tiling = long_inputs(name, 7, q_len=250, k_len=250)
    inputs["value"][:, :, 230, 3] = torch.finfo(inputs["value"].dtype).max
    out, _ = play(inputs, tiling, 0)
    gold, _ = expected(inputs, torch.float64)
    assert out.isfinite().all()
    others = [column for column in range(out.shape[3]) if column != 3]
    torch.testing.assert_close(out[..., others].double(), gold[..., others], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(out[..., 3].double(), gold[..., 3], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("queries", [0, 3])
def test_nothing_to_read_gives_zeros(queries, play):
    inputs, tiling = long_inputs("shared heads", 1, q_len=64, k_len=128)
    inputs["query"] = inputs["query"][:, :, :queries]
    indices, counts = inputs["selection"]
    inputs["selection"] = (
        indices[:, :, : -(-queries // 64)],
        counts[:, :, : -(-queries // 64)] * 0,
    )
    out, lse = play(inputs, tiling, 0)
    assert out.shape == (1, 4, queries, 64)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


def test_a_negative_scale_turns_the_order_of_logits(play):
    inputs, tiling = long_inputs("one group", 3, q_len=70, k_len=300)
    check(inputs := {**inputs, "scale": -0.2}, play(inputs, tiling, 0))


def ragged_rules(name, q_len, k_len):
    """Return padding after some keys, or three documents, for the cases that are called so."""
    if name == "padding":
        return {"key_padding": (torch.arange(k_len) < k_len - 100)[None]}
    if name == "documents":
        query_documents, key_documents = (
            (torch.arange(length) * 3 // length)[None] for length in (q_len, k_len)
        )
        return {"query_documents": query_documents, "key_documents": key_documents}
    return {"lower": -300}


@pytest.mark.parametrize("name", ["shared rows", "documents", "padding", "one group"])
@pytest.mark.parametrize("lengths", [(500, 700), (640, 640), (770, 1000)])
def test_a_tile_is_masked_only_if_some_query_may_not_read_all_of_it(name, lengths):
    inputs, _ = long_inputs(name, 5, *lengths, **ragged_rules(name, *lengths))
    visibility, blocks = inputs["visibility"], inputs["blocks"]
    rules = visibility.as_arguments()
    band = make_band(rules["upper"], rules["lower"], rules["offset"])
    fine = [rules[kind] for kind in ("key_padding", "query_documents", "key_documents")]
    with launching_on(inputs["query"].float(), "query"):
        lists = plan(*inputs["selection"], band, tile_rules(*fine, blocks[0]), lengths, blocks)
    readable = reference.token_mask(visibility, *lengths, torch.device("cpu"))
    mask = _read_mask(inputs)
    batch, heads, rows = inputs["selection"].counts.shape
    assert lists.whole.any()
    for row in range(batch * heads * rows):
        b, head, block = row // rows // heads, row // rows % heads, row % rows
        queries = slice(block * blocks[0], min((block + 1) * blocks[0], lengths[0]))
        wanted = {"masked": [], "whole": []}
        for tile in range(-(-lengths[1] // 64)):
            keys = slice(tile * 64, (tile + 1) * 64)
            seen = readable.expand(batch, -1, -1, -1)[b, 0, queries, keys]
            per_selection = mask.shape[1] // heads
            if mask[b, head * per_selection, queries, keys].any():
                is_whole = seen.all() and seen.shape[1] == 64
                wanted["whole" if is_whole else "masked"].append(tile)
        masked, whole = int(lists.masked[row]), int(lists.whole[row])
        found = lists.tiles[row].tolist()
        # Nothing readable may stay in a list, and be masked: documents decide token by token.
        assert set(wanted["masked"]) <= set(found[:masked])
        assert found[lists.capacity - whole :][::-1] == wanted["whole"]
        assert not set(found[:masked]) & set(wanted["whole"])
