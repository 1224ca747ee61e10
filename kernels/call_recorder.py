"""Who watches a call that is to be played again, and refuses what could be missed.

A whitelist: every PyTorch operator that runs meanwhile must only allocate or view, and every tensor
of a launch must be an operand or one of these allocations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from seer_compile.kernels.played_calls import Launch, Place, RecordedCall, Result, with_base

LARGEST_WORKSPACE = 128 << 20
"""Bytes. All temporary tensors of a played call live side by side; a large call does not wait for
its host anyway."""

_ALIGNMENT = 512
"""Bytes between the starts of tensors, as PyTorch's allocator has it: kernels are compiled for
addresses that are multiples of 16."""

_aten = torch.ops.aten
_ALLOCATING = frozenset(
    {
        _aten.empty.memory_format,
        _aten.empty_like.default,
        _aten.empty_strided.default,
        _aten.new_empty.default,
        _aten.new_empty_strided.default,
    }
)
_VIEWING = frozenset(
    {
        _aten.alias.default,
        _aten.as_strided.default,
        _aten.detach.default,
        _aten.expand.default,
        _aten.permute.default,
        _aten.select.int,
        _aten.slice.Tensor,
        _aten.squeeze.dim,
        _aten.transpose.int,
        _aten.unsqueeze.default,
        _aten.view.default,
        _aten.view.dtype,
    }
)


_active: ContextVar[Recorder | None] = ContextVar("seer_compile_recorder", default=None)


def active_recorder() -> Recorder | None:
    """Return who watches the calls of this thread, if anybody does."""
    return _active.get()


class Recorder(TorchDispatchMode):
    """Watches one call, while it is entered.

    Args:
        operands: The tensors that the call is given.
    """

    def __init__(self, operands: Sequence[Tensor]) -> None:
        super().__init__()
        self.obstacle: str | None = None
        """Why the call cannot be played; None as long as it can."""
        self._operands = tuple(operands)
        self._device = operands[0].device
        # Kept until the end, so that no two of them have one address.
        self._allocated: list[Tensor] = []
        # An answer is as large as its queries, and a log-sum-exp a sixteenth of them at most.
        self._answer = operands[0].numel() * operands[0].element_size()
        self._room = LARGEST_WORKSPACE + self._answer // 16
        self._watched: list[tuple[Any, int, list[Any]]] = []
        self._effects: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        if any(operand.device != self._device for operand in operands):
            self.refuse("an operand is on another device")

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Tell PyTorch that this changes nothing that a compiler would have to know of."""
        return True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Tell Dynamo that functions may be compiled meanwhile."""
        return True

    def __enter__(self) -> Recorder:
        from seer_compile.kernels.triton.launching import observed_launches

        self._token = _active.set(self)
        self._launches = observed_launches(self.add_launch)
        self._launches.__enter__()
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._launches.__exit__(*exception)
        _active.reset(self._token)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and keep what it allocates."""
        result = func(*args, **(kwargs or {}))
        if func in _ALLOCATING and result.device == self._device:
            self._keep(result)
        elif func not in _VIEWING:
            self.refuse(f"{func} runs")
        return result

    def refuse(self, reason: str) -> str:
        """Give up, but let the call end; return the first reason for it."""
        self.obstacle = self.obstacle or reason
        # The call may need this memory.
        self._allocated.clear()
        self._watched.clear()
        return self.obstacle

    def add_launch(self, compiled: Any, programs: int, arguments: list[Any]) -> None:
        """Note a launch.

        Args:
            compiled: What Triton returned for it: a ``CompiledKernel``.
            programs: Size of the grid.
            arguments: All of the kernel's, in order, constants included.
        """
        if self.obstacle is None:
            self._watched.append((compiled, programs, arguments))

    def add_effect(self, effect: Callable[..., None], *arguments: Any) -> None:
        """Note what a played call has to do on the host as well."""
        self._effects.append((effect, arguments))

    def _keep(self, tensor: Tensor) -> None:
        if self.obstacle is not None:
            return
        self._allocated.append(tensor)
        size = tensor.untyped_storage().nbytes()
        self._room -= 0 if size == self._answer else size
        if self._room < 0:
            self.refuse("temporary tensors take too much memory")

    def finish(self, results: Sequence[Tensor]) -> RecordedCall | str:
        """Return the recording of a call with these results, or why there is none."""
        if self.obstacle is not None:
            return self.obstacle
        allocated = [tensor.untyped_storage().data_ptr() for tensor in self._allocated]
        owners = [_owner(result, allocated) for result in results]
        if None in owners or len(set(owners)) < len(owners):
            return self.refuse("a result is no memory of its own")
        places, workspace = self._lay_out(owners)
        if workspace > LARGEST_WORKSPACE:
            return self.refuse("temporary tensors take too much memory")
        launches = [self._launch(*watched, places) for watched in tuple(self._watched)]
        if self.obstacle is not None:
            return self.obstacle
        return RecordedCall(
            launches=tuple(launches),
            results=tuple(
                Result(tuple(result.shape), result.stride(), result.dtype) for result in results
            ),
            workspace=workspace,
            device=self._device,
            effects=tuple(self._effects),
        )

    def _lay_out(self, owners: Sequence[int | None]) -> tuple[dict[int, Place], int]:
        """Return the place of each allocation by its address, and the bytes of the workspace."""
        places, end, first = {}, 0, len(self._operands)
        for number, tensor in enumerate(self._allocated):
            storage = tensor.untyped_storage()
            if number in owners:
                places[storage.data_ptr()] = Place(first + owners.index(number), 0)
                continue
            places[storage.data_ptr()] = Place(first + len(owners), end)
            end += math.ceil(storage.nbytes() / _ALIGNMENT) * _ALIGNMENT
        return places, end

    def _launch(
        self, compiled: Any, programs: int, arguments: list[Any], places: dict[int, Place]
    ) -> Launch:
        constants, pointers, descriptors = list(arguments), [], []
        for index, argument in enumerate(arguments):
            if isinstance(argument, Tensor):
                pointers.append((index, self._place(argument, places)))
                constants[index] = None
            elif _is_descriptor(argument):
                place = self._place(argument.base, places)
                descriptors.append((index, with_base(argument, None), place))
                constants[index] = None
            elif not _is_constant(argument):
                self.refuse(f"an argument is a {type(argument).__name__}")
        return Launch(
            compiled=compiled,
            programs=programs,
            arguments=tuple(constants),
            pointers=tuple(pointers),
            descriptors=tuple(descriptors),
        )

    def _place(self, tensor: Tensor, places: dict[int, Place]) -> Place:
        """Find out what a tensor of a launch belongs to."""
        storage = tensor.untyped_storage().data_ptr()
        if storage in places:
            base, offset = places[storage]
            return Place(base, offset + tensor.data_ptr() - storage)
        owners = [
            number
            for number, operand in enumerate(self._operands)
            if operand.untyped_storage().data_ptr() == storage
        ]
        if len(owners) > 1:
            # Queries, keys and values of one tensor: told apart by where each begins.
            owners = [
                number
                for number in owners
                if self._operands[number].data_ptr() == tensor.data_ptr()
            ]
        if len(owners) != 1:
            self.refuse("a tensor belongs to no operand, or to several")
            return Place(0, 0)
        return Place(owners[0], tensor.data_ptr() - self._operands[owners[0]].data_ptr())


def _is_constant(argument: Any) -> bool:
    if isinstance(argument, tuple):
        return all(isinstance(part, int) for part in argument)
    return argument is None or isinstance(argument, (int, float, str))


def _is_descriptor(argument: Any) -> bool:
    return hasattr(argument, "block_shape") and hasattr(argument, "base")


def _owner(result: Tensor, allocated: list[int]) -> int | None:
    """Return which allocation a result is, all of it."""
    is_whole = result.untyped_storage().nbytes() == result.numel() * result.element_size()
    if not is_whole or result.data_ptr() not in allocated:
        return None
    return allocated.index(result.data_ptr())
