"""What the warps of the Hopper kernel for the gradient of the queries do.

An item is a tile of 64 query rows for each consumer, one head each, that share one list of key
tiles. The producer copies queries and output gradients of an item, then keys and values of its
list into a ring each; a consumer computes, per tile,

    logits = query key^T    grad_probability = grad_out value^T    gradient += dlogits key

in three asynchronous products, some of them beside those of the next tile.

Barriers are those of ``hopper_warps``: ``full`` (bytes landed) and ``empty`` (one arrival per
consumer) for each slot of each ring, phases counted from 0. Consumers free the values of a tile
before its keys, and with ``AHEAD`` the keys only in the next step: the ring of keys then has two
slots or more. The producer asks for the slots of a tile in the order keys, values, and for those of
tile ``j`` only after all before ``j`` were sent, so what a consumer waits for is under way.

Items are dealt out by number, the same for all warps of a program, so none is handed over.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from seer_compile.kernels.triton.hopper_launch import make_barriers, make_ring
from seer_compile.kernels.triton.hopper_query_steps import (
    query_masked,
    query_whole,
    query_whole_ahead,
)
from seer_compile.kernels.triton.hopper_steps import next_slot
from seer_compile.kernels.triton.hopper_tiles import flat, store_rows
from seer_compile.kernels.triton.hopper_warps import copy_tile


@gluon.jit
def query_item(
    item,
    work,
    PER_SELECTION: gl.constexpr,
    BLOCK_Q: gl.constexpr,
    CONSUMERS: gl.constexpr,
):
    """Return batch, first head, tile of query rows and list of an item, the longest lists first."""
    tiles, groups, selections, num_blocks = work
    tile = tiles - 1 - item % tiles
    head = item // tiles % groups * CONSUMERS
    batch = item // tiles // groups
    row = (batch * selections + head // PER_SELECTION) * num_blocks + tile * 64 // BLOCK_Q
    return batch, head, tile, row


@gluon.jit
def _copy_slot(descriptor, where, ring, slot, phase, STAGES: gl.constexpr):
    """Fill the next slot of a ring; return the one after."""
    smem, full, empty = ring
    mbarrier.wait(empty.index(slot), phase ^ 1)
    mbarrier.expect(full.index(slot), descriptor.block_type.nbytes)
    copy_tile(descriptor, where, full.index(slot), smem.index(slot))
    return next_slot(slot, phase, STAGES)


@gluon.jit
def copy_for_queries(
    descriptors,
    rings,
    plan,
    work,
    items,
    PER_KEY_HEAD: gl.constexpr,
    PER_SELECTION: gl.constexpr,
    BLOCK_Q: gl.constexpr,
    CONSUMERS: gl.constexpr,
    KEY_STAGES: gl.constexpr,
    VALUE_STAGES: gl.constexpr,
):
    """Copy what the consumers read, item after item."""
    query_desc, grad_desc, key_desc, value_desc = descriptors
    query_ring, grad_smem, key_ring, value_ring = rings
    query_smem, query_full, query_empty = query_ring
    tiles_ptr, masked_ptr, whole_ptr, capacity = plan
    turn = 0
    key_slot = 0
    key_phase = 0
    value_slot = 0
    value_phase = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        batch, head, tile, row = query_item(item, work, PER_SELECTION, BLOCK_Q, CONSUMERS)
        masked = gl.load(masked_ptr + row)
        count = masked + gl.load(whole_ptr + row)
        list_ptr = tiles_ptr + row.to(gl.int64) * capacity
        gap = capacity - count
        # What is read from memory one step ahead of its use costs no wait.
        key_tile = gl.load(list_ptr + gl.where(masked > 0, 0, gap), mask=count > 0, other=0)
        mbarrier.wait(query_empty.index(0), (turn & 1) ^ 1)
        size: gl.constexpr = query_desc.block_type.nbytes + grad_desc.block_type.nbytes
        mbarrier.expect(query_full.index(0), CONSUMERS * size)
        for consumer in gl.static_range(CONSUMERS):
            rows = [batch, head + consumer, tile * 64, 0]
            copy_tile(query_desc, rows, query_full.index(0), query_smem.index(consumer))
            copy_tile(grad_desc, rows, query_full.index(0), grad_smem.index(consumer))
        key_head = head // PER_KEY_HEAD
        for step in range(count):
            keys = [batch, key_head, key_tile * 64, 0]
            following = gl.minimum(step + 1, count - 1)
            key_tile = gl.load(list_ptr + gl.where(following < masked, following, following + gap))
            key_slot, key_phase = _copy_slot(
                key_desc, keys, key_ring, key_slot, key_phase, KEY_STAGES
            )
            value_slot, value_phase = _copy_slot(
                value_desc, keys, value_ring, value_slot, value_phase, VALUE_STAGES
            )
        turn += 1  # noqa: SIM113  (Gluon knows no enumerate)


@gluon.jit
def differentiate_queries(
    rings,
    meeting,
    plan,
    work,
    items,
    results,
    band,
    rules,
    scale,
    qk_scale,
    heads,
    PER_SELECTION: gl.constexpr,
    BLOCK_Q: gl.constexpr,
    CONSUMERS: gl.constexpr,
    KEY_STAGES: gl.constexpr,
    VALUE_STAGES: gl.constexpr,
    IN_REGISTERS: gl.constexpr,
    AHEAD: gl.constexpr,
    CONSUMER: gl.constexpr,
):
    """Write the gradient of 64 query rows of every item."""
    query_ring, grad_smem, key_ring, _ = rings
    query_smem, query_full, query_empty = query_ring
    tiles_ptr, masked_ptr, whole_ptr, capacity = plan
    target_ptr, target_strides, statistics_ptr = results
    dtype: gl.constexpr = query_smem.dtype
    dim: gl.constexpr = key_ring[0].shape[4]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, dim, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, layout)
    turn = 0
    cursor = (0, 0, 0, 0, 0)
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        batch, head, tile, row = query_item(item, work, PER_SELECTION, BLOCK_Q, CONSUMERS)
        head += CONSUMER
        masked = gl.load(masked_ptr + row)
        whole = gl.load(whole_ptr + row)
        rows = gl.arange(0, 64, row_layout)
        statistics_row = ((batch * heads + head) * work[0] + tile).to(gl.int64) * 128
        lse = gl.load(statistics_ptr + statistics_row + rows)
        delta = gl.load(statistics_ptr + statistics_row + 64 + rows)
        accumulator = gl.zeros([64, dim], gl.float32, out_layout)
        mbarrier.wait(query_full.index(0), turn & 1)
        query = flat(query_smem.index(CONSUMER))
        grad_out = flat(grad_smem.index(CONSUMER))
        if IN_REGISTERS >= 1:
            query = query.load(gl.DotOperandLayout(0, layout, 2))
        if IN_REGISTERS >= 2:
            grad_out = grad_out.load(gl.DotOperandLayout(0, layout, 2))
            # The next copy into these tiles comes after these reads.
            hopper.fence_async_shared()
            mbarrier.arrive(query_empty.index(0), count=1)
        accumulator, cursor = query_masked(
            (query, grad_out),
            tiles_ptr + row.to(gl.int64) * capacity,
            masked,
            accumulator,
            cursor,
            rings,
            meeting,
            (lse, delta),
            tile * 64 + rows,
            batch,
            band,
            rules,
            qk_scale,
            CONSUMERS,
            KEY_STAGES,
            VALUE_STAGES,
        )
        if whole > 0:
            if AHEAD == 2:
                accumulator, cursor = query_whole_ahead(
                    (query, grad_out),
                    whole,
                    accumulator,
                    cursor,
                    rings,
                    (lse, delta),
                    qk_scale,
                    KEY_STAGES,
                    VALUE_STAGES,
                )
            else:
                accumulator, cursor = query_whole(
                    (query, grad_out),
                    whole,
                    accumulator,
                    cursor,
                    rings,
                    (lse, delta),
                    qk_scale,
                    KEY_STAGES,
                    VALUE_STAGES,
                    AHEAD,
                )
        if IN_REGISTERS < 2:
            hopper.fence_async_shared()
            mbarrier.arrive(query_empty.index(0), count=1)
        target = target_ptr + batch.to(gl.int64) * target_strides[0]
        target += head.to(gl.int64) * target_strides[1]
        store_rows(accumulator * scale, target, target_strides[2], tile * 64, band[0], dtype)
        turn += 1  # noqa: SIM113  (Gluon knows no enumerate)


@gluon.jit
def make_tiles(descriptor, slots: gl.constexpr):
    """Return memory for tiles without barriers of their own."""
    tile: gl.constexpr = descriptor.block_type.shape
    shape: gl.constexpr = [slots, tile[0], tile[1], tile[2], tile[3]]
    return gl.allocate_shared_memory(descriptor.dtype, shape, descriptor.layout)


@gluon.jit(
    do_not_specialize=[
        "items", "q_len", "k_len", "upper", "lower", "heads", "tiles", "groups", "selections",
        "num_blocks", "capacity",
    ]
)  # fmt: skip
def query_gradient_kernel(
    query_desc,
    grad_desc,
    key_desc,
    value_desc,
    statistics_ptr,
    target_ptr,
    target_strides,
    tiles_ptr,
    masked_ptr,
    whole_ptr,
    offset_ptr,
    padding_ptr,
    query_documents_ptr,
    key_documents_ptr,
    items,
    q_len,
    k_len,
    upper,
    lower,
    scale,
    qk_scale,
    heads,
    tiles,
    groups,
    selections,
    num_blocks,
    capacity,
    PER_KEY_HEAD: gl.constexpr,
    PER_SELECTION: gl.constexpr,
    BLOCK_Q: gl.constexpr,
    CONSUMERS: gl.constexpr,
    KEY_STAGES: gl.constexpr,
    VALUE_STAGES: gl.constexpr,
    IN_REGISTERS: gl.constexpr,
    AHEAD: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
):
    """Differentiate queries: one or two groups of four warps compute, one warp copies."""
    query_ring = make_ring(query_desc, 1, CONSUMERS, CONSUMERS)
    grad_smem = make_tiles(grad_desc, CONSUMERS)
    key_ring = make_ring(key_desc, KEY_STAGES, 1, CONSUMERS)
    value_ring = make_ring(value_desc, VALUE_STAGES, 1, CONSUMERS)
    rings = (query_ring, grad_smem, key_ring, value_ring)
    # One consumer meets nobody; a barrier that nobody uses would lend its memory to reductions.
    meeting = query_ring[1].index(0)
    if CONSUMERS == 2:
        meeting = make_barriers(1, CONSUMERS).index(0)
    # The copy engine must see barriers that are ready.
    hopper.fence_async_shared()
    if offset_ptr is not None:
        shift = gl.load(offset_ptr).to(gl.int32)
        upper += shift
        lower += shift
    descriptors = (query_desc, grad_desc, key_desc, value_desc)
    plan = (tiles_ptr, masked_ptr, whole_ptr, capacity)
    work = (tiles, groups, selections, num_blocks)
    results = (target_ptr, target_strides, statistics_ptr)
    band = (q_len, k_len, upper, lower)
    # Constants stay constants only where a tuple is written in the call.
    if CONSUMERS == 1:
        gl.warp_specialize(
            [
                (differentiate_queries, (
                    rings, meeting, plan, work, items, results, band,
                    (padding_ptr, query_documents_ptr, key_documents_ptr), scale, qk_scale, heads,
                    PER_SELECTION, BLOCK_Q, CONSUMERS, KEY_STAGES, VALUE_STAGES, IN_REGISTERS,
                    AHEAD, 0,
                )),
                (copy_for_queries, (
                    descriptors, rings, plan, work, items, PER_KEY_HEAD, PER_SELECTION, BLOCK_Q,
                    CONSUMERS, KEY_STAGES, VALUE_STAGES,
                )),
            ],
            [1],
            [24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (differentiate_queries, (
                    rings, meeting, plan, work, items, results, band,
                    (padding_ptr, query_documents_ptr, key_documents_ptr), scale, qk_scale, heads,
                    PER_SELECTION, BLOCK_Q, CONSUMERS, KEY_STAGES, VALUE_STAGES, IN_REGISTERS,
                    AHEAD, 0,
                )),
                (differentiate_queries, (
                    rings, meeting, plan, work, items, results, band,
                    (padding_ptr, query_documents_ptr, key_documents_ptr), scale, qk_scale, heads,
                    PER_SELECTION, BLOCK_Q, CONSUMERS, KEY_STAGES, VALUE_STAGES, IN_REGISTERS,
                    AHEAD, 1,
                )),
                (copy_for_queries, (
                    descriptors, rings, plan, work, items, PER_KEY_HEAD, PER_SELECTION, BLOCK_Q,
                    CONSUMERS, KEY_STAGES, VALUE_STAGES,
                )),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, 24],
        )  # fmt: skip
