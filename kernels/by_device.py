"""What the operators compute, on the device of their tensors; arguments are unchecked.

Operators of their own check them and cost the host tens of microseconds each; a site, which makes
all of its arguments itself, calls these.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seer_compile.kernels import blockwise, engines, scoring, selection
from seer_compile.kernels.budgets import BudgetColumns
from seer_compile.kernels.geometry import Grid
from seer_compile.kernels.sinks import with_sinks
from seer_compile.types import Visibility


def pool_features(
    tokens: Tensor,
    weight: Tensor,
    size: int,
    kinds: str,
    padding: Tensor | None = None,
    groups: int = 1,
) -> Tensor:
    """Pool sub-blocks and project them; see ``scoring.pool_features``."""
    if not tokens.is_cuda:
        return scoring.pool_features(tokens, weight, size, kinds, padding, groups)
    from seer_compile.kernels.triton import pool_blocks as pool
    from seer_compile.kernels.triton import pool_features as kernel
    from seer_compile.kernels.triton import primitives

    if tokens.dtype is torch.float32 or weight.shape[0] > tokens.shape[1]:
        # Exact products do not run on the tensor cores, and for the query heads of a key head a
        # product of its own is the faster one: 0.080 ms against 0.111 (one H200, 32,768 tokens, 8
        # key heads of D128 for 32 query heads).
        pooled = pool.launch(tokens, size, kinds, padding)
        return primitives.with_room(scoring.project(pooled, weight, groups))
    return kernel.launch(tokens, weight, size, kinds, padding, groups)


def block_scores(
    query_features: Tensor,
    key_features: Tensor,
    scale: float,
    sub_blocks: tuple[int, int],
    grid: Grid,
    groups: int,
    visibility: Visibility,
) -> Tensor:
    """Score block pairs; see ``ops.block_scores``."""
    features = (query_features, key_features)
    if query_features.is_cuda:
        return engines.block_scores(*features, scale, sub_blocks, grid, groups, visibility)
    sizes = (*sub_blocks, grid.query_unit, grid.key_unit, grid.q_len, grid.k_len)
    return scoring.block_scores(*features, scale, *sizes, groups, visibility)


def select_blocks(
    scores: Tensor, budget: BudgetColumns, selector: str, grid: Grid, visibility: Visibility
) -> tuple[Tensor, Tensor]:
    """Turn scores into indices and counts; see ``ops.select_blocks``."""
    if not scores.is_cuda:
        return selection.select(scores, budget.value(), selector, grid, visibility)
    from seer_compile.kernels.triton import select_blocks as kernel

    blocks = (grid.query_unit, grid.key_unit, grid.q_len, grid.k_len)
    return kernel.launch(scores, budget, selector, *blocks, *visibility.as_arguments().values())


def attention_mass(
    query: Tensor,
    key: Tensor,
    scale: float,
    query_unit: int,
    key_unit: int,
    query_reduce: str,
    key_reduce: str,
    visibility: Visibility,
    softcap: float | None = None,
) -> Tensor:
    """Pool the attention probabilities; see ``ops.attention_mass``."""
    units = (query_unit, key_unit, query_reduce, key_reduce)
    if not query.is_cuda:
        return scoring.attention_mass(query, key, scale, *units, visibility, softcap)
    from seer_compile.kernels.triton import attention_mass as kernel

    readable = visibility.as_arguments().values()
    return kernel.launch(query, key, scale, *units, *readable, softcap=softcap)


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: tuple[Tensor, Tensor],
    scale: float,
    blocks: tuple[int, int],
    visibility: Visibility,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend to the selected blocks; see ``ops.block_sparse_attention``."""
    operands = (query, key, value, *selection, scale, *blocks)
    if query.is_cuda:
        readable = visibility.as_arguments().values()
        results = engines.forward(*operands, *readable, softcap=softcap)
    else:
        results = blockwise.attention_forward(*operands, visibility, softcap)
    return with_sinks(results, sinks)


def block_sparse_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    selection: tuple[Tensor, Tensor],
    scale: float,
    blocks: tuple[int, int],
    visibility: Visibility,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value; sinks are in ``out`` and ``lse`` already."""
    operands = (grad_out, query, key, value, out, lse, *selection, scale, *blocks)
    if not query.is_cuda:
        return blockwise.attention_backward(*operands, visibility, softcap)
    return engines.backward(*operands, *visibility.as_arguments().values(), softcap=softcap)
