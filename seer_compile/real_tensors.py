"""Leaving the modes of a trace, for what must exist after it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch.utils._python_dispatch import _disable_current_modes


@contextlib.contextmanager
def real_tensors() -> Iterator[None]:
    """Create ordinary tensors even while tracing, under fake tensors or in inference mode."""
    with _disable_current_modes(), torch.inference_mode(False):
        yield
