"""The oracles against hand-worked numbers and against PyTorch itself."""

import math

import pytest
import torch
import torch.nn.functional as F

from seer_compile.kernels import reference
from seer_compile.types import BlockSelection, BlockSize, Visibility
from support.inputs import attention_inputs, key_padding, selection_from_map
from support.kernel_cases import full_selection, random_case

CAUSAL = Visibility(upper=0)


def select_row(scores, selector, budget, visibility=None, keys=16):
    """Select one row of blocks of 16 keys; the query block is 16 tokens at the end."""
    tensor = torch.tensor([[[scores]]], dtype=torch.float32)
    selection = reference.select_blocks(
        tensor,
        torch.tensor([budget]),
        selector,
        16,
        keys,
        16,
        keys * len(scores),
        visibility or Visibility(upper=keys * len(scores) - 16),
    )
    return selection.indices[0, 0, 0, : selection.counts[0, 0, 0]].tolist()


def test_token_mask_is_the_intersection_of_band_padding_and_documents():
    visibility = Visibility(
        upper=1,
        lower=-1,
        offset=torch.tensor(1),
        key_padding=torch.tensor([[True, True, False, True]]),
        query_documents=torch.tensor([[0, 0, 1]]),
        key_documents=torch.tensor([[0, 0, 1, 1]]),
    )
    mask = reference.token_mask(visibility, 3, 4, torch.device("cpu"))
    expected = [[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]]
    assert mask[0, 0].int().tolist() == expected


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("lengths", [(64, 64), (40, 72), (72, 40), (1, 9)])
def test_full_selection_is_sdpa(is_causal, lengths):
    inputs = attention_inputs(
        batch=2, heads=4, kv_heads=2, q_len=lengths[0], k_len=lengths[1], dtype=torch.float64
    )
    selection = full_selection(2, 1, -(-lengths[0] // 16), -(-lengths[1] // 32))
    visibility = CAUSAL if is_causal else Visibility()
    out, lse = reference.block_sparse_attention(*inputs[:3], selection, 0.3, 16, 32, visibility)
    expected = F.scaled_dot_product_attention(
        *inputs[:3], is_causal=is_causal, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    dense = reference.dense_attention(*inputs[:3], 0.3, visibility)
    torch.testing.assert_close(dense, expected, rtol=1e-12, atol=1e-12)
    assert lse.isfinite().all()


def test_log_sum_exp_is_that_of_the_logits():
    inputs = attention_inputs(q_len=32, k_len=48, dtype=torch.float64)
    _, lse = reference.block_sparse_attention(
        *inputs[:3], full_selection(1, 1, 2, 3), 0.7, 16, 16, Visibility()
    )
    logits = inputs.query @ inputs.key.transpose(-1, -2) * 0.7
    torch.testing.assert_close(lse, logits.logsumexp(-1))


def test_unselected_blocks_are_as_if_masked():
    inputs = attention_inputs(heads=1, q_len=32, k_len=64, dtype=torch.float64)
    keep = torch.tensor([[[[True, False, True, False], [False, False, False, True]]]])
    out, _ = reference.block_sparse_attention(
        *inputs[:3], selection_from_map(keep), inputs.scale, 16, 16, Visibility()
    )
    mask = keep.repeat_interleave(16, 2).repeat_interleave(16, 3)
    expected = F.scaled_dot_product_attention(*inputs[:3], attn_mask=mask, scale=inputs.scale)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_row_that_reads_nothing_gives_zero_and_zero_gradients():
    inputs = attention_inputs(q_len=32, k_len=32, dtype=torch.float64)
    tensors = [tensor.clone().requires_grad_() for tensor in inputs[:3]]
    counts = torch.tensor([[[0, 2]]], dtype=torch.int32)
    indices = torch.tensor([[[[7, 7], [0, 1]]]], dtype=torch.int32)
    selection = BlockSelection(indices, counts)
    out, lse = reference.block_sparse_attention(*tensors, selection, 1.0, 16, 16, CAUSAL)
    assert torch.equal(out[:, :, :16], torch.zeros_like(out[:, :, :16]))
    assert (lse[:, :, :16] == -math.inf).all()
    assert lse[:, :, 16:].isfinite().all()
    gradients = torch.autograd.grad(out.sum(), tensors)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert (gradients[0][:, :, :16] == 0).all()


@pytest.mark.parametrize("seed", range(12))
def test_gradients_pass_gradcheck(seed):
    case = random_case(300 + seed)
    query, key, value, scale = case.inputs
    # Few tokens: gradcheck perturbs every element.
    tensors = [
        tensor[:1, :, :20, :4].double().contiguous().requires_grad_()
        for tensor in (query, key, value)
    ]
    visibility = Visibility(upper=case.visibility.upper, lower=case.visibility.lower)
    keep = torch.rand(1, 1, 2, 2, generator=torch.Generator().manual_seed(seed)) < 0.6

    def attend(*operands):
        selection = selection_from_map(keep[:, :, : -(-operands[0].shape[2] // 16)])
        return reference.block_sparse_attention(*operands, selection, scale, 16, 16, visibility)[0]

    assert torch.autograd.gradcheck(attend, tensors, fast_mode=True)


def test_mass_of_a_row_sums_to_one_and_padding_gets_none():
    inputs = attention_inputs(batch=2, q_len=48, k_len=80, dtype=torch.float64)
    padding = key_padding([80, 33], 80)
    visibility = Visibility(upper=32, key_padding=padding)
    share = reference.attention_mass(*inputs[:2], 0.5, 1, 16, "mean", "sum", visibility)
    reads = reference.token_mask(visibility, 48, 80, torch.device("cpu")).any(-1)
    torch.testing.assert_close(share.sum(-1), reads.double().expand_as(share.sum(-1)))
    assert (share[1, :, :, :2] == 0).all()


def test_mass_is_the_pooled_softmax():
    inputs = attention_inputs(q_len=64, k_len=64, dtype=torch.float64)
    logits = inputs.query @ inputs.key.transpose(-1, -2) * inputs.scale
    hidden = torch.ones(64, 64, dtype=torch.bool).triu(1)
    share = logits.masked_fill(hidden, -math.inf).softmax(-1)
    summed = F.avg_pool2d(share, (8, 16)) * 16
    got = reference.attention_mass(*inputs[:2], inputs.scale, 8, 16, "mean", "sum", CAUSAL)
    torch.testing.assert_close(got, summed)
    largest = reference.block_max_probability(
        *inputs[:2], inputs.scale, BlockSize(query=16, key=32), CAUSAL
    )
    torch.testing.assert_close(largest, F.max_pool2d(share, (16, 32)))


def test_mean_leaves_out_queries_that_read_nothing():
    inputs = attention_inputs(heads=1, q_len=16, k_len=16, dtype=torch.float64)
    visibility = Visibility(upper=-12)
    share = reference.attention_mass(*inputs[:2], 1.0, 16, 16, "mean", "sum", visibility)
    torch.testing.assert_close(share, torch.ones(1, 1, 1, 1, dtype=torch.float64))


def test_pool_blocks_reduces_by_hand():
    tokens = torch.tensor([[[[1.0], [5.0], [3.0], [-2.0], [7.0]]]])
    padding = torch.tensor([[True, True, False, False, True]])
    pooled = reference.pool_blocks(tokens, 2, "mean,max,min", padding)
    assert pooled[0, 0].tolist() == [[3.0, 5.0, 1.0], [0.0, 0.0, 0.0], [7.0, 7.0, 7.0]]
    assert reference.pool_blocks(tokens, 2, "min")[0, 0].flatten().tolist() == [1.0, -2.0, 7.0]


def test_block_scores_by_hand():
    # One query sub-row, two blocks of two key sub-blocks: the better ones are those of log 2 and
    # log 5, for the band hides the last.
    query = torch.ones(1, 1, 1, 1)
    key = torch.tensor([0.0, math.log(2.0), math.log(5.0), 100.0]).reshape(1, 1, 4, 1)
    visibility = Visibility(upper=11)
    scores = reference.block_scores(query, key, 1.0, 4, 4, 4, 8, 1, 16, 1, visibility)
    torch.testing.assert_close(scores.flatten(), torch.tensor([2 / 7, 5 / 7]))


def test_block_scores_take_the_neediest_row_and_head():
    query = torch.tensor([[[[0.0], [1.0]], [[2.0], [0.0]]]])
    key = torch.tensor([[[[0.0], [10.0]], [[0.0], [10.0]]]])
    per_head = reference.block_scores(query, key, 1.0, 8, 8, 16, 8, 16, 16, 1, Visibility())
    shared = reference.block_scores(query, key, 1.0, 8, 8, 16, 8, 16, 16, 2, Visibility())
    assert per_head.shape == (1, 2, 1, 2)
    torch.testing.assert_close(per_head[0, :, 0, 0], torch.tensor([0.5, 0.5]))
    assert torch.equal(shared, per_head.amax(1, keepdim=True))


@pytest.mark.parametrize(
    ("scores", "selector", "budget", "kept"),
    [
        # Sink 0 and diagonal 3 are forced, 1 is best.
        ([0.1, 0.5, 0.2, 0.2], "top_p", 0.5, [0, 1, 3]),
        ([0.1, 0.5, 0.2, 0.2], "top_p", 0.79, [0, 1, 3]),
        ([0.1, 0.5, 0.3, 0.1], "top_p", 0.71, [0, 1, 2, 3]),
        ([0.1, 0.5, 0.2, 0.2, 0.0], "top_p", 1.0, [0, 1, 2, 3, 4]),
        ([0.0, 0.0, 0.0], "top_p", 0.5, [0, 2]),
        # Blocks 1 and 2 tie at the cut and stay together.
        ([0.0, 0.25, 0.25, 0.5, 0.0, 0.0], "top_p", 0.7, [0, 1, 2, 3, 5]),
        ([0.1, 0.5, 0.2, 0.2], "fraction", 0.25, [0, 1, 3]),
        ([0.1, 0.3, 0.3, 0.5, 0.0, 0.0, 0.0, 0.0], "fraction", 0.5, [0, 1, 3, 7]),
        ([0.1] * 10, "fraction", 0.3, [0, 1, 9]),
        ([0.1, 0.3, 0.3, 0.5, 0.0], "top_k", 4, [0, 1, 3, 4]),
        ([0.1, 0.3, 0.3, 0.5, 0.0], "top_k", 100, [0, 1, 2, 3, 4]),
        ([0.05, 0.3, 0.1, 0.5, 0.05], "threshold", 1.0, [0, 1, 3, 4]),
        ([0.05, 0.3, 0.15, 0.45, 0.05], "threshold", 0.75, [0, 1, 2, 3, 4]),
        ([math.nan, 0.1, 0.2, 0.1], "top_p", 0.1, [0, 1, 2, 3]),
        ([0.1, 0.1, math.nan, 0.3, 0.1], "top_k", 3, [0, 2, 4]),
    ],
)
def test_selectors_by_hand(scores, selector, budget, kept):
    assert select_row(scores, selector, float(budget)) == kept


def test_diagonal_and_sink_are_kept_where_visible():
    scores = torch.zeros(1, 1, 4, 4)
    scores[..., 2] = 1.0
    keep = reference.selection_mask(
        reference.select_blocks(
            scores,
            torch.full((1,), 9.0),
            "threshold",
            16,
            16,
            64,
            64,
            Visibility(upper=0, lower=-40),
        ),
        4,
    )[0, 0]
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]
    assert keep.int().tolist() == expected


def test_sink_is_the_first_block_with_a_key_that_is_not_padding():
    visibility = Visibility(upper=48, key_padding=key_padding([20], 64))
    assert select_row([0.0, 0.0, 0.0, 0.0], "top_k", 1.0, visibility) == [0, 2, 3]


def test_diagonal_without_an_upper_bound_needs_equal_lengths():
    scores = torch.zeros(1, 1, 3, 3)
    scores[..., 0] = 1.0
    square = reference.select_blocks(scores, torch.ones(1), "top_k", 16, 16, 48, 48, Visibility())
    assert square.counts.flatten().tolist() == [1, 2, 2]
    wide = reference.select_blocks(scores, torch.ones(1), "top_k", 16, 16, 48, 40, Visibility())
    assert wide.counts.flatten().tolist() == [1, 1, 1]
