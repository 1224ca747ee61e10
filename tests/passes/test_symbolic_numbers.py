"""Numbers that dynamic capture makes symbolic are still the numbers of the model."""

import pytest
import torch
from torch import nn

from seer_compile.passes.capture import capture_graphs
from seer_compile.passes.find_sites import find_sites
from seer_compile.passes.site_names import SiteNames
from support.graphs import B, D, T, causal, draw
from support.mask_oracle import check_all, inspect_graph


class Weighted(nn.Module):
    """Bloom's product of logits: both weights are attributes, which Dynamo reads as inputs."""

    def __init__(self, product):
        super().__init__()
        self.product, self.alpha, self.beta = product, 0.25, 1.0

    def forward(self, q, k, v):
        hidden = torch.zeros(()).masked_fill(~causal(q, k), -1e9).expand(B, T, T)
        if self.product == "baddbmm":
            logits = hidden.baddbmm(q, k.mT, beta=self.beta, alpha=self.alpha)
        else:
            logits = torch.add(self.alpha * torch.bmm(q, k.mT), hidden, alpha=self.beta)
        return torch.bmm(logits.softmax(-1), v)


@pytest.mark.parametrize("product", ["baddbmm", "add"])
def test_symbolic_weights_of_logits_are_read(product):
    inputs = [draw(B, T, D, seed=seed) for seed in range(3)]
    module = Weighted(product)
    with torch.no_grad():
        (captured,) = capture_graphs(module, inputs, {}, dynamic=True)
    (site,) = find_sites(captured.graph_module, SiteNames(module))
    assert not site.obstacles
    assert site.scale == 0.25
    assert check_all(inspect_graph(captured, module)) == 1
