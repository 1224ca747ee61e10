"""Selection on the CPU: equal to the oracle, deterministic, no row empty."""

import math
import random

import pytest
import torch

from seer_compile.kernels import ops, reference, selection
from seer_compile.types import BlockSelection, BlockSize, Visibility
from support.inputs import generator, key_padding
from support.kernel_cases import LENGTHS, random_visibility

SELECTORS = {
    "top_p": (0.0, 0.3, 0.9, 0.999, 1.0),
    "fraction": (0.1, 0.3, 0.5, 1.0),
    "top_k": (1.0, 2.0, 5.0, 100.0),
    "threshold": (0.5, 1.0, 3.0),
}


def select(scores, budget, selector, visibility, *, blocks=(16, 16), lengths=None):
    """Select with the operator; lengths default to whole blocks."""
    rows, columns = scores.shape[2:]
    lengths = lengths or (rows * blocks[0], columns * blocks[1])
    budget = torch.full((scores.shape[1],), float(budget))
    readable = visibility.as_arguments().values()
    return BlockSelection(
        *torch.ops.seer_compile.select_blocks.v1(
            scores, budget, selector, *blocks, *lengths, *readable
        )
    )


def random_scores(seed, batch, heads, rows, columns, *, kind):
    draws = torch.rand(batch, heads, rows, columns, generator=generator(seed))
    if kind == "ties":
        return (draws * 4).floor() / 4
    if kind == "peaked":
        return draws**12
    return draws if kind == "flat" else torch.zeros_like(draws)


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("seed", range(25))
def test_selection_is_that_of_the_reference(selector, seed):
    rng = random.Random(seed)
    q_len, k_len = rng.choice(LENGTHS), rng.choice(LENGTHS)
    blocks = rng.choice((16, 32)), rng.choice((16, 32))
    visibility = random_visibility(rng, 2, q_len, k_len)
    kind = rng.choice(("ties", "peaked", "flat", "zero"))
    scores = random_scores(seed, 2, 2, -(-q_len // blocks[0]), -(-k_len // blocks[1]), kind=kind)
    visible = reference.blocks_any(reference.band_mask(visibility, q_len, k_len), *blocks)
    scores = scores.masked_fill(~visible, 0.0)
    budget = rng.choice(SELECTORS[selector])
    got = select(scores, budget, selector, visibility, blocks=blocks, lengths=(q_len, k_len))
    expected = reference.select_blocks(
        scores, torch.full((2,), budget), selector, *blocks, q_len, k_len, visibility
    )
    assert torch.equal(got.counts, expected.counts)
    for row, wanted, count in zip(
        got.indices.flatten(0, 2),
        expected.indices.flatten(0, 2),
        got.counts.flatten().tolist(),
        strict=True,
    ):
        assert row[:count].tolist() == wanted[:count].tolist()
    assert torch.equal(got.counts > 0, visible.any(-1).expand_as(got.counts))


@pytest.mark.parametrize("selector", SELECTORS)
def test_diagonal_sink_and_best_are_kept_by_every_selector(selector):
    scores = random_scores(1, 1, 2, 8, 8, kind="flat").tril()
    kept = select(scores, 1e-6, selector, Visibility(upper=0))
    mask = reference.selection_mask(kept, 8)
    best = scores.argmax(-1)
    for row in range(8):
        assert mask[..., row, 0].all()
        assert mask[..., row, row].all()
    assert mask.gather(-1, best[..., None]).all()


@pytest.mark.parametrize("p", [0.2, 0.5, 0.8, 0.95])
def test_top_p_keeps_the_fewest_that_reach_the_mass(p):
    scores = random_scores(7, 1, 3, 20, 40, kind="peaked")
    visibility = Visibility(upper=20 * 16)
    mask = reference.selection_mask(select(scores, p, "top_p", visibility), 40)
    visible = reference.blocks_any(reference.band_mask(visibility, 320, 640), 16, 16)
    scores = scores.masked_fill(~visible, 0.0).double()
    total, kept = scores.sum(-1), (scores * mask).sum(-1)
    assert (kept >= p * total - 1e-12).all()
    # Without the lowest block that was not forced, the mass is missed.
    forced = torch.zeros_like(mask)
    forced[..., 0] = True
    forced |= torch.arange(40) == (torch.arange(20)[:, None] + 20)
    forced.scatter_(-1, scores.argmax(-1, keepdim=True), True)
    free = mask & ~forced
    lowest = scores.masked_fill(~free, math.inf).amin(-1)
    has_free = free.any(-1)
    assert has_free.any()
    assert (kept - lowest < p * total)[has_free].all()


def test_full_budgets_keep_every_visible_block():
    visibility = Visibility(upper=0, lower=-100)
    scores = random_scores(3, 1, 1, 12, 12, kind="zero")
    visible = reference.blocks_any(reference.band_mask(visibility, 192, 192), 16, 16)
    for selector, budget in (("top_p", 1.0), ("fraction", 1.0), ("top_k", 12)):
        mask = reference.selection_mask(select(scores, budget, selector, visibility), 12)
        assert torch.equal(mask[0, 0], visible), selector


def test_fraction_rounds_up_and_does_not_stumble_over_binary_tenths():
    scores = random_scores(4, 1, 1, 1, 100, kind="flat")
    for percent in range(1, 101):
        kept = select(scores, percent / 100, "fraction", Visibility(), lengths=(16, 1600))
        # Sink and best are forced.
        assert int(kept.counts) == max(percent, 2)
    kept = select(scores[..., :9], 0.5, "fraction", Visibility(), lengths=(16, 144))
    assert int(kept.counts) == 5


def test_shares_next_to_one_are_told_apart_in_float64():
    # Ten blocks hold a billionth each beside one that holds the rest.
    scores = torch.full((1, 1, 1, 12), 1e-9)
    scores[..., 6] = 1.0
    kept = []
    for missing in (0.0, 2.5e-9, 6.5e-9, 1e-6):
        budget = torch.tensor([1.0 - missing], dtype=torch.float64)
        distinct = scores + torch.arange(12) * 1e-11
        _, counts = torch.ops.seer_compile.select_blocks.v1(
            distinct, budget, "top_p", 16, 16, 16, 192
        )
        kept.append(int(counts))
    assert kept == [12, 10, 6, 2]


def test_budgets_apply_per_head():
    scores = random_scores(5, 1, 2, 1, 50, kind="flat")
    indices, counts = torch.ops.seer_compile.select_blocks.v1(
        scores, torch.tensor([3.0, 30.0]), "top_k", 16, 16, 16, 800
    )
    assert counts.flatten().tolist() == [3, 30]
    assert indices.dtype is torch.int32


def test_padding_moves_the_sink_of_each_batch_item():
    scores = torch.zeros(3, 1, 1, 6)
    padding = key_padding([96, 40, 1], 96)
    kept = select(scores, 1.0, "top_k", Visibility(upper=80, key_padding=padding))
    mask = reference.selection_mask(kept, 6)[:, 0, 0]
    # Item 0: sink 0; item 1: 56 keys of padding, sink 3, best of equal scores 0; item 2: sink 5.
    assert mask.int().tolist() == [
        [1, 0, 0, 0, 0, 1],
        [1, 0, 0, 1, 0, 1],
        [1, 0, 0, 0, 0, 1],
    ]


def test_ties_go_to_the_lower_index():
    scores = torch.full((1, 1, 1, 10), 0.5)
    kept = select(scores, 4.0, "top_k", Visibility(), lengths=(16, 160))
    assert kept.indices[0, 0, 0, :4].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("selector", SELECTORS)
def test_rows_with_nan_keep_what_cannot_be_judged_and_leave_others_alone(selector):
    scores = random_scores(6, 1, 1, 10, 10, kind="flat").tril()
    broken = scores.clone()
    broken[0, 0, 6, 3] = math.nan
    budget = {"top_k": 4.0, "threshold": 1.0}.get(selector, 0.4)
    clean = select(scores, budget, selector, Visibility(upper=0))
    got = select(broken, budget, selector, Visibility(upper=0))
    mask = reference.selection_mask(got, 10)[0, 0]
    assert mask[6, 3]
    others = [row for row in range(10) if row != 6]
    assert torch.equal(mask[others], reference.selection_mask(clean, 10)[0, 0][others])
    if selector in ("top_p", "threshold"):
        assert mask[6, :7].all()


def test_selection_is_the_same_however_rows_are_streamed(monkeypatch):
    scores = random_scores(8, 2, 3, 30, 30, kind="peaked")
    for selector, budget in (("top_p", 0.7), ("fraction", 0.3)):
        whole = select(scores, budget, selector, Visibility(upper=0))
        monkeypatch.setattr(selection, "_SLAB_ELEMENTS", 1)
        streamed = select(scores, budget, selector, Visibility(upper=0))
        monkeypatch.undo()
        assert torch.equal(whole.counts, streamed.counts)
        assert torch.equal(whole.indices, streamed.indices)


@pytest.mark.parametrize("selector", ["top_k", "fraction", "top_p"])
def test_an_infinite_budget_keeps_every_block(selector):
    kept = ops.select_blocks(
        torch.rand(1, 2, 8, 8, generator=torch.Generator().manual_seed(0)),
        budget=torch.full((2,), torch.inf),
        selector=selector,
        block_size=BlockSize(query=16, key=16),
        q_len=128,
        k_len=128,
        visibility=Visibility(upper=0),
    )
    assert kept.counts.tolist() == [2 * [list(range(1, 9))]]


@pytest.mark.parametrize("lengths", [(0, 64), (64, 0), (0, 0)])
def test_nothing_to_select_is_an_empty_selection(lengths):
    blocks = BlockSize(query=16, key=16)
    kept = ops.select_blocks(
        torch.zeros(1, 1, lengths[0] // 16, lengths[1] // 16),
        budget=torch.ones(1),
        selector="top_p",
        block_size=blocks,
        q_len=lengths[0],
        k_len=lengths[1],
    )
    assert kept.counts.sum() == 0
    assert kept.indices.shape == (1, 1, lengths[0] // 16, lengths[1] // 16)
