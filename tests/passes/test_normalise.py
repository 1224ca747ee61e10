"""Normalised graphs compute the same, in ATen calls, with metadata kept."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

from seer_compile.passes.capture import capture_export, capture_graphs
from seer_compile.passes.inline_bodies import inline_bodies
from seer_compile.passes.normalise import normalise
from seer_compile.passes.outline_bodies import outline_bodies
from support.graphs import B, NanoAttention, SelfAttention, T, draw, encoder_layer, left_padding
from support.mask_oracle import fused_layers_off

SDPA = torch.ops.aten.scaled_dot_product_attention.default


def capture_raw(model, *args, dynamic=None, **kwargs):
    """Return Dynamo's own graph, its inputs, and the result of the call."""
    seen = []

    def record(graph_module, example_inputs):
        seen.append((graph_module, list(example_inputs)))
        return graph_module.forward

    result = torch.compile(model, backend=record, dynamic=dynamic)(*args, **kwargs)
    (raw,) = seen
    return *raw, result


def targets(graph_module):
    return [node.target for node in graph_module.graph.nodes if node.op == "call_function"]


def run(graph_module, inputs):
    return graph_module(*[x if isinstance(x, torch.Tensor) else int(x) for x in inputs])


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_graph_computes_the_same_in_aten_calls(dynamic):
    model = NanoAttention().eval()
    raw, inputs, expected = capture_raw(model, draw(B, T, 32), dynamic=dynamic)
    fresh = normalise(raw, inputs)
    torch.testing.assert_close(run(fresh, inputs)[0], expected, rtol=0, atol=0)
    calls = [node for node in fresh.graph.nodes if node.op == "call_function"]
    is_aten = [isinstance(node.target, torch._ops.OpOverload) for node in calls]
    assert sum(is_aten) >= len(calls) - sum("getitem" in str(n.target) for n in calls) - 4
    assert all("val" in node.meta for node in calls)


def test_placeholders_keep_their_order_and_origin():
    raw, inputs, _ = capture_raw(NanoAttention().eval(), draw(B, T, 32))
    old = [node for node in raw.graph.nodes if node.op == "placeholder"]
    new = [node for node in normalise(raw, inputs).graph.nodes if node.op == "placeholder"]
    assert [node.meta["original_name"] for node in new] == [node.name for node in old]
    assert [node.meta.get("grapharg") for node in new] == [n.meta.get("grapharg") for n in old]


def test_symbolic_sizes_stay_the_same_symbols():
    raw, inputs, _ = capture_raw(NanoAttention().eval(), draw(B, T, 32), dynamic=True)
    fresh = normalise(raw, inputs)
    old = {
        str(n.meta["example_value"])
        for n in raw.graph.nodes
        if "example_value" in n.meta and isinstance(n.meta["example_value"], torch.SymInt)
    }
    new = {
        str(n.meta["val"])
        for n in fresh.graph.nodes
        if n.op == "placeholder" and isinstance(n.meta["val"], torch.SymInt)
    }
    assert old
    assert new == {name for name in old if name in new}
    assert any(
        isinstance(size, torch.SymInt)
        for n in fresh.graph.nodes
        if n.target is torch.ops.aten.softmax.int
        for size in n.meta["val"].shape
    )


def test_module_stacks_are_kept():
    raw, inputs, _ = capture_raw(SelfAttention().eval(), draw(B, T, 32))
    (site,) = [node for node in normalise(raw, inputs).graph.nodes if node.target is SDPA]
    (path, kind) = list(site.meta["nn_module_stack"].values())[-1]
    assert path.endswith("attention")
    assert kind is nn.MultiheadAttention


def test_original_graph_module_is_left_alone():
    raw, inputs, _ = capture_raw(NanoAttention().eval(), draw(B, T, 32))
    before, names = str(raw.graph), sorted(dict(raw.named_modules()))
    fresh = normalise(raw, inputs)
    assert fresh is not raw
    assert str(raw.graph) == before
    assert sorted(dict(raw.named_modules())) == names


def test_normalising_twice_gives_the_same_graph():
    raw, inputs, _ = capture_raw(NanoAttention().eval(), draw(B, T, 32))
    assert targets(normalise(raw, inputs)) == targets(normalise(raw, inputs))


def test_grad_mode_inside_the_graph_does_not_leak():
    def toggles(x):
        with torch.no_grad():
            y = x * 2
        return y + x

    raw, inputs, _ = capture_raw(toggles, draw(4).requires_grad_())
    with torch.enable_grad():
        fresh = normalise(raw, inputs)
        assert torch.is_grad_enabled()
    assert torch._C._set_grad_enabled in targets(fresh)


def test_autocast_region_has_true_dtypes_and_does_not_leak():
    def region(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = x @ x
        return y, x @ x

    raw, inputs, expected = capture_raw(region, draw(8, 8))
    fresh = normalise(raw, inputs)
    products = [n for n in fresh.graph.nodes if n.target is torch.ops.aten.matmul.default]
    assert [n.meta["val"].dtype for n in products] == [torch.bfloat16, torch.float32]
    assert not torch.is_autocast_enabled("cpu")
    for actual, wanted in zip(run(fresh, inputs), expected, strict=True):
        assert actual.dtype is wanted.dtype
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0)


def test_failure_inside_an_autocast_region_does_not_leak():
    def region(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return x @ x

    raw, inputs, _ = capture_raw(region, draw(8, 8))
    (product,) = [n for n in raw.graph.nodes if "matmul" in str(n.target)]
    product.target = lambda *_: 1 / 0
    with pytest.raises((RuntimeError, ZeroDivisionError)):
        normalise(raw, inputs)
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize(
    "options",
    [{}, {"norm_first": True}, {"activation": "gelu"}],
    ids=["post-norm", "pre-norm", "gelu"],
)
def test_fused_encoder_layer_is_written_out_exactly(options, masked):
    model = encoder_layer(**options).eval()
    x = draw(B, T, 32)
    kwargs = {"src_key_padding_mask": left_padding() == 0} if masked else {}
    with torch.no_grad():
        raw, inputs, _ = capture_raw(model, x, **kwargs)
        assert any("transformer_encoder_layer" in str(target) for target in targets(raw))
        fresh = normalise(raw, inputs)
        with fused_layers_off():
            expected = model(x, **kwargs)
    assert SDPA in targets(fresh)
    actual = run(fresh, inputs)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_fused_encoder_layer_with_a_mask_of_positions_is_written_out_exactly():
    model = encoder_layer().eval()
    x = draw(B, T, 32)
    mask = torch.ones(T, T, dtype=torch.bool).triu(1)
    with torch.no_grad():
        raw, inputs, expected = capture_raw(model, x, src_mask=mask)
        fresh = normalise(raw, inputs)
    torch.testing.assert_close(run(fresh, inputs)[0], expected, rtol=1e-5, atol=1e-5)


def test_checkpointed_body_is_normalised_in_place_and_checkpointed_again():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = NanoAttention(fused=True)

        def forward(self, x):
            return checkpoint(self.layer, x, use_reentrant=False)

    model = Checkpointed().eval()
    x = draw(B, T, 32).requires_grad_()
    raw, inputs, _ = capture_raw(model, x)
    fresh = normalise(inline_bodies(raw), inputs)
    operator = torch.ops.higher_order.tag_activation_checkpoint
    assert SDPA in targets(fresh)
    assert operator not in targets(fresh)
    outline_bodies(fresh)
    assert operator in targets(fresh)
    bodies = [m for m in fresh.modules() if isinstance(m, GraphModule) and m is not fresh]
    assert [SDPA in targets(body) for body in bodies] == [True]
    for module in (*raw.modules(), *fresh.modules()):
        assert "_checkpoint_context_fn" not in getattr(module, "meta", {})
    expected = torch.autograd.grad(model(x).sum(), x)[0]
    actual = torch.autograd.grad(run(fresh, inputs)[0].sum(), x)[0]
    torch.testing.assert_close(actual, expected)


def test_every_graph_of_a_broken_call_is_captured():
    def broken(x):
        y = x + 1
        torch._dynamo.graph_break()
        return y * 2

    graphs = capture_graphs(broken, (draw(3),))
    assert [targets(graph.graph_module) for graph in graphs] == [
        [torch.ops.aten.add.Tensor],
        [torch.ops.aten.mul.Tensor],
    ]


def test_model_may_be_captured_many_times():
    counts = [len(capture_graphs(NanoAttention().eval(), (draw(B, T, 32),))) for _ in range(12)]
    assert counts == [1] * 12


def test_exported_graph_keeps_the_fused_call():
    captured = capture_export(NanoAttention(fused=True).eval(), (draw(B, T, 32),))
    assert SDPA in targets(captured.graph_module)


def test_graph_without_traced_values_is_given_its_own():
    def product(x):
        return F.relu(x @ x)

    fresh = normalise(torch.fx.symbolic_trace(product), [draw(3, 3)])
    assert targets(fresh) == [torch.ops.aten.matmul.default, torch.ops.aten.relu.default]
