"""Baselines against brute force, and density matching."""

import math

import pytest
import torch
import torch.nn.functional as F

from seer_compile.calibration.baselines import BASELINES, xattention
from seer_compile.calibration.matching import (
    attend,
    match_density,
    select,
    selection_mask,
)
from seer_compile.errors import RangeError
from seer_compile.types import BlockSize, SiteInputs, Visibility
from support import inputs

SIZE = BlockSize(query=16, key=16)
CAUSAL = Visibility(upper=0)


def site(visibility=CAUSAL, **kwargs):
    kwargs = {"heads": 4, "kv_heads": 2, "q_len": 100, "head_dim": 16, "sharpness": 2.0} | kwargs
    tensors = inputs.attention_inputs(**kwargs)
    return SiteInputs(
        name="site",
        query=tensors.query,
        key=tensors.key,
        value=tensors.value,
        scale=tensors.scale,
        visibility=visibility,
    )


def token_mask(item):
    """Return ``Bool[b 1 q k]`` by the definition of visibility, band and padding."""
    q_len, k_len = item.query.shape[2], item.key.shape[2]
    offset = 0 if item.visibility.offset is None else int(item.visibility.offset)
    distance = torch.arange(k_len)[None] - torch.arange(q_len)[:, None]
    mask = torch.ones(item.query.shape[0], 1, q_len, k_len, dtype=torch.bool)
    if item.visibility.upper is not None:
        mask &= distance <= item.visibility.upper + offset
    if item.visibility.lower is not None:
        mask &= distance >= item.visibility.lower + offset
    if item.visibility.key_padding is not None:
        mask &= item.visibility.key_padding[:, None, None]
    return mask


def expanded_keys(item):
    return item.key.repeat_interleave(item.query.shape[1] // item.key.shape[1], dim=1)


def probabilities(item):
    """Return ``Float64[b h q k]``, rows that read nothing all zeros."""
    logits = item.query.double() @ expanded_keys(item).double().transpose(-1, -2) * item.scale
    return logits.masked_fill(~token_mask(item), -math.inf).softmax(-1).nan_to_num(0.0)


def cells(values, row_unit, column_unit, fill=0.0):
    """Return ``[..., rows, columns, row_unit, column_unit]``, the rest filled."""
    pad = (0, -values.shape[-1] % column_unit, 0, -values.shape[-2] % row_unit)
    values = F.pad(values, pad, value=fill)
    values = values.unflatten(-1, (-1, column_unit)).unflatten(-3, (-1, row_unit))
    return values.transpose(-3, -2)


def block_visible(item, size=SIZE):
    return cells(token_mask(item).double(), size.query, size.key).amax((-1, -2)) > 0


def oracle_truth(item):
    return cells(probabilities(item), SIZE.query, SIZE.key).sum(-1).amax(-1)


def oracle_mean_truth(item):
    mass = cells(probabilities(item), SIZE.query, SIZE.key).sum((-1, -2))
    rows = cells(torch.ones(item.query.shape[2], 1).double(), SIZE.query, 1).sum((-1, -2))
    return mass / rows


def oracle_max_truth(item):
    return cells(probabilities(item), SIZE.query, SIZE.key).amax((-1, -2))


def quest_truth(item):
    key = expanded_keys(item).double()
    low = cells(key, SIZE.key, key.shape[-1], fill=math.inf).squeeze(-3).amin(-2)
    high = cells(key, SIZE.key, key.shape[-1], fill=-math.inf).squeeze(-3).amax(-2)
    query = item.query.double()[..., None, :]
    bound = torch.maximum(query * low[:, :, None], query * high[:, :, None]).sum(-1) * item.scale
    visible = block_visible(item).repeat_interleave(SIZE.query, 2)[:, :, : bound.shape[2]]
    shares = bound.masked_fill(~visible, -math.inf).softmax(-1)
    return cells(shares, SIZE.query, 1).amax((-1, -2))


def mean_pool_truth(item):
    def means(tensor, unit):
        total = cells(tensor.double(), unit, tensor.shape[-1]).squeeze(-3).sum(-2)
        ones = torch.ones(tensor.shape[-2], 1).double()
        return total / cells(ones, unit, 1).sum((-1, -2, -3))[:, None]

    logits = means(item.query, SIZE.query) @ means(expanded_keys(item), SIZE.key).transpose(-1, -2)
    return (logits * item.scale).masked_fill(~block_visible(item), -math.inf).softmax(-1)


def xattention_truth(item, stride=8):
    """Sum logits along antidiagonals one pair of tokens at a time."""
    logits = item.query.double() @ expanded_keys(item).double().transpose(-1, -2) * item.scale
    tiles = cells(logits, stride, stride)
    strided = sum(tiles[..., stride - 1 - step, step] for step in range(stride)) / stride
    visible = block_visible(item, BlockSizeOf(stride))
    shares = strided.masked_fill(~visible, -math.inf).softmax(-1).nan_to_num(0.0)
    return cells(shares, SIZE.query // stride, SIZE.key // stride).sum((-1, -2))


class BlockSizeOf:
    """A block size that :class:`BlockSize` does not allow, for strides."""

    def __init__(self, unit):
        self.query = self.key = unit


TRUTHS = {
    "oracle": oracle_truth,
    "oracle_mean": oracle_mean_truth,
    "oracle_max": oracle_max_truth,
    "quest": quest_truth,
    "mean_pool": mean_pool_truth,
    "xattention": xattention_truth,
}


@pytest.mark.parametrize("name", TRUTHS)
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"q_len": 96, "batch": 2},
        {"q_len": 49, "k_len": 97, "visibility": Visibility(upper=48)},
        {"visibility": Visibility(upper=0, lower=-39)},
        {"visibility": Visibility()},
    ],
    ids=["ragged", "even", "chunk", "window", "bidirectional"],
)
def test_scores_equal_brute_force(name, case):
    item = site(**case)
    scores = BASELINES[name].score(item, SIZE)
    expected = TRUTHS[name](item) * block_visible(item)
    assert scores.dtype is torch.float32
    torch.testing.assert_close(scores.double(), expected, rtol=1e-4, atol=1e-5)


def test_vertical_slash_finds_a_column_and_a_diagonal():
    # One key that every query wants, and each query wanting the key 40 tokens back.
    length, dim = 256, 64
    generator = inputs.generator(0)
    identity = F.normalize(torch.randn(length, dim, generator=generator), dim=-1)
    query, key = identity.clone(), identity.clone()
    query[40:] = identity[:-40]
    column = F.normalize(torch.randn(dim, generator=generator), dim=0)
    query = 30 * query + 30 * column
    key[70] = column
    item = SiteInputs(
        name="site",
        query=query[None, None],
        key=key[None, None],
        value=key[None, None],
        scale=1.0,
        visibility=CAUSAL,
    )
    scores = BASELINES["vertical_slash"].score(item, SIZE)[0, 0]
    for row in range(8, 16):
        best = set(scores[row].topk(3).indices.tolist())
        # 40 tokens are two and a half blocks: the diagonal crosses two lines of blocks.
        assert best == {70 // 16, row - 2, row - 3}


def test_vertical_slash_places_queries_behind_a_cache():
    whole = site(q_len=128)
    chunk = SiteInputs(
        name="site",
        query=whole.query[:, :, 64:],
        key=whole.key,
        value=whole.value,
        scale=whole.scale,
        visibility=Visibility(upper=64),
    )
    score = BASELINES["vertical_slash"].score
    torch.testing.assert_close(score(chunk, SIZE), score(whole, SIZE)[:, :, 4:])


def test_sink_local_ranks_the_first_block_then_the_nearest():
    item = site(q_len=128)
    scores = BASELINES["sink_local"].score(item, SIZE)
    assert scores.shape == (1, 4, 8, 8)
    assert scores[0, 0, 6].argsort(descending=True).tolist()[:7] == [0, 6, 5, 4, 3, 2, 1]
    assert scores[0, 0, 6, 7] == 0


@pytest.mark.parametrize("name", BASELINES)
def test_hidden_and_padded_blocks_score_zero(name):
    padding = inputs.key_padding([128, 60], 128)
    item = site(batch=2, q_len=128, visibility=Visibility(upper=0, key_padding=padding))
    scores = BASELINES[name].score(item, SIZE)
    visible = block_visible(item).expand_as(scores)
    assert scores.isfinite().all()
    assert (scores >= 0).all()
    assert not scores[~visible].any()
    assert scores[visible].any()


@pytest.mark.parametrize("name", ["quest", "xattention", "xattention16"])
def test_scores_do_not_depend_on_the_size_of_a_piece(name, monkeypatch):
    item = site(q_len=200)
    whole = BASELINES[name].score(item, SIZE)
    monkeypatch.setattr("seer_compile.calibration.baselines._PIECE_BYTES", 1)
    torch.testing.assert_close(BASELINES[name].score(item, SIZE), whole)


def test_stride_must_divide_the_block():
    with pytest.raises(RangeError):
        xattention(site(), SIZE, stride=12)


@pytest.mark.parametrize("selector", ["top_p", "fraction"])
@pytest.mark.parametrize("density", [0.3, 0.5, 0.9])
def test_matched_density_is_the_one_that_was_asked(selector, density):
    item = site(q_len=512)
    scores = BASELINES["oracle"].score(item, SIZE)
    matched = match_density(scores, item, SIZE, selector=selector, density=density)
    assert matched.visible == 4 * 32 * 33 // 2
    assert matched.kept == selection_mask(matched.selection, scores.shape[-1]).sum()
    # A fixed share changes whole rows at a time.
    tolerance = 1 if selector == "top_p" else 4 * 32
    assert abs(matched.kept - density * matched.visible) <= tolerance


@pytest.mark.parametrize("density", [0.3, 0.6])
def test_matched_mass_selects_what_the_operator_selects(density):
    item = site(q_len=512, sharpness=3.0)
    scores = BASELINES["oracle_mean"].score(item, SIZE)
    matched = match_density(scores, item, SIZE, selector="top_p", density=density)
    again = select(scores, item, SIZE, "top_p", matched.budget - 1e-12)
    expected = selection_mask(again, scores.shape[-1])
    differs = (selection_mask(matched.selection, scores.shape[-1]) != expected).sum()
    # The block at which the threshold stands may fall on either side of it.
    assert differs <= 1


def test_density_is_matched_where_one_block_carries_nearly_everything():
    item = site(q_len=512)
    sharp = BASELINES["oracle_mean"].score(item, SIZE).double() ** 12
    scores = (sharp / sharp.sum(-1, keepdim=True)).float()
    assert (scores.double().sort(dim=-1).values[..., :-8].sum(-1) < 1e-10).any()
    matched = match_density(scores, item, SIZE, selector="top_p", density=0.6)
    assert abs(matched.kept - 0.6 * matched.visible) <= 1


def test_blocks_of_equal_scores_are_kept_together():
    item = site(q_len=128)
    scores = torch.full((1, 4, 8, 8), 0.125).tril()
    for density in (0.3, 0.7):
        matched = match_density(scores, item, SIZE, selector="top_p", density=density)
        per_head = matched.selection.counts.unique(dim=1)
        assert per_head.shape[1] == 1
        assert matched.kept == selection_mask(matched.selection, scores.shape[-1]).sum()


def test_unreachable_density_gives_the_nearest():
    item = site(q_len=256)
    scores = BASELINES["oracle"].score(item, SIZE)
    least = select(scores, item, SIZE, "top_p", 0.0).counts.sum()
    matched = match_density(scores, item, SIZE, selector="top_p", density=1e-3)
    assert matched.kept == least
    full = match_density(scores, item, SIZE, selector="top_p", density=1.0)
    assert full.kept == full.visible


def test_full_density_reproduces_dense_attention():
    item = site(q_len=150)
    scores = BASELINES["mean_pool"].score(item, SIZE)
    matched = match_density(scores, item, SIZE, selector="fraction", density=1.0)
    expected = probabilities(item) @ item.value.double().repeat_interleave(2, dim=1)
    torch.testing.assert_close(
        attend(item, matched.selection, SIZE).double(), expected, rtol=1e-4, atol=1e-5
    )


def test_oracle_keeps_more_mass_than_any_other_at_the_same_density():
    item = site(q_len=512, sharpness=4.0)
    truth = cells(probabilities(item), SIZE.query, SIZE.key).sum((-1, -2))
    kept = {}
    for name, baseline in BASELINES.items():
        matched = match_density(
            baseline.score(item, SIZE), item, SIZE, selector="fraction", density=0.3
        )
        chosen = torch.zeros_like(truth, dtype=torch.bool)
        for place in torch.cartesian_prod(*(torch.arange(n) for n in truth.shape[:3])):
            row = tuple(place.tolist())
            count = int(matched.selection.counts[row])
            chosen[row][matched.selection.indices[row][:count].long()] = True
        kept[name] = truth[chosen].sum().item()
    assert max(kept, key=kept.__getitem__) == "oracle_mean"
    assert kept["oracle"] > max(kept["sink_local"], kept["mean_pool"])
