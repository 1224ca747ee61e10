"""What the warps of the Hopper kernel for the gradients of keys and values do.

A program has one tile of 64 keys and walks, for each query head of its key head, the query tiles
that read it. One warp copies tiles of queries, output gradients and their statistics into a ring;
four warps compute, transposed so that the left sides of the last two products are in registers as
the first two leave them,

    logits^T = key query^T           grad_value += p^T grad_out
    grad_p^T = value grad_out^T      grad_key   += dlogits^T query

Keys and values stay in shared memory; both gradients fill half of the registers.

The first key tile, which nearly every query reads where a selection keeps attention sinks, is cut
into ``PARTS`` programs that take every so-manieth step, start first and leave sums of float32;
:func:`add_parts` adds these in order. Otherwise it would go on long after all else has ended.

Barriers, phases counted from 0: ``held`` (bytes of keys and values), and for each slot of the ring
``full`` (bytes landed) and ``empty`` (one arrival, after the last product with the slot). The
producer waits only for slots whose contents it sent a whole turn ago, the consumer only for
contents whose slot it has freed, so one of them can always go on.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from seer_compile.kernels.triton.hopper_key_steps import keys_masked, keys_whole, query_tile_of
from seer_compile.kernels.triton.hopper_launch import make_barriers
from seer_compile.kernels.triton.hopper_query_gradient import make_tiles
from seer_compile.kernels.triton.hopper_steps import next_slot
from seer_compile.kernels.triton.hopper_tiles import flat, scale_rows, store_rows
from seer_compile.kernels.triton.hopper_warps import copy_tile


@gluon.jit
def key_item(work, PARTS: gl.constexpr):
    """Return key head, counted through the batch, key tile, part and parts of a program.

    Parts of first tiles come before all else; then early tiles of a head, which most read.
    """
    tiles, pairs, _, _ = work
    program = gl.program_id(0)
    others = gl.maximum(tiles - 1, 1)
    rest = program - PARTS * pairs
    is_first = rest < 0
    pair = gl.where(is_first, program // PARTS, rest // others)
    tile = gl.where(is_first, 0, 1 + rest % others)
    return pair, tile, gl.where(is_first, program % PARTS, 0), gl.where(is_first, PARTS, 1)


@gluon.jit
def key_list(plan, work, batch, head, item, PER_SELECTION: gl.constexpr, SPLIT: gl.constexpr):
    """Return the query blocks that read a key tile, and what of them this program takes.

    Besides the list: where its whole blocks begin, and how many steps with masked and with whole
    query tiles are of this part.
    """
    blocks_ptr, masked_ptr, whole_ptr, capacity = plan
    tiles, _, selections, _ = work
    _, tile, part, parts = item
    row = (batch * selections + head // PER_SELECTION) * tiles + tile
    list_ptr = blocks_ptr + row.to(gl.int64) * capacity
    masked = gl.load(masked_ptr + row) * SPLIT
    whole = gl.load(whole_ptr + row)
    first_whole = capacity - whole
    masked = (masked + parts - 1 - part) // parts
    whole = (whole * SPLIT + parts - 1 - part) // parts
    return list_ptr, first_whole, masked, whole


@gluon.jit
def copy_for_keys(
    descriptors,
    held,
    ring,
    plan,
    work,
    heads,
    PER_KEY_HEAD: gl.constexpr,
    PER_SELECTION: gl.constexpr,
    SPLIT: gl.constexpr,
    STAGES: gl.constexpr,
    PARTS: gl.constexpr,
):
    """Copy keys and values once, then what reads them."""
    key_desc, value_desc, query_desc, grad_desc, statistics_desc = descriptors
    key_smem, value_smem, held_full = held
    query_smem, grad_smem, statistics_smem, full, empty = ring
    kv_heads = work[3]
    item = key_item(work, PARTS)
    batch, key_head = item[0] // kv_heads, item[0] % kv_heads
    keys = [batch, key_head, item[1] * 64, 0]
    held_size: gl.constexpr = key_desc.block_type.nbytes + value_desc.block_type.nbytes
    mbarrier.expect(held_full.index(0), held_size)
    copy_tile(key_desc, keys, held_full.index(0), key_smem.index(0))
    copy_tile(value_desc, keys, held_full.index(0), value_smem.index(0))
    pair_size: gl.constexpr = query_desc.block_type.nbytes + grad_desc.block_type.nbytes
    size: gl.constexpr = pair_size + statistics_desc.block_type.nbytes
    slot = 0
    phase = 0
    for member in range(PER_KEY_HEAD):
        head = key_head * PER_KEY_HEAD + member
        list_ptr, first_whole, masked, whole = key_list(
            plan, work, batch, head, item, PER_SELECTION, SPLIT
        )
        count = masked + whole
        following = 0
        if count > 0:
            following = query_tile_of(list_ptr, item, 0, masked, first_whole, SPLIT)
        for step in range(count):
            query_tile = following
            # What is read from memory one step ahead of its use costs no wait.
            ahead = gl.minimum(step + 1, count - 1)
            following = query_tile_of(list_ptr, item, ahead, masked, first_whole, SPLIT)
            rows = [batch, head, query_tile * 64, 0]
            mbarrier.wait(empty.index(slot), phase ^ 1)
            mbarrier.expect(full.index(slot), size)
            copy_tile(query_desc, rows, full.index(slot), query_smem.index(slot))
            copy_tile(grad_desc, rows, full.index(slot), grad_smem.index(slot))
            where = [batch * heads + head, query_tile, 0]
            copy_tile(statistics_desc, where, full.index(slot), statistics_smem.index(slot))
            slot, phase = next_slot(slot, phase, STAGES)


@gluon.jit
def differentiate_keys(
    held,
    ring,
    plan,
    work,
    results,
    band,
    rules,
    scale,
    qk_scale,
    PER_KEY_HEAD: gl.constexpr,
    PER_SELECTION: gl.constexpr,
    SPLIT: gl.constexpr,
    STAGES: gl.constexpr,
    PARTS: gl.constexpr,
):
    """Write the gradients of 64 keys and values, or a part of their sums."""
    key_smem, value_smem, held_full = held
    key_ptr, key_strides, value_ptr, value_strides, parts_ptr = results
    dtype: gl.constexpr = key_smem.dtype
    dim: gl.constexpr = key_smem.shape[4]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, dim, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, layout)
    kv_heads = work[3]
    item = key_item(work, PARTS)
    pair, tile, part, parts = item
    batch, key_head = pair // kv_heads, pair % kv_heads
    keys = tile * 64 + gl.arange(0, 64, row_layout)
    state = (
        gl.zeros([64, dim], gl.float32, out_layout),
        gl.zeros([64, dim], gl.float32, out_layout),
        gl.zeros([64], gl.int32, row_layout),
    )
    cursor = (0, 0)
    key, value = flat(key_smem.index(0)), flat(value_smem.index(0))
    mbarrier.wait(held_full.index(0), 0)
    for member in range(PER_KEY_HEAD):
        head = key_head * PER_KEY_HEAD + member
        list_ptr, _, masked, whole = key_list(plan, work, batch, head, item, PER_SELECTION, SPLIT)
        state, cursor = keys_masked(
            (key, value),
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
            SPLIT,
            STAGES,
        )
        state, cursor = keys_whole((key, value), whole, state, cursor, ring, qk_scale, STAGES)
    grad_key, grad_value, spoilt_keys = state
    factor = gl.where(spoilt_keys != 0, float("nan"), 1.0)
    grad_value = scale_rows(grad_value, factor)
    if parts > 1:
        sums = parts_ptr + ((pair * PARTS + part) * 128 * dim).to(gl.int64)
        store_rows(grad_key, sums, dim, 0, 64, gl.float32)
        store_rows(grad_value, sums + 64 * dim, dim, 0, 64, gl.float32)
    else:
        key_ptr += batch.to(gl.int64) * key_strides[0] + key_head.to(gl.int64) * key_strides[1]
        store_rows(grad_key * scale, key_ptr, key_strides[2], tile * 64, band[1], dtype)
        value_ptr += batch.to(gl.int64) * value_strides[0]
        value_ptr += key_head.to(gl.int64) * value_strides[1]
        store_rows(grad_value, value_ptr, value_strides[2], tile * 64, band[1], dtype)


@gluon.jit(
    do_not_specialize=[
        "q_len", "k_len", "upper", "lower", "heads", "tiles", "pairs", "selections",
        "kv_heads", "capacity",
    ]
)  # fmt: skip
def key_gradient_kernel(
    query_desc,
    grad_desc,
    key_desc,
    value_desc,
    statistics_desc,
    key_target_ptr,
    value_target_ptr,
    key_target_strides,
    value_target_strides,
    parts_ptr,
    blocks_ptr,
    masked_ptr,
    whole_ptr,
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
    heads,
    tiles,
    pairs,
    selections,
    kv_heads,
    capacity,
    PER_KEY_HEAD: gl.constexpr,
    PER_SELECTION: gl.constexpr,
    SPLIT: gl.constexpr,
    STAGES: gl.constexpr,
    PARTS: gl.constexpr,
):
    """Differentiate keys and values: four warps compute, one copies."""
    held = (make_tiles(key_desc, 1), make_tiles(value_desc, 1), make_barriers(1, 1))
    statistics_smem = gl.allocate_shared_memory(
        statistics_desc.dtype, [STAGES, 1, 1, 128], statistics_desc.layout
    )
    ring = (
        make_tiles(query_desc, STAGES), make_tiles(grad_desc, STAGES), statistics_smem,
        make_barriers(STAGES, 1), make_barriers(STAGES, 1),
    )  # fmt: skip
    # The copy engine must see barriers that are ready.
    hopper.fence_async_shared()
    if offset_ptr is not None:
        shift = gl.load(offset_ptr).to(gl.int32)
        upper += shift
        lower += shift
    descriptors = (key_desc, value_desc, query_desc, grad_desc, statistics_desc)
    plan = (blocks_ptr, masked_ptr, whole_ptr, capacity)
    work = (tiles, pairs, selections, kv_heads)
    results = (
        key_target_ptr, key_target_strides, value_target_ptr, value_target_strides, parts_ptr,
    )  # fmt: skip
    # Constants stay constants only where a tuple is written in the call.
    gl.warp_specialize(
        [
            (differentiate_keys, (
                held, ring, plan, work, results, (q_len, k_len, upper, lower),
                (padding_ptr, query_documents_ptr, key_documents_ptr), scale, qk_scale,
                PER_KEY_HEAD, PER_SELECTION, SPLIT, STAGES, PARTS,
            )),
            (copy_for_keys, (
                descriptors, held, ring, plan, work, heads, PER_KEY_HEAD, PER_SELECTION, SPLIT,
                STAGES, PARTS,
            )),
        ],
        [1],
        [24],
    )  # fmt: skip
