"""Caches of Hugging Face models: growing or of fixed size, for one model or for two halves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def cache_parts(cache: Any) -> list[Any]:
    """Return the objects of a cache that hold state: its layers, and what ties two caches."""
    halves = [
        getattr(cache, name)
        for name in ("self_attention_cache", "cross_attention_cache")
        if hasattr(cache, name)
    ]
    if not halves:
        return list(cache.layers)
    return [*(layer for half in halves for layer in half.layers), _Ties(cache)]


class _Ties:
    """Which layers of an encoder-decoder cache know the encoder's keys, seen as an attribute."""

    def __init__(self, cache: Any) -> None:
        self.__dict__["is_updated"] = cache.is_updated
        self.__dict__["_cache"] = cache

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._cache, name, value)


def decoder_cache(model: nn.Module, capacity: int | None) -> Any:
    """Return an empty cache: one of fixed size, allocated, or one that grows."""
    from transformers import DynamicCache, StaticCache

    config = model.config.get_text_config(decoder=True)
    if capacity is None:
        return DynamicCache(config=config)
    cache, sample = StaticCache(config=config, max_cache_len=capacity), DynamicCache(config=config)
    fill(model, sample, {"input_ids": torch.ones(1, 2, dtype=torch.long)})
    allocate(cache, sample)
    return cache


def encoder_decoder_cache(model: nn.Module, capacity: int | None, encoded: Tensor) -> Any:
    """Return an empty cache for a decoder that also reads an encoder's output."""
    from transformers import DynamicCache, EncoderDecoderCache, StaticCache

    config = model.config.get_text_config(decoder=True)

    def growing() -> Any:
        return EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))

    if capacity is None:
        return growing()
    cache = EncoderDecoderCache(
        StaticCache(config=config, max_cache_len=capacity),
        StaticCache(config=config, max_cache_len=encoded.shape[1]),
    )
    sample = growing()
    prefix = torch.ones(1, 2, dtype=torch.long)
    fill(model, sample, {"decoder_input_ids": prefix, "encoder_outputs": (encoded,)})
    allocate(cache.self_attention_cache, sample.self_attention_cache)
    allocate(cache.cross_attention_cache, sample.cross_attention_cache)
    return cache


def allocate(cache: Any, sample: Any) -> None:
    """Allocate the layers of a cache that hold keys, for keys like those of a filled one."""
    for layer, filled in zip(cache.layers, sample.layers, strict=True):
        if getattr(filled, "keys", None) is not None:
            layer.lazy_initialization(filled.keys, filled.values)


def fill(model: nn.Module, cache: Any, inputs: Mapping[str, Any]) -> None:
    """Run the inputs of a prefix, so that the cache holds it."""
    with torch.no_grad():
        model(**inputs, past_key_values=cache, use_cache=True)
