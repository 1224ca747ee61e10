"""Block-sparse attention, forward.

For every query block, walk the list of its key blocks and keep the running softmax of
FlashAttention (running maximum, running sum, rescaled accumulator), in base 2:

    out[i] = sum_j p[i, j] value[j],  p = softmax over the readable keys j of the listed blocks
    lse[i] = log sum_j exp(scale * query[i] . key[j])

Layout: one program per tile of query rows; rows of several query heads share a tile where these
heads share a selection and a key head, so that a key tile is read once for all of them. The list
is split at the band: blocks that lie wholly inside it run without any mask, first; blocks on its
edge, at most a few per row, run masked, after. Programs start with the last query block, which has
most to do under a causal band.

Numerics: products of the input dtype accumulate in float32, probabilities are rounded to the dtype
of the values before the second product, float32 inputs are multiplied exactly. What is not finite
in a value row spoils exactly the queries that may read that row. A softcap is exact to float32; it
takes as many exponentials again as the softmax.

Source:
    Dao, "FlashAttention-2", arXiv:2307.08691; the list layout is FlexAttention's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from seer_compile.kernels.triton.launching import launch_kernel
from seer_compile.kernels.triton.primitives import (
    LOG2_E,
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
    tanh,
    tile_pointers,
    token_visibility,
)
from seer_compile.kernels.triton.tuning import Tiling, forward_tiling, head_layout, shared_memory
from seer_compile.result_layout import empty_like_query


@triton.jit
def _attend(
    query,
    key,
    value,
    accumulator,
    running_max,
    running_sum,
    visible,
    qk_scale,
    inner_scale,
    IS_CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add one key tile to the running softmax; ``visible`` is None inside the band."""
    # [rows, keys]
    logits = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    if IS_CAPPED:
        logits = tanh(logits * inner_scale)
    if visible is None:
        new_max = tl.maximum(running_max, tl.max(logits, 1))
        base = new_max
    else:
        logits = tl.where(visible, logits, float("-inf"))
        new_max = tl.maximum(running_max, tl.max(logits, 1))
        # A row without a readable key so far has maximum -inf, and -inf - -inf is NaN.
        base = tl.where(new_max == float("-inf"), 0.0, new_max)
    if PRECISION == "ieee":
        # Float32 keeps its exactness near the maximum when that is subtracted before scaling.
        probability = tl.math.exp2((logits - base[:, None]) * qk_scale)
    else:
        probability = tl.math.exp2(logits * qk_scale - (base * qk_scale)[:, None])
    rescale = tl.math.exp2((running_max - base) * qk_scale)
    running_sum = running_sum * rescale + tl.sum(probability, 1)
    accumulator = accumulator * rescale[:, None]
    accumulator = tl.dot(probability.to(value.dtype), value, accumulator, input_precision=PRECISION)
    return accumulator, new_max, running_sum


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
        "tile_groups",
    ]
)
def _attention_forward(
    query_ptr,
    key_ptr,
    value_ptr,
    indices_ptr,
    counts_ptr,
    out_ptr,
    lse_ptr,
    query_strides,
    key_strides,
    value_strides,
    out_strides,
    offset_ptr,
    padding_ptr,
    query_documents_ptr,
    key_documents_ptr,
    q_len,
    k_len,
    upper,
    lower,
    scale,
    qk_scale,
    inner_scale,
    selections,
    num_blocks,
    capacity,
    tiles,
    tile_groups,
    PER_KEY_HEAD: tl.constexpr,
    PER_SELECTION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PADDED_VALUE_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    NEGATE: tl.constexpr,
    IS_CAPPED: tl.constexpr,
):
    program = tl.program_id(0)
    tile = tiles - 1 - program % tiles
    group = (program // tiles) % tile_groups
    batch = (program // tiles // tile_groups).to(tl.int64)
    head = group * TILE_HEADS

    rows = tl.arange(0, TILE_HEADS * TILE_Q)
    queries = tile * TILE_Q + rows % TILE_Q
    # Rows of a tile are heads x queries; one stride serves both when folded into an offset.
    row_heads = (head + rows // TILE_Q).to(tl.int64)
    columns = tl.arange(0, PADDED_DIM)
    value_columns = tl.arange(0, PADDED_VALUE_DIM)
    is_query = queries < q_len
    first_query = tile * TILE_Q
    last_query = tl.minimum(first_query + TILE_Q, q_len) - 1
    upper, lower = shifted_band(upper, lower, offset_ptr)

    query_rows = row_heads * query_strides[1] + queries.to(tl.int64) * query_strides[2]
    query = load_tile(
        tile_pointers(
            query_ptr + batch * query_strides[0], query_rows, 1, columns, query_strides[3]
        ),
        is_query,
        columns,
        DIM,
        PADDED_DIM,
    )
    if NEGATE:
        query = -query

    key_head = (head // PER_KEY_HEAD).to(tl.int64)
    key_rows = tl.arange(0, TILE_K)
    key_base = key_ptr + batch * key_strides[0] + key_head * key_strides[1]
    key_tile = tile_pointers(key_base, key_rows, key_strides[2], columns, key_strides[3])
    value_base = value_ptr + batch * value_strides[0] + key_head * value_strides[1]
    value_tile = tile_pointers(
        value_base, key_rows, value_strides[2], value_columns, value_strides[3]
    )

    block = (tile * TILE_Q // BLOCK_Q).to(tl.int64)
    selection = (head // PER_SELECTION).to(tl.int64)
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

    accumulator = tl.zeros([TILE_HEADS * TILE_Q, PADDED_VALUE_DIM], tl.float32)
    running_max = tl.full([TILE_HEADS * TILE_Q], float("-inf"), tl.float32)
    running_sum = tl.zeros([TILE_HEADS * TILE_Q], tl.float32)

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
        accumulator, running_max, running_sum = _attend(
            query, key, value, accumulator, running_max, running_sum, None, qk_scale, inner_scale,
            IS_CAPPED, PRECISION,
        )  # fmt: skip

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
        value, is_spoilt = finite_or_zero(value)
        accumulator, running_max, running_sum = _attend(
            query, key, value, accumulator, running_max, running_sum, visible, qk_scale,
            inner_scale, IS_CAPPED, PRECISION,
        )  # fmt: skip
        reads_spoilt = tl.max(tl.where(visible & is_spoilt[None, :], 1, 0), 1)
        accumulator = tl.where((reads_spoilt != 0)[:, None], float("nan"), accumulator)

    # A row that read nothing has sum 0: its output is 0 and its log-sum-exp is -inf.
    is_empty = running_sum == 0.0
    divisor = tl.where(is_empty, 1.0, running_sum)
    lse = tl.where(is_empty, float("-inf"), running_max * scale + tl.log(divisor))
    out_rows = row_heads * out_strides[1] + queries.to(tl.int64) * out_strides[2]
    store_tile(
        tile_pointers(out_ptr + batch * out_strides[0], out_rows, 1, value_columns, out_strides[3]),
        accumulator / divisor[:, None],
        is_query,
        value_columns,
        VALUE_DIM,
        PADDED_VALUE_DIM,
    )
    heads = tile_groups * TILE_HEADS
    lse_rows = (batch * heads + row_heads) * q_len + queries
    tl.store(lse_ptr + lse_rows, lse, mask=is_query)


def _scales(scale: float, softcap: float | None) -> tuple[float, float, float]:
    """Return the scale of logits as they are held, the same in base 2, and that inside a tanh."""
    # Maxima are taken before scaling, so the scale is positive.
    magnitude = max(abs(float(scale)), 1e-30)
    # Capped logits are held in units of the cap: the scale goes inside, the cap is what is left.
    outer = magnitude if softcap is None else float(softcap)
    return outer, outer * LOG2_E, magnitude / outer


def launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
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
    softcap: float | None = None,
    tiling: Tiling | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute block-sparse attention.

    Args:
        query: ``Float[b h q d]``.
        key: ``Float[b g k d]``; ``g`` divides ``h``.
        value: ``Float[b g k v]``.
        indices: ``Int32[b s m capacity]``, ascending in the first ``counts`` entries of a row.
        counts: ``Int32[b s m]``; ``s`` divides ``h``.
        scale: Factor on the logits.
        query_block: Tokens per query block.
        key_block: Tokens per key block.
        upper: Largest visible ``j - i``.
        lower: Smallest visible ``j - i``.
        offset: ``Int[]``, added to both bounds.
        key_padding: ``Bool[b k]``, True where the key may be read.
        query_documents: ``Int[b q]``.
        key_documents: ``Int[b k]``.
        softcap: Bounds the logits by ``softcap * tanh(logits / softcap)``, before the mask.
        tiling: Overrides the tuning table.

    Returns:
        ``Float[b h q v]``, lying like the query (see :mod:`seer_compile.result_layout`), and
        ``Float32[b h q]``, the natural log-sum-exp of each row. A row that reads nothing is 0 and
        -inf.

    Cost:
        Four products of ``query_block x key_block x d`` per listed block, in multiply-adds two;
        no memory beyond the results.
    """
    batch, heads, q_len, dim = query.shape
    kv_heads, k_len, value_dim = key.shape[1], key.shape[2], value.shape[3]
    layout = head_layout(heads, kv_heads, indices.shape[1])
    out = empty_like_query(query, value)
    lse = torch.empty((batch, heads, q_len), dtype=torch.float32, device=query.device)
    if out.numel() == 0 or k_len == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    padded = padded_dim(dim), padded_dim(value_dim)
    tiling = tiling or forward_tiling(
        layout, query_block, key_block, max(padded), query.dtype, shared_memory(query.device)
    )
    band = make_band(upper, lower, offset)
    tiles = ceil_div(q_len, tiling.rows)
    groups = heads // tiling.heads
    with launching_on(query, "query"):
        launch_kernel(
            _attention_forward,
            tiles * groups * batch,
            query,
            key,
            value,
            indices.contiguous(),
            counts.contiguous(),
            out,
            lse,
            query.stride(),
            key.stride(),
            value.stride(),
            out.stride(),
            band.offset,
            *fine_rules(key_padding, query_documents, key_documents),
            q_len,
            k_len,
            band.upper,
            band.lower,
            *_scales(scale, softcap),
            *indices.shape[1:],
            tiles,
            groups,
            PER_KEY_HEAD=layout.per_key_head,
            PER_SELECTION=layout.per_selection,
            BLOCK_Q=query_block,
            BLOCK_K=key_block,
            TILE_Q=tiling.rows,
            TILE_K=tiling.keys,
            TILE_HEADS=tiling.heads,
            DIM=dim,
            VALUE_DIM=value_dim,
            PADDED_DIM=padded[0],
            PADDED_VALUE_DIM=padded[1],
            PRECISION=dot_precision(query.dtype),
            NEGATE=scale < 0,
            IS_CAPPED=softcap is not None,
            num_warps=tiling.warps,
            num_stages=tiling.stages,
        )
    return out, lse
