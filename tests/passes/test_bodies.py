"""Regions with a body of their own: opened for the passes, closed again, with the same numbers."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from torch import nn
from torch.fx import GraphModule
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from seer_compile.passes import pipeline
from seer_compile.passes.capture import capture_export
from seer_compile.passes.gate_source import StoreGates
from seer_compile.passes.inline_bodies import REGION, inline_bodies
from seer_compile.passes.outline_bodies import outline_bodies
from seer_compile.passes.site_names import SiteNames
from support.models import Attention
from support.rewriting import answer_sparsely, new_store

GATED = torch.ops.seer_compile.gated_attention.v1
CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint


class Nested(nn.Module):
    """Checkpointed layers within a checkpointed block, between plain ones."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Attention(16, 2) for _ in range(3))

    def forward(self, x):
        def block(x):
            y = checkpoint(self.layers[0], x, use_reentrant=False)
            return self.layers[1](x + y)

        x = checkpoint(block, x, use_reentrant=False)
        return self.layers[2](x)


class Padded(nn.Module):
    """The mask is made outside of the checkpointed layer and arrives as a tensor."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x, lengths):
        place = torch.arange(x.shape[1])
        mask = (place[:, None] >= place)[None] & (place < lengths[:, None])[:, None]

        def attend(x, mask):
            parts = self.qkv(x).chunk(3, -1)
            q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in parts)
            return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)

        return checkpoint(attend, x, mask[:, None], use_reentrant=False)


def capture(model, *args, dynamic=None):
    """Dynamo's own graphs and their inputs."""
    seen = []

    def record(graph_module, example_inputs):
        seen.append((graph_module, list(example_inputs)))
        return graph_module.forward

    torch.compile(model, backend=record, dynamic=dynamic)(*args)
    (raw,) = seen
    return raw


def rewrite(graph_module, inputs, root=None, **options):
    store = new_store()
    result = pipeline.run(
        graph_module,
        names=SiteNames(root),
        gates=StoreGates(store),
        example_inputs=inputs,
        options=pipeline.PipelineOptions(**options),
    )
    answer_sparsely(store)
    return result


def calls(graph_module, target):
    """How many calls of ``target`` lie at which depth of bodies."""
    found = {}
    for path, module in graph_module.named_modules():
        if isinstance(module, GraphModule):
            number = sum(node.target is target for node in module.graph.nodes)
            if number:
                depth = path.count(".") + 1 if path else 0
                found[depth] = found.get(depth, 0) + number
    return found


def test_open_and_closed_again_the_graph_is_as_it_was():
    model, x = Nested(), torch.randn(1, 20, 16)
    raw, inputs = capture(model, x)
    before = raw.print_readable(print_output=False)
    opened = inline_bodies(raw)
    assert calls(opened, CHECKPOINT) == {}
    assert raw.print_readable(print_output=False) == before
    expected = raw(*inputs)
    assert torch.equal(opened(*inputs)[0], expected[0])
    outline_bodies(opened)
    assert calls(opened, CHECKPOINT) == calls(raw, CHECKPOINT) == {0: 1, 1: 1}
    assert torch.equal(opened(*inputs)[0], expected[0])
    assert not any(REGION in node.meta for node in opened.graph.nodes)


def test_graph_without_regions_is_handed_back():
    raw, _ = capture(Attention(16, 2), torch.randn(1, 20, 16))
    assert inline_bodies(raw) is raw
    assert outline_bodies(raw).rewritten == ()


def test_nested_sites_are_rewritten_in_their_bodies_under_their_names():
    model, x = Nested(), torch.randn(1, 200, 16)
    raw, inputs = capture(model, x)
    result = rewrite(raw, inputs, model)
    assert result.rewritten == ("layers.0", "layers.1", "layers.2")
    assert calls(result.graph_module, CHECKPOINT) == {0: 1, 1: 1}
    assert calls(result.graph_module, GATED) == {0: 1, 1: 1, 2: 1}
    assert calls(raw, GATED) == {}
    assert torch.allclose(result.graph_module(*inputs)[0], raw(*inputs)[0], atol=1e-5)


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_mask_from_outside_of_the_body_is_proved(dynamic):
    model, x = Padded(), torch.randn(2, 150, 16)
    raw, inputs = capture(model, x, torch.tensor([150, 90]), dynamic=dynamic)
    result = rewrite(raw, inputs, model)
    (summary,) = result.summaries
    assert (summary.decision, summary.visibility) == ("sparse", "causal + key padding")
    numbers = [int(i) if isinstance(i, torch.SymInt) else i for i in inputs]
    assert torch.allclose(result.graph_module(*numbers)[0], raw(*numbers)[0], atol=1e-5)


def test_gate_is_an_operand_of_the_region():
    """A weight that a body reads by itself would be saved and recomputed as a constant."""
    raw, inputs = capture(Nested(), torch.randn(1, 100, 16))
    module = rewrite(raw, inputs).graph_module
    for path, body in module.named_modules():
        if path and isinstance(body, GraphModule):
            assert not [n for n in body.graph.nodes if n.op == "get_attr" and "seer" in n.target]


def test_what_selective_checkpointing_saves_is_kept():
    def policy(_context, _target, *_args, **_kwargs):
        return CheckpointPolicy.MUST_SAVE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)

    class Selective(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Attention(16, 2)

        def forward(self, x):
            return checkpoint(self.layer, x, use_reentrant=False, context_fn=contexts)

    raw, inputs = capture(Selective(), torch.randn(1, 80, 16))
    module = rewrite(raw, inputs).graph_module
    (body,) = [m for path, m in module.named_modules() if path and isinstance(m, GraphModule)]
    (old,) = [m for path, m in raw.named_modules() if path and isinstance(m, GraphModule)]
    assert body.meta["_checkpoint_context_fn"] is old.meta["_checkpoint_context_fn"]


@pytest.mark.parametrize("kind", ["no_grad", "autocast"])
def test_regions_of_an_exported_graph_are_rewritten_and_kept(kind):
    class Region(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Attention(16, 2)

        def forward(self, x):
            region = (
                torch.no_grad()
                if kind == "no_grad"
                else torch.autocast("cpu", dtype=torch.bfloat16)
            )
            y = 2 * x
            with region:
                y = self.layer(y)
            return y + x

    model, x = Region(), torch.randn(1, 150, 16)
    captured = capture_export(model, (x,))
    kept = [n for n in captured.graph_module.graph.nodes if "wrap_with" in str(n.target)]
    result = rewrite(captured.graph_module, None)
    assert result.rewritten == ("layer",)
    assert calls(result.graph_module, GATED) == {1 if kept else 0: 1}
    after = [n for n in result.graph_module.graph.nodes if "wrap_with" in str(n.target)]
    assert [n.target for n in after] == [n.target for n in kept]
    got, expected = result.graph_module(x), model(x)
    assert got.dtype is expected.dtype
    assert torch.allclose(got, expected, atol=2e-2 if kind == "autocast" else 1e-5)


def test_branch_stays_closed_with_a_reason():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Attention(16, 2)

        def forward(self, x):
            return torch.cond(x.sum() > 0, self.layer, torch.clone, (x,))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        raw, inputs = capture(Branch(), torch.randn(1, 80, 16))
    result = rewrite(raw, inputs)
    assert result.graph_module is raw
    assert [site.reason for site in result.summaries] == [
        "inside a sub-graph (a branch, a loop, a shared body)"
    ]


def test_outputs_that_are_constants_or_operands_pass_through():
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Attention(16, 2)

        def forward(self, x):
            def body(x):
                return self.layer(x), x, 3, None

            y, same, number, _ = checkpoint(body, x, use_reentrant=False)
            return y * number + same

    model, x = Several(), torch.randn(1, 130, 16)
    raw, inputs = capture(model, x)
    module = rewrite(raw, inputs).graph_module
    assert torch.allclose(module(*inputs)[0], model(x), atol=1e-5)
