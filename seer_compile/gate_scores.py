"""Differentiable gate scores, and which pairs of units a band, padding and documents leave visible.

The operators score without gradients and at block resolution only; training needs the rows of
single query sub-blocks and their gradient. Letters of shapes: see :mod:`seer_compile.types`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from seer_compile.kernels.geometry import document_range, units_with_key
from seer_compile.types import Visibility

# Finite, because the gradient of log-sum-exp over a row of -inf is NaN.
HIDDEN_LOGIT = -1e30


def block_log_mass(
    query_features: Tensor, key_features: Tensor, scale: float, visible: Tensor, per_block: int
) -> Tensor:
    """Return the log of the softmax over key blocks of :func:`block_logits`; arguments alike.

    Returns:
        ``Float32[b h R n]``, finite everywhere; see :meth:`AttnGate.row_log_mass`.

    Cost:
        Two ``Float32[b h R c]`` for the backward.
    """
    return block_logits(query_features, key_features, scale, visible, per_block).log_softmax(-1)


def block_logits(
    query_features: Tensor, key_features: Tensor, scale: float, visible: Tensor, per_block: int
) -> Tensor:
    """Return the logit of the best match among the sub-blocks of each key block.

    Args:
        query_features: ``Float32[b h R e]``.
        key_features: ``Float32[b h c e]``.
        scale: Factor on the logits.
        visible: ``Bool[b or 1, 1, R c]``.
        per_block: Key sub-blocks per key block.

    Returns:
        ``Float32[b h R n]``, ``HIDDEN_LOGIT`` where no sub-block is visible.
    """
    logits = (query_features @ key_features.transpose(-1, -2)) * scale
    logits = logits.masked_fill(~visible, HIDDEN_LOGIT)
    if per_block > 1:
        short = -logits.shape[-1] % per_block
        if short:
            logits = nn.functional.pad(logits, (0, short), value=HIDDEN_LOGIT)
        logits = logits.unflatten(-1, (-1, per_block)).amax(-1)
    return logits


def visible_units(
    visibility: Visibility,
    *,
    units: tuple[int, int],
    lengths: tuple[int, int],
    device: torch.device,
    rows: Tensor | None = None,
    band_only: bool = False,
) -> Tensor:
    """Return which pairs of a query unit and a key unit may hold a readable pair of tokens.

    Args:
        visibility: Band, padding and documents.
        units: Tokens per query unit and per key unit.
        lengths: Query and key tokens.
        device: Of the result.
        rows: ``Int64[R]``, indices of query units; all when None.
        band_only: Leave out padding and documents.

    Returns:
        ``Bool[b or 1, 1, R, key units]``. Documents are compared by the range of ids in a unit, so
        a unit pair may be visible although no two of its tokens share a document.
    """
    query_first, query_last = _unit_edges(units[0], lengths[0], device, rows)
    key_first, key_last = _unit_edges(units[1], lengths[1], device, None)
    offset = 0 if visibility.offset is None else visibility.offset.to(device)
    visible = torch.ones(len(query_first), len(key_first), dtype=torch.bool, device=device)
    if visibility.upper is not None:
        visible &= key_first - query_last[:, None] <= visibility.upper + offset
    if visibility.lower is not None:
        visible &= key_last - query_first[:, None] >= visibility.lower + offset
    visible = visible[None, None]
    if band_only:
        return visible
    if visibility.key_padding is not None:
        visible = visible & units_with_key(visibility.key_padding, units[1])[:, None, None]
    if visibility.query_documents is not None and visibility.key_documents is not None:
        query_low, query_high = document_range(visibility.query_documents, units[0])
        if rows is not None:
            query_low, query_high = query_low[:, rows], query_high[:, rows]
        key_low, key_high = document_range(visibility.key_documents, units[1])
        overlap = query_low[..., None] <= key_high[:, None]
        overlap = overlap & (key_low[:, None] <= query_high[..., None])
        visible = visible & overlap[:, None]
    return visible


def _unit_edges(
    unit: int, length: int, device: torch.device, rows: Tensor | None
) -> tuple[Tensor, Tensor]:
    if rows is None:
        rows = torch.arange(-(-length // unit), device=device)
    return rows * unit, (rows * unit + unit - 1).clamp(max=length - 1)
