"""Calls of ``F.scaled_dot_product_attention`` in every combination of its arguments.

``ARGUMENTS`` are the axes that decide whether a call may be rewritten; their product is taken
whole. ``OPERANDS`` are the axes of what the tensors are (dtype, strides, rank, broadcasting); each
combination of arguments meets some of them, drawn with a seed.

Every scale is positive: with ``is_causal``, PyTorch's own CPU kernel answers NaN to others.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seer_compile.types import SkipCode
from support.graphs import causal, repeat_kv

BATCH, HEADS, KV_HEADS, HEAD_DIM = 2, 4, 2, 16
LENGTHS = {"square": (40, 40), "cached": (24, 40), "long_queries": (40, 24), "decode": (1, 40)}
OTHER_LENGTHS = {
    "square": (57, 57),
    "cached": (33, 57),
    "long_queries": (57, 33),
    "decode": (1, 57),
}
"""What a graph of symbolic lengths is run at too; sizes that were equal stay so."""
NEG = float("-inf")


@dataclass(frozen=True)
class Combination:
    """One call. The fields are the axes; their values are the keys of the tables here."""

    mask: str
    is_causal: bool
    scale: float | None
    heads: str
    dropout: float
    lengths: str
    dtype: str
    layout: str
    rank: int
    broadcast: str
    value_dim: int

    @property
    def name(self) -> str:
        return "-".join(str(getattr(self, axis)) for axis in (*ARGUMENTS, *OPERANDS))


@dataclass(frozen=True)
class Mask:
    """How a mask is made, from the query, the key and an input of its own."""

    build: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    needs: Callable[[int, int], Tensor] | None = None
    """Draws the input, given the lengths."""
    reason: SkipCode | None = None
    """Why a call with this mask stays dense; None where it is proved."""
    is_finite: bool = False
    """Whether a query that may read no key averages all of them in plain PyTorch."""


def _flags(*shape: int) -> Tensor:
    flags = torch.rand(shape, generator=torch.Generator().manual_seed(5)) > 0.4
    flags[..., 0] = True
    return flags


def _padding(q: int, k: int) -> Tensor:
    return _flags(BATCH, k)


def _padding_with_an_empty_item(q: int, k: int) -> Tensor:
    flags = _flags(BATCH, k)
    flags[0] = False
    return flags


def _documents(q: int, k: int) -> Tensor:
    return (torch.arange(max(q, k)) // 7).expand(BATCH, -1).contiguous()


def _same_document(q: Tensor, k: Tensor, x: Any) -> Tensor:
    return x[:, None, : q.shape[-2], None] == x[:, None, None, : k.shape[-2]]


def _as_bias(visible: Tensor, like: Tensor, hidden: float = NEG) -> Tensor:
    return torch.zeros(visible.shape, dtype=like.dtype).masked_fill(~visible, hidden)


def _window(q: Tensor, k: Tensor) -> Tensor:
    distance = torch.arange(k.shape[-2]) - torch.arange(q.shape[-2])[:, None]
    return (distance <= 3) & (distance > -9)


OPAQUE, BIAS = SkipCode.OPAQUE_MASK, SkipCode.FLOAT_BIAS
MASKS: dict[str, Mask | None] = {
    "none": None,
    "bool_causal": Mask(lambda q, k, x: causal(q, k)),
    "bool_window": Mask(lambda q, k, x: _window(q, k)),
    "bool_padding": Mask(lambda q, k, x: x[:, None, None], _padding),
    "bool_padding_empty": Mask(lambda q, k, x: x[:, None, None], _padding_with_an_empty_item),
    "bool_documents": Mask(_same_document, _documents),
    "bool_single": Mask(lambda q, k, x: torch.ones(1, 1, dtype=torch.bool)),
    "bool_arbitrary": Mask(lambda q, k, x: x, _flags, OPAQUE),
    "bool_per_head": Mask(lambda q, k, x: x, lambda q, k: _flags(HEADS, 1, k), OPAQUE),
    "bool_per_query": Mask(lambda q, k, x: x, lambda q, k: _flags(1, q).mT, OPAQUE),
    "float_causal": Mask(lambda q, k, x: _as_bias(causal(q, k), q)),
    "float_wide": Mask(lambda q, k, x: _as_bias(causal(q, k), torch.empty(0))),
    "float_lowest": Mask(
        lambda q, k, x: _as_bias(x[:, None, None], q, torch.finfo(q.dtype).min),
        _padding_with_an_empty_item,
        is_finite=True,
    ),
    "float_bias": Mask(
        lambda q, k, x: x.to(q.dtype), lambda q, k: torch.linspace(-1, 1, q * k).view(q, k), BIAS
    ),
    "float_per_head": Mask(
        lambda q, k, x: x.to(q.dtype)[:, None, None], lambda q, k: torch.arange(4.0), BIAS
    ),
    "int": Mask(lambda q, k, x: causal(q, k).long()),
    "one_axis": Mask(lambda q, k, x: x, lambda q, k: _flags(k)),
    "does_not_fit": Mask(lambda q, k, x: torch.ones(1, 3, dtype=torch.bool)),
}
"""Shapes of masks are those of four dimensions; with other ranks PyTorch decides what they mean."""

ARGUMENTS = {
    "mask": tuple(MASKS),
    "is_causal": (False, True),
    "scale": (None, 0.3, 1.7),
    "heads": ("equal", "grouped", "grouped_equal", "repeated", "ungrouped"),
    "dropout": (0.0, 0.25),
    "lengths": tuple(LENGTHS),
}
OPERANDS = {
    "dtype": (*["float32"] * 4, "bfloat16", "float16", "float64"),
    "layout": ("contiguous", "tokens_first", "packed", "transposed_dim"),
    "rank": (4, 4, 4, 3, 5),
    "broadcast": (*["none"] * 4, "key_batch", "key_heads", "value_batch", "query_batch"),
    "value_dim": (HEAD_DIM, HEAD_DIM, 12),
}


def combinations() -> list[Combination]:
    """Every combination of the arguments, each with distinct operands."""
    draw = random.Random(0)
    found: list[Combination] = []
    for arguments in itertools.product(*ARGUMENTS.values()):
        drawn: dict[Combination, None] = {}
        while len(drawn) < _draws(*arguments):
            operands = (draw.choice(values) for values in OPERANDS.values())
            drawn[Combination(*arguments, *operands)] = None
        found += drawn
    return found


def _draws(
    mask: str, is_causal: bool, scale: float | None, heads: str, dropout: float, lengths: str
) -> int:
    """How many operands a combination of arguments meets: most where it may be replaced."""
    made = MASKS[mask]
    if is_causal and made is not None:
        return 1
    is_left = dropout > 0 or lengths == "decode" or (made is not None and made.reason is not None)
    return 1 if is_left or heads == "ungrouped" else 6


def sample(count: int, seed: int = 0) -> list[Combination]:
    """A seeded choice with every value of every axis in it."""
    everything = combinations()
    random.Random(seed).shuffle(everything)
    chosen = dict.fromkeys(everything[:count])
    for axis, values in (ARGUMENTS | OPERANDS).items():
        for value in values:
            chosen[next(one for one in everything if getattr(one, axis) == value)] = None
    return list(chosen)


def _laid_out(tensor: Tensor, layout: str) -> Tensor:
    if layout == "tokens_first":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "packed":
        b, h, t, d = tensor.shape
        storage = tensor.new_full((b, t, 3, h, d), 999.0)
        return storage[:, :, 1].transpose(1, 2).copy_(tensor)
    return tensor.mT.contiguous().mT if layout == "transposed_dim" else tensor


def tensors_of(one: Combination, lengths: tuple[int, int] | None = None) -> list[Tensor]:
    """Query, key, value and, where the mask needs one, its input; batch x heads x tokens x dim."""
    q_len, k_len = lengths or LENGTHS[one.lengths]
    dtype = getattr(torch, one.dtype)
    kv_heads = HEADS if one.heads in ("equal", "grouped_equal") else KV_HEADS
    shapes = [
        [BATCH, HEADS, q_len, HEAD_DIM],
        [BATCH, kv_heads, k_len, HEAD_DIM],
        [BATCH, kv_heads, k_len, one.value_dim],
    ]
    if one.broadcast == "key_batch":
        shapes[1][0] = shapes[2][0] = 1
    elif one.broadcast == "key_heads":
        shapes[1][1] = shapes[2][1] = 1
    elif one.broadcast == "value_batch":
        shapes[2][0] = 1
    elif one.broadcast == "query_batch":
        shapes[0][0] = 1
    tensors = [
        _laid_out(
            torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype), one.layout
        )
        for seed, shape in enumerate(shapes)
    ]
    mask = MASKS[one.mask]
    return [*tensors, mask.needs(q_len, k_len)] if mask and mask.needs else tensors


def call(one: Combination, *tensors: Tensor) -> Tensor:
    """Make the call."""
    query, key, value, mask = _arguments(one, tensors)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=one.dropout,
        is_causal=one.is_causal,
        scale=one.scale,
        enable_gqa=one.heads.startswith("grouped"),
    )


def exact(one: Combination, *tensors: Tensor) -> Tensor:
    """What the call means, without dropout, written out in float64; no key to read gives 0."""
    query, key, value, mask = _arguments(one, tensors)
    query, key, value = (x.double() for x in (query, key, value))
    if one.heads.startswith("grouped"):
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    scale = HEAD_DIM**-0.5 if one.scale is None else one.scale
    logits = query @ key.mT * scale
    if one.is_causal:
        logits = logits.masked_fill(~causal(query, key), NEG)
    if mask is not None:
        logits = logits.masked_fill(~mask, NEG) if mask.dtype is torch.bool else logits + mask
    return logits.softmax(-1).nan_to_num() @ value


def _arguments(one: Combination, tensors: tuple[Tensor, ...]) -> list[Any]:
    query, key, value = tensors[:3]
    if one.heads == "repeated" and one.broadcast != "key_heads":
        key, value = (repeat_kv(x, HEADS // KV_HEADS) for x in (key, value))
    query, key, value = (_ranked(x, one.rank) for x in (query, key, value))
    mask = MASKS[one.mask]
    own = tensors[3] if mask is not None and mask.needs else None
    return [query, key, value, None if mask is None else mask.build(query, key, own)]


def _ranked(tensor: Tensor, rank: int) -> Tensor:
    """Batch and heads in one dimension, in two, or the batch in two."""
    if rank == 3:
        return tensor.flatten(0, 1)
    return tensor.unsqueeze(0) if rank == 5 else tensor
