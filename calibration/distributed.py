"""Several processes calibrating together: equal gates everywhere, averaged gradients.

Every process passes its own share of the data. Without ``torch.distributed`` all of this is free.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from seer_compile.errors import CalibrationError


class _Plain(Protocol):
    def to_json(self) -> dict[str, Any]: ...


_Table = TypeVar("_Table", bound=_Plain)


def is_on() -> bool:
    """Whether there is a process group of more than one."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """Return the index of this process, 0 without a group."""
    return dist.get_rank() if is_on() else 0


def world_size() -> int:
    """Return the number of processes, 1 without a group."""
    return dist.get_world_size() if is_on() else 1


def gather(value: Any) -> list[Any]:
    """Return the plain data that each process passes, in the order of their ranks."""
    if not is_on():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Raise on every process what is raised inside on one, so that none waits for what is gone.

    Inside there must be no collective: a process that fails would miss it.

    Raises:
        CalibrationError: What another process, the first that failed, stopped by.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    messages = gather(None if failure is None else str(failure))
    if failure is not None:
        raise failure
    for process, message in enumerate(messages):
        if message is not None:
            raise CalibrationError(f"process {process} stopped: {message}")


def average(tensors: Iterable[Tensor]) -> None:
    """Average tensors over the processes, in place, by one collective.

    A NaN of one process becomes a NaN of all, so that all stop together.
    """
    if not is_on():
        return
    parts = list(tensors)
    flat = torch.cat([part.reshape(-1).float() for part in parts])
    dist.all_reduce(flat)
    flat /= world_size()
    for part, value in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
        part.copy_(value.view_as(part))


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Give every process the tensors of process 0, in place."""
    if is_on():
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def everywhere(
    tables: Mapping[str, _Table], parse: Callable[[Mapping[str, Any]], _Table]
) -> dict[str, _Table]:
    """Return on every process what process 0 measured of each site."""
    data = gather({name: table.to_json() for name, table in tables.items()})[0]
    return {name: parse(table) for name, table in data.items()}


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set in any process."""
    if not is_on():
        return flag
    votes = torch.tensor([float(flag)], dtype=torch.float32, device=device)
    dist.all_reduce(votes)
    return bool(votes.item())
