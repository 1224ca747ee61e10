"""Block-sparse attention on Hopper, backward: the same operator as ``attention_backward``.

Two kernels again, neither with atomics, so results are deterministic. Queries
(``hopper_query_gradient``): programs stay on their multiprocessor, one or two groups of four warps
take 64 rows of a head each, two heads that share a selection share every key and value tile. Keys
(``hopper_key_gradient``): one program per key tile, two of them per multiprocessor, so that the
exponentials of one run behind the products of the other. In both a warp of its own copies tiles
ahead. Masks concern the few tiles that ``hopper_plan`` puts aside; the plan, transposed, serves
the keys.

Not for every call: ``hopper_attention.obstacle`` and :func:`obstacle` say what they do not take.

Numerics: as ``attention_backward``; the log-sum-exp is taken to base 2 once per row.

Source:
    Dao, "FlashAttention-2", arXiv:2307.08691, algorithm 2; Shah et al., "FlashAttention-3",
    arXiv:2407.08608, for warps that copy and asynchronous products.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from seer_compile.kernels.triton.gradient_statistics import add_parts, gradient_statistics
from seer_compile.kernels.triton.hopper_key_gradient import key_gradient_kernel
from seer_compile.kernels.triton.hopper_launch import (
    TILE_ROWS,
    describe,
    memory_obstacle,
)
from seer_compile.kernels.triton.hopper_plan import TILE_KEYS, Plan, plan, tile_rules
from seer_compile.kernels.triton.hopper_query_gradient import query_gradient_kernel
from seer_compile.kernels.triton.launching import launch_kernel
from seer_compile.kernels.triton.primitives import (
    LOG2_E,
    Band,
    ceil_div,
    fine_rules,
    launching_on,
    make_band,
    multiprocessors,
)
from seer_compile.kernels.triton.transpose_plan import transpose_plan
from seer_compile.kernels.triton.tuning import (
    HeadLayout,
    HopperKeyTiling,
    HopperQueryTiling,
    head_layout,
    hopper_key_tiling,
    hopper_query_tiling,
)

_DIMS = (64, 128)


def obstacle(grad_out: Tensor, query: Tensor) -> str | None:
    """Return why these kernels do not take a call that the forward's engine takes, or None.

    Args:
        grad_out: ``Float[b h q v]``.
        query: ``Float[b h q d]``.
    """
    if query.shape[3] not in _DIMS:
        return f"head dim {query.shape[3]}"
    reason = memory_obstacle(grad_out)
    return None if reason is None else f"the gradient of the output {reason}"


class Call(NamedTuple):
    """What both kernels of one call read."""

    descriptors: list[TensorDescriptor]
    """Of query, output gradient, key, value."""
    statistics: Tensor
    lists: Plan
    visibility: tuple[Any, ...]
    """Offset, fine rules, lengths, bounds, scales."""
    layout: HeadLayout
    shape: tuple[int, ...]
    """Batch, selections, query blocks, query tiles, key tiles."""


def prepare(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    indices: Tensor,
    counts: Tensor,
    scale: float,
    blocks: tuple[int, int],
    band: Band,
    fine: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> Call:
    """Describe tensors, split lists, and sum what each query row needs."""
    batch, heads, q_len, _ = query.shape
    kv_heads, k_len = key.shape[1:3]
    lists = plan(indices, counts, band, tile_rules(*fine, blocks[0]), (q_len, k_len), blocks)
    scale = float(scale)
    return Call(
        [describe(tensor) for tensor in (query, grad_out, key, value)],
        gradient_statistics(out, grad_out, lse.contiguous()),
        lists,
        (
            band.offset, *fine_rules(*fine), q_len, k_len, band.upper, band.lower, scale,
            scale * LOG2_E,
        ),
        head_layout(heads, kv_heads, indices.shape[1]),
        (batch, *counts.shape[1:], ceil_div(q_len, TILE_ROWS), ceil_div(k_len, TILE_KEYS)),
    )  # fmt: skip


def query_gradient(
    call: Call, target: Tensor, query_block: int, tiling: HopperQueryTiling | None = None
) -> None:
    """Write the gradient of the queries to ``Float[b h q d]``."""
    layout = call.layout
    tiling = tiling or hopper_query_tiling(layout, target.shape[3])
    batch, selections, query_blocks, tiles, _ = call.shape
    groups = layout.heads // tiling.consumers
    items = tiles * groups * batch
    programs = min(items, multiprocessors(target.device) * tiling.programs)
    fine, (lengths, scales) = call.visibility[:4], (call.visibility[4:8], call.visibility[8:])
    lists = call.lists
    launch_kernel(query_gradient_kernel, programs,
        *call.descriptors, call.statistics, target, target.stride(), *lists[:3], *fine, items,
        *lengths, *scales, layout.heads, tiles, groups, selections, query_blocks, lists.capacity,
        PER_KEY_HEAD=layout.per_key_head, PER_SELECTION=layout.per_selection, BLOCK_Q=query_block,
        CONSUMERS=tiling.consumers, KEY_STAGES=tiling.key_stages, VALUE_STAGES=tiling.value_stages,
        IN_REGISTERS=tiling.in_registers, AHEAD=tiling.ahead, CONSUMER_REGISTERS=240, num_warps=4,
        maxnreg=tiling.registers,
    )  # fmt: skip


def key_value_gradient(
    call: Call,
    key_target: Tensor,
    value_target: Tensor,
    query_block: int,
    tiling: HopperKeyTiling | None = None,
) -> None:
    """Write the gradients of keys and values to ``Float[b g k d]`` each."""
    layout = call.layout
    batch, kv_heads, _, dim = key_target.shape
    tiling = tiling or hopper_key_tiling(dim)
    _, selections, query_blocks, _, tiles = call.shape
    lists = transpose_plan(call.lists, batch * selections, query_blocks, tiles)
    pairs = batch * kv_heads
    sums = torch.empty(
        (pairs, tiling.parts, 2, TILE_KEYS, dim), dtype=torch.float32, device=key_target.device
    )
    launch_kernel(key_gradient_kernel, pairs * (tiling.parts + tiles - 1),
        *call.descriptors, _describe_statistics(call.statistics), key_target, value_target,
        key_target.stride(), value_target.stride(), sums, *lists[:3], *call.visibility,
        layout.heads, tiles, pairs, selections, kv_heads, lists.capacity,
        PER_KEY_HEAD=layout.per_key_head, PER_SELECTION=layout.per_selection,
        SPLIT=query_block // TILE_ROWS, STAGES=tiling.stages, PARTS=tiling.parts, num_warps=4,
        maxnreg=tiling.registers,
    )  # fmt: skip
    add_parts(sums, key_target, value_target, call.visibility[8])


def _describe_statistics(statistics: Tensor) -> TensorDescriptor:
    """Describe the statistics for copies of one tile."""
    return TensorDescriptor(
        statistics, list(statistics.shape), list(statistics.stride()), [1, 1, 128], _plain_layout()
    )


@functools.cache
def _plain_layout() -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=3)


def launch(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
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
    query_tiling: HopperQueryTiling | None = None,
    key_tiling: HopperKeyTiling | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate block-sparse attention; arguments and results as ``attention_backward.launch``.

    The call must have neither obstacle. The tilings override the tuning table.

    Cost:
        Six launches, and a few small ones more for padding or documents; the plan and its
        transpose, eight bytes per pair of a query block and 64 keys and one of scratch.
    """
    targets = tuple(
        torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        for tensor in (query, key, value)
    )
    if query.numel() == 0 or key.numel() == 0:
        return tuple(target.zero_() for target in targets)  # type: ignore[return-value]
    fine = (key_padding, query_documents, key_documents)
    with launching_on(query, "query"):
        call = prepare(
            grad_out, query, key, value, out, lse, indices, counts, scale,
            (query_block, key_block), make_band(upper, lower, offset), fine,
        )  # fmt: skip
        query_gradient(call, targets[0], query_block, query_tiling)
        key_value_gradient(call, *targets[1:], query_block, key_tiling)
    return targets
