"""Attention answers in the layout of its query: fakes, every path, symbolic sizes, no copies."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

from seer_compile.kernels import gated_attention
from seer_compile.result_layout import empty_like_query, is_heads_first, laid_like_query
from seer_compile.types import BlockSelection, Visibility
from support.assertions import assert_bitwise_equal
from support.inputs import normal, random_selection

CAUSAL = Visibility(upper=0)
VALUE_DIM = 8


def heads_first(heads, length, dim, seed=0):
    return normal(2, heads, length, dim, seed=seed)


def token_major(heads, length, dim, seed=0):
    return normal(2, length, heads, dim, seed=seed).transpose(1, 2)


def packed_tokens(heads, length, dim, seed=0):
    """One of the three parts of a fused projection."""
    return normal(2, length, 3, heads, dim, seed=seed)[:, :, 1].transpose(1, 2)


def packed_heads(heads, length, dim, seed=0):
    return normal(2, 3, heads, length, dim, seed=seed)[:, 1]


def rows_of_a_cache(heads, length, dim, seed=0):
    return normal(2, heads, length + 9, dim, seed=seed)[:, :, 3 : length + 3]


def expanded_batch(heads, length, dim, seed=0):
    return normal(1, heads, length, dim, seed=seed).expand(2, -1, -1, -1)


def expanded_heads(heads, length, dim, seed=0):
    return normal(2, 1, length, dim, seed=seed).expand(-1, heads, -1, -1)


def expanded_tokens(heads, length, dim, seed=0):
    return normal(2, heads, 1, dim, seed=seed).expand(-1, -1, length, -1)


IS_HEADS_FIRST = {
    heads_first: True,
    token_major: False,
    packed_tokens: False,
    packed_heads: True,
    rows_of_a_cache: True,
    expanded_batch: True,
    expanded_heads: False,
    expanded_tokens: True,
}
every_layout = pytest.mark.parametrize("make", IS_HEADS_FIRST, ids=lambda make: make.__name__)
SIZES = {"usual": (4, 80), "one head": (1, 80), "one token": (4, 1), "no token": (4, 0)}
PATHS = {
    "operator": {},
    "sparse": {"mode": 2},
    "dense": {"mode": 0},
    "automatic": {"mode": 1},
    "full budget": {"mode": 3},
    "masked": {"mode": 0, "visibility": Visibility(upper=0, lower=-30)},
    "soft-capped": {"mode": 0, "softcap": 2.0},
    "sinks": {"mode": 0, "sinks": True},
    "sparse sinks": {"mode": 2, "sinks": True, "softcap": 2.0},
}


def arguments(query, *, k_len=None, mode=None, softcap=None, sinks=False, visibility=CAUSAL):
    """Return the arguments of block-sparse attention, or of a site in some mode."""
    heads, q_len = query.shape[1:3]
    k_len = q_len if k_len is None else k_len
    kv_heads = max(heads // 2, 1)
    key = normal(2, kv_heads, k_len, 16, seed=1)
    value = normal(2, kv_heads, k_len, VALUE_DIM, seed=2)
    last = (*visibility.as_arguments().values(), softcap, normal(heads, seed=5) if sinks else None)
    if mode is None:
        blocks = (-(-q_len // 32), -(-k_len // 16))
        selection = random_selection(2, heads, *blocks, density=0.6, min_per_row=min(1, k_len))
        return (query, key, value, *selection, 0.3, 32, 16, *last)
    weights = (normal(heads, 16, 6, seed=3), normal(heads, 16, 6, seed=4))
    knobs = (torch.full((heads, 1), 0.6), torch.tensor(mode, dtype=torch.int8))
    gate = (0.3, "mean", "mean", 4, 8, 32, 16, "none", "top_p", [64], "site")
    return (query, key, value, *weights, *knobs, *gate, *last)


def operator_of(path):
    name = "block_sparse_attention" if path == "operator" else "gated_attention"
    return getattr(torch.ops.seer_compile, name).v1


def expected_strides(query, value_dim=VALUE_DIM):
    batch, heads, q_len, _ = query.shape
    if query.stride(1) > query.stride(2):
        return torch.empty(batch, heads, q_len, value_dim).stride()
    return torch.empty(batch, q_len, heads, value_dim).transpose(1, 2).stride()


def faked(values):
    mode = FakeTensorMode()
    return mode, [
        mode.from_tensor(value) if isinstance(value, torch.Tensor) else value for value in values
    ]


@every_layout
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("path", PATHS)
def test_fake_and_answer_lie_like_the_query(path, size, make):
    query = make(*SIZES[size], 16)
    if size == "usual":
        assert is_heads_first(query) is IS_HEADS_FIRST[make]
    operator, given = operator_of(path), arguments(query, **PATHS[path])
    out, _ = operator(*given)
    mode, pretended = faked(given)
    with mode:
        fake, _ = operator(*pretended)
    assert out.stride() == fake.stride() == expected_strides(query)
    plain, _ = operator(query.contiguous(), *given[1:])
    torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [heads_first, token_major])
@pytest.mark.parametrize("path", PATHS)
def test_an_answer_without_keys_lies_like_the_query(path, make):
    query = make(4, 80, 16)
    out, _ = operator_of(path)(*arguments(query, k_len=0, **PATHS[path]))
    assert out.stride() == expected_strides(query)
    assert (out == 0).all()


@pytest.mark.parametrize("make", [heads_first, token_major])
def test_slabs_of_rows_lie_like_the_query(make, monkeypatch):
    given = arguments(make(4, 200, 16), mode=2)
    whole, _ = operator_of("sparse")(*given)
    monkeypatch.setattr(gated_attention, "_SLAB_BYTES", 1)
    out, _ = operator_of("sparse")(*given)
    assert out.stride() == whole.stride() == expected_strides(given[0])
    torch.testing.assert_close(out, whole, rtol=1e-5, atol=1e-6)


@every_layout
@pytest.mark.parametrize("path", ["operator", "sparse", "dense", "soft-capped"])
def test_operators_pass_opcheck_in_every_layout(path, make):
    given = arguments(make(4, 80, 16), **PATHS[path])
    given = (*(tensor.detach().requires_grad_() for tensor in given[:3]), *given[3:])
    # A dense answer leaves its log-sum-exp as it finds the memory.
    compared = ("test_aot_dispatch_dynamic",) if path != "dense" else ()
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor", *compared)
    result = opcheck(operator_of(path), given, test_utils=utilities)
    assert set(result.values()) == {"SUCCESS"}


@every_layout
@pytest.mark.parametrize("path", ["operator", "sparse", "dense"])
def test_gradients_do_not_depend_on_the_layout(path, make):
    query = make(4, 80, 16)
    given = arguments(query, **PATHS[path])
    grad = normal(2, 4, 80, VALUE_DIM, seed=9)
    results = []
    for first, upstream in (
        (query, grad),
        (query.contiguous(), token_major(4, 80, VALUE_DIM).copy_(grad)),
    ):
        leaves = [first.detach().requires_grad_()]
        leaves += [tensor.detach().clone().requires_grad_() for tensor in given[1:3]]
        out, _ = operator_of(path)(*leaves, *given[3:])
        results.append(torch.autograd.grad(out, leaves, upstream))
    for ours, theirs in zip(*results, strict=True):
        assert ours.is_contiguous() or ours.stride() == query.stride()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def like_query(query, key, value, **_):
    """Answer in the query's layout, as flash attention and cuDNN do."""
    return torch.empty_like(query[..., : value.shape[3]]).fill_(0.5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("make", [heads_first, token_major, packed_tokens, packed_heads])
def test_a_dense_answer_in_the_layout_of_the_query_is_not_copied(make, size, monkeypatch):
    answers = []

    def answer(*operands, **rest):
        answers.append(like_query(*operands, **rest))
        return answers[-1]

    monkeypatch.setattr(gated_attention, "dense_attention", answer)
    query = make(*SIZES[size], 16)
    out, _ = operator_of("dense")(*arguments(query, mode=0))
    assert out.stride() == expected_strides(query)
    assert out.numel() == 0 or out.data_ptr() == answers[0].data_ptr()


@pytest.mark.parametrize("make", [heads_first, token_major, packed_tokens, packed_heads])
def test_what_sdpa_answers_on_the_cpu_is_not_copied(make, monkeypatch):
    answers, sdpa = [], F.scaled_dot_product_attention

    def attend(*operands, **rest):
        answers.append(sdpa(*operands, **rest))
        return answers[-1]

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    given = list(arguments(make(4, 80, 16), mode=0))
    given[2] = normal(2, 2, 80, 16, seed=2)
    out, _ = operator_of("dense")(*given)
    assert out.data_ptr() == answers[0].data_ptr()


@every_layout
def test_helpers_agree_and_copy_only_what_lies_otherwise(make):
    query, value = make(4, 80, 16), normal(2, 2, 80, VALUE_DIM)
    empty = empty_like_query(query, value)
    assert empty.stride() == expected_strides(query)
    assert laid_like_query(empty, query) is empty
    for other in (heads_first, token_major, packed_tokens, rows_of_a_cache):
        out = other(4, 80, VALUE_DIM, seed=3)
        laid = laid_like_query(out, query)
        assert laid.stride() == empty.stride()
        assert_bitwise_equal(laid, out)
        assert (laid is out) == (out.stride() == empty.stride())


VIEWS = {
    "heads first": ((2, 4, 80, 16), lambda x: x * 2),
    "token major": ((2, 80, 4, 16), lambda x: x.transpose(1, 2)),
    "packed tokens": ((2, 80, 3, 4, 16), lambda x: x[:, :, 1].transpose(1, 2)),
    "packed heads": ((2, 3, 4, 80, 16), lambda x: x[:, 1]),
    "rows of a cache": ((2, 4, 89, 16), lambda x: x[:, :, 5:]),
    "batch second": ((80, 2, 4, 16), lambda x: x.permute(1, 2, 0, 3)),
    "heads outermost": ((4, 2, 80, 16), lambda x: x.transpose(0, 1)),
    "expanded heads": ((2, 1, 80, 16), lambda x: x.expand(-1, 4, -1, -1)),
    "expanded tokens": ((2, 4, 1, 16), lambda x: x.expand(-1, -1, 80, -1)),
}


@pytest.mark.parametrize("view", VIEWS)
def test_the_layout_of_symbolic_sizes_needs_no_guard(view):
    shape, take = VIEWS[view]
    source = normal(*shape)
    taken = []

    def decide(source):
        query = take(source)
        guards = query.fake_mode.shape_env.guards
        before = len(guards)
        taken.append((is_heads_first(query), guards[before:]))
        return empty_like_query(query, query)

    traced = make_fx(decide, tracing_mode="symbolic")(source)
    assert taken == [(is_heads_first(take(source)), [])]
    (output,) = traced.graph.find_nodes(op="output")
    assert is_heads_first(output.args[0].meta["val"]) is is_heads_first(take(source))


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_graph_of_one_layout_does_not_answer_the_other(dynamic):
    operator = operator_of("sparse")
    torch._dynamo.reset()

    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=dynamic)
    def attend(query, *given):
        return operator(query, *given)[0] * 2

    for make in (*IS_HEADS_FIRST, *IS_HEADS_FIRST):
        given = arguments(make(4, 80, 16), mode=2)
        wanted = operator(*given)[0] * 2
        got = attend(*given)
        assert_bitwise_equal(got, wanted)
        assert got.stride() == wanted.stride()
    torch._dynamo.reset()


ROWS = {
    "heads first": lambda x, rows: x.index_select(2, rows),
    "token major": lambda x, rows: x.transpose(1, 2).index_select(1, rows).transpose(1, 2),
    "rows of a cache": lambda x, rows: x[:, :, : rows.shape[0]],
}


@pytest.mark.parametrize("layout", ROWS)
def test_a_length_that_the_data_decides_has_a_layout(layout):
    tensors = arguments(heads_first(4, 80, 16), mode=2)[:3]
    rest = arguments(tensors[0], mode=2)[3:]
    promised = []

    def attend(query, key, value, lengths):
        rows = torch.arange(lengths.sum().item())
        query, key, value = (ROWS[layout](tokens, rows) for tokens in (query, key, value))
        return torch.ops.seer_compile.gated_attention.v1(query, key, value, *rest)[0]

    def keep_promise(graph_module, _):
        (node,) = graph_module.graph.find_nodes(op="output")
        promised.append(is_heads_first(node.args[0][0].meta["example_value"]))
        return graph_module

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        torch._dynamo.reset()
        compiled = torch.compile(attend, backend=keep_promise, fullgraph=True)
        for length in (80, 33, 2, 1):
            lengths = torch.tensor([length - 1, 1])
            got, wanted = (function(*tensors, lengths) for function in (compiled, attend))
            assert_bitwise_equal(got, wanted)
            assert length == 1 or is_heads_first(got) is promised[-1]
        torch._dynamo.reset()
    assert promised == [layout != "token major"]


def test_the_typed_front_says_the_layout():
    from seer_compile.kernels import ops
    from seer_compile.types import BlockSize

    given = arguments(heads_first(4, 80, 16))
    out, _ = ops.block_sparse_attention(
        *given[:3], BlockSelection(*given[3:5]), block_size=BlockSize(query=32, key=16)
    )
    assert out.is_contiguous()
