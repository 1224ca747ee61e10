"""Block-sparse attention on Hopper, forward: the same operator as ``attention_forward``.

A program stays on its multiprocessor and draws tiles of query rows from a queue. One of its warps
copies key and value tiles into a ring in shared memory; one or two groups of four warps, 64 query
rows each, compute from it (``hopper_warps``). Two groups share every key tile: the rows of one
query block of 128, or of two heads that share a selection and a key head. Masks concern the few
tiles that ``hopper_plan`` puts aside for it.

Not for every call: :func:`obstacle` says what it does not take.
"""

from __future__ import annotations

import torch
import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from seer_compile.kernels.triton.hopper_launch import (
    TILE_ROWS,
    describe,
    make_barriers,
    make_ring,
    memory_obstacle,
)
from seer_compile.kernels.triton.hopper_plan import TILE_KEYS, plan, tile_rules
from seer_compile.kernels.triton.hopper_warps import consume, produce
from seer_compile.kernels.triton.launching import launch_kernel
from seer_compile.kernels.triton.primitives import (
    LOG2_E,
    ceil_div,
    fine_rules,
    is_hopper,
    launching_on,
    make_band,
    multiprocessors,
)
from seer_compile.kernels.triton.tuning import HopperTiling, head_layout, hopper_tiling
from seer_compile.result_layout import empty_like_query

_DIMS = (64, 128, 256)
_DTYPES = (torch.float16, torch.bfloat16)


@gluon.jit(
    do_not_specialize=[
        "items", "q_len", "k_len", "upper", "lower", "heads", "tiles", "groups", "selections",
        "num_blocks", "capacity",
    ]
)  # fmt: skip
def _hopper_attention(
    query_desc,
    key_desc,
    value_desc,
    out_ptr,
    lse_ptr,
    out_strides,
    tiles_ptr,
    masked_ptr,
    whole_ptr,
    queue_ptr,
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
    TILE_HEADS: gl.constexpr,
    CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr,
    TILES: gl.constexpr,
    NEGATE: gl.constexpr,
    QUERY_IN_REGISTERS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
):
    query_ring = make_ring(query_desc, 1, CONSUMERS, CONSUMERS)
    key_ring = make_ring(key_desc, STAGES, TILES, CONSUMERS)
    value_ring = make_ring(value_desc, STAGES, TILES, CONSUMERS)
    rings = (query_ring, key_ring, value_ring)
    item_smem = gl.allocate_shared_memory(gl.int32, [8, 1], mbarrier.MBarrierLayout())
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
    descriptors = (query_desc, key_desc, value_desc)
    plan = (tiles_ptr, masked_ptr, whole_ptr, capacity)
    work = (tiles, groups, selections, num_blocks)
    results = (out_ptr, lse_ptr, out_strides)
    band = (q_len, k_len, upper, lower)
    # Constants stay constants only where a tuple is written in the call.
    if CONSUMERS == 1:
        gl.warp_specialize(
            [
                (consume, (
                    rings, item_smem, meeting, plan, items, results, band,
                    (padding_ptr, query_documents_ptr, key_documents_ptr), scale, qk_scale, heads,
                    TILE_HEADS, CONSUMERS, STAGES, TILES, NEGATE,
                    QUERY_IN_REGISTERS, 0,
                )),
                (produce, (
                    descriptors, rings, item_smem, plan, work, items, queue_ptr, PER_KEY_HEAD,
                    PER_SELECTION, BLOCK_Q, TILE_HEADS, CONSUMERS, STAGES, TILES,
                )),
            ],
            [1],
            [24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (consume, (
                    rings, item_smem, meeting, plan, items, results, band,
                    (padding_ptr, query_documents_ptr, key_documents_ptr), scale, qk_scale, heads,
                    TILE_HEADS, CONSUMERS, STAGES, TILES, NEGATE,
                    QUERY_IN_REGISTERS, 0,
                )),
                (consume, (
                    rings, item_smem, meeting, plan, items, results, band,
                    (padding_ptr, query_documents_ptr, key_documents_ptr), scale, qk_scale, heads,
                    TILE_HEADS, CONSUMERS, STAGES, TILES, NEGATE,
                    QUERY_IN_REGISTERS, 1,
                )),
                (produce, (
                    descriptors, rings, item_smem, plan, work, items, queue_ptr, PER_KEY_HEAD,
                    PER_SELECTION, BLOCK_Q, TILE_HEADS, CONSUMERS, STAGES, TILES,
                )),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, 24],
        )  # fmt: skip


def obstacle(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_block: int,
    key_block: int,
    softcap: float | None = None,
) -> str | None:
    """Return why this engine does not take a call, or None.

    Args:
        query: ``Float[b h q d]``.
        key: ``Float[b g k d]``.
        value: ``Float[b g k v]``.
        query_block: Tokens per query block.
        key_block: Tokens per key block.
        softcap: Bounds the logits; None where nothing does.
    """
    if softcap is not None:
        return "logits are soft-capped"
    if query.device.type == "cuda" and not is_hopper(query.device):
        return "the device is no Hopper GPU"
    reason = _shape_obstacle(query, value, query_block, key_block)
    if reason is not None:
        return reason
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        reason = memory_obstacle(tensor)
        if reason is not None:
            return f"{name} {reason}"
    return None


def _shape_obstacle(query: Tensor, value: Tensor, query_block: int, key_block: int) -> str | None:
    """Return what of dtype, head dims, blocks and heads the engine is not built for, or None."""
    if query.dtype not in _DTYPES:
        return f"dtype {query.dtype}"
    if query.shape[3] not in _DIMS or value.shape[3] != query.shape[3]:
        return f"head dims {query.shape[3]} and {value.shape[3]}"
    if query_block % TILE_ROWS or key_block % TILE_KEYS:
        return f"blocks of {query_block} x {key_block} tokens"
    return None


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
    tiling: HopperTiling | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute block-sparse attention; arguments and results as ``attention_forward.launch``.

    The call must have no :func:`obstacle`. ``tiling`` overrides the tuning table.

    Cost:
        Two launches, and a few small ones more for padding or documents; ``Int32`` of the size of
        ``indices``, per 64 keys of a block.
    """
    batch, heads, q_len, dim = query.shape
    kv_heads, k_len = key.shape[1:3]
    layout = head_layout(heads, kv_heads, indices.shape[1])
    out = empty_like_query(query, value)
    lse = torch.empty((batch, heads, q_len), dtype=torch.float32, device=query.device)
    if out.numel() == 0 or k_len == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    tiling = tiling or hopper_tiling(layout, query_block, dim)
    band = make_band(upper, lower, offset)
    # Maxima are taken before scaling, so the scale is positive.
    magnitude = max(abs(float(scale)), 1e-30)
    tiles = ceil_div(q_len, TILE_ROWS * tiling.consumers // tiling.heads)
    groups = heads // tiling.heads
    items = tiles * groups * batch
    programs = min(items, multiprocessors(query.device) * tiling.programs)
    rules = tile_rules(key_padding, query_documents, key_documents, query_block)
    descriptors = [describe(tensor) for tensor in (query, key, value)]
    with launching_on(query, "query"):
        lists = plan(indices, counts, band, rules, (q_len, k_len), (query_block, key_block))
        launch_kernel(
            _hopper_attention,
            programs,
            *descriptors,
            out,
            lse,
            out.stride(),
            lists.tiles,
            lists.masked,
            lists.whole,
            lists.queue,
            band.offset,
            *fine_rules(key_padding, query_documents, key_documents),
            items,
            q_len,
            k_len,
            band.upper,
            band.lower,
            magnitude,
            magnitude * LOG2_E,
            heads,
            tiles,
            groups,
            *counts.shape[1:],
            lists.capacity,
            PER_KEY_HEAD=layout.per_key_head,
            PER_SELECTION=layout.per_selection,
            BLOCK_Q=query_block,
            TILE_HEADS=tiling.heads,
            CONSUMERS=tiling.consumers,
            STAGES=tiling.stages,
            TILES=tiling.tiles,
            NEGATE=scale < 0,
            QUERY_IN_REGISTERS=tiling.query_in_registers,
            CONSUMER_REGISTERS=240,
            num_warps=4,
            maxnreg=tiling.registers,
        )
    return out, lse
