"""The backward of the Hopper engine on a played multiprocessor; by ``test_interpreted.py``."""

# ruff: noqa: E402

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[3] / "benchmarks")]

from interpreter import patch_interpreter

patch_interpreter()

from gluon_language import PlayedKernel
from kernels_cases import FP16, Draw
from kernels_checks import (
    _check_gradient,
    _poison_unread,
    recomputed_gradients,
    reference_attention,
)

from seer_compile.kernels.triton import (
    attention_backward,
    attention_forward,
    hopper_attention,
    hopper_backward,
    hopper_key_gradient,
    hopper_key_steps,
    hopper_launch,
    hopper_query_gradient,
    hopper_query_steps,
    hopper_steps,
    hopper_tiles,
    hopper_warps,
)
from seer_compile.kernels.triton.tuning import HopperKeyTiling, HopperQueryTiling
from seer_compile.types import BlockSelection, Visibility

MODULES = (
    hopper_tiles,
    hopper_steps,
    hopper_warps,
    hopper_launch,
    hopper_attention,
    hopper_query_steps,
    hopper_key_steps,
    hopper_query_gradient,
    hopper_key_gradient,
    hopper_backward,
)
KERNELS = {
    name: getattr(hopper_backward, name)
    for name in ("query_gradient_kernel", "key_gradient_kernel")
}
NAMES = ("dquery", "dkey", "dvalue")
_documents = {
    f"{name}_documents": (torch.arange(length) * 3 // length)[None]
    for name, length in (("query", 300), ("key", 430))
}

# heads, key heads, selections; blocks; dim; memory layout; rules
CASES = {
    "ahead, shared": (
        ((4, 2, 2), (64, 64), 64, "tokens first", {}),
        HopperQueryTiling(2, 4, 3, 1, 2, 1, 168),
        HopperKeyTiling(2, 8, 128),
    ),
    "ahead, alone": (
        ((4, 2, 4), (64, 64), 64, "fused", {"lower": -150}),
        HopperQueryTiling(1, 3, 2, 2, 2, 2, 128),
        HopperKeyTiling(3, 2, 128),
    ),
    "last product beside": (
        ((2, 1, 2), (128, 128), 128, "heads first", {}),
        HopperQueryTiling(1, 2, 1, 2, 1, 2, 128),
        HopperKeyTiling(1, 3, 128),
    ),
    "one after the other": (
        ((4, 1, 1), (128, 64), 64, "heads first", {"lower": -200}),
        HopperQueryTiling(2, 1, 1, 0, 0, 1, 168),
        HopperKeyTiling(2, 2, 128),
    ),
    "padding": (
        ((4, 2, 2), (64, 64), 64, "heads first", {"key_padding": (torch.arange(430) < 350)[None]}),
        HopperQueryTiling(2, 4, 3, 1, 2, 1, 168),
        HopperKeyTiling(2, 2, 128),
    ),
    "documents": (
        ((4, 2, 4), (64, 64), 64, "heads first", _documents),
        HopperQueryTiling(1, 3, 2, 1, 2, 2, 128),
        HopperKeyTiling(2, 8, 128),
    ),
}


@pytest.fixture
def play(monkeypatch):
    """Return a function that runs one call on the played machine, with a seed for its events."""
    monkeypatch.setattr(hopper_backward, "multiprocessors", lambda device: 2)

    def run(name, inputs, seed):
        for kernel, function in KERNELS.items():
            monkeypatch.setattr(hopper_backward, kernel, PlayedKernel(function, MODULES, seed))
        _, query_tiling, key_tiling = CASES[name]
        tensors = [inputs[kind] for kind in ("query", "key", "value")]
        rest = (*inputs["selection"], inputs["scale"], *inputs["blocks"])
        rules = inputs["visibility"].as_arguments()
        out, lse = attention_forward.launch(*tensors, *rest, **rules)
        arguments = (inputs["grad_out"], *tensors, out, lse, *rest)
        tilings = {"query_tiling": query_tiling, "key_tiling": key_tiling}
        return (
            hopper_backward.launch(*arguments, **rules, **tilings),
            attention_backward.launch(*arguments, **rules),
        )

    return run


def make_inputs(name, seed, q_len=300, k_len=430, share=0.7):
    """Draw inputs with many tiles in each list, so that the rings turn several times."""
    (heads, blocks, dim, layout, rules), _, _ = CASES[name]
    draw = Draw(17, seed)
    shape = (1, heads[2], -(-q_len // blocks[0]), -(-k_len // blocks[1]))
    mask = draw.flags(*shape, share=share)
    sizes = {"query": heads[0], "grad_out": heads[0], "key": heads[1], "value": heads[1]}
    tensors = {
        kind: draw.tokens(1, count, q_len if count == heads[0] else k_len, dim, FP16, layout)
        for kind, count in sizes.items()
    }
    lists = torch.argsort(~mask, dim=-1, stable=True).int(), mask.sum(-1, dtype=torch.int32)
    return {
        **tensors, "scale": dim**-0.5, "blocks": blocks, "selection": BlockSelection(*lists),
        "visibility": Visibility(**{"upper": k_len - q_len, **rules}),
    }  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_float64_in_every_order_of_events(name, play):
    inputs = make_inputs(name, 1)
    gold = reference_attention(inputs, torch.float64)[2:]
    recomputed, size = recomputed_gradients(inputs)
    first, _ = play(name, inputs, 0)
    for kind, ours, exact in zip(NAMES, first, gold, strict=True):
        _check_gradient(kind, ours, recomputed[kind], size[kind], exact)
    second, _ = play(name, inputs, 100)
    for ours, theirs in zip(first, second, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("lengths", [(1, 1), (63, 200), (65, 64)])
@pytest.mark.parametrize("name", ["ahead, shared", "ahead, alone", "last product beside"])
def test_short_and_ragged_lengths(name, lengths, play):
    inputs = make_inputs(name, 2, *lengths)
    ours, portable = play(name, inputs, 3)
    for one, other in zip(ours, portable, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["ahead, shared", "ahead, alone", "last product beside"])
def test_what_nothing_reads_changes_no_bit(name, poison, play):
    inputs = make_inputs(name, 3, share=0.4)
    clean, _ = play(name, inputs, 0)
    is_read = _poison_unread({**inputs, "poison": poison})
    poisoned, _ = play(name, inputs, 0)
    for kind, one, other in zip(("query", "key", "key"), clean, poisoned, strict=True):
        assert torch.equal(one[is_read[kind]], other[is_read[kind]])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("kind", "place"),
    [("value", (100, 3)), ("key", (200, 0)), ("query", (120, 5)), ("grad_out", (299, 1))],
)
@pytest.mark.parametrize("name", ["ahead, shared", "ahead, alone"])
def test_what_is_not_finite_spoils_what_it_spoils_in_the_portable_kernels(name, kind, place, play):
    inputs = make_inputs(name, 4, share=0.5)
    inputs[kind][(slice(None), slice(None), *place)] = float("nan")
    for ours, portable in zip(*play(name, inputs, 0), strict=True):
        is_finite = portable.isfinite().all(-1)
        assert torch.equal(ours.isfinite().all(-1), is_finite)
        torch.testing.assert_close(ours[is_finite], portable[is_finite], rtol=2e-2, atol=2e-3)
