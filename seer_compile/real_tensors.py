"""Leaving the modes of a trace, for what must exist after it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch._C import DispatchKey
from torch.utils._python_dispatch import _disable_current_modes


@contextlib.contextmanager
def real_tensors() -> Iterator[None]:
    """Create ordinary tensors even while tracing, under fake tensors or in inference mode."""
    modes = _disable_current_modes() if _is_in_modes() else contextlib.nullcontext()
    with modes, torch.inference_mode(False):
        yield


def _is_in_modes() -> bool:
    """Whether modes are on in this thread.

    PyTorch keeps the stack of pre-dispatch modes once for all threads: leaving modes in a thread
    that traces nothing would take those of a thread that does.
    """
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._dispatch_tls_is_dispatch_key_included(DispatchKey.PreDispatch)
    )
