"""replace_attention: the gated site's output comes from block-sparse attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from seer_compile.errors import PassError
from seer_compile.passes.insert_gates import insert_gates
from seer_compile.passes.node_builder import NodeBuilder
from seer_compile.passes.remove_dead import remove_dead
from seer_compile.passes.replace_attention import replace_attention
from seer_compile.passes.splice import splice, stride_order
from support.assertions import assert_ops, assert_unchanged
from support.graphs import qkv, sdpa_flag, trace
from support.rewriting import (
    OPS,
    assert_equal_within_rounding,
    new_store,
    plan_of,
    source,
)

aten = torch.ops.aten
SPARSE = OPS.block_sparse_attention.v1


def replaced(function, *inputs, dynamic=False, mass=1.0):
    captured, store = trace(function, *inputs, dynamic=dynamic), new_store(mass)
    decided = plan_of(captured)
    insert_gates(captured.graph_module, decided, source(store))
    result = replace_attention(captured.graph_module, decided)
    remove_dead(captured.graph_module)
    captured.graph_module.graph.lint()
    captured.graph_module.recompile()
    return captured, store, decided, result


def test_replace_attention_takes_the_place_of_the_fused_call():
    captured, _, _, result = replaced(sdpa_flag, *qkv())
    assert result.rewritten == ("<root>",)
    assert_ops(captured.graph_module, {SPARSE: 1, aten.scaled_dot_product_attention.default: 0})


def test_replace_attention_takes_the_place_of_a_written_out_softmax():
    def written_out(q, k, v):
        hidden = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1)
        scores = (q @ k.mT * 0.25).masked_fill(hidden, float("-inf"))
        return F.dropout(scores.softmax(-1), 0.1, training=False) @ v

    captured, *_ = replaced(written_out, *qkv())
    assert_ops(
        captured.graph_module,
        {SPARSE: 1, aten.matmul.default: 0, aten.softmax.int: 0, aten.dropout.default: 0},
    )


def test_replace_attention_leaves_a_site_without_selection():
    captured = trace(sdpa_flag, *qkv())
    decided = plan_of(captured)
    with assert_unchanged(captured.graph_module):
        assert replace_attention(captured.graph_module, decided).rewritten == ()


def test_replace_attention_leaves_a_graph_without_sites_unchanged():
    captured = trace(lambda x: x.relu() + 1, torch.randn(3))
    with assert_unchanged(captured.graph_module):
        assert replace_attention(captured.graph_module, plan_of(captured)).rewritten == ()


def test_replace_attention_twice_replaces_once():
    captured, store = trace(sdpa_flag, *qkv()), new_store()
    decided = plan_of(captured)
    insert_gates(captured.graph_module, decided, source(store))
    assert replace_attention(captured.graph_module, decided).rewritten == ("<root>",)
    assert replace_attention(captured.graph_module, decided).rewritten == ()
    assert_ops(captured.graph_module, {SPARSE: 1})


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("dynamic", [False, True])
def test_full_budget_reproduces_dense_attention(tokens, dynamic):
    traced_with = qkv(tokens=100) if dynamic else qkv(tokens=tokens)
    captured, _, decided, _ = replaced(sdpa_flag, *traced_with, dynamic=dynamic)
    q, k, v = qkv(tokens=tokens)
    if not decided.sparse:
        assert tokens == 1
        return
    eager = sdpa_flag(q, k, v)
    exact = sdpa_flag(q.double(), k.double(), v.double())
    assert_equal_within_rounding(captured.graph_module(q, k, v), exact, eager)


def tokens_first(x):
    return F.scaled_dot_product_attention(x, x, x).transpose(1, 2).flatten(2)


def heads_first(x):
    return F.scaled_dot_product_attention(x, x, x).contiguous().view(2, -1)


def written_tokens_first(x):
    weights = torch.einsum("bqhd,bkhd->bhqk", x, x).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, x).flatten(2)


@pytest.mark.parametrize("function", [tokens_first, heads_first, written_tokens_first])
def test_views_after_the_site_stay_legal(function):
    x = torch.randn(2, 16, 4, 8) if function is written_tokens_first else qkv()[0]
    expected = function(x)
    captured, *_ = replaced(function, x)
    assert torch.allclose(captured.graph_module(x), expected, atol=1e-6)


def token_major(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def written_out(q, k, v):
    return (q @ k.mT).softmax(-1) @ v


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("function", "lay", "order", "copies"),
    [
        (sdpa_flag, torch.clone, (0, 1, 2, 3), 0),
        (sdpa_flag, token_major, (0, 2, 1, 3), 0),
        (written_out, torch.clone, (0, 1, 2, 3), 0),
        (written_out, token_major, (0, 1, 2, 3), 1),
    ],
)
def test_stride_order_of_the_replaced_node_is_kept(function, lay, order, copies, dynamic):
    """``contiguous`` of a contiguous tensor leaves a bare view in the trace.

    The operator answers in the order of its query, so a copy restores the traced one only where
    the former attention answered otherwise.
    """
    q, k, v = qkv()
    captured, _, decided, _ = replaced(function, lay(q), k, v, dynamic=dynamic)
    assert stride_order(decided.sparse[0].site.output.meta["val"]) == order
    assert stride_order(captured.graph_module(lay(q), k, v)) == order
    assert_ops(captured.graph_module, {SPARSE: 1, aten.clone.default: copies})


def test_splice_refuses_another_shape_or_dtype():
    captured, store = trace(sdpa_flag, *qkv()), new_store()
    del store
    (site,) = (decision.site for decision in plan_of(captured).sparse)
    builder = NodeBuilder(captured.graph_module, site.output, site.name)
    shorter = builder.call(aten.slice.Tensor, site.query.node, 2, 0, 3)
    halved = builder.call(aten.to.dtype, site.query.node, torch.float16)
    for wrong in (shorter, halved):
        with pytest.raises(PassError, match="replacement of <root>"):
            splice(builder, site, wrong)


def test_smaller_budget_changes_the_result():
    captured, store, *_ = replaced(sdpa_flag, *qkv(tokens=400))
    q, k, v = qkv(tokens=400)
    full = captured.graph_module(q, k, v)
    with torch.no_grad():
        store.get("<root>").budget.fill_(0.2)
    assert (captured.graph_module(q, k, v) - full).abs().max() > 1e-3


def test_a_stride_that_equal_sizes_divide_by_nothing_is_ordered():
    import sympy
    from torch.fx.experimental.sym_node import SymNode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv
    from torch.utils._sympy.functions import FloorDiv

    from seer_compile.passes.splice import _measure

    first, second = sympy.symbols("s0 s1", integer=True, positive=True)
    for divisor in (first - second, second - first):
        node = SymNode(FloorDiv(64 * first, divisor), ShapeEnv(), int, 5)
        assert isinstance(_measure(torch.SymInt(node)), int)
