"""Shared by every test: marks, seeds, poisoned allocations, and a guard on global state."""

from __future__ import annotations

import os
import random
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
# A cached graph keeps the shapes and strides that an operator's fake promised when it was made:
# with the cache on, a test of a changed fake could pass on yesterday's answer.
os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE", "0")

import numpy as np
import pytest
import torch

from support.state import describe_changes, global_state

_ALLOCATORS = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
)


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        return tensor.fill_(float("nan"))
    if tensor.dtype is torch.bool:
        return tensor.fill_(True)
    return tensor.fill_(torch.iinfo(tensor.dtype).max)


def _poisoning(allocate):
    """Return ``allocate``, whose result is filled with NaN when our package is the caller."""

    def poisoning_allocate(*args, **kwargs):
        result = allocate(*args, **kwargs)
        if torch.compiler.is_compiling() or _is_recorded():
            return result
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return _poison(result) if caller.startswith("seer_compile.") else result

    poisoning_allocate.__name__ = allocate.__name__
    return poisoning_allocate


def _is_recorded():
    """Whether somebody would take the filling for a part of a call; played calls are poisoned."""
    recorder = sys.modules.get("seer_compile.kernels.call_recorder")
    return recorder is not None and recorder.active_recorder() is not None


def pytest_addoption(parser):
    """Let the long matrices run whole."""
    parser.addoption(
        "--all-combinations",
        action="store_true",
        help="judge every combination of arguments instead of a seeded sample",
    )


def pytest_configure(config):
    """Fill what our package allocates uninitialised, so that an unwritten element shows."""
    del config
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(2, os.cpu_count() or 1))
    # Inductor raises the limit to this when it first compiles, and leaves it there.
    sys.setrecursionlimit(max(sys.getrecursionlimit(), 2000))
    # For the whole session: Dynamo keys its table of known functions by identity, once.
    for owner, name in _ALLOCATORS:
        setattr(owner, name, _poisoning(getattr(owner, name)))


def pytest_collection_modifyitems(items):
    """Skip tests marked ``gpu`` where there is none; where there is one, the long ones go first.

    They compile for a minute each: the last of them to begin decides when several processes end.
    """
    if torch.cuda.is_available():
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)
        return
    skip = pytest.mark.skip(reason="no CUDA GPU")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeded():
    """Seed the global generators, for models that draw their own weights.

    Inputs come from ``support.inputs``, which uses generators of its own.
    """
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _global_state_is_left_alone():
    """Fail a test that leaves a compiler setting, default or environment variable changed."""
    before = global_state()
    yield
    changes = describe_changes(before, global_state())
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
    assert not changes, f"global state changed: {changes}"
