"""Buffers whose values were used at compile time (a causal triangle), watched at run time."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary


class _Assumed(NamedTuple):
    reference: weakref.ref[Tensor]
    place: int | None
    """Which argument of the graph it is: another tensor may come there from the next call on."""
    digest: str
    known: Any
    """The state in which tensors had these values when they were last compared."""


class AssumedBuffers:
    """Tells whether buffers still hold what they held.

    Seeing that a buffer is the same tensor, not written to since, costs nothing; values are
    compared only where it is not. Writes that PyTorch does not count (through ``tensor.data`` or
    NumPy) are not seen.

    Args:
        tensors: The buffers, held weakly.
        arguments: What the graph was compiled with.
    """

    def __init__(self, tensors: Iterable[Tensor], arguments: Sequence[Any] = ()) -> None:
        places = {id(value): place for place, value in enumerate(arguments)}
        self._assumed = [
            _Assumed(
                weakref.ref(tensor),
                places.get(id(tensor)),
                _digest(tensor),
                WeakIdKeyDictionary({tensor: _state(tensor)}),
            )
            for tensor in tensors
        ]

    def hold(self, arguments: Sequence[Any] = ()) -> bool:
        """Whether every buffer has its value of the time of compilation.

        Args:
            arguments: Of this call of the graph.
        """
        return all(_holds(assumed, arguments) for assumed in self._assumed)


def guarded(
    compiled: Callable[..., Any], buffers: AssumedBuffers, fallback: Callable[..., Any]
) -> Callable[..., Any]:
    """Return a callable that is ``compiled`` while the buffers hold and ``fallback`` otherwise."""

    def call(*args: Any) -> Any:
        return compiled(*args) if buffers.hold(args) else fallback(*args)

    return call


def _holds(assumed: _Assumed, arguments: Sequence[Any]) -> bool:
    tensor = assumed.reference() if assumed.place is None else arguments[assumed.place]
    if tensor is None:
        return True
    state = _state(tensor)
    if assumed.known.get(tensor) == state:
        return True
    if _digest(tensor) != assumed.digest:
        return False
    assumed.known[tensor] = state
    return True


def _state(tensor: Tensor) -> tuple[int, int]:
    """Return what a write or another storage changes; an inference tensor counts no writes."""
    return 0 if tensor.is_inference() else tensor._version, tensor.data_ptr()


def _digest(tensor: Tensor) -> str:
    host = tensor.detach().to("cpu").contiguous()
    return hashlib.sha256(host.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
