"""Modules around a model that take one dictionary of tensors and return one tensor.

Both ways into the compiler then see the same thing, and ``torch.export`` sees tensors only.
Caches are filled and allocated in ``zoo.caches``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from zoo.caches import cache_parts


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


class WithCache(nn.Module):
    """A model with a cache of its own, which every call finds as it was handed in.

    Tensors of the cache's layers become buffers of this module: an exporter sees through module
    attributes only, so that for it the layers are handed the buffers in each call.

    Args:
        model: The model.
        cache: Empty, allocated or filled.
        exported: Whether this module goes to an exporter.
        fixed: More arguments of the model.
    """

    def __init__(self, model: nn.Module, cache: Any, *, exported: bool, **fixed: Any) -> None:
        super().__init__()
        self.model, self.cache, self.exported, self.fixed = model, cache, exported, fixed
        self._state: list[tuple[Any, str, Any]] = []
        for owner in cache_parts(cache):
            for name, value in vars(owner).items():
                kept = tree_map(self._keep, value) if isinstance(value, dict | list) else value
                self._state.append((owner, name, self._keep(kept)))

    def _keep(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        name = f"cached_{sum(1 for _ in self.buffers())}"
        self.register_buffer(name, value, persistent=False)
        return _Buffer(name)

    def forget_calls(self) -> None:
        """Hand the cache's layers what they had at first; the caller resets the buffers."""
        for owner, name, value in self._state:
            setattr(owner, name, tree_map(self._restored, value))

    def _restored(self, value: Any) -> Any:
        return getattr(self, value.name) if isinstance(value, _Buffer) else value

    def forward(self, inputs: Mapping[str, Any]) -> Tensor:
        if self.exported:
            self.forget_calls()
        arguments = dict(inputs) | self.fixed
        if "encoder_hidden" in arguments:
            arguments["encoder_outputs"] = (arguments.pop("encoder_hidden"),)
        return main_output(self.model(**arguments, past_key_values=self.cache, use_cache=True))


@dataclass(frozen=True)
class _Buffer:
    """Where a tensor of the cache is kept."""

    name: str
