"""Whether what was found and proved is what the graph computes, by running the graph.

``inspect`` captures a function, finds its sites and proves their masks. ``check_site`` runs the
captured graph on real inputs and compares, for one proved site: the keys that the real masks leave
visible with those of the proof, exactly; and the site's output with attention computed from the
site's operands and the proof alone.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from seer_compile.passes.capture import CapturedGraph, capture_graphs
from seer_compile.passes.constant_tensors import module_constants
from seer_compile.passes.find_sites import find_sites
from seer_compile.passes.materialise import materialise
from seer_compile.passes.prove_masks import prove_masks
from seer_compile.passes.site_names import SiteNames
from seer_compile.types import AttentionSite, MaskProof, Visibility

HIDING = -1e4
STANDARD_AXES = (("b",), ("h",), ("q",), ("k",))


@dataclass
class Inspected:
    """The sites of one captured graph."""

    captured: CapturedGraph
    sites: tuple[AttentionSite, ...]
    proofs: tuple[MaskProof, ...]

    @property
    def rows(self):
        return list(zip(self.sites, self.proofs, strict=True))

    @property
    def verdicts(self):
        """Per site: the visibility in words, or why it stays dense."""
        return [verdict(site, proof) for site, proof in self.rows]


def verdict(site, proof):
    if site.obstacles:
        return site.obstacles[0].code
    return proof.reason.code if proof.visibility is None else proof.visibility.describe()


def inspect_graph(captured, root=None):
    graph_module = captured.graph_module
    sites = find_sites(graph_module, SiteNames(root))
    constants = module_constants(graph_module, captured.inputs, root)
    return Inspected(captured, sites, prove_masks(graph_module, sites, constants))


def inspect(model, *args, dynamic=None, **kwargs):
    """Inspect the only graph of a call."""
    graphs = inspect_graphs(model, *args, dynamic=dynamic, **kwargs)
    assert len(graphs) == 1, f"{len(graphs)} graphs"
    return graphs[0]


def inspect_graphs(model, *args, dynamic=None, **kwargs):
    """Inspect every graph of a call."""
    root = model if isinstance(model, torch.nn.Module) else None
    with torch.no_grad():
        graphs = capture_graphs(model, args, kwargs, dynamic=dynamic)
    return [inspect_graph(graph, root) for graph in graphs]


class _Recorder(Interpreter):
    """Keeps a copy of every value as it was when its node had run.

    The operands of a site are copied when its output is about to run: that is when a rewritten
    site reads them.
    """

    def __init__(self, graph_module, operands):
        super().__init__(graph_module, garbage_collect_values=False)
        self.values = {}
        self.operands = operands
        self.read = {}

    def run_node(self, n):
        for name in self.operands.get(n.name, ()):
            (node,) = [node for node in self.env if node.name == name]
            self.read[n.name, name] = self.env[node].clone()
        value = super().run_node(n)
        self.values[n.name] = value.clone() if isinstance(value, Tensor) else value
        return value


def check_all(inspected):
    """Check every site that may be rewritten; return how many there are."""
    proved = [
        (site, proof)
        for site, proof in inspected.rows
        if not site.obstacles and proof.visibility is not None
    ]
    visibilities = [
        materialise(proof, site, inspected.captured.graph_module.graph) for site, proof in proved
    ]
    graph_module = inspected.captured.graph_module
    graph_module.graph.lint()
    operands = {
        site.output.name: [
            x.node.name for x in (site.query, site.key, site.value, site.sinks) if x is not None
        ]
        for site, _ in proved
    }
    recorder = _Recorder(GraphModule(graph_module, graph_module.graph), operands)
    with torch.no_grad():
        inputs = [_concrete(x) for x in inspected.captured.inputs]
        recorder.run(*inputs)

    def value(item):
        return recorder.values[item.name] if isinstance(item, Node) else item

    for (site, _), visibility in zip(proved, visibilities, strict=True):

        def operand(item, output=site.output.name):
            return _replay(recorder.read[output, item.node.name], item.steps)

        check_site(site, visibility, value, operand)
    return len(proved)


def check_site(site, visibility, value, operand):
    fields = {name: value(item) for name, item in visibility.as_arguments().items()}
    query, key, val = (operand(x) for x in (site.query, site.key, site.value))
    b, h, q, _ = query.shape
    k = key.shape[2]
    assert (h, key.shape[1], query.shape[3]) == (site.heads, site.kv_heads, site.head_dim)
    readable = readable_keys(Visibility(**fields), b, q, k)
    if all(term.axes == STANDARD_AXES for term in site.mask_terms):
        real = real_mask(site, value, (b, h, q, k))
        assert torch.equal(real, readable[:, None].expand(b, h, q, k)), site.name
    group = h // site.kv_heads
    key, val = (x.repeat_interleave(group, 1).double() for x in (key, val))
    logits = query.double() @ key.mT * site.scale
    if site.softcap is not None:
        logits = site.softcap * torch.tanh(logits / site.softcap)
    logits = logits.masked_fill(~readable[:, None], float("-inf"))
    has_key = readable.any(-1)[:, None, :, None]
    if site.sinks is not None:
        sinks = operand(site.sinks)
        assert sinks.shape == (h,)
        column = sinks.double()[:, None, None].expand(b, h, q, 1)
        logits, has_key = torch.cat([logits, column], -1), torch.ones_like(has_key)
    out = logits.softmax(-1).nan_to_num()[..., :k] @ val
    expected = value(site.output).double()
    rows = has_key.expand_as(out)
    out, rows = (_replay(x, site.output_steps) for x in (out, rows))
    assert out.shape == expected.shape
    error = (out - expected).where(rows, 0.0).abs().max()
    limit = 2e-2 if value(site.output).dtype is torch.bfloat16 else 1e-4
    assert error <= limit, f"{site.name}: {error}"


def readable_keys(visibility, b, q, k):
    """The boolean matrix that a visibility means, written down from its definition."""
    distance = torch.arange(k) - torch.arange(q)[:, None]
    shift = 0 if visibility.offset is None else int(visibility.offset)
    readable = torch.ones(b, q, k, dtype=torch.bool)
    if visibility.upper is not None:
        readable &= distance <= int(visibility.upper) + shift
    if visibility.lower is not None:
        readable &= distance >= int(visibility.lower) + shift
    if visibility.key_padding is not None:
        assert visibility.key_padding.shape == (b, k)
        assert visibility.key_padding.dtype is torch.bool
        readable &= visibility.key_padding[:, None]
    if visibility.key_documents is not None:
        assert visibility.query_documents.shape == (b, q)
        assert visibility.key_documents.shape == (b, k)
        readable &= visibility.query_documents[:, :, None] == visibility.key_documents[:, None]
    return readable


def real_mask(site, value, shape):
    """What the graph's own masks leave visible."""
    visible = torch.ones(shape, dtype=torch.bool)
    if site.is_causal:
        visible &= torch.ones(shape[-2:], dtype=torch.bool).tril()
    for term in site.mask_terms:
        mask = value(term.node)
        if term.kind == "masked_fill":
            visible &= ~mask
        elif term.kind == "where" or (term.kind == "attn_mask" and mask.dtype is torch.bool):
            visible &= mask
        else:
            bias = mask.double() * term.factor
            assert bool(((bias == 0) | (bias <= HIDING)).all()), "a bias was taken for a mask"
            visible &= bias == 0
    return visible


def _replay(tensor, steps) -> Any:
    for step in steps:
        tensor = step.target(tensor, *step.arguments)
    return tensor


@contextlib.contextmanager
def fused_layers_off():
    """Let ``nn.TransformerEncoderLayer`` run its parts."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _concrete(value):
    """An input that a run may change, with its real size where it is symbolic."""
    return value.clone() if isinstance(value, Tensor) else int(value)
