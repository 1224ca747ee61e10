"""Eager oracles: what each operator means, at any dtype, on any device, masks written out.

Obvious before fast: every mask is built token by token, selections row by row. Nothing here is
shared with the kernels. Letters of shapes: see :mod:`seer_compile.types`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from seer_compile.types import BlockSelection, BlockSize, Visibility

BLOCK_SLACK = 0.01
"""Blocks by which a budget may be missed before one more is kept: float32 has no exact 0.1."""


def band_mask(visibility: Visibility, q_len: int, k_len: int) -> Tensor:
    """Return ``Bool[q k]``: what the band alone lets each query read, on the CPU."""
    shift = 0 if visibility.offset is None else int(visibility.offset)
    distance = torch.arange(k_len)[None, :] - torch.arange(q_len)[:, None]
    mask = torch.ones(q_len, k_len, dtype=torch.bool)
    if visibility.upper is not None:
        mask &= distance <= visibility.upper + shift
    if visibility.lower is not None:
        mask &= distance >= visibility.lower + shift
    return mask


def token_mask(visibility: Visibility, q_len: int, k_len: int, device: torch.device) -> Tensor:
    """Return ``Bool[b or 1, 1, q k]``: which keys each query may read."""
    mask = band_mask(visibility, q_len, k_len).to(device)[None]
    if visibility.key_padding is not None:
        mask = mask & visibility.key_padding[:, None, :]
    if visibility.query_documents is not None and visibility.key_documents is not None:
        same = visibility.query_documents[:, :, None] == visibility.key_documents[:, None, :]
        mask = mask & same
    return mask[:, None]


def blocks_any(mask: Tensor, query_block: int, key_block: int) -> Tensor:
    """Return ``Bool[... m n]`` from ``Bool[... q k]``: pairs of blocks with a True in them."""
    lead, q_len, k_len = mask.shape[:-2], mask.shape[-2], mask.shape[-1]
    short = (0, -k_len % key_block, 0, -q_len % query_block)
    blocks = F.pad(mask, short).unflatten(-1, (-1, key_block)).unflatten(-3, (-1, query_block))
    return blocks.any(-1).any(-2).reshape(*lead, -(-q_len // query_block), -(-k_len // key_block))


def selection_mask(selection: BlockSelection, key_blocks: int) -> Tensor:
    """Return ``Bool[b s m n]``: the selected blocks."""
    indices, counts = selection
    used = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    # One column more than there are blocks takes the entries past the count.
    mask = torch.zeros(*counts.shape, key_blocks + 1, dtype=torch.bool, device=indices.device)
    mask.scatter_(-1, indices.long().where(used, key_blocks), True)
    return mask[..., :key_blocks]


def probabilities(
    query: Tensor,
    key: Tensor,
    scale: float,
    mask: Tensor,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return softmax and its log-sum-exp over the keys that a mask leaves.

    Args:
        query: ``Float[b h q d]``.
        key: ``Float[b g k d]``.
        scale: Factor on the logits.
        mask: ``Bool[b or 1, h or 1, q k]``.
        softcap: Bounds the logits smoothly, before the mask.
        sinks: ``Float[h]``: logits of one key more, which every query reads.

    Returns:
        ``Float[b h q k]``, the sink's column dropped, and ``Float[b h q]`` with the sink; a row
        without any key or sink is 0 and -inf.
    """
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = query @ key.transpose(-1, -2) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~mask, -math.inf)
    k_len = logits.shape[-1]
    if sinks is not None:
        column = sinks.to(logits.dtype)[:, None, None].expand(*logits.shape[:-1], 1)
        logits = torch.cat([logits, column], -1)
    if logits.shape[-1] == 0:
        return logits, logits.new_full(logits.shape[:-1], -math.inf)
    largest = logits.detach().amax(-1, keepdim=True)
    largest = largest.masked_fill(largest == -math.inf, 0.0)
    weights = (logits - largest).exp()
    total = weights.sum(-1, keepdim=True)
    lse = (total.log() + largest).squeeze(-1)
    return (weights / total.masked_fill(total == 0, 1.0))[..., :k_len], lse


def pool_blocks(tokens: Tensor, size: int, kinds: str, padding: Tensor | None = None) -> Tensor:
    """Reduce every run of ``size`` tokens to one vector per kind; see :mod:`.ops`."""
    batch, heads, length, dim = tokens.shape
    num_units, names = -(-length // size), kinds.split(",")
    pooled = tokens.new_zeros(batch, heads, num_units, len(names), dim)
    for item in range(batch):
        for unit in range(num_units):
            span = torch.arange(unit * size, min((unit + 1) * size, length), device=tokens.device)
            if padding is not None:
                span = span[padding[item, span]]
            if len(span) == 0:
                continue
            members = tokens[item, :, span]
            wide = members.double()
            values = {"mean": wide.mean(1), "max": wide.amax(1), "min": wide.amin(1)}
            for position, name in enumerate(names):
                pooled[item, :, unit, position] = values[name].to(tokens.dtype)
    return pooled.flatten(-2)


def pool_features(
    tokens: Tensor,
    weight: Tensor,
    size: int,
    kinds: str,
    padding: Tensor | None = None,
    groups: int = 1,
) -> Tensor:
    """Return ``Float[b h//groups units e]``: pooled tokens times weights, summed over groups."""
    pooled = pool_blocks(tokens, size, kinds, padding)
    wide = torch.promote_types(tokens.dtype, weight.dtype)
    pooled = pooled.repeat_interleave(weight.shape[0] // tokens.shape[1], 1)
    features = torch.einsum("bhtp,hpe->bhte", pooled.to(wide), weight.to(wide))
    return features.unflatten(1, (-1, groups)).sum(2)


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
    """Return ``Float[b h//groups m n]``, the predicted share of mass; see :mod:`.ops`."""
    visible = blocks_any(band_mask(visibility, q_len, k_len), query_sub_block, key_sub_block)
    visible = visible.to(query_features.device)[None]
    if visibility.key_padding is not None:
        visible = visible & blocks_any(visibility.key_padding[:, None], 1, key_sub_block)
    if visibility.query_documents is not None and visibility.key_documents is not None:
        query_low, query_high = _document_range(visibility.query_documents, query_sub_block)
        key_low, key_high = _document_range(visibility.key_documents, key_sub_block)
        overlap = query_low[:, :, None] <= key_high[:, None, :]
        visible = visible & overlap & (key_low[:, None, :] <= query_high[:, :, None])
    logits = query_features @ key_features.transpose(-1, -2) * scale
    logits = logits.masked_fill(~visible[:, None], -math.inf)
    largest = _reduce(logits, -1, key_block // key_sub_block, "max")
    share = (largest - largest.amax(-1, keepdim=True)).exp()
    share = share / share.sum(-1, keepdim=True)
    share = share.masked_fill((largest == -math.inf).all(-1, keepdim=True), 0.0)
    share = _reduce(share, -2, query_block // query_sub_block, "max")
    return share.unflatten(1, (-1, groups)).amax(2)


def select_blocks(
    scores: Tensor,
    budget: Tensor,
    selector: str,
    query_block: int,
    key_block: int,
    q_len: int,
    k_len: int,
    visibility: Visibility,
) -> BlockSelection:
    """Return the blocks that every row keeps; see :mod:`.ops`. Counts in Python, row by row."""
    visible = blocks_any(band_mask(visibility, q_len, k_len), query_block, key_block)
    batch, heads, rows, columns = scores.shape
    indices = torch.zeros(scores.shape, dtype=torch.int32)
    counts = torch.zeros(scores.shape[:-1], dtype=torch.int32)
    for item in range(batch):
        forced = _forced(visibility, item, visible, query_block, key_block, q_len, k_len)
        for head in range(heads):
            for row in range(rows):
                seen = [n for n in range(columns) if visible[row, n]]
                values = {n: float(scores[item, head, row, n]) for n in seen}
                kept = _keep(values, forced[row], selector, float(budget[head]))
                counts[item, head, row] = len(kept)
                indices[item, head, row, : len(kept)] = torch.tensor(sorted(kept)).int()
    return BlockSelection(indices.to(scores.device), counts.to(scores.device))


def _forced(
    visibility: Visibility,
    item: int,
    visible: Tensor,
    query_block: int,
    key_block: int,
    q_len: int,
    k_len: int,
) -> list[set[int]]:
    """Return for every row its diagonal and its sink, where visible."""
    padding = visibility.key_padding
    shift = visibility.upper
    if shift is None and q_len == k_len:
        shift = 0
    elif shift is not None and visibility.offset is not None:
        shift = shift + int(visibility.offset)
    forced = []
    for row in range(visible.shape[0]):
        keep = set()
        if shift is not None and k_len:
            for query in (row * query_block, min((row + 1) * query_block, q_len) - 1):
                keep.add(min(max(query + shift, 0), k_len - 1) // key_block)
        for column in range(visible.shape[1]):
            keys = slice(column * key_block, min((column + 1) * key_block, k_len))
            if visible[row, column] and (padding is None or bool(padding[item, keys].any())):
                keep.add(column)
                break
        forced.append({column for column in keep if visible[row, column]})
    return forced


def _keep(values: dict[int, float], forced: set[int], selector: str, budget: float) -> set[int]:
    """Return the blocks that one row keeps, from the scores of its visible blocks.

    A score that is NaN is never dropped: the row then answers as dense attention would.
    """
    if not values:
        return set()
    broken = {n for n, score in values.items() if math.isnan(score)}
    if broken and selector in ("top_p", "threshold"):
        return set(values)
    best = max(values, key=lambda n: (math.isnan(values[n]), values[n], -n))
    forced = forced | {best}
    total = math.fsum(values.values())
    if selector == "top_p":
        if budget >= 1:
            return set(values)
        thresholds = (math.inf, *sorted(set(values.values()), reverse=True), -math.inf)
        choices = (forced | {n for n in values if values[n] >= limit} for limit in thresholds)
        enough = (kept for kept in choices if math.fsum(values[n] for n in kept) >= budget * total)
        return next(enough, set(values))
    if selector == "threshold":
        share = budget / len(values)
        return forced | {n for n, score in values.items() if total and score / total >= share}
    wanted = math.ceil((budget * len(values) if selector == "fraction" else budget) - BLOCK_SLACK)
    order = sorted(values, key=lambda n: (n not in forced, n not in broken, -values[n], n))
    return set(order[: max(wanted, len(forced))])


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: BlockSelection,
    scale: float,
    query_block: int,
    key_block: int,
    visibility: Visibility,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ``Float[b h q v]`` and ``Float[b h q]``, differentiable; see :mod:`.ops`."""
    (q_len, k_len), heads = (query.shape[-2], key.shape[-2]), query.shape[1]
    blocks = selection_mask(selection, -(-k_len // key_block))
    keep = blocks.repeat_interleave(query_block, 2)[:, :, :q_len]
    keep = keep.repeat_interleave(key_block, 3)[..., :k_len]
    keep = keep.repeat_interleave(heads // keep.shape[1], 1)
    mask = keep & token_mask(visibility, q_len, k_len, query.device)
    weights, lse = probabilities(query, key, scale, mask, softcap, sinks)
    # A key that no query reads must not reach the product: 0 * NaN is NaN.
    read = mask.unflatten(1, (value.shape[1], -1)).any(2).any(-2)
    value = torch.where(read[..., None], value, 0.0)
    return weights @ value.repeat_interleave(heads // value.shape[1], dim=1), lse


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    visibility: Visibility,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Return ``Float[b h q v]``: attention to every readable key."""
    mask = token_mask(visibility, query.shape[-2], key.shape[-2], query.device)
    weights, _ = probabilities(query, key, scale, mask, softcap, sinks)
    return weights @ value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)


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
    """Return ``Float[b h m n]``: attention probability per pair of units; see :mod:`.ops`."""
    mask = token_mask(visibility, query.shape[-2], key.shape[-2], query.device)
    share, lse = probabilities(query, key, scale, mask, softcap)
    share = _reduce(share, -1, key_unit, key_reduce)
    if query_reduce == "max":
        return _reduce(share, -2, query_unit, "max")
    reads = (lse != -math.inf).to(share.dtype)[..., None]
    number = _reduce(reads, -2, query_unit, "sum").clamp(min=1)
    return _reduce(share, -2, query_unit, "sum") / number


def block_max_probability(
    query: Tensor, key: Tensor, scale: float, block_size: BlockSize, visibility: Visibility
) -> Tensor:
    """Return the largest attention probability in every block pair.

    The published gate learns this map; ours learns the mass map. A pair whose maximum is near
    zero can be skipped: no query in it attends noticeably to any key in it.

    Args:
        query: ``Float[b h q d]``.
        key: ``Float[b g k d]``; ``g`` divides ``h``.
        scale: Factor on the logits.
        block_size: Tokens per block.
        visibility: What each query may read.

    Returns:
        ``Float[b h m n]``, probabilities in [0, 1]; exactly 0 for an invisible pair.

    Cost:
        Materialises ``Float[b h q k]``.

    Source:
        Gao et al., "SeerAttention", arXiv:2410.13276 (max-pooled attention map).

    Example:
        >>> q = k = torch.eye(64).reshape(1, 1, 64, 64) * 100
        >>> size = BlockSize(query=32, key=32)
        >>> block_max_probability(q, k, 1.0, size, Visibility(upper=0)).squeeze()
        tensor([[1., 0.],
                [0., 1.]])
    """
    return attention_mass(
        query, key, scale, block_size.query, block_size.key, "max", "max", visibility
    )


def _reduce(values: Tensor, axis: int, size: int, kind: str) -> Tensor:
    """Sum or maximum over runs of ``size`` along an axis; the last run may be shorter."""
    values, fill = values.movedim(axis, -1), 0.0 if kind == "sum" else -math.inf
    runs = F.pad(values, (0, -values.shape[-1] % size), value=fill).unflatten(-1, (-1, size))
    reduced = runs.sum(-1) if kind == "sum" else runs.amax(-1)
    return reduced.movedim(-1, axis)


def _document_range(documents: Tensor, unit: int) -> tuple[Tensor, Tensor]:
    spans = [documents[:, start : start + unit] for start in range(0, documents.shape[1], unit)]
    return (
        torch.stack([span.amin(1) for span in spans], 1),
        torch.stack([span.amax(1) for span in spans], 1),
    )
