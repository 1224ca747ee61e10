"""Modules around a model that take one dictionary of tensors and return one tensor.

Both ways into the compiler then see the same thing, and ``torch.export`` sees tensors only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def main_output(output: Any) -> Tensor:
    """Return the tensor that a forward is about."""
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "last_hidden_state", "sample", "logits_per_text"):
        value = output.get(name) if hasattr(output, "get") else getattr(output, name, None)
        if isinstance(value, Tensor):
            return value
    return output[0]


class Forward(nn.Module):
    """The model itself, with some arguments fixed."""

    def __init__(self, model: nn.Module, **fixed: Any) -> None:
        super().__init__()
        self.model, self.fixed = model, fixed

    def forward(self, inputs: Mapping[str, Any]) -> Tensor:
        return main_output(self.model(**inputs, **self.fixed))


class Continue(nn.Module):
    """A model that goes on from past keys and values: a chunk of a prefill in a DynamicCache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Mapping[str, Any]) -> Tensor:
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        for layer, (key, value) in enumerate(zip(inputs["keys"], inputs["values"], strict=True)):
            cache.update(key, value, layer)
        output = self.model(input_ids=inputs["input_ids"], past_key_values=cache, use_cache=True)
        return main_output(output)


class WithStaticCache(nn.Module):
    """A model with a StaticCache of its own, as buffers, filled with a prefix.

    An exporter sees through module attributes only, so that for it the cache's layers are handed
    the buffers in each call.
    """

    def __init__(
        self, model: nn.Module, capacity: int, prefix: Tensor | None, *, exported: bool
    ) -> None:
        super().__init__()
        self.model, self.exported = model, exported
        self.cache = _static_cache(model, capacity)
        if prefix is not None:
            with torch.no_grad():
                model(input_ids=prefix, past_key_values=self.cache, use_cache=True)
        self.names, self.numbers = [], []
        for number, layer in enumerate(self.cache.layers):
            for name, value in vars(layer).items():
                if isinstance(value, Tensor):
                    self.register_buffer(f"{name}_{number}", value, persistent=False)
                    self.names.append((number, name))
                elif isinstance(value, int):
                    self.numbers.append((number, name, value))

    def forget_calls(self) -> None:
        """Set counters that layers keep as Python numbers back to the end of the prefix."""
        for number, name, value in self.numbers:
            setattr(self.cache.layers[number], name, value)

    def forward(self, inputs: Mapping[str, Any]) -> Tensor:
        if self.exported:
            for number, name in self.names:
                setattr(self.cache.layers[number], name, getattr(self, f"{name}_{number}"))
        return main_output(self.model(**inputs, past_key_values=self.cache, use_cache=True))


def _static_cache(model: nn.Module, capacity: int) -> Any:
    """Return an allocated cache; what a layer keeps is read off a short run."""
    from transformers import DynamicCache, StaticCache

    config = model.config.get_text_config()
    cache, sample = StaticCache(config=config, max_cache_len=capacity), DynamicCache()
    with torch.no_grad():
        model(input_ids=torch.ones(1, 2, dtype=torch.long), past_key_values=sample, use_cache=True)
    for layer, filled in zip(cache.layers, sample.layers, strict=True):
        layer.lazy_initialization(filled.keys, filled.values)
    return cache
