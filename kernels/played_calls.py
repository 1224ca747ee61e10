"""A recorded call: its launches, to be repeated with the addresses of other tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Place(NamedTuple):
    """Where a tensor begins: bytes behind the start of an operand, a result or the workspace."""

    base: int
    offset: int


class _Address:
    """What a launcher reads of the tensor in a descriptor."""

    __slots__ = ("_pointer",)

    def __init__(self, pointer: int) -> None:
        self._pointer = pointer

    def data_ptr(self) -> int:
        return self._pointer


class Launch(NamedTuple):
    """One launch of a compiled kernel."""

    compiled: Any
    """The ``triton.compiler.CompiledKernel``; what it loaded is gone when it is."""
    programs: int
    """Size of the grid."""
    arguments: tuple[Any, ...]
    """As bound, with None for what has an address."""
    pointers: tuple[tuple[int, Place], ...]
    """Which arguments are tensors."""
    descriptors: tuple[tuple[int, Any, Place], ...]
    """Which arguments are tensor descriptors, and one of them without a tensor."""

    def play(self, bases: Sequence[int], stream: int) -> None:
        """Launch on a stream, with tensors at other addresses."""
        arguments = list(self.arguments)
        for index, place in self.pointers:
            arguments[index] = bases[place.base] + place.offset
        for index, model, place in self.descriptors:
            arguments[index] = with_base(model, _Address(bases[place.base] + place.offset))
        # No metadata for hooks, and no hooks: calls are not played while there are any.
        compiled, handles = self.compiled, (self.compiled.function, self.compiled.packed_metadata)
        compiled.run(self.programs, 1, 1, stream, *handles, None, None, None, *arguments)


class Result(NamedTuple):
    """How a result is allocated."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class RecordedCall:
    """The launches of a call, its results, and the memory that it needs besides."""

    launches: tuple[Launch, ...]
    results: tuple[Result, ...]
    workspace: int
    """Bytes."""
    device: torch.device
    effects: tuple[tuple[Callable[..., None], tuple[Any, ...]], ...]
    """What the call did on the host that others see, such as counting."""

    def play(self, operands: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the results for other operands that look the same.

        Args:
            operands: As they were recorded: same order, sizes, strides, dtypes, and addresses
                modulo 16.
        """
        device = self.device
        results = tuple(
            torch.empty_strided(shape, strides, dtype=dtype, device=device)
            for shape, strides, dtype in self.results
        )
        workspace = torch.empty(self.workspace, dtype=torch.uint8, device=device)
        bases = [tensor.data_ptr() for tensor in (*operands, *results, workspace)]
        stream = _current_stream(device)
        for launch in self.launches:
            launch.play(bases, stream)
        for effect, arguments in self.effects:
            effect(*arguments)
        return results


def _current_stream(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return torch._C._cuda_getCurrentRawStream(device.index)


def with_base(descriptor: Any, base: Any) -> Any:
    """Return a copy with another tensor, past checks that the recorded one has passed."""
    copied = object.__new__(type(descriptor))
    copied.__dict__.update(descriptor.__dict__, base=base)
    return copied
