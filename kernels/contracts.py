"""The operators of the gate: schema, fake, CPU and CUDA kernel, each exactly once.

``ops`` is the typed front of these. A kernel checks its tensors on the host before it runs, so
that a call from a graph is as safe as one through ``ops``; a fake says shape, dtype and strides.
The version is part of the name: saved programs, and compiled graphs on disk that were not rewritten
here, would miss a changed fake. Those that were carry a digest of the sources.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from seer_compile.errors import HeadConfigError, ShapeError
from seer_compile.kernels import by_device, scoring
from seer_compile.kernels.budgets import only
from seer_compile.kernels.checks import (
    BUDGET_DTYPES,
    SELECTOR_NAMES,
    blocks_of,
    check_attention,
    check_blocks,
    check_choice,
    check_integer,
    check_pools,
    check_scale,
    check_softcap,
    check_tensor,
    check_visibility,
)
from seer_compile.kernels.geometry import Grid
from seer_compile.types import Visibility

NAMESPACE = "seer_compile"
DEVICES = ("cpu", "cuda")


def _units(tokens: int, size: int) -> int:
    # The form of the ceiling that symbolic shapes can reason about.
    return (tokens + size - 1) // size


@custom_op(f"{NAMESPACE}::pool_blocks.v1", mutates_args=(), device_types="cpu")
def pool_blocks(tokens: Tensor, size: int, kinds: str, padding: Tensor | None = None) -> Tensor:
    """CPU kernel."""
    _check_pool(tokens, size, kinds, padding)
    return scoring.pool_blocks(tokens, size, kinds, padding)


@pool_blocks.register_kernel("cuda")
def _(tokens: Tensor, size: int, kinds: str, padding: Tensor | None = None) -> Tensor:
    from seer_compile.kernels.triton import pool_blocks as kernel

    _check_pool(tokens, size, kinds, padding)
    return kernel.launch(tokens, size, kinds, padding)


@pool_blocks.register_fake
def _(tokens: Tensor, size: int, kinds: str, padding: Tensor | None = None) -> Tensor:
    batch, heads, length, dim = tokens.shape
    return tokens.new_empty(batch, heads, _units(length, size), len(kinds.split(",")) * dim)


def _check_pool(tokens: Tensor, size: int, kinds: str, padding: Tensor | None) -> None:
    check_tensor("tokens", tokens, rank=4)
    check_integer("size", size, minimum=1)
    check_pools("kinds", kinds)
    if padding is None:
        return
    check_tensor("padding", padding, rank=2, dtypes=(torch.bool,), device=tokens.device)
    expected = (tokens.shape[0], tokens.shape[2])
    if tuple(padding.shape) != expected:
        raise ShapeError(
            argument="padding.shape", got=tuple(padding.shape), expected=f"{expected}, b and t"
        )


@custom_op(f"{NAMESPACE}::pool_features.v1", mutates_args=(), device_types=DEVICES)
def pool_features(
    tokens: Tensor,
    weight: Tensor,
    size: int,
    kinds: str,
    padding: Tensor | None = None,
    groups: int = 1,
) -> Tensor:
    """Both devices."""
    _check_features(tokens, weight, size, kinds, padding, groups)
    return by_device.pool_features(tokens, weight, size, kinds, padding, groups)


@pool_features.register_fake
def _(
    tokens: Tensor,
    weight: Tensor,
    size: int,
    kinds: str,
    padding: Tensor | None = None,
    groups: int = 1,
) -> Tensor:
    units = _units(tokens.shape[2], size)
    shape = (tokens.shape[0], weight.shape[0] // groups, units, weight.shape[2])
    dtype = tokens.dtype if tokens.device.type == "cuda" else torch.float32
    return tokens.new_empty(shape, dtype=dtype)


def _check_features(
    tokens: Tensor, weight: Tensor, size: int, kinds: str, padding: Tensor | None, groups: int
) -> None:
    _check_pool(tokens, size, kinds, padding)
    check_tensor("weight", weight, rank=3, dtypes=(torch.float32,), device=tokens.device)
    heads, pooled = tokens.shape[1], tokens.shape[3] * len(kinds.split(","))
    if heads < 1 or weight.shape[0] % heads or weight.shape[1] != pooled:
        raise ShapeError(
            argument="weight.shape",
            got=tuple(weight.shape),
            expected=f"(a multiple of {heads} heads, {pooled} pooled channels, gate dim)",
        )
    check_integer("groups", groups, minimum=1)
    if heads % groups or (groups > 1 and weight.shape[0] != heads):
        raise HeadConfigError(
            argument="groups",
            got=groups,
            expected=f"a divisor of {heads} heads; 1 where heads of tokens and weights differ",
        )


@custom_op(f"{NAMESPACE}::block_scores.v1", mutates_args=(), device_types=DEVICES)
def block_scores(
    query_features: Tensor,
    key_features: Tensor,
    scale: float,
    query_sub_block: int,
    key_sub_block: int,
    query_block: int,
    key_block: int,
    q_len: int,
    k_len: int,
    groups: int,
    upper: int | None = None,
    lower: int | None = None,
    offset: Tensor | None = None,
    key_padding: Tensor | None = None,
    query_documents: Tensor | None = None,
    key_documents: Tensor | None = None,
) -> Tensor:
    """Both devices."""
    visibility = Visibility.from_arguments(
        upper, lower, offset, key_padding, query_documents, key_documents
    )
    grid = Grid(q_len, k_len, query_block, key_block)
    sub_blocks = (query_sub_block, key_sub_block)
    _check_scores(query_features, key_features, scale, sub_blocks, grid, groups, visibility)
    return by_device.block_scores(
        query_features, key_features, scale, sub_blocks, grid, groups, visibility
    )


@block_scores.register_fake
def _(
    query_features: Tensor,
    key_features: Tensor,
    scale: float,
    query_sub_block: int,
    key_sub_block: int,
    query_block: int,
    key_block: int,
    q_len: int,
    k_len: int,
    groups: int,
    *readable: Any,
) -> Tensor:
    batch, heads = query_features.shape[:2]
    shape = (batch, heads // groups, _units(q_len, query_block), _units(k_len, key_block))
    return query_features.new_empty(shape, dtype=torch.float32)


def _check_scores(
    query_features: Tensor,
    key_features: Tensor,
    scale: float,
    sub_blocks: tuple[int, int],
    grid: Grid,
    groups: int,
    visibility: Visibility,
) -> None:
    q_len, k_len = grid.q_len, grid.k_len
    check_tensor("query_features", query_features, rank=4)
    check_scale(scale)
    check_blocks(grid.query_unit, grid.key_unit, sub_blocks)
    check_integer("q_len", q_len, minimum=0)
    check_integer("k_len", k_len, minimum=0)
    check_integer("groups", groups, minimum=1)
    batch, heads, _, gate_dim = query_features.shape
    if heads % groups:
        raise HeadConfigError(
            argument="groups", got=groups, expected=f"a divisor of the {heads} heads"
        )
    dtypes, device = (query_features.dtype,), query_features.device
    check_tensor("key_features", key_features, rank=4, dtypes=dtypes, device=device)
    expected = {
        "query_features": (batch, heads, blocks_of(q_len, sub_blocks[0]), gate_dim),
        "key_features": (batch, heads, blocks_of(k_len, sub_blocks[1]), gate_dim),
    }
    for name, tensor in {"query_features": query_features, "key_features": key_features}.items():
        if tuple(tensor.shape) != expected[name]:
            raise ShapeError(
                argument=f"{name}.shape",
                got=tuple(tensor.shape),
                expected=f"{expected[name]}: b, h, sub-blocks of q_len={q_len}, k_len={k_len}",
            )
    check_visibility(visibility, batch=batch, q_len=q_len, k_len=k_len, device=device)


@custom_op(f"{NAMESPACE}::select_blocks.v1", mutates_args=(), device_types=DEVICES)
def select_blocks(
    scores: Tensor,
    budget: Tensor,
    selector: str,
    query_block: int,
    key_block: int,
    q_len: int,
    k_len: int,
    upper: int | None = None,
    lower: int | None = None,
    offset: Tensor | None = None,
    key_padding: Tensor | None = None,
    query_documents: Tensor | None = None,
    key_documents: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Both devices."""
    visibility = Visibility.from_arguments(
        upper, lower, offset, key_padding, query_documents, key_documents
    )
    grid = Grid(q_len, k_len, query_block, key_block)
    _check_select(scores, budget, selector, grid, visibility)
    return by_device.select_blocks(scores, only(budget), selector, grid, visibility)


@select_blocks.register_fake
def _(
    scores: Tensor,
    budget: Tensor,
    selector: str,
    query_block: int,
    key_block: int,
    q_len: int,
    k_len: int,
    *readable: Any,
) -> tuple[Tensor, Tensor]:
    indices = scores.new_empty(scores.shape, dtype=torch.int32)
    return indices, scores.new_empty(scores.shape[:-1], dtype=torch.int32)


def _check_select(
    scores: Tensor, budget: Tensor, selector: str, grid: Grid, visibility: Visibility
) -> None:
    check_tensor("scores", scores, rank=4, dtypes=(torch.float32,))
    device = scores.device
    check_tensor("budget", budget, rank=1, dtypes=BUDGET_DTYPES, device=device)
    check_choice("selector", selector, SELECTOR_NAMES)
    check_blocks(grid.query_unit, grid.key_unit)
    check_integer("q_len", grid.q_len, minimum=0)
    check_integer("k_len", grid.k_len, minimum=0)
    if budget.shape[0] != scores.shape[1]:
        raise ShapeError(
            argument="budget.shape",
            got=tuple(budget.shape),
            expected=f"({scores.shape[1]},): one budget per head of scores",
        )
    if tuple(scores.shape[2:]) != grid.shape:
        raise ShapeError(
            argument="scores.shape",
            got=tuple(scores.shape),
            expected=f"{grid.shape} blocks on the last axes: q_len={grid.q_len}, "
            f"k_len={grid.k_len} with blocks of {grid.query_unit} and {grid.key_unit}",
        )
    lengths = {"q_len": grid.q_len, "k_len": grid.k_len}
    check_visibility(visibility, batch=scores.shape[0], device=device, **lengths)


@custom_op(f"{NAMESPACE}::attention_mass.v1", mutates_args=(), device_types=DEVICES)
def attention_mass(
    query: Tensor,
    key: Tensor,
    scale: float,
    query_unit: int,
    key_unit: int,
    query_reduce: str,
    key_reduce: str,
    upper: int | None = None,
    lower: int | None = None,
    offset: Tensor | None = None,
    key_padding: Tensor | None = None,
    query_documents: Tensor | None = None,
    key_documents: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Both devices."""
    visibility = Visibility.from_arguments(
        upper, lower, offset, key_padding, query_documents, key_documents
    )
    units = (query_unit, key_unit, query_reduce, key_reduce)
    _check_mass(query, key, scale, *units, visibility, softcap)
    return by_device.attention_mass(query, key, scale, *units, visibility, softcap)


@attention_mass.register_fake
def _(
    query: Tensor,
    key: Tensor,
    scale: float,
    query_unit: int,
    key_unit: int,
    query_reduce: str,
    key_reduce: str,
    *readable: Any,
) -> Tensor:
    shape = (_units(query.shape[2], query_unit), _units(key.shape[2], key_unit))
    return query.new_empty((*query.shape[:2], *shape), dtype=torch.float32)


def _check_mass(
    query: Tensor,
    key: Tensor,
    scale: float,
    query_unit: int,
    key_unit: int,
    query_reduce: str,
    key_reduce: str,
    visibility: Visibility,
    softcap: float | None,
) -> None:
    check_attention(query, key)
    check_softcap(softcap)
    check_scale(scale)
    check_integer("query_unit", query_unit, minimum=1)
    check_integer("key_unit", key_unit, minimum=1)
    check_choice("query_reduce", query_reduce, ("mean", "max"))
    check_choice("key_reduce", key_reduce, ("sum", "max"))
    lengths = {"q_len": query.shape[2], "k_len": key.shape[2]}
    check_visibility(visibility, batch=query.shape[0], device=query.device, **lengths)
