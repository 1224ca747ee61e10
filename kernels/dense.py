"""Dense attention under a visibility, by the fastest form of SDPA that means the same.

Also the rule that says, from sizes the host knows, when the sparse path would not pay.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from seer_compile.kernels import every_block
from seer_compile.kernels.break_even import TABLE, BreakEven, head_dim_class
from seer_compile.kernels.dense_backends import device_class, fused_attention
from seer_compile.types import Visibility

_MASK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 28}
"""Largest mask that is written out at once; more query rows are answered in turns."""
_FOLDED_QUERIES = 16
"""Up to so many queries the heads of a group become rows of one head: nothing is expanded."""


def dense_reason(
    *,
    q_len: int,
    k_len: int,
    heads: int,
    dims: tuple[int, int],
    device: torch.device,
    table: Mapping[tuple[str, int], BreakEven] = TABLE,
) -> str | None:
    """Return why a call is answered densely, or None where the sparse path pays.

    The rule reads what the host knows, so that it neither waits for a device nor guards a graph.

    Args:
        q_len: Query tokens.
        k_len: Key tokens.
        heads: Query heads of all sequences of the batch.
        dims: Head dims of keys and of values.
        device: Where the tensors are.
        table: Break-even sizes by device class and head dim class.

    Returns:
        ``"decode"``, ``"short"``, or None.
    """
    if q_len == 1:
        return "decode"
    limit = _break_even(device, head_dim_class(max(dims)), table)
    work = heads * q_len * k_len * sum(dims)
    is_short = q_len < limit.q_len or k_len < limit.k_len or work < limit.work
    return "short" if is_short else None


def _break_even(
    device: torch.device, dim_class: int, table: Mapping[tuple[str, int], BreakEven]
) -> BreakEven:
    entry = table.get((device_class(device), dim_class))
    return table[device.type, dim_class] if entry is None else entry


class _Form(NamedTuple):
    """What SDPA is asked for: how many keys, and which mask over them."""

    k_len: int
    kind: str
    """``full``, ``causal`` (top-left), ``lower_right`` or ``mask``."""


def _form(visibility: Visibility, q_len: int, k_len: int) -> _Form:
    """Return the cheapest form of a visibility whose offset, if any, is already in its bounds."""
    has_tensor = not (
        visibility.offset is visibility.key_padding is visibility.key_documents is None
    )
    upper, lower = visibility.upper, visibility.lower
    if has_tensor or (lower is not None and lower > 1 - q_len):
        return _Form(k_len, "mask")
    if upper is None or upper >= k_len - 1:
        return _Form(k_len, "full")
    if upper < 0:
        return _Form(k_len, "mask")
    # Keys that no query reaches are not handed over.
    k_end = min(k_len, upper + q_len)
    if upper == 0:
        return _Form(k_end, "causal")
    return _Form(k_end, "lower_right" if k_end == upper + q_len else "mask")


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    visibility: Visibility | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend to every readable key, by ``F.scaled_dot_product_attention``.

    Args:
        query: ``Float[b h q d]``.
        key: ``Float[b g k d]``; ``g`` divides ``h``.
        value: ``Float[b g k v]``.
        scale: Factor on the logits.
        visibility: What each query may read; everything when None.
        softcap: Bounds the logits by ``softcap * tanh(logits / softcap)``, before the mask.
        sinks: ``Float[h]``: logits that take part in the softmax and have no value. SDPA has
            neither; the block-sparse operator answers then, over every block.

    Returns:
        ``Float[b h q v]`` in the strides that SDPA chose. A query that may read nothing gets 0.

    Cost:
        No mask is written out for a full band, a causal one, or (on CUDA) one that is causal
        behind a cache. Else ``Bool[b 1 q k]``, in turns over the queries where it is large; then
        (but for a handful of queries), and for float32 on CUDA, keys and values are expanded to
        the query heads: SDPA's fused kernels take groups in 16 bits and without a mask only.

    Numerics:
        Those of SDPA's kernels, of which :mod:`.dense_backends` chooses one by size; like there,
        NaN in a key that is masked out may reach the output.
    """
    visibility = _folded(visibility or Visibility())
    if softcap is not None or sinks is not None:
        return every_block.forward(query, key, value, scale, visibility, softcap, sinks)[0]
    q_len, k_len = query.shape[2], key.shape[2]
    if query.numel() == 0 or k_len == 0:
        return query.new_zeros(*query.shape[:3], value.shape[-1])
    form = _form(visibility, q_len, k_len)
    is_cpu = query.device.type == "cpu"
    is_half = query.dtype in (torch.float16, torch.bfloat16)
    if form.kind == "mask" or (form.kind == "lower_right" and is_cpu):
        return _masked_attention(query, key, value, scale, visibility)
    if form.k_len < k_len:
        key, value = key[:, :, : form.k_len], value[:, :, : form.k_len]
    is_fused = not is_cpu and is_half and query.shape[-1] == value.shape[-1]
    if is_fused and form.kind != "lower_right":
        return fused_attention(query, key, value, is_causal=form.kind == "causal", scale=scale)
    if not is_cpu and not is_fused:
        key, value = _expanded(key, query.shape[1]), _expanded(value, query.shape[1])
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=_lower_right(q_len, form.k_len) if form.kind == "lower_right" else None,
        is_causal=form.kind == "causal",
        scale=scale,
        enable_gqa=key.shape[1] != query.shape[1],
    )


def _lower_right(q_len: int, k_len: int) -> Tensor:
    # Importing it loads Dynamo and Inductor.
    from torch.nn.attention.bias import causal_lower_right

    return causal_lower_right(q_len, k_len)


def _folded(visibility: Visibility) -> Visibility:
    """Add an offset that the host can read for free to the bounds."""
    offset = visibility.offset
    if offset is None or offset.device.type != "cpu":
        return visibility
    shift = int(offset)
    return Visibility(
        upper=None if visibility.upper is None else visibility.upper + shift,
        lower=None if visibility.lower is None else visibility.lower + shift,
        key_padding=visibility.key_padding,
        query_documents=visibility.query_documents,
        key_documents=visibility.key_documents,
    )


def _expanded(tokens: Tensor, heads: int) -> Tensor:
    groups = heads // tokens.shape[1]
    return tokens if groups == 1 else tokens.repeat_interleave(groups, dim=1)


def _masked_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, visibility: Visibility
) -> Tensor:
    """Attend under a written-out mask, in turns over query rows where it would be large."""
    (batch, heads, q_len, _), k_len = query.shape, key.shape[2]
    limit = _MASK_ELEMENTS.get(query.device.type, _MASK_ELEMENTS["cuda"])
    step = max(1, limit // (k_len * (1 if visibility.key_padding is None else batch)))
    groups = heads // key.shape[1]
    if q_len > _FOLDED_QUERIES:
        key, value, groups = _expanded(key, heads), _expanded(value, heads), 1
    parts = []
    for start in range(0, q_len, step):
        rows = slice(start, min(start + step, q_len))
        columns = _reachable(visibility, rows, k_len)
        mask = _mask(visibility, rows, columns, query.device)
        # The heads of a group are rows of one head: the mask repeats, keys are not expanded.
        queries = query[:, :, rows].unflatten(1, (-1, groups)).flatten(2, 3)
        mask = mask if groups == 1 else mask.repeat(1, 1, groups, 1)
        part = F.scaled_dot_product_attention(
            queries, key[:, :, columns], value[:, :, columns], attn_mask=mask, scale=scale
        )
        part = part.masked_fill(~mask.any(-1, keepdim=True), 0.0)
        parts.append(part.unflatten(2, (groups, -1)).flatten(1, 2))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _reachable(visibility: Visibility, rows: slice, k_len: int) -> slice:
    """Return the keys, at least one, that some queries may reach."""
    begin, end = 0, k_len
    if visibility.offset is None and visibility.lower is not None:
        begin = min(max(rows.start + visibility.lower, 0), k_len - 1)
    if visibility.offset is None and visibility.upper is not None:
        end = min(rows.stop + visibility.upper, k_len)
    return slice(begin, max(end, begin + 1))


def _mask(visibility: Visibility, rows: slice, columns: slice, device: torch.device) -> Tensor:
    """Return ``Bool[b or 1, 1, rows columns]``."""
    queries = torch.arange(rows.start, rows.stop, device=device)[:, None]
    keys = torch.arange(columns.start, columns.stop, device=device)
    distance = keys - queries
    mask = torch.ones_like(distance, dtype=torch.bool)
    shift = 0 if visibility.offset is None else visibility.offset
    if visibility.upper is not None:
        mask &= distance <= visibility.upper + shift
    if visibility.lower is not None:
        mask &= distance >= visibility.lower + shift
    mask = mask[None]
    if visibility.key_padding is not None:
        mask = mask & visibility.key_padding[:, None, columns]
    if visibility.query_documents is not None and visibility.key_documents is not None:
        of_query = visibility.query_documents[:, rows, None]
        mask = mask & (of_query == visibility.key_documents[:, None, columns])
    return mask[:, None]
