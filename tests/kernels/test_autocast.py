"""Operators called in an autocast region compute in the dtypes that they are given."""

from __future__ import annotations

import pytest
import torch

from seer_compile.kernels import ops
from seer_compile.kernels.autocast import OPERATORS
from seer_compile.types import BlockSize, Visibility
from support.inputs import random_selection


def test_every_operator_has_the_rule():
    named = {f"seer_compile::{definition._name}" for definition in OPERATORS}
    every = torch._C._dispatch_get_all_op_names()
    assert named == {name for name in every if name.startswith("seer_compile::")}
    for name in named:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "AutocastCPU"), name
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "AutocastCUDA"), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_and_its_gradient_are_the_same_inside_and_outside(dtype):
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(1, 2, 150, 16, generator=generator).to(dtype).requires_grad_() for _ in range(3)
    ]
    selection = random_selection(1, 2, 3, 3, min_per_row=1)

    def attend():
        return ops.block_sparse_attention(
            *tensors,
            selection,
            block_size=BlockSize(query=64, key=64),
            visibility=Visibility(upper=0),
        )[0]

    outside = attend()
    expected = torch.autograd.grad(outside.sum(), tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = attend()
        got = torch.autograd.grad(inside.sum(), tensors)
    assert inside.dtype is dtype
    assert torch.equal(inside, outside)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_pooling_keeps_float32_where_autocast_would_not():
    tokens = torch.randn(1, 2, 64, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (tokens @ tokens.mT).dtype is torch.bfloat16
        pooled = ops.pool_blocks(tokens, size=8)
    assert torch.equal(pooled, ops.pool_blocks(tokens, size=8))
