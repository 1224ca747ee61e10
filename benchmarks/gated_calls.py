"""The gated operator and the dense call beside it, at a size: for scripts that weigh them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import seer_compile.kernels.ops  # noqa: F401  (registers the operators)
from seer_compile.config import Fraction, GateConfig
from seer_compile.gate import AttnGate
from seer_compile.kernels.dense import dense_attention
from seer_compile.kernels.gated_attention import MODE_SPARSE
from seer_compile.types import Visibility

CONFIG = GateConfig(selector=Fraction())
"""The gate that is timed: the default one, with the same share of the blocks in every row."""


class Shape(NamedTuple):
    """Heads, key heads and head dim of a call."""

    heads: int
    kv_heads: int
    head_dim: int


class Size(NamedTuple):
    """Tokens and sequences of a causal call; fewer queries than keys are the last ones."""

    q_len: int
    k_len: int
    batch: int = 1


Operands = tuple[Tensor, Tensor, Tensor]


def dtype_of(device: torch.device) -> torch.dtype:
    """Return the dtype in which calls are timed."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def operands(shape: Shape, size: Size, device: torch.device) -> Operands:
    """Return query, key and value of one call, laid out as models have them, tokens first."""
    generator = torch.Generator(device).manual_seed(size.k_len)

    def draw(length: int, heads: int) -> Tensor:
        sizes = (size.batch, length, heads, shape.head_dim)
        values = torch.randn(sizes, generator=generator, device=device, dtype=dtype_of(device))
        return values.transpose(1, 2)

    return draw(size.q_len, shape.heads), *(draw(size.k_len, shape.kv_heads) for _ in range(2))


def _upper(tensors: Operands) -> int:
    return tensors[1].shape[2] - tensors[0].shape[2]


def dense_call(tensors: Operands) -> Callable[[], Tensor]:
    """Return the call that answers below break-even."""
    scale, visibility = tensors[0].shape[3] ** -0.5, Visibility(upper=_upper(tensors))
    return lambda: dense_attention(*tensors, scale=scale, visibility=visibility)


def gated_call(shape: Shape, tensors: Operands, density: float) -> Callable[[], Tensor]:
    """Return a call of the gated operator that answers sparsely whatever the size."""
    gate = AttnGate(*shape, config=CONFIG, device=tensors[0].device).requires_grad_(False)
    gate.budget.fill_(density)
    mode = torch.tensor(MODE_SPARSE, dtype=torch.int8)
    knobs = (gate.query_weight, gate.key_weight, gate.budget, mode)
    arguments = (*knobs, shape.head_dim**-0.5, *gate.constants().values(), "benchmark")
    operator = torch.ops.seer_compile.gated_attention.v1
    return lambda: operator(*tensors, *arguments, _upper(tensors))[0]


def check_full_budget(shape: Shape, tensors: Operands) -> None:
    """Compare the gated operator at a full budget with dense attention."""
    exact = dense_call(tensors)().float()
    error = float((gated_call(shape, tensors, 1.0)().float() - exact).norm() / exact.norm())
    limit = 1e-4 if tensors[0].dtype is torch.float32 else 1e-2
    if not error <= limit:
        raise SystemExit(f"a full budget is off by {error:.3g} from dense attention: {shape}")
