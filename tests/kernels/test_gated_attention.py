"""The whole site in one operator: the composition, its paths, slabs, budgets and gradients."""

import itertools
import math
import random
import threading

import pytest
import torch
import torch.nn.functional as F

from seer_compile.errors import RangeError, SeerInputError
from seer_compile.kernels import budgets, counters, engines, gated_attention, ops, reference
from seer_compile.kernels.recorded_calls import CallRecords
from seer_compile.types import SHARINGS, BlockSelection, BlockSize, Visibility
from support.assertions import assert_bitwise_equal
from support.inputs import attention_inputs, documents, key_padding, normal
from support.kernel_cases import random_visibility

LENGTHS = [64, 256, 1024]
CAUSAL = Visibility(upper=0)


@pytest.fixture(autouse=True)
def _fresh_counters():
    counters.reset()
    yield
    counters.reset()


def gate_arguments(inputs, *, mode=2, budget=0.6, sharing="none", selector="top_p", seed=0):
    """Return the operator's arguments between value and the visibility, in its order."""
    heads, head_dim = inputs.query.shape[1], inputs.query.shape[-1]
    selections = heads if sharing == "none" else inputs.key.shape[1]
    gate_heads = inputs.key.shape[1] if sharing == "gate" else heads
    table = torch.full((selections, len(LENGTHS)), budget)
    return (
        normal(heads, 3 * head_dim, 8, seed=seed + 1, scale=0.2),
        normal(gate_heads, 2 * head_dim, 8, seed=seed + 2, scale=0.2),
        table,
        torch.tensor(mode, dtype=torch.int8),
        inputs.scale,
        "mean,max,min",
        "min,mean",
        4,
        8,
        32,
        16,
        sharing,
        selector,
        LENGTHS,
        "site",
    )


def call(inputs, arguments, visibility):
    readable = visibility.as_arguments().values()
    return torch.ops.seer_compile.gated_attention.v1(*inputs[:3], *arguments, *readable)


def test_records_tell_calls_apart_by_all_that_decides_their_launches(monkeypatch):
    # On a CPU nothing is a launch: calls are watched, refused, and right.
    records = CallRecords()
    monkeypatch.setattr(gated_attention, "RECORDS", records)
    monkeypatch.setattr(gated_attention, "_may_be_played", lambda query: True)
    lies_otherwise = attention_inputs(heads=4, kv_heads=2, q_len=96, seed=1, layout="tokens_first")
    inputs = attention_inputs(heads=4, kv_heads=2, q_len=96, seed=1)
    arguments = gate_arguments(inputs, sharing="gate")
    masked = Visibility(upper=0, key_padding=key_padding([90], 96))
    calls = [
        (inputs, arguments, CAUSAL),
        (inputs, arguments, Visibility()),
        (inputs, arguments, masked),
        (inputs, gate_arguments(inputs, sharing="gate", selector="fraction"), CAUSAL),
        (inputs, (*arguments[:4], 0.3, *arguments[5:]), CAUSAL),
        (lies_otherwise, arguments, CAUSAL),
    ]
    for turn in range(3):
        for number, given in enumerate(calls, 1):
            with monkeypatch.context() as patch:
                patch.setattr(gated_attention, "_may_be_played", lambda query: False)
                expected = call(*given)
            for ours, theirs in zip(call(*given), expected, strict=True):
                assert_bitwise_equal(ours, theirs)
            if turn == 0:
                assert records.states() == number * ["seen once"]
    with engines.attention_engine("portable"):
        call(*calls[0])
    states = records.states()
    assert len(states) == len(calls) + 1
    assert all(state.startswith("aten.") for state in states[:-1])
    # Another site, other weights and budgets: the same launches.
    call(inputs, (*gate_arguments(inputs, sharing="gate", budget=0.2, seed=7)[:-1], "b"), CAUSAL)
    assert records.states() == states


def composed(inputs, arguments, visibility):
    """Compose the oracles, without slabs."""
    query, key, value = inputs[:3]
    query_weight, key_weight, budget, _, scale, query_pools, key_pools, *sizes = arguments
    query_sub_block, key_sub_block, query_block, key_block, sharing, selector, lengths, _ = sizes
    groups = query.shape[1] // key.shape[1]
    pooled = reference.pool_blocks(query, query_sub_block, query_pools).float()
    query_features = torch.einsum("bhrp,hpe->bhre", pooled, query_weight)
    if sharing == "gate":
        query_features = query_features.unflatten(1, (-1, groups)).sum(2)
    pooled = reference.pool_blocks(key, key_sub_block, key_pools, visibility.key_padding).float()
    pooled = pooled.repeat_interleave(key_weight.shape[0] // key.shape[1], 1)
    key_features = torch.einsum("bhcp,hpe->bhce", pooled, key_weight)
    grid = (query_block, key_block, query.shape[2], key.shape[2])
    scores = reference.block_scores(
        query_features,
        key_features,
        scale,
        query_sub_block,
        key_sub_block,
        *grid,
        groups if sharing == "selection" else 1,
        visibility,
    )
    place = math.log2(key.shape[2])
    logs = [math.log2(length) for length in lengths]
    at = torch.stack([torch.tensor(interpolate(place, logs, row.tolist())) for row in budget])
    selection = reference.select_blocks(scores, at, selector, *grid, visibility)
    return reference.block_sparse_attention(
        query, key, value, selection, scale, query_block, key_block, visibility
    )


def interpolate(x, xs, ys):
    if x <= xs[0]:
        return ys[0]
    for (x0, x1), (y0, y1) in zip(itertools.pairwise(xs), itertools.pairwise(ys), strict=True):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return ys[-1]


@pytest.mark.parametrize("selector", ["top_p", "fraction", "top_k", "threshold"])
@pytest.mark.parametrize("seed", range(12))
def test_operator_is_the_composition_of_the_oracles(seed, selector):
    rng = random.Random(seed)
    kv_heads = rng.choice((1, 2))
    q_len, k_len = rng.choice((33, 100, 160)), rng.choice((64, 130, 200))
    inputs = attention_inputs(
        batch=2, heads=2 * kv_heads, kv_heads=kv_heads, q_len=q_len, k_len=k_len, head_dim=16
    )
    visibility = random_visibility(rng, 2, q_len, k_len)
    budget = {"top_k": 3.0, "threshold": 1.0}.get(selector, 0.6)
    arguments = gate_arguments(
        inputs, budget=budget, selector=selector, sharing=SHARINGS[seed % 3], seed=seed
    )
    out, lse = call(inputs, arguments, visibility)
    expected, expected_lse = composed(inputs, arguments, visibility)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)
    assert counters.snapshot() == {"site": {"sparse": 1}}


@pytest.mark.parametrize(
    "visibility",
    [
        CAUSAL,
        Visibility(upper=30),
        Visibility(upper=0, lower=-70),
        Visibility(upper=5, offset=torch.tensor(3)),
        Visibility(lower=-100),
        Visibility(upper=0, key_padding=key_padding([200, 77], 200)),
        Visibility(
            upper=0,
            query_documents=documents([50, 120], 200).expand(2, -1),
            key_documents=documents([50, 120], 200).expand(2, -1),
        ),
        Visibility(),
    ],
    ids=lambda visibility: visibility.describe(),
)
@pytest.mark.parametrize("selector", ["top_p", "fraction"])
def test_slabs_of_rows_give_what_the_whole_gives(visibility, selector, monkeypatch):
    inputs = attention_inputs(batch=2, heads=4, kv_heads=2, q_len=200, head_dim=16)
    arguments = gate_arguments(inputs, selector=selector, budget=0.4)
    leaves = [tensor.requires_grad_() for tensor in inputs[:3]]

    def compute():
        out, lse = call((*leaves, inputs.scale), arguments, visibility)
        return out.detach(), lse, *torch.autograd.grad(out.square().sum(), leaves)

    expected = compute()
    monkeypatch.setattr(gated_attention, "_SLAB_BYTES", 1)
    with counters.collect_density() as meter:
        streamed = compute()
    for got, wanted in zip(streamed, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    kept, visible = meter.totals()["site"]
    blocks = reference.blocks_any(reference.band_mask(visibility, 200, 200), 32, 16)
    assert visible == int(blocks.sum()) * 2 * 4
    assert 0 < kept < visible


@pytest.mark.parametrize(("mode", "reason"), [(0, "mode"), (3, "full budget")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dense_modes_are_sdpa_to_the_bit(dtype, mode, reason):
    inputs = attention_inputs(heads=4, kv_heads=2, q_len=100, dtype=dtype)
    out, lse = call(inputs, gate_arguments(inputs, mode=mode), CAUSAL)
    expected = F.scaled_dot_product_attention(
        *inputs[:3], is_causal=True, scale=inputs.scale, enable_gqa=True
    )
    assert_bitwise_equal(out, expected)
    assert lse.shape == out.shape[:3]
    assert out.is_contiguous()
    assert counters.snapshot() == {"site": {f"dense:{reason}": 1}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_budget_reproduces_dense_attention(dtype):
    inputs = attention_inputs(heads=4, kv_heads=2, q_len=300, dtype=dtype, sharpness=2.0)
    out, _ = call(inputs, gate_arguments(inputs, budget=1.0), CAUSAL)
    gold = reference.dense_attention(*inputs.to(torch.float64)[:3], inputs.scale, CAUSAL)
    sdpa = F.scaled_dot_product_attention(*inputs[:3], is_causal=True, enable_gqa=True)
    error, sdpa_error = (out.double() - gold).abs(), (sdpa.double() - gold).abs()
    floor = torch.finfo(dtype).eps * gold.square().mean().sqrt()
    assert error.max() <= 2 * sdpa_error.max() + floor
    assert error.mean() <= 1.1 * sdpa_error.mean() + floor


def test_automatic_mode_answers_short_calls_and_decode_densely():
    inputs = attention_inputs(q_len=128)
    call(inputs, gate_arguments(inputs, mode=1), CAUSAL)
    one = attention_inputs(q_len=1, k_len=128)
    call(one, gate_arguments(one, mode=1), Visibility())
    none = attention_inputs(q_len=0, k_len=128)
    call(none, gate_arguments(none), CAUSAL)
    assert counters.snapshot() == {"site": {"dense:short": 1, "dense:decode": 1, "dense:empty": 1}}


def test_automatic_mode_answers_long_calls_sparsely():
    inputs = attention_inputs(heads=8, kv_heads=2, q_len=3072, head_dim=64)
    out, _ = call(inputs, gate_arguments(inputs, mode=1, budget=0.3), CAUSAL)
    assert counters.snapshot() == {"site": {"sparse": 1}}
    assert out.isfinite().all()


def test_unknown_mode_is_refused():
    inputs = attention_inputs()
    with pytest.raises(RangeError, match="mode=4"):
        call(inputs, gate_arguments(inputs, mode=4), CAUSAL)


@pytest.mark.parametrize(
    ("k_len", "expected"),
    [(1, 0.2), (64, 0.2), (128, 0.3), (256, 0.4), (512, 0.7), (1024, 1.0), (4096, 1.0)],
)
def test_budget_is_linear_in_the_logarithm_of_the_length(k_len, expected):
    table = torch.tensor([[0.2, 0.4, 1.0], [0.2, 0.4, 1.0]])
    got = budgets.budget_at(table, LENGTHS, k_len)
    torch.testing.assert_close(got, torch.tensor([expected, expected]))


@pytest.mark.parametrize("k_len", [1, 128, 300, 512, 4096])
def test_infinite_budgets_stay_infinite(k_len):
    table = torch.full((2, 3), torch.inf, dtype=torch.float64)
    assert torch.equal(budgets.budget_at(table, LENGTHS, k_len), table[:, 0])


def test_budget_of_one_length_holds_everywhere():
    table = torch.tensor([[0.3]])
    assert budgets.budget_at(table, [128], 5000).item() == table.item()


@pytest.mark.parametrize("mode", [0, 1, 2])
@pytest.mark.parametrize("visibility", [CAUSAL, Visibility(upper=0, lower=-60), Visibility()])
def test_gradients_are_those_of_the_attention_and_reach_no_gate(mode, visibility):
    inputs = attention_inputs(batch=2, heads=4, kv_heads=2, q_len=120, head_dim=16)
    arguments = gate_arguments(inputs, mode=mode, budget=0.5)
    weights = [tensor.requires_grad_() for tensor in arguments[:2]]
    grad = normal(2, 4, 120, 16, seed=9)

    def differentiate(function):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs[:3]]
        out = function(type(inputs)(*leaves, inputs.scale))
        return torch.autograd.grad(out, leaves, grad)

    got = differentiate(lambda operands: call(operands, arguments, visibility)[0])
    if mode == 2:
        expected = differentiate(
            lambda operands: fixed_selection(operands, inputs, arguments, visibility)
        )
    else:
        expected = differentiate(
            lambda operands: reference.dense_attention(*operands[:3], inputs.scale, visibility)
        )
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    assert all(weight.grad is None for weight in weights)


def fixed_selection(operands, inputs, arguments, visibility):
    """Attend by the oracle with the selection that the gate makes of detached inputs."""
    with torch.no_grad():
        detached = type(inputs)(*(tensor.detach() for tensor in operands[:3]), inputs.scale)
        # One-hot values tell which blocks were read.
        blocks = torch.eye(8)[torch.arange(120) // 16].expand(2, 2, 120, 8)
        marks, _ = call(detached._replace(value=blocks), arguments, visibility)
        rows = reference.blocks_any((marks > 0), 32, 1)
        indices = torch.argsort(~rows, dim=-1, stable=True).int()
    selection = BlockSelection(indices, rows.sum(-1).int())
    return reference.block_sparse_attention(
        *operands[:3], selection, inputs.scale, 32, 16, visibility
    )[0]


def test_backward_uses_the_knobs_of_its_forward():
    inputs = attention_inputs(heads=2, kv_heads=1, q_len=160, head_dim=16)
    arguments = gate_arguments(inputs, budget=0.2)
    budget, mode = arguments[2:4]

    def differentiate(turn):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs[:3]]
        out, _ = call((*leaves, inputs.scale), arguments, CAUSAL)
        if turn:
            budget.fill_(1.0)
            mode.fill_(0)
        return torch.autograd.grad(out.sum(), leaves)

    expected = differentiate(turn=False)
    for got, wanted in zip(differentiate(turn=True), expected, strict=True):
        assert_bitwise_equal(got, wanted)


def test_turning_a_knob_changes_the_next_call():
    inputs = attention_inputs(heads=2, kv_heads=1, q_len=320, head_dim=16)
    arguments = gate_arguments(inputs, budget=1.0, selector="fraction")
    densities = []
    for budget in (1.0, 0.5, 0.2):
        arguments[2].fill_(budget)
        with counters.collect_density() as meter:
            call(inputs, arguments, CAUSAL)
        densities.append(meter.densities()["site"])
    assert densities[0] == 1.0
    assert densities == sorted(densities, reverse=True)
    assert densities[2] < 0.4


def test_density_is_collected_inside_the_block_only():
    inputs = attention_inputs(q_len=96)
    arguments = gate_arguments(inputs)
    with counters.collect_density() as outer:
        call(inputs, arguments, CAUSAL)
        with counters.collect_density() as inner:
            call(inputs, arguments, CAUSAL)
    call(inputs, arguments, CAUSAL)
    once = inner.totals()["site"]
    assert outer.totals()["site"] == (2 * once[0], 2 * once[1])


def test_calls_are_counted_across_threads():
    def work():
        for _ in range(200):
            counters.record("shared", "sparse")

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counters.snapshot() == {"shared": {"sparse": 1600}}


def test_padding_holds_nothing_that_matters():
    padding = key_padding([200, 60], 200)
    visibility = Visibility(upper=0, key_padding=padding)
    inputs = attention_inputs(batch=2, heads=2, kv_heads=1, q_len=200, head_dim=16)
    arguments = gate_arguments(inputs)
    clean, _ = call(inputs, arguments, visibility)
    for value in (math.nan, math.inf, 65504.0):
        key = inputs.key.masked_fill(~padding[:, None, :, None], value)
        values = inputs.value.masked_fill(~padding[:, None, :, None], value)
        got, _ = call(inputs._replace(key=key, value=values), arguments, visibility)
        assert_bitwise_equal(got, clean)
    assert (clean[1, :, :140] == 0).all()


def test_wrapper_is_the_operator():
    inputs = attention_inputs(heads=4, kv_heads=2, q_len=100, head_dim=16)
    arguments = gate_arguments(inputs)
    expected, _ = call(inputs, arguments, CAUSAL)
    out, _ = ops.gated_attention(
        *inputs[:3],
        query_weight=arguments[0],
        key_weight=arguments[1],
        budget=arguments[2],
        mode=arguments[3],
        query_pools=("mean", "max", "min"),
        key_pools=("min", "mean"),
        query_sub_block=4,
        key_sub_block=8,
        block_size=BlockSize(query=32, key=16),
        sharing="none",
        selector="top_p",
        budget_lengths=LENGTHS,
        site="site",
        visibility=CAUSAL,
    )
    assert_bitwise_equal(out, expected)


@pytest.mark.parametrize("place", range(7))
def test_a_call_that_passed_excuses_no_other(place):
    inputs = attention_inputs(heads=4, kv_heads=2, q_len=100)
    operands = [*inputs[:3], *gate_arguments(inputs)]
    operator = torch.ops.seer_compile.gated_attention.v1
    operator(*operands, 0)
    operands[place] = operands[place].to(torch.float16 if place < 6 else torch.int32)
    with pytest.raises(SeerInputError):
        operator(*operands, 0)
