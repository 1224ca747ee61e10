"""``model.forward(...)``, called past ``model(...)``, on an optimized model.

It skips hooks, as it always does, and goes through graphs of its own, rewritten like those of the
call. The stand-in sits among the module's instance attributes, where PyTorch's own call finds it as
well: that is told by a flag of the thread, which is set while a compiled call runs or is traced.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import nn

FORWARD = "forward"
_running = threading.local()


class Owner(Protocol):
    """Who has the compiled forwards."""

    forwards: dict[int, Callable[..., Any]]
    """Compiled ``(stand_in, *args, **kwargs)`` by the number of a module; empty when detached."""


class DirectForward:
    """Stands in for the forward of one module.

    Args:
        model: The module.
        owner: Who has its compiled forward.
        number: Under which number.
        previous: The forward that somebody else had put on the instance, if any.
    """

    def __init__(
        self,
        model: nn.Module,
        owner: Owner,
        number: int,
        previous: Callable[..., Any] | None,
    ) -> None:
        self.model, self.owner, self.number, self.previous = model, owner, number, previous

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The plain forward, whose signature this has."""
        if self.previous is not None:
            return self.previous
        return type(self.model).forward.__get__(self.model)

    @property
    def __code__(self) -> Any:
        """Where the plain forward is written; ``torch.export`` asks."""
        return inspect.unwrap(self.__wrapped__).__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the forward returns, without hooks."""
        if not is_running():
            compiled = self.owner.forwards.get(self.number)
            if compiled is not None:
                return compiled(self, *args, **kwargs)
        return self.plain(*args, **kwargs)

    def plain(self, *args: Any, **kwargs: Any) -> Any:
        """Call the forward that the module has without us."""
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        return type(self.model).forward(self.model, *args, **kwargs)


@torch.compiler.assume_constant_result
def is_running() -> bool:
    """Whether a compiled call runs in this thread, or is being traced in it."""
    return bool(getattr(_running, "depth", 0))


@contextlib.contextmanager
def running() -> Iterator[None]:
    """Let forwards be called plainly while the block runs, from this thread."""
    _running.depth = getattr(_running, "depth", 0) + 1
    try:
        yield
    finally:
        _running.depth -= 1


def attach_forwards(entries: Sequence[nn.Module], owner: Owner) -> None:
    """Put the stand-ins on modules, which are numbered in this order."""
    for number, entry in enumerate(entries):
        previous = entry.__dict__.get(FORWARD)
        entry.__dict__[FORWARD] = DirectForward(entry, owner, number, previous)


def detach_forwards(entries: Sequence[nn.Module]) -> None:
    """Take the stand-ins off where nobody has wrapped them since."""
    for entry in entries:
        ours = entry.__dict__.get(FORWARD)
        if isinstance(ours, DirectForward):
            del entry.__dict__[FORWARD]
            if ours.previous is not None:
                entry.__dict__[FORWARD] = ours.previous
