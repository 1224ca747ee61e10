"""Registration: opcheck, fakes, autograd, dynamic shapes under compile and export."""

import random

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from seer_compile.kernels import attention_contracts, contracts, gated_contracts, ops
from seer_compile.types import BlockSelection, BlockSize, Visibility
from support.assertions import assert_bitwise_equal
from support.inputs import attention_inputs, documents, key_padding, normal, random_selection

CAUSAL = Visibility(upper=0)
VISIBILITIES = {
    "full": Visibility(),
    "causal": CAUSAL,
    "padded": Visibility(upper=0, key_padding=key_padding([80, 30], 80)),
    "offset": Visibility(upper=-10, lower=-50, offset=torch.tensor(10)),
    "documents": Visibility(
        query_documents=documents([25], 80).expand(2, -1),
        key_documents=documents([25], 80).expand(2, -1),
    ),
}
every_visibility = pytest.mark.parametrize("visibility", VISIBILITIES.values(), ids=VISIBILITIES)


def arguments(name, visibility, *, dtype=torch.float32, requires_grad=False):  # noqa: PLR0911
    """Return positional arguments of an operator for 80 queries and keys."""
    inputs = attention_inputs(
        batch=2, heads=4, kv_heads=2, q_len=80, head_dim=16, value_dim=8, dtype=dtype
    )
    query, key, value = (tensor.requires_grad_(requires_grad) for tensor in inputs[:3])
    readable = tuple(visibility.as_arguments().values())
    selection = random_selection(2, 4, 3, 5, density=0.6, min_per_row=1)
    if name == "pool_blocks":
        return (query.detach(), 8, "mean,max,min", visibility.key_padding)
    if name == "pool_features":
        weight = normal(2, 48, 6, seed=2)
        return (key.detach(), weight, 8, "mean,max,min", visibility.key_padding, 2)
    if name == "block_scores":
        features = normal(2, 4, 20, 6), normal(2, 4, 10, 6, seed=1)
        return (*features, 0.5, 4, 8, 32, 16, 80, 80, 2, *readable)
    if name == "select_blocks":
        scores = normal(2, 2, 3, 5).abs()
        return (scores, torch.full((2,), 0.6), "top_p", 32, 16, 80, 80, *readable)
    if name == "attention_mass":
        return (query.detach(), key.detach(), 0.3, 8, 16, "mean", "sum", *readable)
    if name == "block_sparse_attention":
        return (query, key, value, *selection, 0.3, 32, 16, *readable)
    gate = (
        normal(4, 48, 6, seed=2),
        normal(4, 48, 6, seed=3),
        torch.full((4, 2), 0.6),
        torch.tensor(2, dtype=torch.int8),
        0.3,
        "mean,max,min",
        "mean,max,min",
        4,
        8,
        32,
        16,
        "none",
        "top_p",
        [64, 256],
        "site",
        *readable,
    )
    if name == "gated_attention":
        return (query, key, value, *gate)
    operands = [tensor.detach() for tensor in (query, key, value)]
    forward_name = name.removesuffix("_backward")
    forward = arguments(forward_name, visibility, dtype=dtype)
    out, lse = overload(forward_name)(*forward)
    grad = normal(*out.shape, dtype=dtype, seed=7)
    rest = gate if forward_name == "gated_attention" else forward[3:]
    return (grad, *operands, out, lse, *rest)


def overload(name):
    return getattr(torch.ops.seer_compile, name).v1


FORWARDS = (
    "pool_blocks",
    "pool_features",
    "block_scores",
    "select_blocks",
    "attention_mass",
    "block_sparse_attention",
    "gated_attention",
)
BACKWARDS = ("block_sparse_attention_backward", "gated_attention_backward")
DIFFERENTIABLE = ("block_sparse_attention", "gated_attention")


@every_visibility
@pytest.mark.parametrize("name", FORWARDS + BACKWARDS)
def test_operator_passes_opcheck(name, visibility):
    result = opcheck(
        overload(name),
        arguments(name, visibility, requires_grad=name in DIFFERENTIABLE),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", FORWARDS + BACKWARDS)
def test_operator_passes_opcheck_under_dynamic_tracing(name):
    visibility = VISIBILITIES["padded"]
    result = opcheck(
        overload(name),
        arguments(name, visibility, requires_grad=name in DIFFERENTIABLE),
        test_utils="test_aot_dispatch_dynamic",
    )
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FORWARDS + BACKWARDS)
def test_fake_says_shape_dtype_and_strides(name, dtype):
    real_arguments = arguments(name, CAUSAL, dtype=dtype)
    real = overload(name)(*real_arguments)
    with FakeTensorMode() as mode:
        fake_arguments = [
            mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
            for value in real_arguments
        ]
        fake = overload(name)(*fake_arguments)
    for got, wanted in zip(as_tuple(fake), as_tuple(real), strict=True):
        assert got.shape == wanted.shape
        assert got.dtype is wanted.dtype
        assert got.stride() == wanted.stride()


def as_tuple(result):
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


def test_every_operator_is_versioned_and_listed():
    registered = {
        str(definition._qualname)
        for module in (contracts, attention_contracts, gated_contracts)
        for definition in vars(module).values()
        if isinstance(definition, torch._library.custom_ops.CustomOpDef)
    }
    assert registered == {f"seer_compile::{name}.v1" for name in FORWARDS + BACKWARDS}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_log_sum_exp_has_no_gradient(name):
    out, lse = overload(name)(*arguments(name, CAUSAL, requires_grad=True))
    assert out.requires_grad
    assert not lse.requires_grad


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_keyword_arguments_and_defaults_reach_the_kernel(name):
    positional = arguments(name, CAUSAL)
    names = [argument.name for argument in overload(name)._schema.arguments]
    assert names[len(positional) :] == ["softcap", "sinks"]
    named = dict(zip(names, positional, strict=False))
    expected = overload(name)(*positional)[0]
    assert_bitwise_equal(overload(name)(**named)[0], expected)
    trimmed = positional[: names.index("upper") + 1]
    assert_bitwise_equal(overload(name)(*trimmed)[0], expected)


def lengths_of(seed, number, low=64, high=1024):
    rng = random.Random(seed)
    return [rng.randint(low, high) for _ in range(number)]


def test_gated_attention_compiles_once_for_every_length():
    weights = normal(2, 48, 6, seed=1), normal(2, 48, 6, seed=2)
    budget, mode = torch.full((2, 2), 0.5), torch.tensor(2, dtype=torch.int8)

    def attend(query, key, value, padding):
        out, _ = torch.ops.seer_compile.gated_attention.v1(
            query * 2,
            key,
            value,
            *weights,
            budget,
            mode,
            0.2,
            "mean,max,min",
            "mean,max,min",
            4,
            8,
            64,
            64,
            "none",
            "top_p",
            [64, 1024],
            "site",
            key.shape[2] - query.shape[2],
            None,
            None,
            padding,
        )
        return out.transpose(1, 2).reshape(query.shape[0], query.shape[2], -1) + 1

    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(attend, backend=counter, fullgraph=True, dynamic=True)
    for length in [64, 63, 1, 128, *lengths_of(0, 60)]:
        inputs = attention_inputs(heads=2, kv_heads=1, q_len=length, head_dim=16)
        padding = torch.ones(1, length, dtype=torch.bool)
        with torch.no_grad():
            assert_bitwise_equal(compiled(*inputs[:3], padding), attend(*inputs[:3], padding))
    # One for a single token, which Dynamo always specialises, and one for all others.
    assert counter.frame_count <= 2
    torch._dynamo.reset()


def test_compiled_gradients_are_those_of_eager():
    rest = arguments("gated_attention", CAUSAL)[3:]

    def loss(query, key, value):
        return torch.ops.seer_compile.gated_attention.v1(query, key, value, *rest)[0].sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    inputs = attention_inputs(batch=2, heads=4, kv_heads=2, q_len=80, head_dim=16)
    results = []
    for function in (loss, compiled):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs[:3]]
        results.append(torch.autograd.grad(function(*leaves), leaves))
    for got, wanted in zip(*results, strict=True):
        assert_bitwise_equal(got, wanted)
    torch._dynamo.reset()


def test_typed_fronts_compile_without_a_break():
    block_size = BlockSize(query=32, key=16)

    def attend(query, key, value, indices, counts):
        return ops.block_sparse_attention(
            query,
            key,
            value,
            BlockSelection(indices, counts),
            block_size=block_size,
            visibility=CAUSAL,
        )[0]

    torch._dynamo.reset()
    inputs = attention_inputs(batch=2, heads=4, kv_heads=2, q_len=80, head_dim=16)
    selection = random_selection(2, 4, 3, 5, min_per_row=1)
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    expected = attend(*inputs[:3], *selection)
    assert_bitwise_equal(compiled(*inputs[:3], *selection), expected)
    torch._dynamo.reset()


def test_gated_attention_exports_with_a_dynamic_length():
    rest = arguments("gated_attention", CAUSAL)[3:]

    class Site(torch.nn.Module):
        def forward(self, query, key, value):
            return torch.ops.seer_compile.gated_attention.v1(query, key, value, *rest)[0]

    def sample(length):
        return attention_inputs(heads=4, kv_heads=2, q_len=length, head_dim=16)[:3]

    length = torch.export.Dim("length", min=2, max=4096)
    shapes = ({2: length}, {2: length}, {2: length})
    program = torch.export.export(Site(), sample(100), dynamic_shapes=shapes)
    for tokens in (2, 63, 64, 65, 700):
        inputs = sample(tokens)
        assert_bitwise_equal(program.module()(*inputs), Site()(*inputs))


def test_no_operator_changes_its_inputs():
    for name in FORWARDS + BACKWARDS:
        values = arguments(name, VISIBILITIES["padded"])
        copies = [v.clone() if isinstance(v, torch.Tensor) else v for v in values]
        overload(name)(*values)
        for value, copy in zip(values, copies, strict=True):
            if isinstance(value, torch.Tensor):
                assert_bitwise_equal(value, copy, name=name)


def test_typed_fronts_are_the_operators():
    query, key, value, indices, counts, scale, *_ = arguments("block_sparse_attention", CAUSAL)
    block_size, lengths = BlockSize(query=32, key=16), {"q_len": 80, "k_len": 80}
    scores = arguments("block_scores", CAUSAL)
    assert_bitwise_equal(
        ops.block_scores(
            *scores[:2],
            scale=0.5,
            query_sub_block=4,
            key_sub_block=8,
            block_size=block_size,
            groups=2,
            visibility=CAUSAL,
            **lengths,
        ),
        overload("block_scores")(*scores),
    )
    chosen = arguments("select_blocks", CAUSAL)
    selection = ops.select_blocks(
        chosen[0],
        budget=chosen[1],
        selector="top_p",
        block_size=block_size,
        visibility=CAUSAL,
        **lengths,
    )
    assert_bitwise_equal(selection.indices, overload("select_blocks")(*chosen)[0])
    out, lse = ops.block_sparse_attention(
        query,
        key,
        value,
        BlockSelection(indices, counts),
        block_size=block_size,
        scale=scale,
        visibility=CAUSAL,
    )
    wanted = overload("block_sparse_attention")(*arguments("block_sparse_attention", CAUSAL))
    assert_bitwise_equal(out, wanted[0])
    assert_bitwise_equal(lse, wanted[1])
    mass = ops.attention_mass(query, key, query_unit=8, key_unit=16, scale=0.3, visibility=CAUSAL)
    assert_bitwise_equal(mass, overload("attention_mass")(*arguments("attention_mass", CAUSAL)))
    pooled = ops.pool_blocks(query, size=8, kinds=("mean", "max", "min"))
    assert_bitwise_equal(pooled, overload("pool_blocks")(*arguments("pool_blocks", CAUSAL)))
