"""Buffers whose values were used at compile time (a causal triangle), watched at run time."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class AssumedBuffers:
    """Tells whether buffers still hold what they held.

    Reading a version counter costs nothing; values are compared only after a write.

    Args:
        tensors: The buffers, held weakly.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._watched = [
            [weakref.ref(tensor), tensor._version, _digest(tensor)]
            for tensor in tensors
            if not tensor.is_inference()
        ]

    def hold(self) -> bool:
        """Whether every buffer that still exists has its value of the time of compilation."""
        for entry in self._watched:
            reference, version, digest = entry
            tensor = reference()
            if tensor is None or tensor._version == version:
                continue
            if _digest(tensor) != digest:
                return False
            entry[1] = tensor._version
        return True


def guarded(
    compiled: Callable[..., Any], buffers: AssumedBuffers, fallback: Callable[..., Any]
) -> Callable[..., Any]:
    """Return a callable that is ``compiled`` while the buffers hold and ``fallback`` otherwise."""

    def call(*args: Any) -> Any:
        return compiled(*args) if buffers.hold() else fallback(*args)

    return call


def _digest(tensor: Tensor) -> str:
    host = tensor.detach().to("cpu").contiguous()
    return hashlib.sha256(host.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
