"""Block-sparse attention, backward: gradients of query, key and value.

With ``p`` recomputed from the saved log-sum-exp, ``delta[i] = sum_v grad_out[i] out[i]`` and
``dlogits = p * (grad_out value^T - delta)``:

    dquery = scale * dlogits key      dkey = scale * dlogits^T query      dvalue = p^T grad_out

Layout: two kernels. The first walks the list of each query block and writes dquery and delta. The
second walks, for each key tile, the transposed lists of all query heads of its key head, so that
the sum over these heads happens in registers. Neither uses atomics: results are deterministic.

Numerics: as in the forward; ``p`` and ``dlogits`` are rounded to the input dtype before products.

Source:
    Dao, "FlashAttention-2", arXiv:2307.08691, algorithm 2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from seer_compile.kernels.triton.attention_forward import head_layout
from seer_compile.kernels.triton.primitives import (
    ceil_div,
    count_outside,
    dot_precision,
    fine_rules,
    finite_or_zero,
    interior_key_range,
    launching_on,
    load_tile,
    load_whole_tile,
    make_band,
    padded_dim,
    shifted_band,
    store_tile,
    tile_pointers,
    token_visibility,
)
from seer_compile.kernels.triton.transpose_selection import transpose_selection


class BackwardTiling(NamedTuple):
    """How the two kernels are cut into tiles; each divides its block."""

    rows: int
    keys: int
    query_warps: int
    query_stages: int
    key_warps: int
    key_stages: int


@triton.jit
def _dlogits(query, key, value, grad_out, lse, delta, visible, scale, PRECISION: tl.constexpr):
    """Return probabilities and the gradient of the logits, ``[rows, keys]`` each.

    Called with the roles of rows and keys exchanged it returns both transposed; ``lse`` and
    ``delta`` come shaped to broadcast.
    """
    logits = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    if PRECISION == "ieee":
        # Base 2 costs float32 a rounding of both terms; here only their difference is rounded.
        logits = (logits * scale - lse) * 1.4426950408889634
    else:
        logits = logits * (scale * 1.4426950408889634) - lse * 1.4426950408889634
    if visible is not None:
        logits = tl.where(visible, logits, float("-inf"))
    probability = tl.math.exp2(logits)
    grad_probability = tl.dot(grad_out, tl.trans(value), input_precision=PRECISION)
    gradient = probability * (grad_probability - delta)
    if visible is not None:
        # Where an unread value is not finite, 0 * NaN has slipped in.
        gradient = tl.where(visible, gradient, 0.0)
    return probability, gradient


@triton.jit(
    do_not_specialize=[
        "q_len",
        "k_len",
        "upper",
        "lower",
        "selections",
        "num_blocks",
        "capacity",
        "tiles",
        "heads",
    ]
)
def _query_gradient(
    query_ptr,
    key_ptr,
    value_ptr,
    out_ptr,
    grad_out_ptr,
    lse_ptr,
    delta_ptr,
    indices_ptr,
    counts_ptr,
    grad_query_ptr,
    query_strides,
    key_strides,
    value_strides,
    out_strides,
    grad_out_strides,
    grad_query_strides,
    offset_ptr,
    padding_ptr,
    query_documents_ptr,
    key_documents_ptr,
    q_len,
    k_len,
    upper,
    lower,
    scale,
    selections,
    num_blocks,
    capacity,
    tiles,
    heads,
    PER_KEY_HEAD: tl.constexpr,
    PER_SELECTION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PADDED_VALUE_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0)
    tile = tiles - 1 - program % tiles
    head = (program // tiles % heads).to(tl.int64)
    batch = (program // tiles // heads).to(tl.int64)
    queries = tile * TILE_Q + tl.arange(0, TILE_Q)
    columns = tl.arange(0, PADDED_DIM)
    value_columns = tl.arange(0, PADDED_VALUE_DIM)
    is_query = queries < q_len
    first_query = tile * TILE_Q
    last_query = tl.minimum(first_query + TILE_Q, q_len) - 1
    upper, lower = shifted_band(upper, lower, offset_ptr)

    query_base = query_ptr + batch * query_strides[0] + head * query_strides[1]
    query = load_tile(
        tile_pointers(query_base, queries, query_strides[2], columns, query_strides[3]),
        is_query,
        columns,
        DIM,
        PADDED_DIM,
    )
    out_base = out_ptr + batch * out_strides[0] + head * out_strides[1]
    out = load_tile(
        tile_pointers(out_base, queries, out_strides[2], value_columns, out_strides[3]),
        is_query,
        value_columns,
        VALUE_DIM,
        PADDED_VALUE_DIM,
    )
    grad_base = grad_out_ptr + batch * grad_out_strides[0] + head * grad_out_strides[1]
    grad_out = load_tile(
        tile_pointers(grad_base, queries, grad_out_strides[2], value_columns, grad_out_strides[3]),
        is_query,
        value_columns,
        VALUE_DIM,
        PADDED_VALUE_DIM,
    )
    delta = tl.sum(out.to(tl.float32) * grad_out.to(tl.float32), 1)
    statistics = (batch * heads + head) * q_len + queries
    tl.store(delta_ptr + statistics, delta, mask=is_query)
    lse = tl.load(lse_ptr + statistics, mask=is_query, other=float("inf"))
    # A row that read nothing has lse -inf; with +inf its probabilities are 0.
    lse = tl.where(lse == float("-inf"), float("inf"), lse)

    key_head = head // PER_KEY_HEAD
    key_rows = tl.arange(0, TILE_K)
    key_base = key_ptr + batch * key_strides[0] + key_head * key_strides[1]
    key_tile = tile_pointers(key_base, key_rows, key_strides[2], columns, key_strides[3])
    value_base = value_ptr + batch * value_strides[0] + key_head * value_strides[1]
    value_tile = tile_pointers(
        value_base, key_rows, value_strides[2], value_columns, value_strides[3]
    )
    block = (tile * TILE_Q // BLOCK_Q).to(tl.int64)
    selection = head // PER_SELECTION
    list_row = (batch * selections + selection) * num_blocks + block
    list_ptr = indices_ptr + list_row * capacity
    count = tl.load(counts_ptr + list_row)
    if (padding_ptr is None) and (key_documents_ptr is None):
        begin, end = interior_key_range(first_query, last_query, upper, lower, k_len, BLOCK_K)
        num_below, num_above = count_outside(list_ptr, count, begin, end, 128)
    else:
        num_below = count
        num_above = 0
    SPLIT: tl.constexpr = BLOCK_K // TILE_K
    accumulator = tl.zeros([TILE_Q, PADDED_DIM], tl.float32)

    for step in range(num_below * SPLIT, (count - num_above) * SPLIT):
        start = tl.load(list_ptr + step // SPLIT) * BLOCK_K + step % SPLIT * TILE_K
        key = load_whole_tile(
            key_tile + start.to(tl.int64) * key_strides[2], columns, DIM, PADDED_DIM
        )
        value = load_whole_tile(
            value_tile + start.to(tl.int64) * value_strides[2],
            value_columns,
            VALUE_DIM,
            PADDED_VALUE_DIM,
        )
        _, gradient = _dlogits(
            query, key, value, grad_out, lse[:, None], delta[:, None], None, scale, PRECISION
        )
        accumulator = tl.dot(gradient.to(key.dtype), key, accumulator, input_precision=PRECISION)

    for step in range(0, (num_below + num_above) * SPLIT):
        position = step // SPLIT
        position = tl.where(
            position < num_below, position, position + count - num_below - num_above
        )
        start = tl.load(list_ptr + position) * BLOCK_K + step % SPLIT * TILE_K
        visible, is_key = token_visibility(
            queries,
            start + key_rows,
            batch,
            q_len,
            k_len,
            upper,
            lower,
            padding_ptr,
            query_documents_ptr,
            key_documents_ptr,
        )
        key = load_tile(
            key_tile + start.to(tl.int64) * key_strides[2], is_key, columns, DIM, PADDED_DIM
        )
        value = load_tile(
            value_tile + start.to(tl.int64) * value_strides[2],
            is_key,
            value_columns,
            VALUE_DIM,
            PADDED_VALUE_DIM,
        )
        _, gradient = _dlogits(
            query, key, value, grad_out, lse[:, None], delta[:, None], visible, scale, PRECISION
        )
        key, _ = finite_or_zero(key)
        accumulator = tl.dot(gradient.to(key.dtype), key, accumulator, input_precision=PRECISION)

    target = grad_query_ptr + batch * grad_query_strides[0] + head * grad_query_strides[1]
    store_tile(
        tile_pointers(target, queries, grad_query_strides[2], columns, grad_query_strides[3]),
        accumulator * scale,
        is_query,
        columns,
        DIM,
        PADDED_DIM,
    )


@triton.jit
def _interior_query_range(first_key, last_key, upper, lower, q_len, BLOCK: tl.constexpr):
    """Return the range of query blocks of which every query may read every key of a tile."""
    begin = (tl.maximum(last_key - upper, 0) + BLOCK - 1) // BLOCK
    end = tl.maximum(tl.minimum(q_len, first_key - lower + 1), 0) // BLOCK
    return begin, end


@triton.jit(
    do_not_specialize=["q_len", "k_len", "upper", "lower", "tiles", "kv_heads", "query_blocks"]
)
def _key_value_gradient(
    query_ptr,
    key_ptr,
    value_ptr,
    grad_out_ptr,
    lse_ptr,
    delta_ptr,
    lists_ptr,
    list_counts_ptr,
    grad_key_ptr,
    grad_value_ptr,
    query_strides,
    key_strides,
    value_strides,
    grad_out_strides,
    grad_key_strides,
    grad_value_strides,
    offset_ptr,
    padding_ptr,
    query_documents_ptr,
    key_documents_ptr,
    q_len,
    k_len,
    upper,
    lower,
    scale,
    tiles,
    kv_heads,
    query_blocks,
    PER_KEY_HEAD: tl.constexpr,
    PER_SELECTION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PADDED_VALUE_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0)
    # Early key tiles first: under a causal band most queries read them.
    tile = program % tiles
    key_head = (program // tiles % kv_heads).to(tl.int64)
    batch = (program // tiles // kv_heads).to(tl.int64)
    keys = tile * TILE_K + tl.arange(0, TILE_K)
    query_rows = tl.arange(0, TILE_Q)
    columns = tl.arange(0, PADDED_DIM)
    value_columns = tl.arange(0, PADDED_VALUE_DIM)
    upper, lower = shifted_band(upper, lower, offset_ptr)
    is_key = keys < k_len
    is_read = is_key
    if padding_ptr is not None:
        flags = tl.load(padding_ptr + batch * k_len + keys, mask=is_key, other=0)
        is_read = is_key & (flags != 0)
    key_base = key_ptr + batch * key_strides[0] + key_head * key_strides[1]
    key = load_tile(
        tile_pointers(key_base, keys, key_strides[2], columns, key_strides[3]),
        is_read,
        columns,
        DIM,
        PADDED_DIM,
    )
    value_base = value_ptr + batch * value_strides[0] + key_head * value_strides[1]
    value = load_tile(
        tile_pointers(value_base, keys, value_strides[2], value_columns, value_strides[3]),
        is_read,
        value_columns,
        VALUE_DIM,
        PADDED_VALUE_DIM,
    )
    grad_key = tl.zeros([TILE_K, PADDED_DIM], tl.float32)
    grad_value = tl.zeros([TILE_K, PADDED_VALUE_DIM], tl.float32)
    last_key = tl.minimum(tile * TILE_K + TILE_K, k_len) - 1
    block = tile * TILE_K // BLOCK_K
    num_key_blocks = (k_len + BLOCK_K - 1) // BLOCK_K
    SPLIT: tl.constexpr = BLOCK_Q // TILE_Q

    for member in range(0, PER_KEY_HEAD):
        head = key_head * PER_KEY_HEAD + member
        heads = kv_heads * PER_KEY_HEAD
        selection = (batch * heads + head) // PER_SELECTION
        list_row = selection * num_key_blocks + block
        list_ptr = lists_ptr + list_row * query_blocks
        count = tl.load(list_counts_ptr + list_row)
        if key_documents_ptr is None:
            begin, end = _interior_query_range(
                tile * TILE_K, last_key, upper, lower, q_len, BLOCK_Q
            )
            num_below, num_above = count_outside(list_ptr, count, begin, end, 128)
        else:
            num_below = count
            num_above = 0
        query_base = query_ptr + batch * query_strides[0] + head * query_strides[1]
        query_tile = tile_pointers(
            query_base, query_rows, query_strides[2], columns, query_strides[3]
        )
        grad_base = grad_out_ptr + batch * grad_out_strides[0] + head * grad_out_strides[1]
        grad_tile = tile_pointers(
            grad_base, query_rows, grad_out_strides[2], value_columns, grad_out_strides[3]
        )
        statistics = (batch * heads + head) * q_len

        for step in range(num_below * SPLIT, (count - num_above) * SPLIT):
            start = tl.load(list_ptr + step // SPLIT) * BLOCK_Q + step % SPLIT * TILE_Q
            query = load_whole_tile(
                query_tile + start.to(tl.int64) * query_strides[2], columns, DIM, PADDED_DIM
            )
            grad_out = load_whole_tile(
                grad_tile + start.to(tl.int64) * grad_out_strides[2],
                value_columns,
                VALUE_DIM,
                PADDED_VALUE_DIM,
            )
            lse = tl.load(lse_ptr + statistics + start + query_rows)
            delta = tl.load(delta_ptr + statistics + start + query_rows)
            probability, gradient = _dlogits(
                key, query, grad_out, value, lse[None, :], delta[None, :], None, scale, PRECISION
            )
            grad_value = tl.dot(
                probability.to(grad_out.dtype), grad_out, grad_value, input_precision=PRECISION
            )
            grad_key = tl.dot(gradient.to(query.dtype), query, grad_key, input_precision=PRECISION)

        for step in range(0, (num_below + num_above) * SPLIT):
            position = step // SPLIT
            position = tl.where(
                position < num_below, position, position + count - num_below - num_above
            )
            start = tl.load(list_ptr + position) * BLOCK_Q + step % SPLIT * TILE_Q
            queries = start + query_rows
            is_query = queries < q_len
            visible, _ = token_visibility(
                queries,
                keys,
                batch,
                q_len,
                k_len,
                upper,
                lower,
                padding_ptr,
                query_documents_ptr,
                key_documents_ptr,
            )
            visible = tl.trans(visible.to(tl.int8)) != 0
            query = load_tile(
                query_tile + start.to(tl.int64) * query_strides[2],
                is_query,
                columns,
                DIM,
                PADDED_DIM,
            )
            grad_out = load_tile(
                grad_tile + start.to(tl.int64) * grad_out_strides[2],
                is_query,
                value_columns,
                VALUE_DIM,
                PADDED_VALUE_DIM,
            )
            lse = tl.load(lse_ptr + statistics + queries, mask=is_query, other=0.0)
            lse = tl.where(lse == float("-inf"), float("inf"), lse)
            delta = tl.load(delta_ptr + statistics + queries, mask=is_query, other=0.0)
            probability, gradient = _dlogits(
                key,
                query,
                grad_out,
                value,
                lse[None, :],
                delta[None, :],
                visible,
                scale,
                PRECISION,
            )
            query, _ = finite_or_zero(query)
            grad_out, is_spoilt = finite_or_zero(grad_out)
            # Where a log-sum-exp is NaN, so is the probability of what its row may not read.
            probability = tl.where(visible, probability, 0.0)
            grad_value = tl.dot(
                probability.to(grad_out.dtype), grad_out, grad_value, input_precision=PRECISION
            )
            reads_spoilt = tl.max(tl.where(visible & is_spoilt[None, :], 1, 0), 1)
            grad_value = tl.where((reads_spoilt != 0)[:, None], float("nan"), grad_value)
            grad_key = tl.dot(gradient.to(query.dtype), query, grad_key, input_precision=PRECISION)

    target = grad_key_ptr + batch * grad_key_strides[0] + key_head * grad_key_strides[1]
    store_tile(
        tile_pointers(target, keys, grad_key_strides[2], columns, grad_key_strides[3]),
        tl.where(is_read[:, None], grad_key * scale, 0.0),
        is_key,
        columns,
        DIM,
        PADDED_DIM,
    )
    target = grad_value_ptr + batch * grad_value_strides[0] + key_head * grad_value_strides[1]
    store_tile(
        tile_pointers(target, keys, grad_value_strides[2], value_columns, grad_value_strides[3]),
        tl.where(is_read[:, None], grad_value, 0.0),
        is_key,
        value_columns,
        VALUE_DIM,
        PADDED_VALUE_DIM,
    )


def choose_tiling(query_block: int, key_block: int, dim: int, dtype: torch.dtype) -> BackwardTiling:
    """Return the tiling for a shape; ``dim`` is the larger of the padded head dims."""
    if dtype is torch.float32:
        size = 32 if dim <= 64 else 16
        return BackwardTiling(min(query_block, size), min(key_block, size), 4, 1, 4, 1)
    rows, keys = min(query_block, 64), min(key_block, 64)
    if dim <= 64:
        return BackwardTiling(rows, keys, 4, 3, 4, 3)
    if dim <= 128:
        return BackwardTiling(rows, keys, 4, 2, 8, 2)
    return BackwardTiling(rows, min(keys, 32), 8, 2, 8, 1)


def launch(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    indices: Tensor,
    counts: Tensor,
    scale: float,
    query_block: int,
    key_block: int,
    upper: int | None = None,
    lower: int | None = None,
    offset: Tensor | None = None,
    key_padding: Tensor | None = None,
    query_documents: Tensor | None = None,
    key_documents: Tensor | None = None,
    *,
    tiling: BackwardTiling | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate block-sparse attention.

    Args:
        grad_out: ``Float[b h q v]``, any strides.
        query: ``Float[b h q d]``.
        key: ``Float[b g k d]``.
        value: ``Float[b g k v]``.
        out: ``Float[b h q v]``, of the forward.
        lse: ``Float32[b h q]``, of the forward.
        indices: ``Int32[b s m capacity]``.
        counts: ``Int32[b s m]``.
        scale: Factor on the logits.
        query_block: Tokens per query block.
        key_block: Tokens per key block.
        upper: Largest visible ``j - i``.
        lower: Smallest visible ``j - i``.
        offset: ``Int[]``, added to both bounds.
        key_padding: ``Bool[b k]``.
        query_documents: ``Int[b q]``.
        key_documents: ``Int[b k]``.
        tiling: Overrides the tuning table.

    Returns:
        Contiguous gradients of query, key and value, in their dtypes. Keys that no query reads,
        and queries that read nothing, get 0.

    Cost:
        Seven products per listed block to the forward's two; the transposed selection,
        five bytes per block pair.
    """
    batch, heads, q_len, dim = query.shape
    kv_heads, k_len, value_dim = key.shape[1], key.shape[2], value.shape[3]
    layout = head_layout(heads, kv_heads, indices.shape[1])
    gradients = tuple(
        torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        for tensor in (query, key, value)
    )
    if query.numel() == 0 or key.numel() == 0:
        return tuple(gradient.zero_() for gradient in gradients)  # type: ignore[return-value]
    grad_query, grad_key, grad_value = gradients
    padded = padded_dim(dim), padded_dim(value_dim)
    tiling = tiling or choose_tiling(query_block, key_block, max(padded), query.dtype)
    band = make_band(upper, lower, offset)
    delta = torch.empty_like(lse, memory_format=torch.contiguous_format)
    lse, indices, counts = lse.contiguous(), indices.contiguous(), counts.contiguous()
    key_blocks = ceil_div(k_len, key_block)
    visibility = (
        band.offset,
        *fine_rules(key_padding, query_documents, key_documents),
        q_len,
        k_len,
        band.upper,
        band.lower,
        float(scale),
    )
    constants = {
        "PER_KEY_HEAD": layout.per_key_head,
        "PER_SELECTION": layout.per_selection,
        "BLOCK_Q": query_block,
        "BLOCK_K": key_block,
        "TILE_Q": tiling.rows,
        "TILE_K": tiling.keys,
        "DIM": dim,
        "VALUE_DIM": value_dim,
        "PADDED_DIM": padded[0],
        "PADDED_VALUE_DIM": padded[1],
        "PRECISION": dot_precision(query.dtype),
    }
    with launching_on(query, "query"):
        lists, list_counts = transpose_selection(indices, counts, key_blocks)
        tiles = ceil_div(q_len, tiling.rows)
        _query_gradient[(tiles * heads * batch,)](
            query,
            key,
            value,
            out,
            grad_out,
            lse,
            delta,
            indices,
            counts,
            grad_query,
            query.stride(),
            key.stride(),
            value.stride(),
            out.stride(),
            grad_out.stride(),
            grad_query.stride(),
            *visibility,
            *indices.shape[1:],
            tiles,
            heads,
            **constants,
            num_warps=tiling.query_warps,
            num_stages=tiling.query_stages,
        )
        tiles = ceil_div(k_len, tiling.keys)
        _key_value_gradient[(tiles * kv_heads * batch,)](
            query,
            key,
            value,
            grad_out,
            lse,
            delta,
            lists,
            list_counts,
            grad_key,
            grad_value,
            query.stride(),
            key.stride(),
            value.stride(),
            grad_out.stride(),
            grad_key.stride(),
            grad_value.stride(),
            *visibility,
            tiles,
            kv_heads,
            lists.shape[3],
            **constants,
            num_warps=tiling.key_warps,
            num_stages=tiling.key_stages,
        )
    return grad_query, grad_key, grad_value
