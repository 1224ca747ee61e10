"""Pool the tokens of each sub-block to one vector per kind (mean, maximum, minimum).

Layout: one program per tile of sub-blocks; it walks the positions inside a sub-block and keeps the
running results of all kinds in registers, so tokens are read once. The kinds lie side by side in
the last dimension of the result.

Numerics: sums in float32; maximum and minimum are exact. Tokens that do not count are not read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from seer_compile.errors import RangeError
from seer_compile.kernels.triton.launching import launch_kernel
from seer_compile.kernels.triton.primitives import as_bytes, ceil_div, launching_on, padded_dim
from seer_compile.types import POOL_KINDS

_TILE_ELEMENTS = 2048
"""Elements of one kind in registers: 16 per thread of four warps."""


@triton.jit
def _accumulate(
    tokens_ptr,
    padding_ptr,
    positions,
    token_strides,
    is_inside,
    columns,
    DIM: tl.constexpr,
):
    """Load one token per sub-block; return it as float32, and which of them count."""
    is_token = is_inside
    if padding_ptr is not None:
        flags = tl.load(padding_ptr + positions, mask=is_inside, other=0)
        is_token = is_inside & (flags != 0)
    pointers = (
        tokens_ptr
        + positions[:, None].to(tl.int64) * token_strides[2]
        + columns[None, :] * token_strides[3]
    )
    mask = is_token[:, None] & (columns < DIM)[None, :]
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32), is_token


@triton.jit(do_not_specialize=["num_tokens", "num_sub_blocks", "tiles", "heads"])
def _pool_blocks(
    tokens_ptr,
    pooled_ptr,
    padding_ptr,
    token_strides,
    num_tokens,
    num_sub_blocks,
    tiles,
    heads,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TILE: tl.constexpr,
    UNROLL: tl.constexpr,
    NUM_KINDS: tl.constexpr,
    MEAN: tl.constexpr,
    MAXIMUM: tl.constexpr,
    MINIMUM: tl.constexpr,
):
    program = tl.program_id(0)
    tile = program % tiles
    head = (program // tiles % heads).to(tl.int64)
    batch = (program // tiles // heads).to(tl.int64)
    tokens_ptr += batch * token_strides[0] + head * token_strides[1]
    if padding_ptr is not None:
        padding_ptr += batch * num_tokens
    sub_blocks = tile * TILE + tl.arange(0, TILE)
    columns = tl.arange(0, PADDED_DIM)
    total = tl.zeros([TILE, PADDED_DIM], tl.float32)
    highest = tl.full([TILE, PADDED_DIM], float("-inf"), tl.float32)
    lowest = tl.full([TILE, PADDED_DIM], float("inf"), tl.float32)
    count = tl.zeros([TILE], tl.int32)
    for chunk in range(0, (SIZE + UNROLL - 1) // UNROLL):
        for step in tl.static_range(UNROLL):
            place = chunk * UNROLL + step
            positions = sub_blocks * SIZE + place
            is_inside = positions < tl.minimum((sub_blocks + 1) * SIZE, num_tokens)
            token, is_token = _accumulate(
                tokens_ptr,
                padding_ptr,
                positions,
                token_strides,
                is_inside,
                columns,
                DIM,
            )
            count += is_token.to(tl.int32)
            if MEAN >= 0:
                total += token
            if MAXIMUM >= 0:
                highest = tl.where(is_token[:, None], tl.maximum(highest, token), highest)
            if MINIMUM >= 0:
                lowest = tl.where(is_token[:, None], tl.minimum(lowest, token), lowest)

    is_empty = (count == 0)[:, None]
    rows = (batch * heads + head) * num_sub_blocks + sub_blocks
    target = pooled_ptr + rows[:, None] * (NUM_KINDS * DIM) + columns[None, :]
    mask = (sub_blocks < num_sub_blocks)[:, None] & (columns < DIM)[None, :]
    dtype = pooled_ptr.dtype.element_ty
    if MEAN >= 0:
        mean = total / tl.maximum(count, 1).to(tl.float32)[:, None]
        tl.store(target + MEAN * DIM, mean.to(dtype), mask=mask)
    if MAXIMUM >= 0:
        tl.store(target + MAXIMUM * DIM, tl.where(is_empty, 0.0, highest).to(dtype), mask=mask)
    if MINIMUM >= 0:
        tl.store(target + MINIMUM * DIM, tl.where(is_empty, 0.0, lowest).to(dtype), mask=mask)


def launch(tokens: Tensor, size: int, kinds: str, padding: Tensor | None = None) -> Tensor:
    """Pool sub-blocks of tokens.

    Args:
        tokens: ``Float[b x t d]``, any strides.
        size: Tokens per sub-block.
        kinds: Comma-joined, distinct, out of ``mean``, ``max``, ``min``.
        padding: ``Bool[b t]``, True where a token counts.

    Returns:
        ``Float[b x ceil(t/size) len(kinds)*d]``, in the order of ``kinds``. A sub-block in which
        no token counts is 0.

    Raises:
        RangeError: ``kinds`` names something else, or a kind twice, or ``size`` is below 1.

    Cost:
        One read of the tokens, ``len(kinds) / size`` of it written.
    """
    order = kinds.split(",")
    if not set(order) <= set(POOL_KINDS) or len(set(order)) != len(order):
        raise RangeError(argument="kinds", got=kinds, expected=f"distinct kinds of {POOL_KINDS}")
    if size < 1:
        raise RangeError(argument="size", got=size, expected="at least 1 token")
    batch, heads, num_tokens, dim = tokens.shape
    num_sub_blocks = ceil_div(num_tokens, size)
    pooled = torch.empty(
        (batch, heads, num_sub_blocks, len(order) * dim), dtype=tokens.dtype, device=tokens.device
    )
    if pooled.numel() == 0:
        return pooled
    padded = padded_dim(dim)
    tile = max(1, min(_TILE_ELEMENTS // padded, triton.next_power_of_2(num_sub_blocks)))
    tiles = ceil_div(num_sub_blocks, tile)
    places = {kind: order.index(kind) if kind in order else -1 for kind in POOL_KINDS}
    with launching_on(tokens, "tokens"):
        launch_kernel(
            _pool_blocks,
            tiles * heads * batch,
            tokens,
            pooled,
            as_bytes(padding),
            tokens.stride(),
            num_tokens,
            num_sub_blocks,
            tiles,
            heads,
            SIZE=size,
            DIM=dim,
            PADDED_DIM=padded,
            TILE=tile,
            UNROLL=min(8, triton.next_power_of_2(size)),
            NUM_KINDS=len(order),
            MEAN=places["mean"],
            MAXIMUM=places["max"],
            MINIMUM=places["min"],
            num_warps=4,
        )
    return pooled
