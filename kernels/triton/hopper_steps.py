"""How a group of four warps takes key tiles into its 64 query rows: with a mask, and without.

``state`` is the accumulator, the running maximum of each row, its running sum in parts (see
``hopper_tiles``), and which rows read a value that is not finite; ``cursor`` the next slot of the
rings, the parity of its use, and how often the groups have met. A ring is its tiles, the barriers
of its filled and those of its emptied slots: see ``hopper_warps``.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from seer_compile.kernels.triton.hopper_tiles import (
    add_values,
    as_operand,
    clear_rows,
    logits,
    scale_rows,
    softmax_masked,
    softmax_whole,
    spoilt_words,
    value_words,
    visibility,
)
from seer_compile.kernels.triton.hopper_turns import await_turn, end_turn

# Triton 3.6 knows it under the second name.
meet_warps = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.jit
def next_slot(slot, phase, STAGES: gl.constexpr):
    """Return the slot after this one and the parity of its next use."""
    is_last = slot == STAGES - 1
    return gl.where(is_last, 0, slot + 1), gl.where(is_last, phase ^ 1, phase)


@gluon.jit
def _clean_values(
    value_smem,
    index,
    visible,
    spoilt_rows,
    meetings,
    meeting,
    CONSUMERS: gl.constexpr,
):
    """Set value rows that hold anything not finite to 0; note which queries may read them.

    A hidden probability of 0 times NaN is NaN, so such a row must not meet the product. Two
    consumers read the same tile, and neither may change it before the other has looked: they meet
    in between. After that both write the same bytes, and each reads after its own writes.
    """
    words_smem = value_words(value_smem, index)
    found = spoilt_words(words_smem, value_smem.dtype)
    if gl.reduce_or(gl.reduce_or(found, 0), 0) != 0:
        is_spoilt = gl.reduce_or(found, 1) != 0
        if CONSUMERS == 2:
            mbarrier.arrive(meeting, count=1)
            mbarrier.wait(meeting, meetings & 1)
        clear_rows(words_smem, is_spoilt)
        column_layout: gl.constexpr = gl.SliceLayout(0, visible.type.layout)
        is_spoilt = gl.convert_layout(is_spoilt, column_layout)
        reads = gl.where(visible & is_spoilt[None, :], 1, 0)
        spoilt_rows = gl.maximum(spoilt_rows, gl.max(reads, 1))
        meetings += 1
    return spoilt_rows, meetings


@gluon.jit
def _logits_alone(query, key_ring, slot, phase, TILES: gl.constexpr, NEGATE: gl.constexpr):
    """Return the logits of the one tile of a slot, and free the slot of its keys."""
    key_smem, full, empty = key_ring
    mbarrier.wait(full.index(slot), phase)
    product = logits(query, key_smem, slot * TILES)
    product = hopper.warpgroup_mma_wait(0, deps=(product,))
    mbarrier.arrive(empty.index(slot), count=1)
    if NEGATE:
        product = -product
    return product


@gluon.jit
def _values_alone(operand, value_ring, slot, accumulator, TILES: gl.constexpr):
    """Add the products with the one tile of a slot, and free the slot of its values."""
    value_smem, _, empty = value_ring
    token = add_values(operand, value_smem, slot * TILES, accumulator)
    accumulator, operand = hopper.warpgroup_mma_wait(0, deps=(token, operand))
    mbarrier.arrive(empty.index(slot), count=1)
    return accumulator


@gluon.jit
def attend_masked(
    query,
    list_ptr,
    tile,
    masked,
    state,
    cursor,
    key_ring,
    value_ring,
    meeting,
    queries,
    batch,
    band,
    rules,
    qk_scale,
    CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr,
    TILES: gl.constexpr,
    NEGATE: gl.constexpr,
):
    """Attend to the tiles that need a mask, one after the other; ``tile`` is the first of them."""
    accumulator, running_max, running_sum, spoilt_rows = state
    slot, phase, meetings = cursor
    value_smem, value_full, _ = value_ring
    dtype: gl.constexpr = value_smem.dtype
    layout: gl.constexpr = accumulator.type.layout
    for step in range(masked):
        visible = visibility(queries, tile * 64, batch, band, rules)
        tile = gl.load(list_ptr + gl.minimum(step + 1, masked - 1))
        product = _logits_alone(query, key_ring, slot, phase, TILES, NEGATE)
        probability, rescale, running_max, running_sum = softmax_masked(
            product, visible, running_max, running_sum, qk_scale
        )
        accumulator = scale_rows(accumulator, rescale)
        operand = as_operand(probability, dtype, layout)
        mbarrier.wait(value_full.index(slot), phase)
        spoilt_rows, meetings = _clean_values(
            value_smem,
            slot * TILES,
            visible,
            spoilt_rows,
            meetings,
            meeting,
            CONSUMERS,
        )
        # What this group wrote is for the matrix unit to read, what it read for a copy to replace.
        hopper.fence_async_shared()
        meet_warps()
        accumulator = _values_alone(operand, value_ring, slot, accumulator, TILES)
        slot, phase = next_slot(slot, phase, STAGES)
    return (accumulator, running_max, running_sum, spoilt_rows), (slot, phase, meetings)


@gluon.jit
def attend_one(
    query,
    state,
    cursor,
    key_ring,
    value_ring,
    qk_scale,
    STAGES: gl.constexpr,
    TILES: gl.constexpr,
    NEGATE: gl.constexpr,
):
    """Attend to a tile that needs no mask and has a slot to itself: the odd one of a list."""
    accumulator, running_max, running_sum, spoilt_rows = state
    slot, phase, meetings = cursor
    value_smem, value_full, _ = value_ring
    layout: gl.constexpr = accumulator.type.layout
    product = _logits_alone(query, key_ring, slot, phase, TILES, NEGATE)
    probability, _, rescale, running_max, running_sum = softmax_whole(
        product, product, running_max, running_sum, qk_scale, 1
    )
    accumulator = scale_rows(accumulator, rescale)
    operand = as_operand(probability, value_smem.dtype, layout)
    mbarrier.wait(value_full.index(slot), phase)
    accumulator = _values_alone(operand, value_ring, slot, accumulator, TILES)
    slot, phase = next_slot(slot, phase, STAGES)
    return (accumulator, running_max, running_sum, spoilt_rows), (slot, phase, meetings)


@gluon.jit
def _begin_logits(query, key_ring, slot, phase, TILES: gl.constexpr):
    """Wait for the keys of a slot and begin their products; the second repeats where TILES is 1."""
    key_smem, full, _ = key_ring
    mbarrier.wait(full.index(slot), phase)
    first = logits(query, key_smem, slot * TILES)
    second = first
    if TILES == 2:
        second = logits(query, key_smem, slot * TILES + 1)
    return first, second


@gluon.jit
def _end_logits(
    tokens, key_ring, slot, PENDING: gl.constexpr, TILES: gl.constexpr, NEGATE: gl.constexpr
):
    """Wait until all but the last ``PENDING`` products are done and free the slot of the keys."""
    first, second = tokens
    if TILES == 2:
        first, second = hopper.warpgroup_mma_wait(PENDING, deps=(first, second))
    else:
        first = hopper.warpgroup_mma_wait(PENDING, deps=(first,))
        second = first
    mbarrier.arrive(key_ring[2].index(slot), count=1)
    if NEGATE:
        first, second = -first, -second
    return first, second


@gluon.jit
def _begin_values(operands, value_ring, slot, phase, accumulator, TILES: gl.constexpr):
    """Wait for the values of a slot and begin adding their products."""
    value_smem, full, _ = value_ring
    mbarrier.wait(full.index(slot), phase)
    token = add_values(operands[0], value_smem, slot * TILES, accumulator)
    if TILES == 2:
        token = add_values(operands[1], value_smem, slot * TILES + 1, token)
    return token


@gluon.jit
def _end_values(token, operands, following, value_ring, slot, TILES: gl.constexpr):
    """Wait for all products and free the slot of the values.

    The operands are named because the products read their registers until then, and those that
    follow because the compiler would otherwise make them after the wait instead of behind it.
    """
    first, second = operands
    next_first, next_second = following
    if TILES == 2:
        accumulator, first, second, next_first, next_second = hopper.warpgroup_mma_wait(
            0, deps=(token, first, second, next_first, next_second)
        )
    else:
        accumulator, first, next_first = hopper.warpgroup_mma_wait(
            0, deps=(token, first, next_first)
        )
        next_second = next_first
    mbarrier.arrive(value_ring[2].index(slot), count=1)
    return accumulator, (next_first, next_second)


@gluon.jit
def attend_whole(
    query,
    whole,
    state,
    cursor,
    key_ring,
    value_ring,
    qk_scale,
    CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr,
    TILES: gl.constexpr,
    NEGATE: gl.constexpr,
    CONSUMER: gl.constexpr,
):
    """Attend to the tiles that need no mask, the softmax of each behind the values of the last.

    The keys run one slot ahead of the values: ``slot`` and ``phase`` are theirs. Two consumers
    begin their products in turn, so that the softmax of one runs behind the products of the other.
    """
    accumulator, running_max, running_sum, spoilt_rows = state
    slot, phase, meetings = cursor
    dtype: gl.constexpr = value_ring[0].dtype
    layout: gl.constexpr = accumulator.type.layout
    tokens = _begin_logits(query, key_ring, slot, phase, TILES)
    first, second = _end_logits(tokens, key_ring, slot, 0, TILES, NEGATE)
    value_slot, value_phase = slot, phase
    slot, phase = next_slot(slot, phase, STAGES)
    first, second, rescale, running_max, running_sum = softmax_whole(
        first, second, running_max, running_sum, qk_scale, TILES
    )
    accumulator = scale_rows(accumulator, rescale)
    operands = as_operand(first, dtype, layout), as_operand(second, dtype, layout)
    for _ in range(TILES, whole, TILES):
        if CONSUMERS == 2:
            await_turn(CONSUMER)
        tokens = _begin_logits(query, key_ring, slot, phase, TILES)
        added = _begin_values(operands, value_ring, value_slot, value_phase, accumulator, TILES)
        if CONSUMERS == 2:
            end_turn(CONSUMER)
        # The products with values, as many as TILES, may still run.
        first, second = _end_logits(tokens, key_ring, slot, TILES, TILES, NEGATE)
        first, second, rescale, running_max, running_sum = softmax_whole(
            first, second, running_max, running_sum, qk_scale, TILES
        )
        following = as_operand(first, dtype, layout), as_operand(second, dtype, layout)
        accumulator, operands = _end_values(
            added, operands, following, value_ring, value_slot, TILES
        )
        accumulator = scale_rows(accumulator, rescale)
        value_slot, value_phase = slot, phase
        slot, phase = next_slot(slot, phase, STAGES)
    added = _begin_values(operands, value_ring, value_slot, value_phase, accumulator, TILES)
    accumulator, operands = _end_values(added, operands, operands, value_ring, value_slot, TILES)
    return (accumulator, running_max, running_sum, spoilt_rows), (slot, phase, meetings)
