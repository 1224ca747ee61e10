"""Arithmetic of the Hopper kernel: products, the running softmax, masks, and values not finite.

A warp group of four warps owns 64 query rows. ``query`` is a tile in registers or in shared
memory, ``key_smem`` and ``value_smem`` are rings of tiles of 64 tokens. Products are asynchronous:
what :func:`logits` and :func:`add_values` return may be read after ``warpgroup_mma_wait`` only.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia import hopper

# Triton 3.6 has the method under the private name only.
REINTERPRET_IS_PRIVATE = gl.constexpr(hasattr(gl.shared_memory_descriptor, "_reinterpret"))


@gluon.jit
def flat(tile_smem):
    """View a tile ``[1, 1, tokens, dim]``, as copied, as the matrix it is."""
    return tile_smem.reshape([tile_smem.shape[2], tile_smem.shape[3]])


@gluon.jit
def logits(query, key_smem, index):
    """Begin the product of the queries with one key tile: ``Float32[64 64]``."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    zero = gl.zeros([64, 64], gl.float32, layout)
    key = flat(key_smem.index(index)).permute((1, 0))
    return hopper.warpgroup_mma(query, key, zero, use_acc=False, is_async=True)


@gluon.jit
def add_values(probability, value_smem, index, accumulator):
    """Begin adding the product of probabilities with one value tile to the accumulator."""
    value = flat(value_smem.index(index))
    return hopper.warpgroup_mma(probability, value, accumulator, is_async=True)


@gluon.jit
def as_operand(probability, dtype: gl.constexpr, layout: gl.constexpr):
    """Round probabilities to the dtype of the values, placed as the left side of a product.

    No data moves between threads: an accumulator of one product lies like the operand of the next.
    """
    return gl.convert_layout(probability.to(dtype), gl.DotOperandLayout(0, layout, 2))


@gluon.jit
def scale_rows(accumulator, factor):
    """Multiply each row by its factor; the layouts hold the same rows per thread."""
    layout: gl.constexpr = gl.SliceLayout(1, accumulator.type.layout)
    return accumulator * gl.convert_layout(factor, layout)[:, None]


@gluon.constexpr_function
def _row_layout(like, dim, bits):
    """Return the layout in which rows of an accumulator are written.

    Of 16-bit numbers a thread holds two of a row side by side, and four threads write half a sector
    of 32 bytes. They trade halves of what they hold, so that they write whole ones; no number
    leaves its warp. (One H200, 32,768 tokens of D128: attention at 5 % takes 0.90 ms instead
    of 1.00, at 10 % 1.57 instead of 1.66.)
    """
    if bits != 16:
        return like
    wide = [[0, 16], [0, 32], [0, 64], [0, 128]][: dim.bit_length() - 5]
    lanes = [[0, 8], [0, 4], [1, 0], [2, 0], [4, 0]]
    registers = [[0, 1], [0, 2], [8, 0], *wide]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [64, dim])


@gluon.jit
def store_rows(accumulator, target_ptr, row_stride, first, length, dtype: gl.constexpr):
    """Write the rows of a tile that exist, in a dtype."""
    layout: gl.constexpr = _row_layout(
        accumulator.type.layout, accumulator.shape[1], dtype.primitive_bitwidth
    )
    rows = first + gl.arange(0, 64, gl.SliceLayout(1, layout))
    columns = gl.arange(0, accumulator.shape[1], gl.SliceLayout(0, layout))
    pointers = target_ptr + rows.to(gl.int64) * row_stride
    values = gl.convert_layout(accumulator.to(dtype), layout)
    gl.store(pointers[:, None] + columns[None, :], values, mask=(rows < length)[:, None])


@gluon.jit
def partial_sums(values):
    """Return the sums of ``[64 64]`` over what a thread holds of each row: ``[64 4]``.

    Four threads hold a row of an accumulator, each two neighbours of every eight columns. Their
    sums are added once per item, not once per tile: see :func:`whole_sums`.
    """
    return gl.sum(gl.sum(values.reshape([64, 8, 4, 2]), 3), 1)


@gluon.jit
def whole_sums(parts, like):
    """Return the sum of each row from its parts, in the layout of another number per row."""
    return gl.convert_layout(gl.sum(parts, 1), like.type.layout)


@gluon.jit
def softmax_whole(first, second, running_max, running_sum, qk_scale, TILES: gl.constexpr):
    """Take one or two tiles of logits, all readable, into the running softmax.

    ``second`` is ignored where ``TILES`` is 1. Returns the probabilities of both, the factor for
    what was accumulated before, and the new maximum and sums.
    """
    largest = first
    if TILES == 2:
        largest = gl.maximum(first, second)
    new_max = gl.maximum(running_max, gl.max(largest, 1))
    base = new_max * qk_scale
    first = gl.exp2(first * qk_scale - base[:, None])
    added = first
    if TILES == 2:
        second = gl.exp2(second * qk_scale - base[:, None])
        added = first + second
    rescale = gl.exp2(running_max * qk_scale - base)
    return first, second, rescale, new_max, scale_rows(running_sum, rescale) + partial_sums(added)


@gluon.jit
def softmax_masked(values, visible, running_max, running_sum, qk_scale):
    """Take one tile of logits, some of them hidden, into the running softmax."""
    values = gl.where(visible, values, float("-inf"))
    new_max = gl.maximum(running_max, gl.max(values, 1))
    # A row without a readable key so far has maximum -inf, and -inf - -inf is NaN.
    base = gl.where(new_max == float("-inf"), 0.0, new_max) * qk_scale
    values = gl.exp2(values * qk_scale - base[:, None])
    rescale = gl.exp2(running_max * qk_scale - base)
    return values, rescale, new_max, scale_rows(running_sum, rescale) + partial_sums(values)


@gluon.jit
def visibility(queries, start, batch, band, rules):
    """Return ``[64 64]``: which key of the tile at ``start`` each query may read."""
    q_len, k_len, upper, lower = band
    padding_ptr, query_documents_ptr, key_documents_ptr = rules
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    keys = start + gl.arange(0, 64, gl.SliceLayout(0, layout))
    is_query = queries < q_len
    is_key = keys < k_len
    # Two comparisons per pair: a row beyond the end has an empty range.
    first = gl.where(is_query, queries + lower, k_len)
    last = gl.minimum(queries + upper, k_len - 1)
    visible = (keys[None, :] >= first[:, None]) & (keys[None, :] <= last[:, None])
    if padding_ptr is not None:
        flags = gl.load(padding_ptr + batch.to(gl.int64) * k_len + keys, mask=is_key, other=0)
        visible = visible & (flags != 0)[None, :]
    if key_documents_ptr is not None:
        query_base = query_documents_ptr + batch.to(gl.int64) * q_len
        key_base = key_documents_ptr + batch.to(gl.int64) * k_len
        query_documents = gl.load(query_base + queries, mask=is_query, other=0)
        key_documents = gl.load(key_base + keys, mask=is_key, other=0)
        visible = visible & (query_documents[:, None] == key_documents[None, :])
    return visible


@gluon.jit
def value_words(value_smem, index):
    """View a value tile as 32-bit words, two numbers each: ``Int32[64 dim/2]``."""
    tile = flat(value_smem.index(index))
    columns: gl.constexpr = tile.shape[1] // 2
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 32, rank=2)
    if REINTERPRET_IS_PRIVATE:
        return tile._reinterpret(gl.int32, [64, columns], layout)
    else:  # noqa: RET505  (a jitted function sees both branches unless they are these)
        return tile.reinterpret(gl.int32, [64, columns], layout)


@gluon.jit
def _overflow(words, IS_BFLOAT16: gl.constexpr):
    """Return words that are not 0 exactly where one of the two numbers is not finite.

    The exponent of what is not finite is all ones: adding one to it carries into the place of the
    sign, which was cleared, and no further.
    """
    least_exponent: gl.constexpr = 0x00800080 if IS_BFLOAT16 else 0x04000400
    # The signs are 0x80008000, which as a literal would be 64 bits wide.
    return ((words & 0x7FFF7FFF) + least_exponent) & -2147450880


@gluon.jit
def spoilt_words(words_smem, dtype: gl.constexpr):
    """Return ``Int32[64 32]``: not 0 where a row holds anything not finite.

    32 columns are read at a time, four per thread, and added to one another: a whole row would
    not fit the registers beside the accumulator.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    is_bfloat16: gl.constexpr = dtype == gl.bfloat16
    found = _overflow(words_smem.slice(0, 32, dim=1).load(layout), is_bfloat16)
    columns: gl.constexpr = words_smem.shape[1]
    for start in gl.static_range(32, columns, 32):
        words = words_smem.slice(start, 32, dim=1).load(layout)
        found = found | _overflow(words, is_bfloat16)
    return found


@gluon.jit
def clear_rows(words_smem, is_cleared):
    """Write zeros to the rows that are marked."""
    layout: gl.constexpr = is_cleared.type.layout.parent
    columns: gl.constexpr = words_smem.shape[1]
    for start in gl.static_range(0, columns, 32):
        part_smem = words_smem.slice(start, 32, dim=1)
        part_smem.store(gl.where(is_cleared[:, None], 0, part_smem.load(layout)))
