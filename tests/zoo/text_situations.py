"""How models of text are called: plain, padded, packed, and going on from a cache."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from zoo.architecture import Batch, Door, Situation
from zoo.caches import decoder_cache, fill
from zoo.wrappers import Continue, Forward, WithCache

Side = Literal["left", "right"]
SIDES: tuple[Side, ...] = ("left", "right")
VOCABULARY = 96
CAPACITY = 200
"""Tokens that a StaticCache holds."""
PREFIX = 60
"""Tokens in the cache when a call goes on."""
SHARES = (0.0, 0.4, 0.15)
"""Share of the tokens that is padding, per batch item."""
ITEMS = len(SHARES)


def token_ids(length: int, batch: int = 1, seed: int = 0) -> Tensor:
    """Return ``Int64[batch length]`` without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCABULARY, (batch, length), generator=generator)


def padding(length: int, side: Side) -> Tensor:
    """Return ``Int64[b length]``: 1 on tokens, 0 on padding, which is on one side."""
    shares = torch.tensor(SHARES)[:, None]
    mask = (torch.arange(length)[None] >= shares * length).long()
    return mask if side == "left" else mask.flip(1)


def _plain(model: nn.Module, size: int) -> Batch:
    del model
    return Batch(inputs={"input_ids": token_ids(size, 2)})


def _padded(model: nn.Module, size: int, side: Side) -> Batch:
    del model
    mask = padding(size, side)
    inputs = {"input_ids": token_ids(size, ITEMS), "attention_mask": mask}
    return Batch(inputs=inputs, rows=mask.bool())


def _packed(model: nn.Module, size: int) -> Batch:
    del model
    first = size // 3
    positions = torch.cat([torch.arange(first), torch.arange(size - first)])[None]
    return Batch(inputs={"input_ids": token_ids(size), "position_ids": positions})


def _chunk(model: nn.Module, size: int) -> Batch:
    with torch.no_grad():
        past = model(input_ids=token_ids(PREFIX, 2, seed=1), use_cache=True).past_key_values
    return Batch(
        inputs={
            "input_ids": token_ids(size, 2, seed=2),
            "keys": [layer.keys for layer in past.layers],
            "values": [layer.values for layer in past.layers],
        }
    )


def _single(model: nn.Module, size: int) -> Batch:
    del model
    return Batch(inputs={"input_ids": token_ids(size)})


def without_cache(model: nn.Module, door: Door) -> nn.Module:
    """Wrap as users call it; an exported program returns tensors, so there without a cache."""
    return Forward(model, **({"use_cache": False} if door == "export" else {}))


def never_cached(model: nn.Module, door: Door) -> nn.Module:
    """Wrap without a cache: Hugging Face finds packed documents only then."""
    del door
    return Forward(model, use_cache=False)


def _bare(model: nn.Module, door: Door) -> nn.Module:
    del door
    return Forward(model)


def _continued(model: nn.Module, door: Door) -> nn.Module:
    del door
    return Continue(model)


def _cached(
    model: nn.Module, door: Door, *, capacity: int | None = CAPACITY, prefix: int = PREFIX
) -> nn.Module:
    cache = decoder_cache(model, capacity)
    if prefix:
        fill(model, cache, {"input_ids": token_ids(prefix, seed=1)})
    return WithCache(model, cache, exported=door == "export")


_TOKENS = {"input_ids": (1,)}
_MASKED = _TOKENS | {"attention_mask": (1,)}

PLAIN = Situation(name="no mask", wrap=without_cache, make=_plain, dynamic=_TOKENS)
PADDINGS = tuple(
    Situation(
        name=f"{side} padding",
        wrap=without_cache,
        make=partial(_padded, side=side),
        dynamic=_MASKED,
    )
    for side in SIDES
)
PACKED = Situation(
    name="packed", wrap=never_cached, make=_packed, dynamic=_TOKENS | {"position_ids": (1,)}
)
CHUNK = Situation(
    name="dynamic cache, chunk", wrap=_continued, make=_chunk, dynamic=_TOKENS, sizes=(75, 66)
)
RECURRENT_CHUNK = Situation(
    name="dynamic cache, chunk",
    wrap=partial(_cached, capacity=None),
    make=_single,
    dynamic=_TOKENS,
    sizes=(75, 66),
)
"""For layers with a running state, which is no list of keys."""
STATIC_PREFILL = Situation(
    name="static cache, prefill",
    wrap=partial(_cached, prefix=0),
    make=_single,
    dynamic=_TOKENS,
)
STATIC_CHUNK = Situation(
    name="static cache, chunk", wrap=_cached, make=_single, dynamic=_TOKENS, sizes=(75, 66)
)
STATIC_DECODE = Situation(
    name="static cache, decode", wrap=_cached, make=_single, sizes=(1, 1), decodes=True
)
ENCODER_PLAIN = Situation(name="no mask", wrap=_bare, make=_plain, dynamic=_TOKENS)
ENCODER_PADDINGS = tuple(dataclasses.replace(padded, wrap=_bare) for padded in PADDINGS)

STATIC = (STATIC_PREFILL, STATIC_CHUNK, STATIC_DECODE)
CAUSAL = (PLAIN, *PADDINGS, PACKED, CHUNK, *STATIC)
RECURRENT = (PLAIN, *PADDINGS, RECURRENT_CHUNK, *STATIC)
ENCODER = (ENCODER_PLAIN, *ENCODER_PADDINGS)
