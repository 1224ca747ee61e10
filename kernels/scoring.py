"""Pooling, block scores and attention mass on the CPU, streamed over query rows.

Nothing of size queries x keys is ever held: a slab of rows is scored, reduced to blocks, and
dropped. Keys that the band hides from the whole slab are not touched at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from seer_compile.kernels.geometry import (
    Band,
    Grid,
    document_range,
    units_with_key,
    visible_pairs,
)
from seer_compile.types import Visibility

_SLAB_ELEMENTS = 1 << 20
"""Logits of one slab of rows: 4 MB, so that its passes stay in the cache of a core or two."""


def pool_blocks(tokens: Tensor, size: int, kinds: str, padding: Tensor | None) -> Tensor:
    """Reduce every run of ``size`` tokens to one vector per kind; see ``ops.pool_blocks``."""
    number = -(-tokens.shape[2] // size)
    short = number * size - tokens.shape[2]
    units = F.pad(tokens, (0, 0, 0, short)).unflatten(2, (number, size))
    members = None
    if padding is not None or short:
        if padding is None:
            padding = torch.ones(tokens.shape[0], tokens.shape[2], dtype=torch.bool)
        members = F.pad(padding, (0, short)).unflatten(1, (number, size))[:, None, :, :, None]
    pooled = [_pool(units, kind, members).to(tokens.dtype) for kind in kinds.split(",")]
    return torch.cat(pooled, -1)


def _pool(units: Tensor, kind: str, members: Tensor | None) -> Tensor:
    wide = torch.promote_types(units.dtype, torch.float32)
    if kind == "mean":
        if members is None:
            return units.mean(3, dtype=wide)
        total = units.masked_fill(~members, 0.0).sum(3, dtype=wide)
        return total / members.sum(3).clamp(min=1)
    if members is None:
        return units.amax(3) if kind == "max" else units.amin(3)
    if kind == "max":
        pooled = units.masked_fill(~members, -torch.inf).amax(3)
    else:
        pooled = units.masked_fill(~members, torch.inf).amin(3)
    return pooled.masked_fill(~members.any(3), 0.0)


def pool_features(
    tokens: Tensor,
    weight: Tensor,
    size: int,
    kinds: str,
    padding: Tensor | None,
    groups: int = 1,
) -> Tensor:
    """Pool sub-blocks and project them to gate features.

    Args:
        tokens: ``Float[b x t d]``.
        weight: ``Float32[h len(kinds)*d e]``; x divides h.
        size: Tokens per sub-block.
        kinds: Comma-joined kinds of pooling.
        padding: ``Bool[b t]``, True where a token counts.
        groups: Consecutive heads whose features are added up.

    Returns:
        ``Float[b h//groups ceil(t/size) e]``, contiguous, of the dtype that :func:`project` says.
    """
    return project(pool_blocks(tokens, size, kinds, padding), weight, groups)


def project(pooled: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
    """Project pooled tokens per query head, or per group of heads.

    Args:
        pooled: ``Float[b x t p]``; x divides h.
        weight: ``Float32[h p e]``.
        groups: Consecutive heads whose features are added up; 1 unless x is h.

    Returns:
        ``Float[b h//groups t e]``.

    Numerics:
        On CUDA, 16-bit inputs are multiplied by weights rounded to their dtype, accumulate in
        float32 and come out in their dtype: float32 products would not run on the tensor cores,
        and scores of float32 features took 3.7 ms a layer where 0.3 ms of attention followed
        (H200, 8 heads, 32,768 tokens).
    """
    if groups > 1:
        # The channels of a group's heads side by side: the product adds them up.
        pooled = pooled.unflatten(1, (-1, groups)).transpose(2, 3).flatten(3)
        weight = weight.unflatten(0, (-1, groups)).flatten(1, 2)
    batch, heads, units, channels = pooled.shape
    served = weight.shape[0] // heads
    # [x, p, served * e]: one product serves the query heads of a key head.
    weight = weight.unflatten(0, (heads, served)).transpose(1, 2).flatten(2)
    left = pooled.reshape(batch * heads, units, channels)
    right = weight.expand(batch, -1, -1, -1).flatten(0, 1)
    if pooled.is_cuda and pooled.dtype in (torch.float16, torch.bfloat16):
        features = left @ right.to(pooled.dtype)
    else:
        features = torch.bmm(left.float(), right)
    features = features.view(batch, heads, units, served, -1)
    return features.transpose(2, 3).flatten(1, 2).contiguous()


class _Slab(NamedTuple):
    """Consecutive query units of one batch item and the key units that they may read."""

    item: int
    rows: slice
    columns: slice


SlabMask = Callable[[_Slab], Tensor]
"""Returns, for a slab, which of its pairs may be visible."""


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
    visibility: Visibility,
) -> Tensor:
    """Return ``Float32[b h//groups m n]``; see ``ops.block_scores``."""
    batch, heads = query_features.shape[:2]
    band, grid = Band.of(visibility), Grid(q_len, k_len, query_sub_block, key_sub_block)
    shape = Grid(q_len, k_len, query_block, key_block).shape
    result = torch.zeros(batch, heads // groups, *shape, dtype=torch.float32)
    extra = _sub_block_masks(visibility, query_sub_block, key_sub_block)
    per_row, per_column = query_block // query_sub_block, key_block // key_sub_block
    query_features, key_features = query_features.float(), key_features.float()
    for slab in _slabs(batch, heads, band, grid, (per_row, per_column)):
        queries, keys = query_features[slab.item, :, slab.rows], key_features[slab.item]
        logits = torch.bmm(queries, keys[:, slab.columns].transpose(1, 2)).mul_(scale)
        reads = _hide(logits, band, grid, slab, extra)
        share = _softmax(_reduce_runs(logits, per_column, "max"), reads)
        share = _reduce_runs(share.transpose(-1, -2), per_row, "max").transpose(-1, -2)
        m, n = slab.rows.start // per_row, slab.columns.start // per_column
        target = result[slab.item, :, m : m + share.shape[-2], n : n + share.shape[-1]]
        target.copy_(share.unflatten(0, (-1, groups)).amax(1))
    return result


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
    """Return ``Float32[b h m n]``; see ``ops.attention_mass``."""
    batch, heads, q_len, _ = query.shape
    kv_heads, k_len = key.shape[1:3]
    query, key = query.float(), key.float()
    band, grid = Band.of(visibility), Grid(q_len, k_len, 1, 1)
    shape = Grid(q_len, k_len, query_unit, key_unit).shape
    result = torch.zeros(batch, heads, *shape, dtype=torch.float32)
    extra = _token_masks(visibility)
    for slab in _slabs(batch, heads, band, grid, (query_unit, key_unit)):
        # The rows of the query heads of a group follow each other: one product per key head.
        queries = query[slab.item, :, slab.rows].unflatten(0, (kv_heads, -1)).flatten(1, 2)
        keys = key[slab.item, :, slab.columns].transpose(1, 2)
        logits = torch.bmm(queries, keys).view(heads, -1, keys.shape[-1])
        if softcap is None:
            logits.mul_(scale)
        else:
            logits.mul_(scale / softcap).tanh_().mul_(softcap)
        reads = _hide(logits, band, grid, slab, extra)
        share = _softmax(logits, reads)
        share = _reduce_runs(share, key_unit, key_reduce).transpose(-1, -2)
        share = _reduce_runs(share, query_unit, "max" if query_reduce == "max" else "sum")
        if query_reduce == "mean":
            reads = torch.ones_like(logits[0, :, 0]) if reads is None else reads
            number = _reduce_runs(reads.float(), query_unit, "sum")
            share = share / number.clamp(min=1)
        m, n = slab.rows.start // query_unit, slab.columns.start // key_unit
        share = share.transpose(-1, -2)
        result[slab.item, :, m : m + share.shape[-2], n : n + share.shape[-1]] = share
    return result


def _slabs(
    batch: int, heads: int, band: Band, grid: Grid, per_block: tuple[int, int]
) -> Iterator[_Slab]:
    """Cut the query units into slabs of whole blocks that hold few logits, empty ones left out."""
    num_rows, num_columns = grid.shape
    step = max(1, _SLAB_ELEMENTS // max(heads * num_columns * per_block[0], 1)) * per_block[0]
    for start in range(0, num_rows, step):
        rows = slice(start, min(start + step, num_rows))
        last_query = min(rows.stop * grid.query_unit, grid.q_len) - 1
        keys = band.key_range(start * grid.query_unit, last_query, grid.k_len)
        first = keys[0] // grid.key_unit // per_block[1] * per_block[1]
        columns = slice(first, min(-(-keys[1] // grid.key_unit), num_columns))
        if columns.start < columns.stop:
            for item in range(batch):
                yield _Slab(item, rows, columns)


def _sub_block_masks(visibility: Visibility, query_unit: int, key_unit: int) -> list[SlabMask]:
    """Return functions of a slab: further masks over pairs of sub-blocks."""
    masks = []
    if visibility.key_padding is not None:
        holds = units_with_key(visibility.key_padding, key_unit)
        masks.append(lambda slab: holds[slab.item, None, slab.columns])
    if visibility.query_documents is not None and visibility.key_documents is not None:
        low_q, high_q = document_range(visibility.query_documents, query_unit)
        low_k, high_k = document_range(visibility.key_documents, key_unit)

        def share_document(slab: _Slab) -> Tensor:
            rows, columns = (slab.item, slab.rows, None), (slab.item, None, slab.columns)
            return (low_q[rows] <= high_k[columns]) & (low_k[columns] <= high_q[rows])

        masks.append(share_document)
    return masks


def _token_masks(visibility: Visibility) -> list[SlabMask]:
    """Return functions of a slab: further masks over pairs of tokens."""
    masks = []
    padding, query_ids, key_ids = (
        visibility.key_padding,
        visibility.query_documents,
        visibility.key_documents,
    )
    if padding is not None:
        masks.append(lambda slab: padding[slab.item, None, slab.columns])
    if query_ids is not None and key_ids is not None:
        masks.append(
            lambda slab: (
                query_ids[slab.item, slab.rows, None] == key_ids[slab.item, None, slab.columns]
            )
        )
    return masks


def _hide(
    logits: Tensor, band: Band, grid: Grid, slab: _Slab, masks: list[SlabMask]
) -> Tensor | None:
    """Set hidden columns to -inf, in place; return which rows see any, None where all do.

    Without further masks, the columns that the first and the last row see are seen by all rows
    between them: only the columns around these are masked.
    """
    num_rows, num_columns = logits.shape[-2:]
    ends = slice(slab.rows.start, slab.rows.stop, max(1, num_rows - 1))
    inside = visible_pairs(band, grid, ends, slab.columns).all(0).nonzero()
    if masks or len(inside) == 0:
        visible = visible_pairs(band, grid, slab.rows, slab.columns)
        for mask in masks:
            visible = visible & mask(slab)
        logits.masked_fill_(~visible, -torch.inf)
        return visible.any(-1)
    first, last = int(inside[0]), int(inside[-1]) + 1
    for begin, end in ((0, first), (last, num_columns)):
        if begin < end:
            columns = slice(slab.columns.start + begin, slab.columns.start + end)
            hidden = ~visible_pairs(band, grid, slab.rows, columns)
            logits[..., begin:end].masked_fill_(hidden, -torch.inf)
    return None


def _softmax(logits: Tensor, reads: Tensor | None) -> Tensor:
    """Return the softmax of the rows that read anything; others are 0."""
    share = logits.softmax(-1)
    return share if reads is None else share.masked_fill_(~reads[:, None], 0.0)


def _reduce_runs(values: Tensor, size: int, kind: str) -> Tensor:
    """Sum or maximum over runs of ``size`` of the last axis; the last run may be shorter."""
    if size == 1:
        return values
    fill = 0.0 if kind == "sum" else -torch.inf
    runs = F.pad(values, (0, -values.shape[-1] % size), value=fill).unflatten(-1, (-1, size))
    return runs.sum(-1) if kind == "sum" else runs.amax(-1)
