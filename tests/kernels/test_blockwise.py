"""The CPU kernel of block-sparse attention: numbers, poison, coverage, metamorphic relations."""

import dataclasses
import math
import time

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from seer_compile.errors import SelectionError
from seer_compile.kernels import block_rows, blockwise, ops, reference
from seer_compile.result_layout import empty_like_query
from seer_compile.types import BlockSelection, BlockSize, Visibility
from support.assertions import (
    assert_bitwise_equal,
    assert_ignores,
    assert_no_worse_than_eager,
)
from support.inputs import (
    attention_inputs,
    key_padding,
    normal,
    random_selection,
    with_layout,
)
from support.kernel_cases import (
    eager_attention,
    eager_gradients,
    full_selection,
    random_case,
    worst_of_eager,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CAUSAL = Visibility(upper=0)


def attend(query, key, value, selection, scale, query_block, key_block, visibility):
    return torch.ops.seer_compile.block_sparse_attention.v1(
        query,
        key,
        value,
        *selection,
        scale,
        query_block,
        key_block,
        *visibility.as_arguments().values(),
    )


def run(case):
    sizes = (case.query_block, case.key_block, case.visibility)
    return attend(*case.inputs[:3], case.selection, case.inputs.scale, *sizes)


def plain(inputs, mask, rows):
    del rows
    return (eager_attention(inputs, mask),)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(70))
def test_random_call_is_as_exact_as_eager(seed, dtype):
    case = random_case(seed, dtype)
    out, lse = run(case)
    wide = case.inputs.to(torch.float64)
    gold, gold_lse = reference.block_sparse_attention(
        *wide[:3],
        case.selection,
        wide.scale,
        case.query_block,
        case.key_block,
        case.visibility,
    )
    (eager,) = worst_of_eager(plain, case.inputs, case.mask(), (gold,))
    stride = empty_like_query(case.inputs.query, case.inputs.value).stride()
    assert_no_worse_than_eager(out, eager, gold, stride=stride)
    assert lse.dtype is torch.float32
    torch.testing.assert_close(lse.double(), gold_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(100, 140))
def test_random_gradient_is_as_exact_as_eager(seed, dtype):
    case = random_case(seed, dtype)
    mask = case.mask()
    grad = normal(*run(case)[0].shape, dtype=dtype, seed=seed)

    def differentiate(function, inputs):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs[:3]]
        out = function(type(inputs)(*leaves, inputs.scale))
        return torch.autograd.grad(out, leaves, grad.to(out.dtype))

    def sparse(inputs):
        sizes = (case.query_block, case.key_block, case.visibility)
        return attend(*inputs[:3], case.selection, inputs.scale, *sizes)[0]

    def exactly(inputs):
        sizes = (case.query_block, case.key_block, case.visibility)
        return reference.block_sparse_attention(*inputs[:3], case.selection, inputs.scale, *sizes)[
            0
        ]

    got = differentiate(sparse, case.inputs)
    gold = differentiate(exactly, case.inputs.to(torch.float64))

    def plain_gradients(inputs, turned_mask, rows):
        return eager_gradients(inputs, turned_mask, grad[:, :, rows])

    eager = worst_of_eager(plain_gradients, case.inputs, mask, gold)
    for name, ours, theirs, exact in zip(("query", "key", "value"), got, eager, gold, strict=True):
        if exact.any():
            assert_no_worse_than_eager(ours, theirs, exact, name=f"gradient of {name}")
        else:
            assert ours.abs().max() <= 2 * theirs.abs().max() + torch.finfo(dtype).eps


@pytest.mark.parametrize("seed", range(24))
def test_gradients_of_the_float64_kernel_are_exact(seed):
    case = random_case(200 + seed, torch.float64)
    rest = (case.inputs.scale, case.query_block, case.key_block, case.visibility)
    leaves = [tensor.detach().clone().requires_grad_() for tensor in case.inputs[:3]]
    expected, _ = reference.block_sparse_attention(*leaves, case.selection, *rest)
    out, lse = blockwise.attention_forward(*case.inputs[:3], *case.selection, *rest)
    grad = normal(*out.shape, dtype=torch.float64, seed=seed)
    got = blockwise.attention_backward(grad, *case.inputs[:3], out, lse, *case.selection, *rest)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    for ours, theirs in zip(got, torch.autograd.grad(expected, leaves, grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize(
    ("q_len", "k_len"),
    [(n, n) for n in (1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 191)]
    + [(1, 1025), (7, 130), (130, 7), (64, 1023)],
)
def test_ragged_lengths_equal_dense_attention_at_full_selection(block, q_len, k_len):
    inputs = attention_inputs(heads=2, kv_heads=1, q_len=q_len, k_len=k_len, head_dim=16)
    rows, columns = -(-q_len // block), -(-k_len // block)
    visibility = Visibility(upper=max(k_len - q_len, 0))
    out, _ = attend(
        *inputs[:3],
        full_selection(1, 1, rows, columns),
        inputs.scale,
        block,
        block,
        visibility,
    )
    mask = reference.token_mask(visibility, q_len, k_len, out.device)
    gold = F.scaled_dot_product_attention(
        *(tensor.double() for tensor in inputs[:3]), attn_mask=mask, enable_gqa=True
    )
    (eager,) = worst_of_eager(plain, inputs, mask.expand(1, 2, q_len, k_len), (gold,))
    assert_no_worse_than_eager(out, eager, gold)


@pytest.mark.parametrize("head_dim", [1, 8, 40, 59, 80, 96, 111, 128, 256])
@pytest.mark.parametrize("value_dim", [1, 24, 256])
def test_any_head_dim_works(head_dim, value_dim):
    inputs = attention_inputs(q_len=70, head_dim=head_dim, value_dim=value_dim)
    selection = full_selection(1, 1, 2, 2)
    out, _ = attend(*inputs[:3], selection, inputs.scale, 64, 64, CAUSAL)
    mask = reference.token_mask(CAUSAL, 70, 70, out.device)
    gold = reference.dense_attention(*inputs.to(torch.float64)[:3], inputs.scale, CAUSAL)
    (eager,) = worst_of_eager(plain, inputs, mask.expand(1, 2, 70, 70), (gold,))
    assert_no_worse_than_eager(out, eager, gold)


@pytest.mark.parametrize("seed", range(25))
def test_what_nobody_reads_does_not_matter(seed):
    case = random_case(400 + seed)
    if seed % 2:
        padding = key_padding([case.lengths[1] // 2] * case.inputs.key.shape[0], case.lengths[1])
        fields = {**case.visibility.as_arguments(), "key_padding": padding}
        case = dataclasses.replace(case, visibility=Visibility(**fields))
    read = case.mask().unflatten(1, (case.inputs.key.shape[1], -1)).any(2).any(-2)
    if read.all():
        pytest.skip("every key is read")
    sizes = (case.query_block, case.key_block, case.visibility)
    grad = normal(*run(case)[0].shape, seed=seed)

    def forward_and_backward(query, key, value):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in (query, key, value)]
        out, lse = attend(*leaves, case.selection, case.inputs.scale, *sizes)
        return out.detach(), lse, *torch.autograd.grad(out, leaves, grad)

    names = ("query", "key", "value")
    inputs = {n: t.contiguous() for n, t in zip(names, case.inputs[:3], strict=True)}
    assert_ignores(forward_and_backward, inputs, {"key": ~read, "value": ~read})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_future_keys_of_the_diagonal_block_leave_earlier_queries_alone(dtype):
    inputs = attention_inputs(heads=2, kv_heads=1, q_len=96, head_dim=16, dtype=dtype)
    selection = full_selection(1, 1, 2, 2)
    clean, _ = attend(*inputs[:3], selection, inputs.scale, 64, 64, CAUSAL)
    for value in (math.nan, math.inf, -math.inf):
        for position in (0, 37, 63, 64, 95):
            key, values = inputs.key.clone(), inputs.value.clone()
            key[:, :, position] = value
            values[:, :, position] = value
            for operands in ((key, inputs.value), (inputs.key, values), (key, values)):
                out, _ = attend(inputs.query, *operands, selection, inputs.scale, 64, 64, CAUSAL)
                assert_bitwise_equal(out[:, :, :position], clean[:, :, :position])
            out, _ = attend(
                inputs.query, inputs.key, values, selection, inputs.scale, 64, 64, CAUSAL
            )
            assert not out[:, :, position:].isfinite().any()


def test_nan_spoils_the_gradients_of_its_readers_alone():
    inputs = attention_inputs(heads=1, q_len=64, head_dim=8)
    leaves = [tensor.clone().requires_grad_() for tensor in inputs[:3]]
    with torch.no_grad():
        leaves[2][:, :, 40] = math.nan
    visibility = Visibility(upper=0, lower=-7)
    out, _ = attend(*leaves, full_selection(1, 1, 2, 2), 1.0, 32, 32, visibility)
    spoilt = ~out.isfinite().all(-1)[0, 0]
    assert spoilt.nonzero().flatten().tolist() == list(range(40, 48))
    grad_query, grad_key, _ = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert torch.equal(~grad_query.isfinite().all(-1)[0, 0], spoilt)
    # Keys 33 to 47 are read by a query that also reads key 40.
    touched = (~grad_key.isfinite().all(-1))[0, 0].nonzero().flatten().tolist()
    assert touched == list(range(33, 48))


def test_grad_of_queries_that_read_nothing_does_not_matter():
    inputs = attention_inputs(batch=2, q_len=48, head_dim=8)
    padding = key_padding([48, 10], 48)
    visibility = Visibility(upper=0, key_padding=padding)
    leaves = [tensor.requires_grad_() for tensor in inputs[:3]]
    selection = full_selection(2, 1, 3, 3)
    out, lse = attend(*leaves, selection, 1.0, 16, 16, visibility)
    empty = lse == -math.inf
    assert empty.any()
    assert (out[empty] == 0).all()
    grad = torch.ones_like(out)
    clean = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    dirty = torch.autograd.grad(out, leaves, grad.masked_fill(empty[..., None], math.nan))
    for ours, theirs in zip(dirty, clean, strict=True):
        assert_bitwise_equal(ours, theirs)
    assert (clean[0][empty] == 0).all()


@pytest.mark.parametrize("seed", range(20))
def test_nonzero_pattern_of_the_output_is_the_mask(seed):
    # Value row j is the j-th unit vector: the output of a query is its probabilities.
    case = random_case(600 + seed)
    k_len = case.inputs.key.shape[2]
    values = torch.eye(k_len).expand(*case.inputs.key.shape[:2], k_len, k_len)
    sizes = (case.query_block, case.key_block, case.visibility)
    query = case.inputs.query * 0.1
    out, _ = attend(query, case.inputs.key, values, case.selection, 0.1, *sizes)
    assert torch.equal(out != 0, case.mask())


def sample():
    inputs = attention_inputs(batch=2, heads=4, kv_heads=2, q_len=150, k_len=170, head_dim=16)
    selection = random_selection(2, 4, 3, 6, density=0.5, min_per_row=1, seed=3)
    return inputs, selection, (inputs.scale, 64, 32, Visibility(upper=20))


def test_constant_values_come_back():
    inputs, selection, rest = sample()
    ones = torch.ones_like(inputs.value)
    out, lse = attend(inputs.query, inputs.key, ones, selection, *rest)
    expected = (lse != -math.inf).float()[..., None].expand_as(out)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)


def test_values_times_a_power_of_two_scale_bitwise():
    inputs, selection, rest = sample()
    out, _ = attend(*inputs[:3], selection, *rest)
    scaled, _ = attend(inputs.query, inputs.key, inputs.value * 1024, selection, *rest)
    assert_bitwise_equal(scaled, out * 1024)


def test_permuted_groups_and_items_give_permuted_bits():
    inputs, selection, rest = sample()
    out, _ = attend(*inputs[:3], selection, *rest)
    heads = [2, 3, 0, 1]
    swapped = BlockSelection(selection.indices[:, heads], selection.counts[:, heads])
    got, _ = attend(
        inputs.query[:, heads], inputs.key[:, [1, 0]], inputs.value[:, [1, 0]], swapped, *rest
    )
    assert_bitwise_equal(got, out[:, heads])
    turned = BlockSelection(selection.indices.flip(0), selection.counts.flip(0))
    got, _ = attend(*(tensor.flip(0) for tensor in inputs[:3]), turned, *rest)
    assert_bitwise_equal(got, out.flip(0))


def test_item_alone_gives_the_bits_it_gives_in_a_batch():
    inputs, selection, rest = sample()
    query = inputs.query.clone()
    query[1] = math.nan
    out, _ = attend(query, *inputs[1:3], selection, *rest)
    alone = BlockSelection(selection.indices[:1], selection.counts[:1])
    got, _ = attend(*(tensor[:1] for tensor in inputs[:3]), alone, *rest)
    assert_bitwise_equal(got, out[:1])


def test_constant_added_to_all_keys_changes_nothing_but_rounding():
    inputs, selection, rest = sample()
    out, _ = attend(*inputs[:3], selection, *rest)
    shifted, _ = attend(inputs.query, inputs.key + normal(16), inputs.value, selection, *rest)
    torch.testing.assert_close(shifted, out, rtol=1e-5, atol=1e-5)


def test_capacity_and_entries_past_the_count_do_not_matter():
    inputs, selection, rest = sample()
    out, _ = attend(*inputs[:3], selection, *rest)
    capacity = int(selection.counts.max())
    tight = BlockSelection(selection.indices[..., :capacity], selection.counts)
    assert_bitwise_equal(attend(*inputs[:3], tight, *rest)[0], out)
    loose = F.pad(selection.indices, (0, 5), value=-(2**31))
    assert_bitwise_equal(
        attend(*inputs[:3], BlockSelection(loose, selection.counts), *rest)[0], out
    )


@pytest.mark.parametrize("layout", ["tokens_first", "sliced", "expanded_batch"])
def test_strides_do_not_matter(layout):
    inputs, selection, rest = sample()
    views = [with_layout(tensor, layout) for tensor in inputs[:3]]
    expected, _ = attend(*(view.contiguous() for view in views), selection, *rest)
    got, _ = attend(*views, selection, *rest)
    assert_bitwise_equal(got, expected)
    grad = with_layout(normal(*got.shape), layout)
    results = []
    for tensors, upstream in ((views, grad), ([v.contiguous() for v in views], grad.contiguous())):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        out, _ = attend(*leaves, selection, *rest)
        results.append(torch.autograd.grad(out, leaves, upstream))
    for ours, theirs in zip(*results, strict=True):
        assert_bitwise_equal(ours, theirs)


def test_step_minus_one_and_offset_views_work():
    inputs, selection, rest = sample()
    doubled = [torch.stack([tensor, tensor + 1], -1) for tensor in inputs[:3]]
    got, _ = attend(*(tensor[..., 0] for tensor in doubled), selection, *rest)
    assert_bitwise_equal(got, attend(*inputs[:3], selection, *rest)[0])


def test_shared_selection_is_the_selection_of_every_head_of_the_group():
    inputs = attention_inputs(batch=2, heads=6, kv_heads=2, q_len=100, head_dim=16)
    for shared in (1, 2):
        selection = random_selection(2, shared, 2, 4, density=0.6, min_per_row=1)
        each = BlockSelection(
            selection.indices.repeat_interleave(6 // shared, 1),
            selection.counts.repeat_interleave(6 // shared, 1),
        )
        rest = (inputs.scale, 64, 32, CAUSAL)
        got, _ = attend(*inputs[:3], selection, *rest)
        expected, _ = attend(*inputs[:3], each, *rest)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lengths", [(0, 64), (64, 0), (0, 0)])
def test_empty_inputs_give_empty_or_zero(lengths):
    inputs = attention_inputs(q_len=lengths[0], k_len=lengths[1])
    leaves = [tensor.requires_grad_() for tensor in inputs[:3]]
    rows, columns = lengths[0] // 64, lengths[1] // 64
    out, lse = attend(*leaves, full_selection(1, 2, rows, columns), 1.0, 64, 64, CAUSAL)
    assert out.shape == (1, 2, lengths[0], 32)
    assert (out == 0).all()
    assert (lse == -math.inf).all()
    grads = torch.autograd.grad(out.sum(), leaves)
    assert all((grad == 0).all() for grad in grads)


def test_batch_of_none_is_empty():
    query = torch.zeros(0, 2, 64, 16)
    out, lse = attend(query, query, query, full_selection(0, 2, 1, 1), 1.0, 64, 64, CAUSAL)
    assert out.shape == (0, 2, 64, 16)
    assert lse.shape == (0, 2, 64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_huge_logits_and_values_stay_finite(dtype):
    inputs = attention_inputs(heads=1, q_len=64, head_dim=16, dtype=dtype)
    query = (inputs.query * 100).to(dtype)
    key = (inputs.key * 100).to(dtype)
    value = torch.full_like(inputs.value, 6e4)
    out, lse = attend(query, key, value, full_selection(1, 1, 1, 1), 1.0, 64, 64, CAUSAL)
    torch.testing.assert_close(out, value, rtol=1e-3, atol=0)
    assert lse.abs().max() > 1e4


def test_equal_logits_average_over_many_keys():
    key = torch.zeros(1, 1, 40_000, 8)
    value = normal(1, 1, 40_000, 8).add_(3)
    query = normal(1, 1, 64, 8)
    selection = full_selection(1, 1, 1, 625)
    out, lse = attend(query, key, value, selection, 1.0, 64, 64, Visibility())
    expected = value.double().mean(2, keepdim=True).expand(1, 1, 64, 8)
    torch.testing.assert_close(out.double(), expected, rtol=2e-6, atol=0)
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(40_000)))


def test_long_lists_are_walked_in_steps_with_the_same_result(monkeypatch):
    inputs = attention_inputs(heads=2, kv_heads=1, q_len=300, head_dim=16)
    leaves = [tensor.requires_grad_() for tensor in inputs[:3]]
    selection = random_selection(1, 2, 5, 19, density=0.8, min_per_row=1)

    def compute():
        out, lse = attend(*leaves, selection, inputs.scale, 64, 16, CAUSAL)
        return out.detach(), lse, *torch.autograd.grad(out.square().sum(), leaves)

    expected = compute()
    monkeypatch.setattr(block_rows, "_STEP_KEYS", 32)
    monkeypatch.setattr(block_rows, "_BATCH_ELEMENTS", 1 << 12)
    for got, wanted in zip(compute(), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_repeated_runs_give_the_same_bits():
    inputs, selection, rest = sample()
    leaves = [tensor.requires_grad_() for tensor in inputs[:3]]

    def compute():
        out, _ = attend(*leaves, selection, *rest)
        return out.detach(), *torch.autograd.grad(out.square().sum(), leaves)

    first = compute()
    for _ in range(3):
        for got, wanted in zip(compute(), first, strict=True):
            assert_bitwise_equal(got, wanted)


@pytest.mark.parametrize(
    ("indices", "counts"),
    [([[0, 4]], [2]), ([[-1, 0]], [2]), ([[0, 1]], [3]), ([[0, 1]], [-1])],
)
def test_indices_and_counts_out_of_range_are_refused_by_the_kernel_itself(indices, counts):
    query = normal(1, 1, 16, 8)
    key = normal(1, 1, 64, 8)
    selection = BlockSelection(
        torch.tensor([[indices]], dtype=torch.int32), torch.tensor([[counts]], dtype=torch.int32)
    )
    with pytest.raises(SelectionError, match="expected in"):
        attend(query, key, key, selection, 1.0, 16, 16, Visibility())
    fine = BlockSelection(torch.tensor([[[[0, 3]]]]).int(), torch.tensor([[[2]]]).int())
    attend(query, key, key, fine, 1.0, 16, 16, Visibility())


class _LargestResult(TorchFunctionMode):
    """Notes the largest tensor that any function returns."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numel = max(self.numel, result.numel())
        return result


def test_memory_does_not_grow_with_queries_times_keys():
    inputs = attention_inputs(heads=1, q_len=4096, head_dim=8)
    selection = random_selection(1, 1, 64, 64, density=0.05, min_per_row=1)
    rest = (1.0, 64, 64, CAUSAL)
    with _LargestResult() as largest:
        blockwise.attention_forward(*inputs[:3], *selection, *rest)
    assert 0 < largest.numel <= max(block_rows._BATCH_ELEMENTS, 4096 * 64)


@pytest.mark.slow
def test_long_sparse_attention_beats_dense_sdpa():
    inputs = attention_inputs(heads=4, kv_heads=2, q_len=8192, head_dim=64)
    visible = torch.ones(128, 128, dtype=torch.bool).tril()
    selection = random_selection(1, 4, 128, 128, density=0.1, visible=visible, min_per_row=1)

    def clock(function):
        function()
        # Processor time: wall time would measure the neighbours of a shared machine.
        start = time.process_time()
        for _ in range(3):
            function()
        return time.process_time() - start

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        sparse = clock(
            lambda: ops.block_sparse_attention(
                *inputs[:3], selection, block_size=BlockSize(), visibility=CAUSAL
            )
        )
        dense = clock(
            lambda: F.scaled_dot_product_attention(*inputs[:3], is_causal=True, enable_gqa=True)
        )
    finally:
        torch.set_num_threads(threads)
    assert sparse < 0.6 * dense, f"sparse {sparse:.3f} s, dense {dense:.3f} s"
