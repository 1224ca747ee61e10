"""What comes before and after the backward kernels of Hopper.

Before: one tile of numbers per 64 query rows. After: the sum of the parts of the first key tile.

A tile of statistics is ``Float32[128]``: ``lse * log2(e)`` of 64 rows, then ``delta[i] = sum_v
grad_out[i] out[i]`` of the same rows. A row that read nothing, or lies past the end, gets ``+inf``:
with it its probabilities are 0.
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
    load_tile,
    store_tile,
    tile_pointers,
)

_LOG2_E = tl.constexpr(LOG2_E)

ROWS = 64
"""Query rows of a tile."""


@triton.jit(do_not_specialize=["q_len", "tiles", "heads"])
def _statistics(
    out_ptr, grad_out_ptr, lse_ptr, result_ptr, out_strides, grad_out_strides, q_len, tiles, heads,
    ROWS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tile = program % tiles
    row = (program // tiles).to(tl.int64)
    batch, head = row // heads, row % heads
    offsets = tl.arange(0, ROWS)
    queries = tile * ROWS + offsets
    columns = tl.arange(0, DIM)
    is_query = queries < q_len
    out_base = out_ptr + batch * out_strides[0] + head * out_strides[1]
    out = load_tile(
        tile_pointers(out_base, queries, out_strides[2], columns, out_strides[3]), is_query,
        columns, DIM, DIM,
    )  # fmt: skip
    grad_base = grad_out_ptr + batch * grad_out_strides[0] + head * grad_out_strides[1]
    grad_out = load_tile(
        tile_pointers(grad_base, queries, grad_out_strides[2], columns, grad_out_strides[3]),
        is_query, columns, DIM, DIM,
    )  # fmt: skip
    lse = tl.load(lse_ptr + row * q_len + queries, mask=is_query, other=float("-inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse * _LOG2_E)
    result = result_ptr + (row * tiles + tile) * (2 * ROWS) + offsets
    tl.store(result, lse)
    tl.store(result + ROWS, tl.sum(out.to(tl.float32) * grad_out.to(tl.float32), 1))


def gradient_statistics(out: Tensor, grad_out: Tensor, lse: Tensor) -> Tensor:
    """Return the statistics of all rows.

    Args:
        out: ``Float[b h q v]``, of the forward; ``v`` a power of two.
        grad_out: ``Float[b h q v]``.
        lse: ``Float32[b h q]``, contiguous.

    Returns:
        ``Float32[b*h tiles 128]``.

    Cost:
        One read of ``out`` and ``grad_out``.
    """
    batch, heads, q_len, dim = out.shape
    tiles = ceil_div(q_len, ROWS)
    shape = (batch * heads, tiles, 2 * ROWS)
    result = torch.empty(shape, dtype=torch.float32, device=out.device)
    launch_kernel(_statistics, tiles * heads * batch,
        out, grad_out, lse, result, out.stride(), grad_out.stride(), q_len, tiles, heads,
        ROWS=ROWS, DIM=dim, num_warps=4,
    )  # fmt: skip
    return result


@triton.jit(do_not_specialize=["kv_heads", "k_len"])
def _add_parts(
    sums_ptr, key_ptr, value_ptr, key_strides, value_strides, scale, kv_heads, k_len,
    PARTS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    pair = (program // 4).to(tl.int64)
    batch, head = pair // kv_heads, pair % kv_heads
    rows = program % 4 * 16 + tl.arange(0, 16)
    columns = tl.arange(0, DIM)
    tile = sums_ptr + pair * (PARTS * 128 * DIM) + rows[:, None] * DIM + columns[None, :]
    grad_key = tl.zeros([16, DIM], tl.float32)
    grad_value = tl.zeros([16, DIM], tl.float32)
    for part in range(PARTS):
        grad_key += tl.load(tile + part * (128 * DIM))
        grad_value += tl.load(tile + part * (128 * DIM) + 64 * DIM)
    is_key = rows < k_len
    target = key_ptr + batch * key_strides[0] + head * key_strides[1]
    store_tile(
        tile_pointers(target, rows, key_strides[2], columns, key_strides[3]), grad_key * scale,
        is_key, columns, DIM, DIM,
    )  # fmt: skip
    target = value_ptr + batch * value_strides[0] + head * value_strides[1]
    store_tile(
        tile_pointers(target, rows, value_strides[2], columns, value_strides[3]), grad_value,
        is_key, columns, DIM, DIM,
    )  # fmt: skip


def add_parts(sums: Tensor, key_target: Tensor, value_target: Tensor, scale: float) -> None:
    """Write the first 64 rows of both gradients of every key head.

    Args:
        sums: ``Float32[b*g parts 2 64 d]``, contiguous: of keys, unscaled, and of values.
        key_target: ``Float[b g k d]``.
        value_target: ``Float[b g k d]``.
        scale: Factor on the logits.
    """
    pairs, parts, _, _, dim = sums.shape
    launch_kernel(_add_parts, pairs * 4,
        sums, key_target, value_target, key_target.stride(), value_target.stride(), scale,
        key_target.shape[1], key_target.shape[2], PARTS=parts, DIM=dim, num_warps=4,
    )  # fmt: skip
