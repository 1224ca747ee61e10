"""Gradient of the queries: one program per query tile walks its list of key blocks.

Writes ``delta[i] = sum_v grad_out[i, v] out[i, v]`` too, for the kernel of the other gradients.
See :mod:`attention_backward` for the formulas.
"""

from __future__ import annotations

import triton
import triton.language as tl

from seer_compile.kernels.triton.primitives import (
    LOG2_E,
    count_outside,
    finite_or_zero,
    interior_key_range,
    load_tile,
    load_whole_tile,
    shifted_band,
    store_tile,
    tanh,
    tile_pointers,
    token_visibility,
)

_LOG2_E = tl.constexpr(LOG2_E)


@triton.jit
def grad_logits(
    query, key, value, grad_out, lse, delta, visible, scale, softcap, IS_CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Return probabilities and the gradient of the logits, ``[rows, keys]`` each.

    Called with the roles of rows and keys exchanged it returns both transposed; ``lse`` and
    ``delta`` come shaped to broadcast. Of a softcap the gradient is that of what it bounds.
    """
    logits = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    if IS_CAPPED:
        bounded = tanh(logits * (scale / softcap))
        logits, scale = bounded, softcap
    if PRECISION == "ieee":
        # Base 2 costs float32 a rounding of both terms; here only their difference is rounded.
        logits = (logits * scale - lse) * _LOG2_E
    else:
        logits = logits * (scale * _LOG2_E) - lse * _LOG2_E
    if visible is not None:
        logits = tl.where(visible, logits, float("-inf"))
    probability = tl.math.exp2(logits)
    grad_probability = tl.dot(grad_out, tl.trans(value), input_precision=PRECISION)
    gradient = probability * (grad_probability - delta)
    if IS_CAPPED:
        gradient *= 1.0 - bounded * bounded
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
def query_gradient(
    query_ptr, key_ptr, value_ptr, out_ptr, grad_out_ptr, lse_ptr, delta_ptr, indices_ptr,
    counts_ptr, grad_query_ptr, query_strides, key_strides, value_strides, out_strides,
    grad_out_strides, grad_query_strides, offset_ptr, padding_ptr, query_documents_ptr,
    key_documents_ptr, q_len, k_len, upper, lower, scale, softcap, selections, num_blocks, capacity,
    tiles, heads, PER_KEY_HEAD: tl.constexpr, PER_SELECTION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    PADDED_VALUE_DIM: tl.constexpr, PRECISION: tl.constexpr, IS_CAPPED: tl.constexpr,
):  # fmt: skip
    """Write the gradient of one tile of queries, and its delta."""
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
        tile_pointers(query_base, queries, query_strides[2], columns, query_strides[3]), is_query,
        columns, DIM, PADDED_DIM,
    )  # fmt: skip
    out_base = out_ptr + batch * out_strides[0] + head * out_strides[1]
    out = load_tile(
        tile_pointers(out_base, queries, out_strides[2], value_columns, out_strides[3]), is_query,
        value_columns, VALUE_DIM, PADDED_VALUE_DIM,
    )  # fmt: skip
    grad_base = grad_out_ptr + batch * grad_out_strides[0] + head * grad_out_strides[1]
    grad_out = load_tile(
        tile_pointers(grad_base, queries, grad_out_strides[2], value_columns, grad_out_strides[3]),
        is_query, value_columns, VALUE_DIM, PADDED_VALUE_DIM,
    )  # fmt: skip
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
            value_tile + start.to(tl.int64) * value_strides[2], value_columns, VALUE_DIM,
            PADDED_VALUE_DIM,
        )  # fmt: skip
        _, gradient = grad_logits(
            query, key, value, grad_out, lse[:, None], delta[:, None], None, scale, softcap,
            IS_CAPPED, PRECISION,
        )  # fmt: skip
        accumulator = tl.dot(gradient.to(key.dtype), key, accumulator, input_precision=PRECISION)

    for step in range(0, (num_below + num_above) * SPLIT):
        position = step // SPLIT
        position = tl.where(
            position < num_below, position, position + count - num_below - num_above
        )
        start = tl.load(list_ptr + position) * BLOCK_K + step % SPLIT * TILE_K
        visible, is_key = token_visibility(
            queries, start + key_rows, batch, q_len, k_len, upper, lower, padding_ptr,
            query_documents_ptr, key_documents_ptr,
        )  # fmt: skip
        key = load_tile(
            key_tile + start.to(tl.int64) * key_strides[2], is_key, columns, DIM, PADDED_DIM
        )
        value = load_tile(
            value_tile + start.to(tl.int64) * value_strides[2], is_key, value_columns, VALUE_DIM,
            PADDED_VALUE_DIM,
        )  # fmt: skip
        _, gradient = grad_logits(
            query, key, value, grad_out, lse[:, None], delta[:, None], visible, scale, softcap,
            IS_CAPPED, PRECISION,
        )  # fmt: skip
        key, _ = finite_or_zero(key)
        accumulator = tl.dot(gradient.to(key.dtype), key, accumulator, input_precision=PRECISION)

    target = grad_query_ptr + batch * grad_query_strides[0] + head * grad_query_strides[1]
    store_tile(
        tile_pointers(target, queries, grad_query_strides[2], columns, grad_query_strides[3]),
        accumulator * scale, is_query, columns, DIM, PADDED_DIM,
    )  # fmt: skip
