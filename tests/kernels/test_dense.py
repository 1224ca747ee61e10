"""Dense attention under a visibility, and the rule that chooses it."""

import random

import pytest
import torch
import torch.nn.functional as F

from seer_compile.kernels import dense, reference
from seer_compile.kernels.break_even import TABLE, BreakEven
from seer_compile.kernels.dense import dense_attention, dense_reason
from seer_compile.types import Visibility
from support.inputs import attention_inputs, documents, key_padding
from support.kernel_cases import BANDS, random_visibility

CPU = torch.device("cpu")


@pytest.fixture
def calls(monkeypatch):
    """The keyword arguments and key lengths of every SDPA call."""
    seen = []
    original = F.scaled_dot_product_attention

    def spy(query, key, value, **named):
        seen.append({**named, "k_len": key.shape[2], "q_len": query.shape[2]})
        return original(query, key, value, **named)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    return seen


@pytest.mark.parametrize("band", BANDS)
@pytest.mark.parametrize("seed", range(10))
def test_every_visibility_gives_the_reference(band, seed):
    rng = random.Random(seed)
    q_len, k_len = rng.choice((1, 33, 64)), rng.choice((1, 33, 64, 100))
    inputs = attention_inputs(batch=2, heads=4, kv_heads=2, q_len=q_len, k_len=k_len)
    visibility = random_visibility(rng, 2, q_len, k_len, band=band)
    out = dense_attention(*inputs[:3], scale=0.3, visibility=visibility)
    expected = reference.dense_attention(*inputs.to(torch.float64)[:3], 0.3, visibility)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("visibility", "lengths", "is_causal", "k_len"),
    [
        (Visibility(), (64, 64), False, 64),
        (Visibility(upper=0), (64, 64), True, 64),
        (Visibility(upper=0), (64, 200), True, 64),
        (Visibility(upper=99), (1, 100), False, 100),
        (Visibility(upper=0, offset=torch.tensor(0)), (64, 64), True, 64),
        (Visibility(upper=0, lower=-63), (64, 64), True, 64),
        (Visibility(upper=500), (64, 64), False, 64),
    ],
)
def test_no_mask_is_written_out_where_sdpa_needs_none(visibility, lengths, is_causal, k_len, calls):
    inputs = attention_inputs(q_len=lengths[0], k_len=lengths[1])
    out = dense_attention(*inputs[:3], scale=0.2, visibility=visibility)
    assert len(calls) == 1
    assert calls[0]["attn_mask"] is None
    assert (calls[0]["is_causal"], calls[0]["k_len"]) == (is_causal, k_len)
    expected = reference.dense_attention(*inputs[:3], 0.2, visibility)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "visibility",
    [
        Visibility(upper=37),
        Visibility(upper=37, lower=0),
        Visibility(upper=37, key_padding=key_padding([100, 20], 100)),
        Visibility(
            query_documents=documents([20], 63).expand(2, -1),
            key_documents=documents([20], 100).expand(2, -1),
        ),
        Visibility(upper=-5),
    ],
    ids=lambda visibility: visibility.describe(),
)
def test_masked_rows_are_answered_in_turns_with_the_same_result(visibility, monkeypatch, calls):
    inputs = attention_inputs(batch=2, heads=4, kv_heads=2, q_len=63, k_len=100)
    expected = reference.dense_attention(*inputs[:3], 0.2, visibility)
    monkeypatch.setitem(dense._MASK_ELEMENTS, "cpu", 1000)
    out = dense_attention(*inputs[:3], scale=0.2, visibility=visibility)
    assert len(calls) > 5
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_turns_leave_out_keys_that_they_cannot_reach(monkeypatch, calls):
    inputs = attention_inputs(q_len=256)
    monkeypatch.setitem(dense._MASK_ELEMENTS, "cpu", 256 * 32)
    dense_attention(*inputs[:3], scale=0.2, visibility=Visibility(upper=0, lower=-31))
    assert [seen["k_len"] for seen in calls] == [32] + [63] * 7


def test_grouped_heads_are_not_expanded_without_a_mask(calls):
    inputs = attention_inputs(heads=8, kv_heads=2, q_len=64)
    dense_attention(*inputs[:3], scale=0.2, visibility=Visibility(upper=0))
    assert calls[0]["enable_gqa"]


def test_a_handful_of_queries_expands_no_keys_for_its_mask(calls):
    inputs = attention_inputs(batch=2, heads=8, kv_heads=2, q_len=3, k_len=50)
    visibility = Visibility(upper=0, offset=torch.tensor(40), key_padding=key_padding([50, 9], 50))
    out = dense_attention(*inputs[:3], scale=0.2, visibility=visibility)
    assert [seen["q_len"] for seen in calls] == [3 * 4]
    expected = reference.dense_attention(*inputs[:3], 0.2, visibility)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_rows_without_a_key_are_zero_forward_and_backward():
    inputs = attention_inputs(batch=2, q_len=32, k_len=32)
    leaves = [tensor.requires_grad_() for tensor in inputs[:3]]
    visibility = Visibility(upper=0, key_padding=key_padding([32, 8], 32))
    out = dense_attention(*leaves, scale=0.2, visibility=visibility)
    assert (out[1, :, :24] == 0).all()
    gradients = torch.autograd.grad(out.sum(), leaves)
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (0, 0)])
def test_nothing_to_attend_to_is_zero(lengths):
    inputs = attention_inputs(q_len=lengths[0], k_len=lengths[1])
    out = dense_attention(*inputs[:3], scale=0.2)
    assert out.shape == (1, 2, lengths[0], 32)
    assert (out == 0).all()


def test_rule_is_a_function_of_sizes():
    table = {("cpu", 64): BreakEven(q_len=16, k_len=100, work=1e6)}

    def reason(q_len, k_len, heads):
        sizes = {"q_len": q_len, "k_len": k_len, "heads": heads, "dims": (1, 1)}
        return dense_reason(**sizes, device=CPU, table=table)

    assert reason(1, 10**6, 10**6) == "decode"
    assert reason(15, 10**6, 10**6) == "short"
    assert reason(16, 99, 10**6) == "short"
    assert reason(16, 100, 312) == "short"
    assert reason(16, 100, 313) is None


@pytest.mark.parametrize(
    ("dims", "reason"),
    [((64, 64), None), ((65, 64), "short"), ((64, 128), "short"), ((129, 1), None)],
)
def test_the_larger_dim_says_which_entry_counts(dims, reason):
    never = BreakEven(q_len=2**40, k_len=1, work=0.0)
    always = BreakEven(q_len=1, k_len=1, work=0.0)
    table = {("cpu", 64): always, ("cpu", 128): never, ("cpu", 256): always}
    sizes = {"q_len": 64, "k_len": 64, "heads": 4, "dims": dims}
    assert dense_reason(**sizes, device=CPU, table=table) == reason


def test_rule_never_goes_back_to_dense_as_a_call_grows():
    lengths = [2**power for power in range(0, 21)]
    answers = [
        dense_reason(q_len=length, k_len=length, heads=8, dims=(64, 64), device=CPU)
        for length in lengths
    ]
    first = answers.index(None)
    assert all(answer is None for answer in answers[first:])
    assert 512 <= lengths[first] <= 8192


def test_every_kind_of_device_has_an_entry_for_every_head_dim():
    assert {(device, dim) for device in ("cpu", "cuda") for dim in (64, 128, 256)} <= set(TABLE)
