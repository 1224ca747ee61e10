"""Function transforms become ordinary calls, which the mask proof understands."""

import pytest
import torch
import torch.nn.functional as F

from seer_compile.passes.capture import capture_graphs
from seer_compile.passes.open_transforms import open_transforms
from support.graphs import B, T, draw, qkv, trace
from support.mask_oracle import check_all, inspect


def over_queries_and_keys(function, tokens):
    positions = torch.arange(tokens)
    return torch.vmap(torch.vmap(function, (None, 0)), (0, None))(positions, positions)


def causal_mask(q, k, v):
    mask = over_queries_and_keys(lambda i, j: j <= i, q.shape[-2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def window_mask(q, k, v):
    mask = over_queries_and_keys(lambda i, j: (j <= i) & (j > i - 5), q.shape[-2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def padded_mask(q, k, v, readable):
    def visible(b, i, j):
        return (j <= i) & readable[b, j]

    items, positions = torch.arange(B), torch.arange(q.shape[-2])
    over = visible
    for place in ((None, None, 0), (None, 0, None), (0, None, None)):
        over = torch.vmap(over, place)
    mask = over(items, positions, positions)[:, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    ("function", "visibility"), [(causal_mask, "causal"), (window_mask, "causal + window(5)")]
)
def test_mask_written_for_one_query_and_key_is_proved(function, visibility, dynamic):
    inspected = inspect(function, *qkv(), dynamic=dynamic)
    assert inspected.verdicts == [visibility]
    assert check_all(inspected) == 1


def test_region_that_reads_an_input_is_traced_with_it():
    readable = torch.arange(B * T).view(B, T) % 5 > 0
    inspected = inspect(padded_mask, *qkv(), readable)
    graph_module = inspected.captured.graph_module
    own = [x.clone() for x in inspected.captured.inputs]
    assert torch.equal(graph_module(*own)[0], padded_mask(*qkv(), readable))
    assert check_all(inspected) == sum(isinstance(one, str) for one in inspected.verdicts)


def test_numbers_under_vmap_are_those_of_eager():
    def twice(x):
        halves = torch.vmap(lambda row: row.softmax(-1) * row.sum())(x)
        return halves, torch.vmap(torch.vmap(torch.dot))(x, halves)

    x = draw(3, 4, 5)
    (captured,) = capture_graphs(twice, (x,))
    for ours, plain in zip(captured.graph_module(x), twice(x), strict=True):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_random_numbers_under_vmap_are_drawn_as_in_eager(randomness):
    def noisy(x):
        return torch.vmap(lambda row: torch.rand(4) + row, randomness=randomness)(x)

    (captured,) = capture_graphs(noisy, (draw(3, 4),))
    torch.manual_seed(1)
    ours = captured.graph_module(draw(3, 4))[0]
    torch.manual_seed(1)
    assert torch.equal(ours, noisy(draw(3, 4)))


def test_derivatives_taken_by_the_program_are_those_of_eager():
    def derived(x):
        slope = torch.func.grad(lambda y: (y * y.sum()).tanh().sum())(x)
        rows = torch.vmap(torch.func.grad(lambda row: row.square().sum()))(x)
        return slope, rows, torch.func.jvp(torch.sin, (x,), (x,))[1]

    x = draw(3, 4)
    (captured,) = capture_graphs(derived, (x,))
    for ours, plain in zip(captured.graph_module(x), derived(x), strict=True):
        torch.testing.assert_close(ours, plain)


def test_gradients_under_vmap_are_those_of_eager():
    def scaled(x):
        return torch.vmap(lambda row: (row * row.sum()).tanh())(x)

    x = draw(3, 4).requires_grad_()
    (captured,) = capture_graphs(scaled, (x,))
    (ours,) = torch.autograd.grad(captured.graph_module(x)[0].sum(), x)
    (plain,) = torch.autograd.grad(scaled(x).sum(), x)
    torch.testing.assert_close(ours, plain)


def test_modules_and_constants_beside_a_region_stay():
    from torch.utils.checkpoint import checkpoint

    table = torch.tensor([1.0, 2.0, 4.0, 8.0])

    def beside(x):
        rows = torch.vmap(torch.sum)(x)[:, None]
        return checkpoint(torch.tanh, x * rows, use_reentrant=False) * torch.tensor([2.0]) + table

    x = draw(3, 4)
    (captured,) = capture_graphs(beside, (x,))
    torch.testing.assert_close(captured.graph_module(*captured.inputs)[0], beside(x))


def test_graph_without_transforms_is_returned_as_it_is():
    captured = trace(torch.relu, draw(2, 3))
    assert open_transforms(captured.graph_module) is captured.graph_module
