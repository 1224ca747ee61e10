"""What the launches of Hopper kernels share: descriptors, barriers, and what cannot be copied."""

from __future__ import annotations

import functools

import torch
import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

TILE_ROWS = 64
"""Query rows of one group of four warps: what one matrix instruction takes."""


@gluon.jit
def make_barriers(count: gl.constexpr, arrivals: gl.constexpr):
    """Return barriers in shared memory, each of so many arrivals a phase."""
    barriers = gl.allocate_shared_memory(gl.int64, [count, 1], mbarrier.MBarrierLayout())
    for index in gl.static_range(count):
        mbarrier.init(barriers.index(index), count=arrivals)
    return barriers


@gluon.jit
def make_ring(descriptor, slots: gl.constexpr, tiles: gl.constexpr, readers: gl.constexpr):
    """Return the tiles of a ring, and its barriers: slots filled, slots emptied."""
    tile: gl.constexpr = descriptor.block_type.shape
    shape: gl.constexpr = [slots * tiles, tile[0], tile[1], tile[2], tile[3]]
    smem = gl.allocate_shared_memory(descriptor.dtype, shape, descriptor.layout)
    return smem, make_barriers(slots, 1), make_barriers(slots, readers)


def memory_obstacle(tensor: Tensor) -> str | None:
    """Return why the copy engine cannot read a tensor, or None."""
    if tensor.stride(3) != 1:
        return "has no contiguous last axis"
    if tensor.data_ptr() % 16:
        return "does not begin at a multiple of 16 bytes"
    for size, stride in zip(tensor.shape[:3], tensor.stride()[:3], strict=True):
        if size > 1 and (stride == 0 or stride * tensor.element_size() % 16):
            return f"has a stride of {stride} elements"
    return None


def describe(tensor: Tensor) -> TensorDescriptor:
    """Describe ``[b x t d]`` for copies of 64 tokens of one head; tokens past the end read as 0."""
    dim = tensor.shape[3]
    # The stride of an axis of one entry means nothing and may be anything.
    strides = [
        stride if size > 1 else dim
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    ]
    block = [1, 1, TILE_ROWS, dim]
    return TensorDescriptor(tensor, list(tensor.shape), strides, block, _layout(dim, tensor.dtype))


@functools.cache
def _layout(dim: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    element = gl.bfloat16 if dtype is torch.bfloat16 else gl.float16
    return gl.NVMMASharedLayout.get_default_for([1, 1, TILE_ROWS, dim], element)
