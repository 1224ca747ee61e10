"""Input factories. Every random number comes from a generator local to the call."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from seer_compile.types import BlockSelection

Layout = Literal["contiguous", "tokens_first", "sliced", "expanded_batch"]


def generator(seed: int = 0) -> torch.Generator:
    """Return a CPU generator; values are drawn on the CPU so that every device sees the same."""
    return torch.Generator().manual_seed(seed)


def normal(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
    scale: float = 1.0,
) -> Tensor:
    """Return normally distributed values, rounded to ``dtype``."""
    values = torch.randn(shape, generator=generator(seed), dtype=torch.float64) * scale
    return values.to(dtype).to(device)


def with_layout(tensor: Tensor, layout: Layout) -> Tensor:
    """Return equal values of ``b h t d`` in other strides.

    ``tokens_first`` is what a projection followed by ``transpose(1, 2)`` gives, ``sliced`` a view
    into a fused projection with padding around it, ``expanded_batch`` stride 0 on the batch.
    """
    if layout == "contiguous":
        return tensor.contiguous()
    if layout == "tokens_first":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "sliced":
        batch, heads, tokens, dim = tensor.shape
        storage = tensor.new_full((batch, tokens, heads + 2, dim + 3), 65504.0)
        view = storage[:, :, 1 : heads + 1, 2 : dim + 2].transpose(1, 2)
        return view.copy_(tensor)
    if layout == "expanded_batch":
        return tensor[:1].expand_as(tensor)
    raise ValueError(layout)


class AttentionInputs(NamedTuple):
    """``Float[b h q d]``, ``Float[b g k d]``, ``Float[b g k v]`` and their scale."""

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float

    def to(self, dtype: torch.dtype) -> AttentionInputs:
        """Return the same values in another dtype."""
        tensors = (self.query.to(dtype), self.key.to(dtype), self.value.to(dtype))
        return AttentionInputs(*tensors, self.scale)


def attention_inputs(
    *,
    batch: int = 1,
    heads: int = 2,
    kv_heads: int | None = None,
    q_len: int = 128,
    k_len: int | None = None,
    head_dim: int = 32,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    layout: Layout = "contiguous",
    seed: int = 0,
    sharpness: float = 1.0,
) -> AttentionInputs:
    """Return query, key and value of one site; ``sharpness`` above 1 concentrates attention."""
    kv_heads = kv_heads or heads
    k_len = q_len if k_len is None else k_len
    value_dim = value_dim or head_dim
    shapes = (
        (batch, heads, q_len, head_dim),
        (batch, kv_heads, k_len, head_dim),
        (batch, kv_heads, k_len, value_dim),
    )
    tensors = [
        with_layout(
            normal(*shape, dtype=dtype, seed=3 * seed + part, scale=sharpness if part == 0 else 1),
            layout,
        )
        for part, shape in enumerate(shapes)
    ]
    query, key, value = (_to_device(tensor, device) for tensor in tensors)
    return AttentionInputs(query, key, value, head_dim**-0.5)


def _to_device(tensor: Tensor, device: str | torch.device) -> Tensor:
    """Move a tensor and keep its strides, which ``Tensor.to`` does not for sliced storage."""
    if torch.device(device) == tensor.device:
        return tensor
    storage = tensor.untyped_storage()
    whole = torch.empty(0, dtype=tensor.dtype).set_(storage).to(device)
    return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def key_padding(lengths: list[int], k_len: int, *, side: Literal["left", "right"] = "left"):
    """Return ``Bool[b k]``, True on ``lengths[b]`` keys; ``side`` is where the padding lies."""
    positions = torch.arange(k_len)[None]
    counts = torch.tensor(lengths)[:, None]
    return positions >= k_len - counts if side == "left" else positions < counts


def documents(boundaries: list[int], length: int) -> Tensor:
    """Return ``Int64[length]``: the document of each token, new ones starting at ``boundaries``."""
    starts = torch.zeros(length, dtype=torch.int64)
    starts[torch.tensor(boundaries, dtype=torch.int64)] = 1
    return starts.cumsum(0)


def selection_from_map(keep: Tensor, *, capacity: int | None = None) -> BlockSelection:
    """Return the selection of ``Bool[b s m n]``; entries past the count are an invalid index."""
    counts = keep.sum(-1, dtype=torch.int32)
    capacity = keep.shape[-1] if capacity is None else capacity
    order = torch.argsort(~keep, dim=-1, stable=True)[..., :capacity].to(torch.int32)
    is_kept = torch.arange(capacity) < counts[..., None]
    return BlockSelection(order.masked_fill(~is_kept, torch.iinfo(torch.int32).max), counts)


def random_selection(
    batch: int,
    heads: int,
    query_blocks: int,
    key_blocks: int,
    *,
    density: float = 0.5,
    visible: Tensor | None = None,
    min_per_row: int = 0,
    seed: int = 0,
) -> BlockSelection:
    """Return a selection of about ``density`` of the visible blocks.

    Args:
        batch: Batch size.
        heads: Selection heads.
        query_blocks: Rows.
        key_blocks: Columns.
        density: Chance of each visible block.
        visible: ``Bool[m n]``; None for all.
        min_per_row: Visible blocks kept at least in every row that has as many.
        seed: Of the local generator.
    """
    shape = (batch, heads, query_blocks, key_blocks)
    draws = torch.rand(shape, generator=generator(seed))
    if visible is None:
        visible = torch.ones(query_blocks, key_blocks, dtype=torch.bool)
    draws = draws.masked_fill(~visible, 2.0)
    keep = draws < density
    if min_per_row:
        best = draws.argsort(-1)[..., :min_per_row]
        keep = keep.scatter(-1, best, True)
    return selection_from_map(keep & visible)
