"""Dense attention by the block-sparse operator: every block that the band shows.

For what SDPA does not compute: attention with a softcap, and with sinks, for which it would have to
give away its log-sum-exp.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seer_compile.kernels.geometry import visible_range
from seer_compile.types import BlockSelection, Visibility

BLOCKS = (128, 64)
"""Tokens per query block and per key block; what is computed does not depend on them."""


def every_block(query: Tensor, key: Tensor, visibility: Visibility) -> BlockSelection:
    """Return the selection of every block with a pair of tokens inside the band.

    Args:
        query: ``Float[b h q d]``.
        key: ``Float[b g k d]``.
        visibility: The band; padding and documents do not count.

    Returns:
        ``Int32[b 1 m n]`` and ``Int32[b 1 m]``, without waiting for a device.
    """
    lengths = (query.shape[2], key.shape[2])
    first, number = visible_range(visibility, lengths, BLOCKS, query.device)
    columns = -(-lengths[1] // BLOCKS[1])
    indices = first[:, None] + torch.arange(columns, device=query.device)
    indices = indices.clamp(max=max(columns - 1, 0)).to(torch.int32)
    shape = (query.shape[0], 1, *indices.shape)
    return BlockSelection(indices.expand(shape), number.to(torch.int32).expand(shape[:-1]))


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    visibility: Visibility,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return out and lse of attention to every readable key; see ``ops.block_sparse_attention``."""
    return torch.ops.seer_compile.block_sparse_attention.v1(
        query,
        key,
        value,
        *every_block(query, key, visibility),
        scale,
        *BLOCKS,
        *visibility.as_arguments().values(),
        softcap,
        sinks,
    )


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    visibility: Visibility,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value, given what :func:`forward` returned."""
    return torch.ops.seer_compile.block_sparse_attention_backward.v1(
        grad_out,
        query,
        key,
        value,
        out,
        lse,
        *every_block(query, key, visibility),
        scale,
        *BLOCKS,
        *visibility.as_arguments().values(),
        softcap,
    )
