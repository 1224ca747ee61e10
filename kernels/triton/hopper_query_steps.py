"""How a group of four warps takes key tiles into the gradient of its 64 query rows.

``operands`` are queries and output gradients, in registers or in shared memory; ``statistics`` the
log-sum-exp to base 2 and delta of each row; ``cursor`` the next slot and the parity of its use for
keys, the same for values, and how often the groups have met. A ring is its tiles, the barriers of
its filled and those of its emptied slots: see ``hopper_query_gradient``.
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
    visibility,
)


@gluon.jit
def _clean_keys(key_smem, slot, meetings, meeting, CONSUMERS: gl.constexpr):
    """Set key rows that hold anything not finite to 0, after all consumers took their logits.

    A hidden gradient of 0 times NaN is NaN; one that is not hidden is NaN already. Two consumers
    meet before either writes; after that both write the same bytes.
    """
    words_smem = value_words(key_smem, slot)
    found = spoilt_words(words_smem, key_smem.dtype)
    if gl.reduce_or(gl.reduce_or(found, 0), 0) != 0:
        is_spoilt = gl.reduce_or(found, 1) != 0
        if CONSUMERS == 2:
            mbarrier.arrive(meeting, count=1)
            mbarrier.wait(meeting, meetings & 1)
        clear_rows(words_smem, is_spoilt)
        meetings += 1
    return meetings


@gluon.jit
def _begin_keys(query, key_ring, cursor):
    """Wait for the next keys and begin the product with them."""
    mbarrier.wait(key_ring[1].index(cursor[0]), cursor[1])
    return logits(query, key_ring[0], cursor[0])


@gluon.jit
def _begin_values(grad_out, value_ring, cursor):
    """Wait for the next values and begin the product with them."""
    mbarrier.wait(value_ring[1].index(cursor[2]), cursor[3])
    return logits(grad_out, value_ring[0], cursor[2])


@gluon.jit
def _begin_pair(operands, key_ring, value_ring, cursor):
    """Begin both products of the next tile."""
    product = _begin_keys(operands[0], key_ring, cursor)
    return product, _begin_values(operands[1], value_ring, cursor)


@gluon.jit
def _advance(cursor, KEY_STAGES: gl.constexpr, VALUE_STAGES: gl.constexpr):
    """Return the cursor of the next tile."""
    key_slot, key_phase, value_slot, value_phase, meetings = cursor
    key_slot, key_phase = next_slot(key_slot, key_phase, KEY_STAGES)
    value_slot, value_phase = next_slot(value_slot, value_phase, VALUE_STAGES)
    return key_slot, key_phase, value_slot, value_phase, meetings


@gluon.jit
def _take_pair(tokens, statistics, qk_scale, value_ring, value_slot, PENDING: gl.constexpr):
    """Wait for both products but not for ``PENDING`` later ones; return the logits' gradient."""
    lse, delta = statistics
    product = hopper.warpgroup_mma_wait(PENDING + 1, deps=(tokens[0],))
    probability = gl.exp2(product * qk_scale - lse[:, None])
    # The probability is named because the compiler would otherwise make it after the wait.
    grad_probability, probability = hopper.warpgroup_mma_wait(
        PENDING, deps=(tokens[1], probability)
    )
    mbarrier.arrive(value_ring[2].index(value_slot), count=1)
    return probability * (grad_probability - delta[:, None])


@gluon.jit
def _add_alone(operand, key_ring, key_slot, accumulator):
    """Add the product with one key tile and free it."""
    token = add_values(operand, key_ring[0], key_slot, accumulator)
    accumulator, operand = hopper.warpgroup_mma_wait(0, deps=(token, operand))
    mbarrier.arrive(key_ring[2].index(key_slot), count=1)
    return accumulator


@gluon.jit
def query_masked(
    operands,
    list_ptr,
    masked,
    accumulator,
    cursor,
    rings,
    meeting,
    statistics,
    queries,
    batch,
    band,
    rules,
    qk_scale,
    CONSUMERS: gl.constexpr,
    KEY_STAGES: gl.constexpr,
    VALUE_STAGES: gl.constexpr,
):
    """Take the tiles that need a mask, one after the other."""
    _, _, key_ring, value_ring = rings
    dtype: gl.constexpr = key_ring[0].dtype
    layout: gl.constexpr = accumulator.type.layout
    for step in range(masked):
        tile = gl.load(list_ptr + step)
        tokens = _begin_pair(operands, key_ring, value_ring, cursor)
        visible = visibility(queries, tile * 64, batch, band, rules)
        gradient = _take_pair(tokens, statistics, qk_scale, value_ring, cursor[2], 0)
        gradient = gl.where(visible, gradient, 0.0)
        operand = as_operand(gradient, dtype, layout)
        meetings = _clean_keys(key_ring[0], cursor[0], cursor[4], meeting, CONSUMERS)
        # What this group wrote is for the matrix unit to read, what it read for a copy to replace.
        hopper.fence_async_shared()
        meet_warps()
        accumulator = _add_alone(operand, key_ring, cursor[0], accumulator)
        cursor = (cursor[0], cursor[1], cursor[2], cursor[3], meetings)
        cursor = _advance(cursor, KEY_STAGES, VALUE_STAGES)
    return accumulator, cursor


@gluon.jit
def query_whole(
    operands,
    whole,
    accumulator,
    cursor,
    rings,
    statistics,
    qk_scale,
    KEY_STAGES: gl.constexpr,
    VALUE_STAGES: gl.constexpr,
    AHEAD: gl.constexpr,
):
    """Take the tiles that need no mask, one after the other.

    With ``AHEAD`` 1 each product with keys runs beside the first products of the next tile. All
    products end within a step: the assembler serialises those in flight at the head of a loop.
    """
    _, _, key_ring, value_ring = rings
    dtype: gl.constexpr = key_ring[0].dtype
    layout: gl.constexpr = accumulator.type.layout
    if AHEAD == 1:
        tokens = _begin_pair(operands, key_ring, value_ring, cursor)
        gradient = _take_pair(tokens, statistics, qk_scale, value_ring, cursor[2], 0)
        operand = as_operand(gradient, dtype, layout)
        last_slot = cursor[0]
        cursor = _advance(cursor, KEY_STAGES, VALUE_STAGES)
        for _ in range(1, whole):
            tokens = _begin_pair(operands, key_ring, value_ring, cursor)
            added = add_values(operand, key_ring[0], last_slot, accumulator)
            gradient = _take_pair(tokens, statistics, qk_scale, value_ring, cursor[2], 1)
            following = as_operand(gradient, dtype, layout)
            # The operand is read until then; the next one is named to be made before, not after.
            accumulator, operand, following = hopper.warpgroup_mma_wait(
                0, deps=(added, operand, following)
            )
            mbarrier.arrive(key_ring[2].index(last_slot), count=1)
            operand = following
            last_slot = cursor[0]
            cursor = _advance(cursor, KEY_STAGES, VALUE_STAGES)
        accumulator = _add_alone(operand, key_ring, last_slot, accumulator)
    else:
        for _ in range(whole):
            tokens = _begin_pair(operands, key_ring, value_ring, cursor)
            gradient = _take_pair(tokens, statistics, qk_scale, value_ring, cursor[2], 0)
            operand = as_operand(gradient, dtype, layout)
            accumulator = _add_alone(operand, key_ring, cursor[0], accumulator)
            cursor = _advance(cursor, KEY_STAGES, VALUE_STAGES)
    return accumulator, cursor


@gluon.jit
def query_whole_ahead(
    operands,
    whole,
    accumulator,
    cursor,
    rings,
    statistics,
    qk_scale,
    KEY_STAGES: gl.constexpr,
    VALUE_STAGES: gl.constexpr,
):
    """Do what :func:`query_whole` does, exponentials of each tile beside the logits of the next.

    The last product of a tile needs its exponentials and is begun after the next logits were, so no
    compiler can move them out from behind these.
    """
    _, _, key_ring, value_ring = rings
    lse, delta = statistics
    dtype: gl.constexpr = key_ring[0].dtype
    layout: gl.constexpr = accumulator.type.layout
    product = _begin_keys(operands[0], key_ring, cursor)
    product = hopper.warpgroup_mma_wait(0, deps=(product,))
    for _ in range(1, whole):
        values = _begin_values(operands[1], value_ring, cursor)
        last_slot, last_value_slot = cursor[0], cursor[2]
        cursor = _advance(cursor, KEY_STAGES, VALUE_STAGES)
        following = _begin_keys(operands[0], key_ring, cursor)
        probability = gl.exp2(product * qk_scale - lse[:, None])
        grad_probability = hopper.warpgroup_mma_wait(1, deps=(values,))
        mbarrier.arrive(value_ring[2].index(last_value_slot), count=1)
        operand = as_operand(probability * (grad_probability - delta[:, None]), dtype, layout)
        added = add_values(operand, key_ring[0], last_slot, accumulator)
        product, accumulator, operand = hopper.warpgroup_mma_wait(
            0, deps=(following, added, operand)
        )
        mbarrier.arrive(key_ring[2].index(last_slot), count=1)
    values = _begin_values(operands[1], value_ring, cursor)
    probability = gl.exp2(product * qk_scale - lse[:, None])
    grad_probability = hopper.warpgroup_mma_wait(0, deps=(values,))
    mbarrier.arrive(value_ring[2].index(cursor[2]), count=1)
    operand = as_operand(probability * (grad_probability - delta[:, None]), dtype, layout)
    accumulator = _add_alone(operand, key_ring, cursor[0], accumulator)
    return accumulator, _advance(cursor, KEY_STAGES, VALUE_STAGES)
