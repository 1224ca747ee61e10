"""A survey row says what ``explain`` would, in one line."""

import torch

from seer_compile.passes.survey import survey
from support.graphs import B, NanoAttention, SelfAttention, T, TwoLayers, draw


def test_row_counts_sites_and_names_masks():
    model = TwoLayers(NanoAttention(), NanoAttention(fused=True)).eval()
    row = survey(model, (draw(B, T, 32),), architecture="nano", spelling="mixed")
    assert (row.graphs, row.sites, row.sparse) == (1, 2, 2)
    assert (row.visible, row.reason) == ("causal", "")
    assert (row.architecture, row.spelling, row.situation) == ("nano", "mixed", "default")


def test_row_gives_the_reason_of_dense_sites_once():
    model = TwoLayers(SelfAttention(need_weights=True), SelfAttention(need_weights=True)).eval()
    row = survey(model, (draw(B, T, 32),), architecture="mha", spelling="weights")
    assert (row.sites, row.sparse) == (2, 0)
    assert row.reason.startswith("attention weights are used outside the site")


def test_row_spans_all_graphs_of_a_call():
    first, second = NanoAttention(fused=True).eval(), NanoAttention(fused=True).eval()

    def broken(x):
        x = first(x)
        torch._dynamo.graph_break()
        return second(x)

    row = survey(broken, (draw(B, T, 32),), architecture="nano", spelling="fused")
    assert (row.graphs, row.sites, row.sparse) == (2, 2, 2)
