"""The operators on CUDA: registration, dense forms, the gated composition."""

import random

import pytest
import torch
from torch.library import opcheck

from seer_compile.kernels import counters, gated_attention, reference
from seer_compile.kernels.dense import dense_attention
from seer_compile.types import Visibility
from support.assertions import assert_bitwise_equal
from support.inputs import attention_inputs, key_padding, normal, random_selection
from support.kernel_cases import random_visibility

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
LIMIT = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
BANDS = ("full", "causal", "lower_right", "window", "tensor_offset", "anti_causal")


def to_cuda(value):
    if isinstance(value, torch.Tensor):
        return value.to(CUDA)
    if isinstance(value, Visibility):
        return Visibility(**{k: to_cuda(v) for k, v in value.as_arguments().items()})
    return value


def gate_of(inputs, *, mode=2, budget=0.5, selector="top_p"):
    heads, head_dim = inputs.query.shape[1], inputs.query.shape[-1]
    weights = [normal(heads, 3 * head_dim, 64, seed=s, scale=0.1, device=CUDA) for s in (5, 6)]
    table = torch.full((heads, 2), budget, device=CUDA)
    return (
        *weights,
        table,
        torch.tensor(mode, dtype=torch.int8),
        inputs.scale,
        "mean,max,min",
        "mean,max,min",
        4,
        8,
        64,
        64,
        "none",
        selector,
        [128, 4096],
        "site",
    )


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("band", BANDS)
@pytest.mark.parametrize("lengths", [(1, 200), (7, 130), (160, 160), (128, 300)])
def test_dense_forms_on_cuda_are_the_reference(band, lengths, dtype):
    rng = random.Random(f"{band}{lengths}")
    q_len, k_len = lengths
    for value_dim in (64, 32):
        inputs = attention_inputs(
            batch=2,
            heads=8,
            kv_heads=2,
            q_len=q_len,
            k_len=k_len,
            head_dim=64,
            value_dim=value_dim,
            dtype=dtype,
            device=CUDA,
        )
        visibility = to_cuda(random_visibility(rng, 2, q_len, k_len, band=band))
        out = dense_attention(*inputs[:3], scale=inputs.scale, visibility=visibility)
        wide = inputs.to(torch.float64)
        expected = reference.dense_attention(*wide[:3], inputs.scale, visibility)
        torch.testing.assert_close(out.double(), expected, rtol=LIMIT[dtype], atol=LIMIT[dtype])


@pytest.mark.parametrize("mode", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("visibility", [Visibility(upper=0), Visibility(), Visibility(upper=40)])
def test_gated_attention_on_cuda_reproduces_dense_attention_at_full_budget(visibility, dtype, mode):
    inputs = attention_inputs(
        heads=8, kv_heads=2, q_len=300, k_len=340, head_dim=64, dtype=dtype, device=CUDA
    )
    readable = visibility.as_arguments().values()
    operator = torch.ops.seer_compile.gated_attention.v1
    grad = normal(*inputs.query.shape, dtype=dtype, device=CUDA, seed=11)
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs[:3]]
    out, _ = operator(*leaves, *gate_of(inputs, mode=mode, budget=1.0), *readable)
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs[:3]]
    expected = reference.dense_attention(*wide, inputs.scale, visibility)
    torch.testing.assert_close(out.double(), expected, rtol=LIMIT[dtype], atol=LIMIT[dtype])
    got = torch.autograd.grad(out, leaves, grad)
    for ours, theirs in zip(got, torch.autograd.grad(expected, wide, grad.double()), strict=True):
        error = (ours.double() - theirs).norm() / theirs.norm()
        assert error < LIMIT[dtype]


@pytest.mark.parametrize("selector", ["top_p", "fraction"])
def test_gated_attention_on_cuda_answers_as_the_cpu_does(selector):
    visibility = Visibility(upper=0, key_padding=key_padding([512, 300], 512))
    inputs = attention_inputs(batch=2, heads=4, kv_heads=2, q_len=512, head_dim=64, device=CUDA)
    arguments = gate_of(inputs, selector=selector)
    operator = torch.ops.seer_compile.gated_attention.v1
    with counters.collect_density() as meter:
        out, lse = operator(*inputs[:3], *arguments, *to_cuda(visibility).as_arguments().values())
    on_cuda = meter.totals()["site"]
    host = [v.cpu() if isinstance(v, torch.Tensor) else v for v in (*inputs[:3], *arguments)]
    with counters.collect_density() as meter:
        expected, expected_lse = operator(*host, *visibility.as_arguments().values())
    assert on_cuda[1] == meter.totals()["site"][1]
    # Scores differ by rounding: a block on the edge of the budget may fall on either side.
    assert abs(on_cuda[0] - meter.totals()["site"][0]) <= 0.01 * on_cuda[0]
    is_close = torch.isclose(out.cpu(), expected, rtol=1e-3, atol=1e-4).float().mean()
    assert is_close > 0.98
    assert torch.equal(lse.cpu() == -torch.inf, expected_lse == -torch.inf)


def test_slabs_on_cuda_give_what_the_whole_gives(monkeypatch):
    inputs = attention_inputs(
        heads=8, kv_heads=2, q_len=1024, head_dim=64, dtype=torch.bfloat16, device=CUDA
    )
    arguments = gate_of(inputs, selector="fraction")
    # A recorded call would not look at the number of slabs again.
    gated_attention.RECORDS.clear()
    operator = torch.ops.seer_compile.gated_attention.v1
    whole, _ = operator(*inputs[:3], *arguments, 0)
    monkeypatch.setattr(gated_attention, "_SLAB_BYTES", 1 << 14)
    streamed, _ = operator(*inputs[:3], *arguments, 0)
    assert_bitwise_equal(streamed, whole)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_offset_on_the_device_is_never_read_by_the_host():
    inputs = attention_inputs(
        heads=8, kv_heads=2, q_len=512, k_len=1024, head_dim=64, dtype=torch.bfloat16, device=CUDA
    )
    offset = torch.tensor(300, device=CUDA)
    arguments = gate_of(inputs)
    operator = torch.ops.seer_compile.gated_attention.v1
    expected, _ = operator(*inputs[:3], *arguments, 300)
    operator(*inputs[:3], *arguments, 0, None, offset)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, _ = operator(*inputs[:3], *arguments, 0, None, offset)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("layout", ["contiguous", "tokens_first"])
def test_operators_pass_opcheck_on_cuda(layout):
    inputs = attention_inputs(
        heads=4, kv_heads=2, q_len=200, head_dim=64, device=CUDA, layout=layout
    )
    selection = random_selection(1, 4, 4, 4, density=0.6, min_per_row=1)
    selection = [tensor.to(CUDA) for tensor in selection]
    leaves = [tensor.requires_grad_() for tensor in inputs[:3]]
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    operators = torch.ops.seer_compile
    features = normal(1, 4, 50, 64, device=CUDA), normal(1, 4, 25, 64, seed=1, device=CUDA)
    scores = normal(1, 4, 4, 4, device=CUDA).abs()
    calls = {
        operators.pool_blocks.v1: (inputs.key.detach(), 8, "mean,max,min", None),
        operators.pool_features.v1: (
            *(inputs.key.detach(), normal(4, 192, 32, device=CUDA), 8),
            *("mean,max,min", None),
        ),
        operators.block_scores.v1: (*features, 0.5, 4, 8, 64, 64, 200, 200, 1, 0),
        operators.select_blocks.v1: (
            scores,
            torch.full((4,), 0.5, device=CUDA),
            "top_p",
            *(64, 64, 200, 200, 0),
        ),
        operators.attention_mass.v1: (
            *(inputs.query.detach(), inputs.key.detach()),
            *(0.3, 8, 64, "mean", "sum", 0),
        ),
        operators.block_sparse_attention.v1: (*leaves, *selection, 0.3, 64, 64, 0),
        operators.gated_attention.v1: (*leaves, *gate_of(inputs), 0),
    }
    for operator, arguments in calls.items():
        result = opcheck(operator, arguments, test_utils=utilities)
        assert set(result.values()) == {"SUCCESS"}, operator
