"""Site graphs say what feeds what, and are written in every format."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from seer_compile.errors import SeerInputError
from seer_compile.passes.capture import capture_graphs
from seer_compile.passes.mutation import Mutations
from seer_compile.passes.plan import plan
from seer_compile.passes.site_graph import draw_sites, site_graph
from support.graphs import B, NanoAttention, T, TwoLayers, draw, qkv, trace
from support.mask_oracle import inspect_graph


class CrossAttention(nn.Module):
    """An encoder site whose output is read as keys by two decoder sites."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = NanoAttention(fused=True), nn.Module()

    def forward(self, x, y):
        memory = x + self.encoder(x)
        keys = memory.view(B, T, 4, 8).transpose(1, 2)
        for _ in range(2):
            queries = y.view(B, T, 4, 8).transpose(1, 2)
            out = F.scaled_dot_product_attention(queries, keys, keys)
            y = y + out.transpose(1, 2).reshape(B, T, 32)
        return y


def planned(model, *args):
    (captured,) = capture_graphs(model, args)
    inspected = inspect_graph(captured, model)
    return captured.graph_module, plan(inspected.sites, inspected.proofs)


def edges(graph):
    labels = dict(graph.nodes(data="label"))
    return {(labels[a], labels[b]): roles for a, b, roles in graph.edges(data="roles")}


def test_layers_in_a_row_feed_each_other():
    graph = site_graph(*planned(TwoLayers(NanoAttention(), NanoAttention()), draw(B, T, 32)))
    reads = ["query", "key", "value"]
    assert edges(graph) == {
        ("input", "layers.0"): reads,
        ("layers.0", "layers.1"): reads,
        ("layers.1", "output"): ["result"],
    }


def test_cross_attention_shows_where_its_keys_come_from():
    graph = site_graph(*planned(CrossAttention(), draw(B, T, 32), draw(B, T, 32, seed=1)))
    found = edges(graph)
    assert found["encoder", "<root>"] == ["key", "value"]
    assert found["encoder", "<root>#1"] == ["key", "value"]
    assert found["<root>", "<root>#1"] == ["query"]
    assert found["input", "<root>"] == ["query"]


@pytest.mark.parametrize("suffix", [".dot", ".gv", ".json", ".png", ".svg"])
def test_drawing_is_written_in_the_format_of_its_suffix(tmp_path, suffix):
    if suffix in (".png", ".svg"):
        pytest.importorskip("matplotlib")
    path = tmp_path / f"sites{suffix}"
    draw_sites([planned(TwoLayers(NanoAttention(), NanoAttention()), draw(B, T, 32))], path)
    content = path.read_bytes()
    if suffix == ".json":
        labels = [vertex["label"] for vertex in json.loads(content)["nodes"]]
        assert labels == ["input", "layers.0", "layers.1", "output"]
    elif suffix in (".dot", ".gv"):
        assert content.startswith(b"digraph")
        assert b"layers.1" in content
    else:
        assert content[:4] == b"\x89PNG" or b"<svg" in content


def test_several_graphs_share_one_drawing(tmp_path):
    pair = planned(NanoAttention(), draw(B, T, 32))
    draw_sites([pair, pair], tmp_path / "sites.json")
    vertices = json.loads((tmp_path / "sites.json").read_text())["nodes"]
    assert len(vertices) == len({vertex["id"] for vertex in vertices}) == 6


def test_unknown_format_is_refused(tmp_path):
    with pytest.raises(SeerInputError, match="draw="):
        draw_sites([], tmp_path / "sites.txt")


def test_writes_are_seen_through_views_and_only_between_the_nodes():
    def writes(q, k, v):
        x = q + 0
        y = x * 2
        x[:, 0].zero_()
        return y, x + k, v

    graph = trace(writes, *qkv()).graph_module.graph
    mutations = Mutations(graph)
    nodes = {node.name: node for node in graph.nodes}
    x, y, after = nodes["add"], nodes["mul"], nodes["add_1"]
    assert mutations.writer_between(x, x, y) is None
    assert mutations.writer_between(x, x, after) is nodes["zero_"]
    assert mutations.writer_between(y, y, after) is None
    assert mutations.is_written(x)
    assert not mutations.is_written(y)
    assert torch.ops.aten.zero_ is nodes["zero_"].target.overloadpacket
