"""What the warps of a Hopper program do: one copies, one or two groups of four compute.

A program takes *items*: a tile of query rows, 64 for each consumer, that share one list of key
tiles. The producer copies the queries of an item, then the key and value tiles of its list one
slot of a ring after another; a slot holds one masked tile, or ``TILES`` whole ones, or the odd
whole one alone.

Barriers, and why no wait is for ever. A barrier counts phases from 0; waiting for parity ``x``
returns once a phase of that parity has ended, and the phase before phase 0 has parity 1.

``full``   one arrival, the producer's announcement of bytes, and these bytes. Use n of a slot is
           phase n; a consumer waits for parity n % 2.
``empty``  one arrival per consumer, after it has read the slot for the n-th time: phase n. Before
           use n the producer waits for the end of phase n - 1, parity (n + 1) % 2, which for use
           0 is the phase before 0.
``meeting`` one arrival per consumer when a value tile holds something not finite: see
           ``hopper_steps``. Both see the same tile, so both come or none does.

Two consumers begin their products in turn, by barriers of the hardware: see ``hopper_turns``. The
first begins, and either waits for the n-th time until the other has ended its turn as often, or,
the first, once less.

All consumers take the same items and steps, in the order in which the producer fills slots; a
producer waits only for slots whose earlier contents it has already sent, and a consumer only for
contents whose slot it has already freed. Both consumers take as many turns, and the one that has
taken fewer waits for none that the other has yet to take. So some warp can always go on until the
last item, whose number, beyond the end, the producer hands over without a copy.

Source:
    Shah et al., "FlashAttention-3", arXiv:2407.08608: a warp that copies, the softmax of one tile
    behind the products of another.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from seer_compile.kernels.triton.hopper_steps import (
    attend_masked,
    attend_one,
    attend_whole,
    next_slot,
)
from seer_compile.kernels.triton.hopper_tiles import (
    flat,
    partial_sums,
    scale_rows,
    store_rows,
    whole_sums,
)
from seer_compile.kernels.triton.hopper_turns import begin_turns

# Triton 3.6 knows it under the second name.
copy_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


@gluon.jit
def _decode(
    item,
    work,
    PER_SELECTION: gl.constexpr,
    BLOCK_Q: gl.constexpr,
    TILE_Q: gl.constexpr,
    TILE_HEADS: gl.constexpr,
):
    """Return batch, first head, first query and list of an item.

    The last tile of a head comes first, which has most to do under a causal band; heads follow
    one another, so that the programs of one moment read the same keys.
    """
    tiles, groups, selections, num_blocks = work
    first_query = (tiles - 1 - item % tiles) * TILE_Q
    head = item // tiles % groups * TILE_HEADS
    batch = item // tiles // groups
    row = (batch * selections + head // PER_SELECTION) * num_blocks + first_query // BLOCK_Q
    return batch, head, first_query, row


@gluon.jit
def _copy_one(
    descriptors,
    keys,
    key_ring,
    value_ring,
    slot,
    phase,
    STAGES: gl.constexpr,
    TILES: gl.constexpr,
):
    """Fill a slot of each ring with one tile; return the next slot."""
    key_desc, value_desc = descriptors[1], descriptors[2]
    key_smem, key_full, key_empty = key_ring
    value_smem, value_full, value_empty = value_ring
    mbarrier.wait(key_empty.index(slot), phase ^ 1)
    mbarrier.expect(key_full.index(slot), key_desc.block_type.nbytes)
    copy_tile(key_desc, keys, key_full.index(slot), key_smem.index(slot * TILES))
    mbarrier.wait(value_empty.index(slot), phase ^ 1)
    mbarrier.expect(value_full.index(slot), value_desc.block_type.nbytes)
    copy_tile(value_desc, keys, value_full.index(slot), value_smem.index(slot * TILES))
    return next_slot(slot, phase, STAGES)


@gluon.jit
def _hand_over(item_smem, numbers):
    """Write what the consumers need to know of an item."""
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    for index in gl.static_range(len(numbers)):
        item_smem.index(index).store(gl.full([1], numbers[index], gl.int32, one))


@gluon.jit
def _read(item_smem, index, layout: gl.constexpr):
    """Return one of the numbers that the producer hands over with an item."""
    return gl.max(item_smem.index(index).load(layout), 0)


@gluon.jit
def produce(
    descriptors,
    rings,
    item_smem,
    plan,
    work,
    items,
    queue_ptr,
    PER_KEY_HEAD: gl.constexpr,
    PER_SELECTION: gl.constexpr,
    BLOCK_Q: gl.constexpr,
    TILE_HEADS: gl.constexpr,
    CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr,
    TILES: gl.constexpr,
):
    """Copy what the consumers read; draw items until there are none."""
    query_desc, key_desc, value_desc = descriptors
    query_ring, key_ring, value_ring = rings
    query_smem, query_full, query_empty = query_ring
    key_smem, key_full, key_empty = key_ring
    value_smem, value_full, value_empty = value_ring
    tiles_ptr, masked_ptr, whole_ptr, capacity = plan
    TILE_Q: gl.constexpr = 64 * CONSUMERS // TILE_HEADS
    item = gl.program_id(0)
    sent = 0
    slot = 0
    phase = 0
    while item < items:
        batch, head, first_query, row = _decode(
            item, work, PER_SELECTION, BLOCK_Q, TILE_Q, TILE_HEADS
        )
        masked = gl.load(masked_ptr + row)
        whole = gl.load(whole_ptr + row)
        list_ptr = tiles_ptr + row.to(gl.int64) * capacity
        # What is read from memory one step ahead of its use costs no wait.
        tile = gl.load(list_ptr, mask=masked > 0, other=0)
        mbarrier.wait(query_empty.index(0), (sent & 1) ^ 1)
        _hand_over(item_smem, (item, batch, head, first_query, row, masked, whole, tile))
        mbarrier.expect(query_full.index(0), CONSUMERS * query_desc.block_type.nbytes)
        for consumer in gl.static_range(CONSUMERS):
            rows = [
                batch,
                head + consumer * (TILE_HEADS - 1),
                first_query + 64 * consumer * (2 - TILE_HEADS),
                0,
            ]
            copy_tile(query_desc, rows, query_full.index(0), query_smem.index(consumer))
        key_head = head // PER_KEY_HEAD
        for step in range(masked):
            keys = [batch, key_head, tile * 64, 0]
            tile = gl.load(list_ptr + gl.minimum(step + 1, masked - 1))
            slot, phase = _copy_one(
                descriptors, keys, key_ring, value_ring, slot, phase, STAGES, TILES
            )
        list_ptr += capacity - whole
        last = whole - 1
        odd = whole % TILES
        first_tile = gl.load(list_ptr, mask=whole > 0, other=0)
        if TILES == 2:
            if odd != 0:
                keys = [batch, key_head, first_tile * 64, 0]
                slot, phase = _copy_one(
                    descriptors, keys, key_ring, value_ring, slot, phase, STAGES, TILES
                )
                first_tile = gl.load(list_ptr + gl.minimum(1, last))
        second_tile = gl.load(list_ptr + gl.minimum(odd + 1, last), mask=whole > 0, other=0)
        for step in range(odd, whole, TILES):
            first = [batch, key_head, first_tile * 64, 0]
            second = [batch, key_head, second_tile * 64, 0]
            first_tile = gl.load(list_ptr + gl.minimum(step + TILES, last))
            second_tile = gl.load(list_ptr + gl.minimum(step + TILES + 1, last))
            mbarrier.wait(key_empty.index(slot), phase ^ 1)
            full = key_full.index(slot)
            mbarrier.expect(full, TILES * key_desc.block_type.nbytes)
            copy_tile(key_desc, first, full, key_smem.index(slot * TILES))
            if TILES == 2:
                copy_tile(key_desc, second, full, key_smem.index(slot * TILES + 1))
            mbarrier.wait(value_empty.index(slot), phase ^ 1)
            full = value_full.index(slot)
            mbarrier.expect(full, TILES * value_desc.block_type.nbytes)
            copy_tile(value_desc, first, full, value_smem.index(slot * TILES))
            if TILES == 2:
                copy_tile(value_desc, second, full, value_smem.index(slot * TILES + 1))
            slot, phase = next_slot(slot, phase, STAGES)
        sent += 1
        item = gl.num_programs(0) + gl.atomic_add(queue_ptr, 1, sem="relaxed")
    mbarrier.wait(query_empty.index(0), (sent & 1) ^ 1)
    _hand_over(item_smem, (items,))
    mbarrier.arrive(query_full.index(0), count=1)


@gluon.jit
def _store(state, pointers, row_stride, first_query, q_len, scale, dtype: gl.constexpr):
    """Divide by the sum and write; a row that read nothing is 0 and -inf."""
    accumulator, running_max, running_sum, spoilt_rows = state
    running_sum = whole_sums(running_sum, running_max)
    lse_ptr, out_ptr = pointers
    is_empty = running_sum == 0.0
    divisor = gl.where(is_empty, 1.0, running_sum)
    lse = gl.where(is_empty, float("-inf"), running_max * scale + gl.log(divisor))
    queries = first_query + gl.arange(0, 64, lse.type.layout)
    gl.store(lse_ptr + queries, lse, mask=queries < q_len)
    factor = gl.where(spoilt_rows != 0, float("nan"), 1.0 / divisor)
    accumulator = scale_rows(accumulator, factor)
    store_rows(accumulator, out_ptr, row_stride, first_query, q_len, dtype)


@gluon.jit
def consume(
    rings,
    item_smem,
    meeting,
    plan,
    items,
    results,
    band,
    rules,
    scale,
    qk_scale,
    heads,
    TILE_HEADS: gl.constexpr,
    CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr,
    TILES: gl.constexpr,
    NEGATE: gl.constexpr,
    QUERY_IN_REGISTERS: gl.constexpr,
    CONSUMER: gl.constexpr,
):
    """Attend for 64 query rows of every item."""
    query_ring, key_ring, value_ring = rings
    query_smem, query_full, query_empty = query_ring
    tiles_ptr, _, _, capacity = plan
    out_ptr, lse_ptr, out_strides = results
    q_len = band[0]
    dtype: gl.constexpr = query_smem.dtype
    value_dim: gl.constexpr = value_ring[0].shape[4]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, value_dim, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, layout)
    one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    taken = 0
    cursor = (0, 0, 0)
    if CONSUMERS == 2:
        begin_turns(CONSUMER)
    mbarrier.wait(query_full.index(0), 0)
    item = _read(item_smem, 0, one)
    while item < items:
        batch = _read(item_smem, 1, one)
        head = _read(item_smem, 2, one)
        first_query = _read(item_smem, 3, one)
        row = _read(item_smem, 4, one)
        masked = _read(item_smem, 5, one)
        whole = _read(item_smem, 6, one)
        tile = _read(item_smem, 7, one)
        head += CONSUMER * (TILE_HEADS - 1)
        first_query += 64 * CONSUMER * (2 - TILE_HEADS)
        queries = first_query + gl.arange(0, 64, row_layout)
        state = (
            gl.zeros([64, value_dim], gl.float32, out_layout),
            gl.full([64], float("-inf"), gl.float32, row_layout),
            partial_sums(gl.zeros([64, 64], gl.float32, layout)),
            gl.zeros([64], gl.int32, row_layout),
        )
        query = flat(query_smem.index(CONSUMER))
        if QUERY_IN_REGISTERS:
            query = query.load(gl.DotOperandLayout(0, layout, 2))
            # The next copy into this tile comes after these reads.
            hopper.fence_async_shared()
            mbarrier.arrive(query_empty.index(0), count=1)
        state, cursor = attend_masked(
            query,
            tiles_ptr + row.to(gl.int64) * capacity,
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
            CONSUMERS,
            STAGES,
            TILES,
            NEGATE,
        )
        if TILES == 2:
            if whole % 2 != 0:
                state, cursor = attend_one(
                    query, state, cursor, key_ring, value_ring, qk_scale, STAGES, TILES, NEGATE
                )
                whole -= 1
        if whole > 0:
            state, cursor = attend_whole(
                query,
                whole,
                state,
                cursor,
                key_ring,
                value_ring,
                qk_scale,
                CONSUMERS,
                STAGES,
                TILES,
                NEGATE,
                CONSUMER,
            )
        if not QUERY_IN_REGISTERS:
            mbarrier.arrive(query_empty.index(0), count=1)
        head_row = (batch * heads + head).to(gl.int64)
        out_base = batch.to(gl.int64) * out_strides[0] + head.to(gl.int64) * out_strides[1]
        pointers = (lse_ptr + head_row * q_len, out_ptr + out_base)
        _store(state, pointers, out_strides[2], first_query, q_len, scale, dtype)
        taken += 1
        mbarrier.wait(query_full.index(0), taken & 1)
        item = _read(item_smem, 0, one)
