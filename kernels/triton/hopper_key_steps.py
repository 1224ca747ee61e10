"""How four warps take query tiles into the gradients of their 64 keys and values.

Everything is transposed: rows are keys, columns queries. ``held`` are keys and values in shared
memory; ``state`` both gradients and which keys are read by output gradients that are not finite;
``cursor`` the next slot and the parity of its use. A ring is its tiles of queries, output gradients
and statistics, the barriers of its filled and those of its emptied slots: see
``hopper_key_gradient``.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from seer_compile.kernels.triton.hopper_steps import meet_warps, next_slot
from seer_compile.kernels.triton.hopper_tiles import (
    add_values,
    as_operand,
    clear_rows,
    logits,
    spoilt_words,
    value_words,
)


@gluon.jit
def query_tile_of(list_ptr, item, step, masked, first_whole, SPLIT: gl.constexpr):
    """Return the query tile of a step, masked ones first."""
    _, _, part, parts = item
    is_masked = step < masked
    position = part + gl.where(is_masked, step, step - masked) * parts
    block = gl.load(list_ptr + gl.where(is_masked, 0, first_whole) + position // SPLIT)
    return block * SPLIT + position % SPLIT


@gluon.jit
def statistics_of(statistics_smem, slot, START: gl.constexpr):
    """Return 64 numbers of a tile of statistics, one per column of the transposed logits."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    numbers = statistics_smem.index(slot).reshape([128]).slice(START, 64)
    return numbers.load(gl.SliceLayout(0, layout))


@gluon.jit
def visibility_by_keys(keys, start, batch, band, rules):
    """Return ``[64 64]``: by which query of the tile at ``start`` each key may be read."""
    q_len, k_len, upper, lower = band
    padding_ptr, query_documents_ptr, key_documents_ptr = rules
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    queries = start + gl.arange(0, 64, gl.SliceLayout(0, layout))
    is_query = queries < q_len
    is_key = keys < k_len
    # Two comparisons per pair: a key beyond the end has an empty range.
    first = gl.where(is_key, keys - upper, q_len)
    last = gl.minimum(keys - lower, q_len - 1)
    visible = (queries[None, :] >= first[:, None]) & (queries[None, :] <= last[:, None])
    if padding_ptr is not None:
        flags = gl.load(padding_ptr + batch.to(gl.int64) * k_len + keys, mask=is_key, other=0)
        visible = visible & (flags != 0)[:, None]
    if key_documents_ptr is not None:
        query_base = query_documents_ptr + batch.to(gl.int64) * q_len
        key_base = key_documents_ptr + batch.to(gl.int64) * k_len
        query_documents = gl.load(query_base + queries, mask=is_query, other=0)
        key_documents = gl.load(key_base + keys, mask=is_key, other=0)
        visible = visible & (query_documents[None, :] == key_documents[:, None])
    return visible


@gluon.jit
def _clean_queries(query_smem, grad_smem, slot, visible, spoilt_keys):
    """Set rows that hold anything not finite to 0; note which keys are read by such gradients.

    A hidden probability of 0 times NaN is NaN. Where it is not hidden, the gradient of the logits
    is NaN already, but the probability need not be.
    """
    words_smem = value_words(query_smem, slot)
    found = spoilt_words(words_smem, query_smem.dtype)
    if gl.reduce_or(gl.reduce_or(found, 0), 0) != 0:
        clear_rows(words_smem, gl.reduce_or(found, 1) != 0)
    words_smem = value_words(grad_smem, slot)
    found = spoilt_words(words_smem, grad_smem.dtype)
    if gl.reduce_or(gl.reduce_or(found, 0), 0) != 0:
        is_spoilt = gl.reduce_or(found, 1) != 0
        clear_rows(words_smem, is_spoilt)
        is_spoilt = gl.convert_layout(is_spoilt, gl.SliceLayout(0, visible.type.layout))
        reads = gl.where(visible & is_spoilt[None, :], 1, 0)
        spoilt_keys = gl.maximum(spoilt_keys, gl.max(reads, 1))
    return spoilt_keys


@gluon.jit
def keys_masked(
    held,
    list_ptr,
    item,
    masked,
    state,
    cursor,
    ring,
    keys,
    batch,
    band,
    rules,
    qk_scale,
    SPLIT: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Take the query tiles that need a mask."""
    key, value = held
    grad_key, grad_value, spoilt_keys = state
    slot, phase = cursor
    query_smem, grad_smem, statistics_smem, full, empty = ring
    dtype: gl.constexpr = query_smem.dtype
    layout: gl.constexpr = grad_key.type.layout
    for step in range(masked):
        query_tile = query_tile_of(list_ptr, item, step, masked, 0, SPLIT)
        mbarrier.wait(full.index(slot), phase)
        product = logits(key, query_smem, slot)
        grad_product = logits(value, grad_smem, slot)
        visible = visibility_by_keys(keys, query_tile * 64, batch, band, rules)
        product, grad_product = hopper.warpgroup_mma_wait(0, deps=(product, grad_product))
        lse = statistics_of(statistics_smem, slot, 0)
        # Where a log-sum-exp is NaN, so is the probability of what its row may not read.
        probability = gl.where(visible, gl.exp2(product * qk_scale - lse[None, :]), 0.0)
        delta = statistics_of(statistics_smem, slot, 64)
        gradient = gl.where(visible, probability * (grad_product - delta[None, :]), 0.0)
        operand = as_operand(probability, dtype, layout)
        gradient_operand = as_operand(gradient, dtype, layout)
        spoilt_keys = _clean_queries(query_smem, grad_smem, slot, visible, spoilt_keys)
        # What these warps wrote is for the matrix unit to read, what they read for a copy to
        # replace.
        hopper.fence_async_shared()
        meet_warps()
        value_token = add_values(operand, grad_smem, slot, grad_value)
        key_token = add_values(gradient_operand, query_smem, slot, grad_key)
        grad_value, grad_key, operand, gradient_operand = hopper.warpgroup_mma_wait(
            0, deps=(value_token, key_token, operand, gradient_operand)
        )
        mbarrier.arrive(empty.index(slot), count=1)
        slot, phase = next_slot(slot, phase, STAGES)
    return (grad_key, grad_value, spoilt_keys), (slot, phase)


@gluon.jit
def keys_whole(
    held,
    steps,
    state,
    cursor,
    ring,
    qk_scale,
    STAGES: gl.constexpr,
):
    """Take the query tiles that need no mask; all products end within a step."""
    key, value = held
    grad_key, grad_value, spoilt_keys = state
    slot, phase = cursor
    query_smem, grad_smem, statistics_smem, full, empty = ring
    dtype: gl.constexpr = query_smem.dtype
    layout: gl.constexpr = grad_key.type.layout
    for _ in range(steps):
        mbarrier.wait(full.index(slot), phase)
        product = logits(key, query_smem, slot)
        grad_product = logits(value, grad_smem, slot)
        product = hopper.warpgroup_mma_wait(1, deps=(product,))
        lse = statistics_of(statistics_smem, slot, 0)
        probability = gl.exp2(product * qk_scale - lse[None, :])
        operand = as_operand(probability, dtype, layout)
        value_token = add_values(operand, grad_smem, slot, grad_value)
        grad_product = hopper.warpgroup_mma_wait(1, deps=(grad_product,))
        delta = statistics_of(statistics_smem, slot, 64)
        gradient = probability * (grad_product - delta[None, :])
        gradient_operand = as_operand(gradient, dtype, layout)
        key_token = add_values(gradient_operand, query_smem, slot, grad_key)
        grad_value, grad_key, operand, gradient_operand = hopper.warpgroup_mma_wait(
            0, deps=(value_token, key_token, operand, gradient_operand)
        )
        mbarrier.arrive(empty.index(slot), count=1)
        slot, phase = next_slot(slot, phase, STAGES)
    return (grad_key, grad_value, spoilt_keys), (slot, phase)
