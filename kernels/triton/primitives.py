"""What the kernels share: jitted helpers for tiles and bands, and the host side of a launch.

Visibility inside a kernel is always a band of two int32 bounds (an absent bound lies beyond every
position), to which ``offset_ptr`` adds a number held on the device. Key padding and documents are
pointers, or None, which Triton compiles away.

Names: ``x_ptr`` pointers, ``x_strides`` one tuple per tensor, upper-case compile-time constants,
``rows``/``columns`` positions of a tile. Every product with a stride is taken in int64.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

from seer_compile.errors import (
    DtypeError,
    FeatureUnsupportedError,
    HardwareUnsupportedError,
    InterpreterUnsupportedError,
)

UNBOUNDED = 1 << 29
"""Further than any two positions can lie apart, and safe to add twice in int32."""

LOG2_E = 1.4426950408889634

_NEAR = tl.constexpr(0.625)
"""Up to here tanh is a series: beyond, 1 less an exponential no longer cancels."""

_ABSENT_MULTIPROCESSORS = 132
"""Assumed where a launch is only compiled."""

_INTERPRETER_LOCK = threading.Lock()


class Band(NamedTuple):
    """The band as kernels take it: two bounds, and a pointer to a number added to both."""

    upper: int
    lower: int
    offset: Tensor | None


def make_band(upper: int | None, lower: int | None, offset: Tensor | None) -> Band:
    """Return the band of a visibility; an offset that lives on the CPU is folded in."""
    shift = 0
    if offset is not None and offset.device.type == "cpu" and not is_interpreted():
        shift, offset = int(offset), None
    high = UNBOUNDED if upper is None else _clamp(upper + shift)
    low = -UNBOUNDED if lower is None else _clamp(lower + shift)
    if low > high:
        # No pair is visible; two crossed bounds would look open to a test of block corners.
        high, low, offset = -UNBOUNDED, -UNBOUNDED, None
    return Band(high, low, offset)


def _clamp(bound: int) -> int:
    return max(-UNBOUNDED, min(UNBOUNDED, bound))


class FineRules(NamedTuple):
    """What decides, besides the band, which keys a query may read; contiguous, or None."""

    padding: Tensor | None
    """``UInt8[b k]``."""
    query_documents: Tensor | None
    key_documents: Tensor | None


def as_bytes(padding: Tensor | None) -> Tensor | None:
    """Return a ``Bool`` tensor as the contiguous bytes that a kernel reads."""
    return None if padding is None else padding.contiguous().view(torch.uint8)


def fine_rules(
    key_padding: Tensor | None, query_documents: Tensor | None, key_documents: Tensor | None
) -> FineRules:
    """Return padding and documents as kernels take them.

    They are made contiguous rather than passed with strides: Triton compiles a variant for each
    divisibility of each stride, and theirs change with every length.
    """
    if query_documents is None or key_documents is None:
        return FineRules(as_bytes(key_padding), None, None)
    return FineRules(
        as_bytes(key_padding), query_documents.contiguous(), key_documents.contiguous()
    )


_ROOM = 32
"""Sub-blocks of a key block, at most, that a kernel copies at once."""


def empty_features(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return an empty tensor of features, contiguous, whose memory goes on for a few sub-blocks.

    A kernel that copies whole key blocks reads past the last sub-block where a block lacks some.
    """
    number = math.prod(shape)
    flat = like.new_empty(number + _ROOM * shape[-1])
    return flat[:number].view(shape)


def with_room(features: Tensor) -> Tensor:
    """Return equal features in the memory of :func:`empty_features`, where that is needed."""
    if features.shape[2] % _ROOM == 0:
        return features
    return empty_features(tuple(features.shape), features).copy_(features)


def ceil_div(number: int, divisor: int) -> int:
    """Return ``number / divisor`` rounded up."""
    return -(-number // divisor)


def padded_dim(dim: int) -> int:
    """Return the power of two, at least 16, that a tile of ``dim`` columns occupies."""
    if not 1 <= dim <= 256:
        raise FeatureUnsupportedError(
            argument="head_dim",
            got=dim,
            expected="1 to 256",
            hint="Run this site dense: kernels hold one row of a head in registers.",
        )
    # Triton's own next_power_of_2 takes microseconds on the host.
    return max(16, 1 << (dim - 1).bit_length())


def dot_precision(dtype: torch.dtype) -> str:
    """Return the input precision of matrix products: exact for float32.

    TF32 keeps 11 bits and splitting it into three products still exceeds float32's own rounding.
    """
    return "ieee" if dtype is torch.float32 else "tf32"


def positive_scale(scale: float) -> float:
    """Return the factor for powers of 2; kernels take maxima before scaling: it is positive."""
    return max(abs(scale) * LOG2_E, 1e-30)


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Whether a GPU is one of Hopper's; PyTorch takes microseconds to say."""
    return torch.cuda.get_device_capability(device)[0] == 9


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return how many programs a device runs side by side, one per multiprocessor."""
    if device.type != "cuda":
        return _ABSENT_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def is_interpreted() -> bool:
    """Whether the kernels of this process run under Triton's CPU interpreter."""
    return not isinstance(finite_or_zero, triton.runtime.jit.JITFunction)


@contextlib.contextmanager
def launching_on(tensor: Tensor, name: str) -> Iterator[None]:
    """Enter the device of ``tensor``; on the CPU, hold the interpreter's lock.

    The interpreter patches Triton's language while it runs, so two threads disturb each other. It
    also multiplies the bit patterns of bfloat16 numbers, so that dtype is refused there.

    Raises:
        DtypeError: The dtype is none of float16, bfloat16, float32.
        HardwareUnsupportedError: A tile does not fit the device.
        InterpreterUnsupportedError: bfloat16 under the interpreter.
    """
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise DtypeError(argument=name, got=tensor.dtype, expected="float16, bfloat16 or float32")
    if tensor.device.type == "cuda":
        try:
            # Asking which device is current costs less than entering the one that is.
            is_current = torch.cuda.current_device() == tensor.get_device()
            with contextlib.nullcontext() if is_current else torch.cuda.device(tensor.device):
                yield
        except OutOfResources as error:
            raise HardwareUnsupportedError(
                str(error),
                hint="Use smaller blocks, or run this site dense.",
                context={"device": torch.cuda.get_device_name(tensor.device)},
            ) from error
        return
    if tensor.dtype is torch.bfloat16 and is_interpreted():
        raise InterpreterUnsupportedError(
            argument=name, got=tensor.dtype, expected="float16 or float32 on the CPU"
        )
    with _INTERPRETER_LOCK:
        yield


@triton.jit
def tanh(x):
    """Return the hyperbolic tangent to the precision of float32.

    Not libdevice's, which the interpreter does not have, nor the GPU's approximation, whose error
    of 5e-4 a softcap would multiply. Source: Moshier, Cephes, ``tanhf.c``.
    """
    square = x * x
    series = -5.70498872745e-3 * square + 2.06390887954e-2
    series = series * square - 5.37397155531e-2
    series = series * square + 1.33314422036e-1
    series = series * square - 3.33332819422e-1
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < _NEAR, x + x * square * series, tl.where(x < 0.0, -far, far))


@triton.jit
def tile_pointers(base_ptr, rows, row_stride, columns, column_stride):
    """Return the ``[rows, columns]`` pointers of a tile."""
    return base_ptr + rows[:, None].to(tl.int64) * row_stride + columns[None, :] * column_stride


@triton.jit
def load_tile(pointers, row_mask, columns, DIM: tl.constexpr, PADDED_DIM: tl.constexpr):
    """Load the rows whose mask is set; other rows and padding columns are 0."""
    if DIM == PADDED_DIM:
        return tl.load(pointers, mask=row_mask[:, None], other=0.0)
    return tl.load(pointers, mask=row_mask[:, None] & (columns < DIM)[None, :], other=0.0)


@triton.jit
def load_whole_tile(pointers, columns, DIM: tl.constexpr, PADDED_DIM: tl.constexpr):
    """Load a tile of which every row exists."""
    if DIM == PADDED_DIM:
        return tl.load(pointers)
    return tl.load(pointers, mask=(columns < DIM)[None, :], other=0.0)


@triton.jit
def store_tile(pointers, values, row_mask, columns, DIM: tl.constexpr, PADDED_DIM: tl.constexpr):
    """Store the rows whose mask is set, without the padding columns."""
    values = values.to(pointers.dtype.element_ty)
    if DIM == PADDED_DIM:
        tl.store(pointers, values, mask=row_mask[:, None])
    else:
        tl.store(pointers, values, mask=row_mask[:, None] & (columns < DIM)[None, :])


@triton.jit
def finite_or_zero(tile):
    """Return the tile without the rows that hold anything not finite, and which these are.

    A masked probability of 0 times NaN is NaN: a row that only some of the other side may read
    must be 0 in the product, and must spoil those who do read it after. The exponent is all ones
    exactly in what is not finite.
    """
    if tile.dtype == tl.float32:
        largest = tl.max(tile.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
        is_spoilt = largest >= 0x7F800000
    elif tile.dtype == tl.bfloat16:
        largest = tl.max(tile.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF, 1)
        is_spoilt = largest >= 0x7F80
    else:
        largest = tl.max(tile.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF, 1)
        is_spoilt = largest >= 0x7C00
    # A typed zero: a plain 0.0 would widen 16-bit tiles.
    return tl.where(is_spoilt[:, None], tl.zeros_like(tile), tile), is_spoilt


@triton.jit
def shifted_band(upper, lower, offset_ptr):
    """Return the bounds with the number on the device added."""
    if offset_ptr is not None:
        shift = tl.load(offset_ptr).to(tl.int32)
        upper += shift
        lower += shift
    return upper, lower


@triton.jit
def interior_key_range(first_query, last_query, upper, lower, k_len, TILE: tl.constexpr):
    """Return the range of key tiles that are whole and wholly inside the band of all queries."""
    end = tl.maximum(tl.minimum(k_len, first_query + upper + 1), 0) // TILE
    begin = (tl.maximum(last_query + lower, 0) + TILE - 1) // TILE
    return begin, end


@triton.jit
def visible_key_range(first_query, last_query, upper, lower, k_len, TILE: tl.constexpr):
    """Return the range of key tiles that hold a key inside the band of any of the queries."""
    end = (tl.maximum(tl.minimum(k_len, last_query + upper + 1), 0) + TILE - 1) // TILE
    begin = tl.maximum(first_query + lower, 0) // TILE
    return tl.minimum(begin, end), end


@triton.jit
def count_outside(list_ptr, count, begin, end, CHUNK: tl.constexpr):
    """Return how many entries of an ascending list lie below ``begin``, and at or above ``end``."""
    below = 0
    above = 0
    for start in range(0, count, CHUNK):
        positions = start + tl.arange(0, CHUNK)
        entries = tl.load(list_ptr + positions, mask=positions < count, other=-1)
        is_entry = positions < count
        is_above = is_entry & (entries >= end)
        below += tl.sum(tl.where(is_entry & (entries < begin) & (entries < end), 1, 0), 0)
        above += tl.sum(tl.where(is_above, 1, 0), 0)
    return below, above


@triton.jit
def token_visibility(
    queries,
    keys,
    batch,
    q_len,
    k_len,
    upper,
    lower,
    padding_ptr,
    query_documents_ptr,
    key_documents_ptr,
):
    """Return ``[queries, keys]``: which key each query may read; and which keys exist to be read.

    The second result drops padding and positions beyond the end, and is what loads are masked by.
    """
    is_key = keys < k_len
    is_query = queries < q_len
    # Two comparisons per pair: a row beyond the end has an empty range.
    first = tl.where(is_query, queries + lower, k_len)
    last = tl.minimum(queries + upper, k_len - 1)
    visible = (keys[None, :] >= first[:, None]) & (keys[None, :] <= last[:, None])
    if padding_ptr is not None:
        flags = tl.load(padding_ptr + batch * k_len + keys, mask=is_key, other=0)
        is_key = is_key & (flags != 0)
        visible = visible & is_key[None, :]
    if key_documents_ptr is not None:
        query_documents = tl.load(
            query_documents_ptr + batch * q_len + queries, mask=is_query, other=0
        )
        key_documents = tl.load(key_documents_ptr + batch * k_len + keys, mask=is_key, other=0)
        visible = visible & (query_documents[:, None] == key_documents[None, :])
    return visible, is_key
