"""Launches of kernels, and who is told of them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
import triton

Observer = Callable[[Any, int, list[Any]], None]
"""Told of a launch: the ``CompiledKernel``, the size of the grid, and all of the kernel's arguments
in order, constants included."""

_observer: ContextVar[Observer | None] = ContextVar("seer_compile_launches", default=None)


def launch_kernel(kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
    """Launch a kernel.

    Every launch goes through here: a recorded call repeats what its observer saw, nothing else.

    Args:
        kernel: A ``triton.jit`` or ``gluon.jit`` function.
        programs: How many of it to start.
        arguments: The kernel's, in order.
        options: Constants of the kernel, and of its compilation.
    """
    compiled = kernel[(programs,)](*arguments, **options)
    observer = _observer.get()
    if observer is not None:
        others = kernel.arg_names[len(arguments) :]
        observer(compiled, programs, [*arguments, *(options[name] for name in others)])


@contextlib.contextmanager
def observed_launches(observer: Observer) -> Iterator[None]:
    """Tell of every launch of this thread while the block runs."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


def can_be_repeated() -> bool:
    """Whether launches may be repeated past Triton's own function for them.

    Not with a Triton whose launcher is unknown, and not while somebody, such as a profiler, wants
    to be told of every launch.
    """
    if not _is_known():
        return False
    runtime = triton.knobs.runtime
    hooks = (runtime.launch_enter_hook, runtime.launch_exit_hook)
    # A chain of them, or what somebody put in its place.
    return not any(getattr(hook, "calls", hook) for hook in hooks)


@functools.cache
def _is_known() -> bool:
    major, minor = (int(part) for part in triton.__version__.split(".")[:2])
    return (3, 6) <= (major, minor) <= (3, 9) and torch.version.hip is None
