"""How a graph that looks like attention, and is not quite, is judged.

It must be left alone with the true reason, or understood exactly. The verdict is compared with what
the case expects; ``check_all`` runs whatever was proved against the real masks and the real output;
and the whole pipeline rewrites the graph, whose outputs must be those of the function.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from support.graphs import qkv, trace
from support.mask_oracle import check_all, inspect_graph
from support.rewriting import answer_sparsely, new_store, rewrite

NOT_FOUND: list[Any] = []
LIMIT = 1e-4
"""Largest difference, relative to the largest value; float32 accounts for a hundredth of it."""


@dataclass
class NearMisses:
    """Cases of one idea, by name: functions of query, key, value and what ``extra`` makes.

    Shapes: b=2, h=4, t=16, d=8.
    """

    cases: dict[str, tuple[Any, Any, dict[str, Any]]] = field(default_factory=dict)

    def __call__(self, expected, **options):
        """Register a function; ``expected`` is its verdict, or one per site in a list.

        A text is a visibility that is proved, a code a reason, ``NOT_FOUND`` no site at all.
        """

        def register(function):
            assert function.__name__ not in self.cases
            self.cases[function.__name__] = (function, expected, options)
            return function

        return register

    def parametrized(self):
        """Return the marks that run a test ``(name, dynamic)`` over all cases."""
        names = pytest.mark.parametrize("name", self.cases)
        sizes = [
            pytest.param(False, id="static"),
            pytest.param(True, id="dynamic", marks=pytest.mark.slow),
        ]
        return lambda test: names(pytest.mark.parametrize("dynamic", sizes)(test))

    def judge(self, name, dynamic):
        """Assert that a case is left alone or understood exactly."""
        function, expected, options = self.cases[name]
        inputs = qkv(
            options.get("tokens", 16),
            keys=options.get("keys"),
            heads=options.get("heads", 4),
            kv_heads=options.get("kv_heads"),
        )
        inputs = (*inputs, *options.get("extra", tuple)())
        inspected = inspect_graph(trace(function, *inputs, dynamic=dynamic))
        verdicts = expected if isinstance(expected, list) else [expected]
        assert inspected.verdicts == verdicts, f"{inspected.verdicts}, expected {verdicts}"
        proved = check_all(inspected)
        assert proved == sum(isinstance(one, str) for one in verdicts), f"{proved} sites proved"
        if proved:
            store = new_store()
            graph_module = rewrite(trace(function, *inputs, dynamic=dynamic), store).graph_module
            answer_sparsely(store)
            assert_same_results(graph_module, function, inputs)


def attend(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def positions(q, k):
    rows = torch.arange(q.shape[-2])[:, None]
    return rows, torch.arange(k.shape[-2])[None, :]


def assert_same_results(graph_module, function, inputs):
    """Outputs, and inputs changed in place, are the function's; a query without keys gets 0."""
    own, theirs = ([x.clone() for x in inputs] for _ in range(2))
    with torch.no_grad():
        torch.manual_seed(1)
        results = pytree.tree_leaves((graph_module(*own), own))
        torch.manual_seed(1)
        expected = pytree.tree_leaves((function(*theirs), theirs))
    for ours, plain in zip(results, expected, strict=True):
        if not isinstance(plain, Tensor):
            assert ours == plain
            continue
        assert (ours.shape, ours.dtype) == (plain.shape, plain.dtype)
        if not plain.dtype.is_floating_point:
            assert torch.equal(ours, plain)
            continue
        limit = LIMIT * plain.nan_to_num().abs().max().clamp(min=1.0)
        is_close = ((ours - plain).abs() <= limit) | (ours.isnan() & plain.isnan())
        assert bool((is_close | (ours == 0)).all()), (ours - plain).abs().max()
        assert bool((ours != 0).any()) or bool((plain.nan_to_num() == 0).all())
