"""How a tile of sub-blocks is pooled in registers, one token of each sub-block after another."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pool_chunk(
    base_ptr,
    padding_ptr,
    sub_blocks,
    columns,
    token_strides,
    num_tokens,
    DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    SIZE: tl.constexpr,
    UNROLL: tl.constexpr,
    IS_WHOLE: tl.constexpr,
):
    """Return mean, maximum and minimum of some columns of a tile of sub-blocks.

    ``IS_WHOLE`` says that every token of the tile exists and counts. What is not used is not
    computed.
    """
    TILE: tl.constexpr = sub_blocks.shape[0]
    dtype: tl.constexpr = base_ptr.dtype.element_ty
    total = tl.zeros([TILE, CHUNK], tl.float32)
    highest = tl.full([TILE, CHUNK], float("-inf"), tl.float32)
    lowest = tl.full([TILE, CHUNK], float("inf"), tl.float32)
    count = tl.zeros([TILE], tl.int32)
    first = sub_blocks * SIZE
    first_pointers = base_ptr + first[:, None].to(tl.int64) * token_strides[2]
    first_pointers += columns[None, :] * token_strides[3]
    for start in range(0, SIZE, UNROLL):
        for step in tl.static_range(UNROLL):
            positions = first + (start + step)
            pointers = first_pointers + tl.cast(start + step, tl.int64) * token_strides[2]
            if IS_WHOLE:
                if DIM % CHUNK == 0:
                    token = tl.load(pointers).to(tl.float32)
                else:
                    mask = (columns < DIM)[None, :]
                    token = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
                highest = tl.maximum(highest, token)
                lowest = tl.minimum(lowest, token)
            else:
                is_token = positions < num_tokens
                if padding_ptr is not None:
                    flags = tl.load(padding_ptr + positions, mask=is_token, other=0)
                    is_token = is_token & (flags != 0)
                mask = is_token[:, None] & (columns < DIM)[None, :]
                token = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
                highest = tl.where(is_token[:, None], tl.maximum(highest, token), highest)
                lowest = tl.where(is_token[:, None], tl.minimum(lowest, token), lowest)
                count += is_token.to(tl.int32)
            total += token
    if not IS_WHOLE:
        is_empty = (count == 0)[:, None]
        highest = tl.where(is_empty, 0.0, highest)
        lowest = tl.where(is_empty, 0.0, lowest)
        mean = total / tl.maximum(count, 1).to(tl.float32)[:, None]
    else:
        mean = total / SIZE
    return mean.to(dtype), highest.to(dtype), lowest.to(dtype)
