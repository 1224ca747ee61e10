"""Gradients of keys and values: one program per key tile walks the query blocks that list it.

The lists of all query heads of its key head are walked in turn, so their sum stays in registers.
See :mod:`attention_backward` for the formulas.
"""

from __future__ import annotations

import triton
import triton.language as tl

from seer_compile.kernels.triton.primitives import (
    count_outside,
    finite_or_zero,
    load_tile,
    load_whole_tile,
    shifted_band,
    store_tile,
    tile_pointers,
    token_visibility,
)
from seer_compile.kernels.triton.query_gradient import grad_logits


@triton.jit
def _interior_query_range(first_key, last_key, upper, lower, q_len, BLOCK: tl.constexpr):
    """Return the range of query blocks of which every query may read every key of a tile."""
    begin = (tl.maximum(last_key - upper, 0) + BLOCK - 1) // BLOCK
    end = tl.maximum(tl.minimum(q_len, first_key - lower + 1), 0) // BLOCK
    return begin, end


@triton.jit(
    do_not_specialize=["q_len", "k_len", "upper", "lower", "tiles", "kv_heads", "query_blocks"]
)
def key_value_gradient(
    query_ptr, key_ptr, value_ptr, grad_out_ptr, lse_ptr, delta_ptr, lists_ptr, list_counts_ptr,
    grad_key_ptr, grad_value_ptr, query_strides, key_strides, value_strides, grad_out_strides,
    grad_key_strides, grad_value_strides, offset_ptr, padding_ptr, query_documents_ptr,
    key_documents_ptr, q_len, k_len, upper, lower, scale, softcap, tiles, kv_heads, query_blocks,
    PER_KEY_HEAD: tl.constexpr, PER_SELECTION: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr, DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, PADDED_VALUE_DIM: tl.constexpr,
    PRECISION: tl.constexpr, IS_CAPPED: tl.constexpr,
):  # fmt: skip
    """Write the gradients of one tile of keys and values."""
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
        tile_pointers(key_base, keys, key_strides[2], columns, key_strides[3]), is_read, columns,
        DIM, PADDED_DIM,
    )  # fmt: skip
    value_base = value_ptr + batch * value_strides[0] + key_head * value_strides[1]
    value = load_tile(
        tile_pointers(value_base, keys, value_strides[2], value_columns, value_strides[3]),
        is_read, value_columns, VALUE_DIM, PADDED_VALUE_DIM,
    )  # fmt: skip
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
                grad_tile + start.to(tl.int64) * grad_out_strides[2], value_columns, VALUE_DIM,
                PADDED_VALUE_DIM,
            )  # fmt: skip
            lse = tl.load(lse_ptr + statistics + start + query_rows)
            delta = tl.load(delta_ptr + statistics + start + query_rows)
            probability, gradient = grad_logits(
                key, query, grad_out, value, lse[None, :], delta[None, :], None, scale, softcap,
                IS_CAPPED, PRECISION,
            )  # fmt: skip
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
                queries, keys, batch, q_len, k_len, upper, lower, padding_ptr,
                query_documents_ptr, key_documents_ptr,
            )  # fmt: skip
            visible = tl.trans(visible.to(tl.int8)) != 0
            query = load_tile(
                query_tile + start.to(tl.int64) * query_strides[2], is_query, columns, DIM,
                PADDED_DIM,
            )  # fmt: skip
            grad_out = load_tile(
                grad_tile + start.to(tl.int64) * grad_out_strides[2], is_query, value_columns,
                VALUE_DIM, PADDED_VALUE_DIM,
            )  # fmt: skip
            lse = tl.load(lse_ptr + statistics + queries, mask=is_query, other=0.0)
            lse = tl.where(lse == float("-inf"), float("inf"), lse)
            delta = tl.load(delta_ptr + statistics + queries, mask=is_query, other=0.0)
            probability, gradient = grad_logits(
                key, query, grad_out, value, lse[None, :], delta[None, :], visible, scale, softcap,
                IS_CAPPED, PRECISION,
            )  # fmt: skip
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
        tl.where(is_read[:, None], grad_key * scale, 0.0), is_key, columns, DIM, PADDED_DIM,
    )  # fmt: skip
    target = grad_value_ptr + batch * grad_value_strides[0] + key_head * grad_value_strides[1]
    store_tile(
        tile_pointers(target, keys, grad_value_strides[2], value_columns, grad_value_strides[3]),
        tl.where(is_read[:, None], grad_value, 0.0), is_key, value_columns, VALUE_DIM,
        PADDED_VALUE_DIM,
    )  # fmt: skip
