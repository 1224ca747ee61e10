"""``flex_attention``: sparse where its block mask is made in the graph, and what must stop it."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from seer_compile.types import SkipCode
from support.graphs import G, qkv
from support.mask_oracle import check_all, inspect
from support.rewriting import answer_sparsely, new_store, rewrite

TOKENS, DIM = 200, 16
LENGTHS = torch.tensor([200, 130])
DOCUMENTS = torch.arange(TOKENS).expand(2, TOKENS) // torch.tensor([[70], [45]])


def inputs(**changes):
    return qkv(**({"tokens": TOKENS, "dim": DIM} | changes))


def blocks(mask, q, k, batch=None, **options):
    return create_block_mask(mask, batch, None, q.shape[2], k.shape[2], device="cpu", **options)


def causal(b, h, i, j):
    return i >= j


def window(b, h, i, j):
    return (i >= j) & (i - j < 50)


def within(documents):
    return lambda b, h, i, j: (documents[b, i] == documents[b, j]) & (i >= j)


def attend_causally(q, k, v):
    return flex_attention(q, k, v, block_mask=blocks(causal, q, k), enable_gqa=True)


def attend_in_a_window(q, k, v):
    return flex_attention(q, k, v, block_mask=blocks(window, q, k), scale=0.5)


def attend_by_small_blocks(q, k, v):
    return flex_attention(q, k, v, block_mask=blocks(causal, q, k, BLOCK_SIZE=(32, 64)))


def attend_within_documents(q, k, v, documents):
    return flex_attention(q, k, v, block_mask=blocks(within(documents), q, k, batch=q.shape[0]))


def attend_to_present_keys(q, k, v, lengths):
    def present(b, h, i, j):
        return j < lengths[b]

    return flex_attention(q, k, v, block_mask=blocks(present, q, k, batch=q.shape[0]))


def attend_to_keys_marked(q, k, v, documents):
    marks = documents < 3
    mask = blocks(lambda b, h, i, j: marks[b, j] & (i >= j), q, k, batch=q.shape[0])
    return flex_attention(q, k, v, block_mask=mask)


def bounded(q, k, v):
    def cap(score, b, h, i, j):
        return 5.0 * torch.tanh(score / 2.0)

    return flex_attention(q, k, v, cap, block_mask=blocks(causal, q, k))


def scaled(q, k, v):
    return flex_attention(q, k, v, lambda score, b, h, i, j: score * 0.25)


def score_and_mask_are_absent(q, k, v):
    return flex_attention(q, k, v)


PROVED = {
    attend_causally: ("causal", {"kv_heads": G}, ()),
    attend_in_a_window: ("causal + window(50)", {}, ()),
    attend_by_small_blocks: ("causal", {}, ()),
    attend_within_documents: ("causal + same document", {}, (DOCUMENTS,)),
    attend_to_present_keys: ("key padding", {}, (LENGTHS,)),
    attend_to_keys_marked: ("causal + key padding", {}, (DOCUMENTS,)),
    bounded: ("causal", {}, ()),
    scaled: ("full", {"keys": 90}, ()),
    score_and_mask_are_absent: ("full", {"heads": 1}, ()),
}


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("attend", PROVED, ids=lambda case: case.__name__)
def test_block_masks_made_in_the_graph_are_proved(attend, dynamic):
    visibility, shape, more = PROVED[attend]
    arguments = (*inputs(**shape), *more)
    inspected = inspect(attend, *arguments, dynamic=dynamic)
    assert inspected.verdicts == [visibility]
    assert check_all(inspected) == 1
    captured = inspect(attend, *arguments, dynamic=dynamic).captured
    result = rewrite(captured, store := new_store())
    answer_sparsely(store)
    assert result.rewritten == ("<root>",)
    targets = [str(node.target) for node in result.graph_module.graph.nodes]
    assert not any("flex" in target or "argsort" in target for target in targets)
    given = [each if isinstance(each, torch.Tensor) else int(each) for each in captured.inputs]
    expected = torch.compile(attend, backend="eager")(*arguments)
    torch.testing.assert_close(result.graph_module(*given)[0], expected)


# --- what must stay as it is --------------------------------------------------------------------


OUTSIDE = create_block_mask(causal, None, None, TOKENS, TOKENS, device="cpu")


def blocks_from_outside(q, k, v):
    return flex_attention(q, k, v, block_mask=OUTSIDE)


def another_mask_function(q, k, v):
    mask = blocks(causal, q, k)
    mask.mask_mod = window
    return flex_attention(q, k, v, block_mask=mask)


def _rebuilt(mask, function=causal, **changes):
    names = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
    lists = {name: getattr(mask, name) for name in names} | changes
    size = lists.pop("BLOCK_SIZE", mask.BLOCK_SIZE)
    return BlockMask.from_kv_blocks(
        **lists, BLOCK_SIZE=size, mask_mod=function, seq_lengths=mask.seq_lengths
    )


def fewer_blocks_than_the_mask_has(q, k, v):
    mask = blocks(causal, q, k)
    fewer = mask.kv_num_blocks.clamp(max=1)
    return flex_attention(q, k, v, block_mask=_rebuilt(mask, kv_num_blocks=fewer))


def blocks_in_reverse(q, k, v):
    mask = blocks(causal, q, k)
    return flex_attention(q, k, v, block_mask=_rebuilt(mask, kv_indices=mask.kv_indices.flip(-1)))


def full_blocks_of_another_mask(q, k, v):
    mask, other = blocks(causal, q, k), blocks(window, q, k)
    changes = {
        "full_kv_num_blocks": other.full_kv_num_blocks,
        "full_kv_indices": other.full_kv_indices,
    }
    return flex_attention(q, k, v, block_mask=_rebuilt(mask, **changes))


def partial_blocks_alone(q, k, v):
    changes = {"full_kv_num_blocks": None, "full_kv_indices": None}
    return flex_attention(q, k, v, block_mask=_rebuilt(blocks(causal, q, k), **changes))


def blocks_of_another_size(q, k, v):
    mask = _rebuilt(blocks(causal, q, k, BLOCK_SIZE=64), BLOCK_SIZE=(64, 32))
    return flex_attention(q, k, v, block_mask=mask)


def whole_blocks_of_a_band(q, k, v):
    def everything(b, h, i, j):
        return i >= 0

    return flex_attention(q, k, v, block_mask=_rebuilt(blocks(causal, q, k), everything))


def score_moved_by_a_distance(q, k, v):
    def nearer(score, b, h, i, j):
        return score - (i - j).abs() * 0.1

    return flex_attention(q, k, v, nearer, block_mask=blocks(causal, q, k))


def score_shifted(q, k, v):
    def shifted(score, b, h, i, j):
        return 5.0 * torch.tanh(score / 5.0 + 1.0)

    return flex_attention(q, k, v, shifted)


def score_bounded_twice(q, k, v):
    return flex_attention(q, k, v, lambda score, b, h, i, j: torch.tanh(torch.tanh(score)))


def score_rounded(q, k, v):
    def rounded(score, b, h, i, j):
        return torch.div(score, 0.5, rounding_mode="floor")

    return flex_attention(q, k, v, rounded)


def score_moved_in_place(q, k, v):
    def moved(score, b, h, i, j):
        doubled = score * 2
        doubled.view(1).add_(1)
        return torch.tanh(doubled)

    return flex_attention(q, k, v, moved)


def score_divided_by_nothing(q, k, v):
    return flex_attention(q, k, v, lambda score, b, h, i, j: torch.tanh(score / 0) * 2)


def score_per_head(q, k, v, slopes):
    return flex_attention(q, k, v, lambda score, b, h, i, j: score * slopes[h])


def sums_are_returned(q, k, v):
    result, sums = flex_attention(q, k, v, block_mask=blocks(causal, q, k), return_lse=True)
    return result + sums[..., None]


def documents_change_behind_the_mask(q, k, v, documents):
    mask = blocks(within(documents), q, k, batch=q.shape[0])
    documents[:, 60:].zero_()
    return flex_attention(q, k, v, block_mask=mask)


def documents_of_one_row_for_all(q, k, v, documents):
    return flex_attention(q, k, v, block_mask=blocks(within(documents), q, k))


def mask_per_head(q, k, v):
    def wider(b, h, i, j):
        return (i >= j) & (i - j < 10 * (h + 1))

    mask = create_block_mask(wider, None, q.shape[1], q.shape[2], k.shape[2], device="cpu")
    return flex_attention(q, k, v, block_mask=mask)


def every_second_key(q, k, v):
    return flex_attention(q, k, v, block_mask=blocks(lambda b, h, i, j: (i - j) % 2 == 0, q, k))


FLEX, OPAQUE = SkipCode.FLEX, SkipCode.OPAQUE_MASK
LEFT_ALONE = {
    blocks_from_outside: (FLEX, ()),
    another_mask_function: (OPAQUE, ()),
    fewer_blocks_than_the_mask_has: (FLEX, ()),
    blocks_in_reverse: (FLEX, ()),
    full_blocks_of_another_mask: (FLEX, ()),
    partial_blocks_alone: (FLEX, ()),
    blocks_of_another_size: (FLEX, ()),
    whole_blocks_of_a_band: (OPAQUE, ()),
    score_moved_by_a_distance: (FLEX, ()),
    score_shifted: (FLEX, ()),
    score_bounded_twice: (FLEX, ()),
    score_rounded: (FLEX, ()),
    score_moved_in_place: (FLEX, ()),
    score_divided_by_nothing: (FLEX, ()),
    score_per_head: (FLEX, (torch.ones(4),)),
    sums_are_returned: (FLEX, ()),
    documents_change_behind_the_mask: (SkipCode.MUTATION, (DOCUMENTS,)),
    documents_of_one_row_for_all: (OPAQUE, (DOCUMENTS,)),
    mask_per_head: (OPAQUE, ()),
    every_second_key: (OPAQUE, ()),
}


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("attend", LEFT_ALONE, ids=lambda case: case.__name__)
def test_other_block_masks_and_scores_stay(attend, dynamic):
    code, more = LEFT_ALONE[attend]
    inspected = inspect(attend, *inputs(), *(each.clone() for each in more), dynamic=dynamic)
    assert [site.kind for site in inspected.sites] == ["flex"]
    assert inspected.verdicts == [code]
    assert rewrite(inspected.captured, new_store()).rewritten == ()
