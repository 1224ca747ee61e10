"""The global state that no public call may change: snapshots of it, and changes by the user."""

from __future__ import annotations

import copy
import logging
import os
import random
import sys
import warnings
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any

import numpy as np
import torch

_CONFIG_MODULES = (
    "torch._dynamo.config",
    "torch._inductor.config",
    "torch._functorch.config",
    "torch.fx.experimental._config",
    "torch.compiler.config",
)
# Set by PyTorch and pytest themselves while they run.
_VOLATILE_VARIABLES = frozenset(
    {"PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"}
    | {"KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK", "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"}
    | {"TRITON_PTXAS_PATH"}
)


def global_state() -> dict[str, Any]:
    """Return compiler settings, numeric defaults and environment variables, by name."""
    state: dict[str, Any] = {
        "default dtype": torch.get_default_dtype(),
        "default device": str(torch.get_default_device()),
        "grad enabled": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "cudnn benchmark": torch.backends.cudnn.benchmark,
        "flash sdp": torch.backends.cuda.flash_sdp_enabled(),
        "efficient sdp": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "math sdp": torch.backends.cuda.math_sdp_enabled(),
        "recursion limit": sys.getrecursionlimit(),
    }
    for name, value in os.environ.items():
        if name not in _VOLATILE_VARIABLES:
            state[f"${name}"] = value
    for module_name in _CONFIG_MODULES:
        module = sys.modules.get(module_name)
        if module is not None:
            for key, value in _settings(module).items():
                state[f"{module_name}.{key}"] = value
    return state


def _settings(module: ModuleType) -> dict[str, Any]:
    """Return the settings of a configuration module, without those that it hides.

    ``get_config_copy`` of torch 2.11 raises once an AOTInductor package has hidden one.
    """
    settings = {}
    for key in module._config:
        with suppress(AttributeError):
            settings[key] = copy.deepcopy(getattr(module, key))
    return settings


def describe_changes(before: dict[str, Any], after: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return what differs, as ``name: (before, after)``.

    Settings of a module that was imported in between have no earlier value and do not count.
    """
    changes = {}
    for name in before.keys() | after.keys():
        if not name.startswith("$") and (name not in before or name not in after):
            continue
        old, new = before.get(name), after.get(name)
        if old is not new and old != new:
            changes[name] = (old, new)
    return changes


@contextmanager
def assert_global_state_unchanged(*, rng: bool = True):
    """Fail when the block changes global state; with ``rng``, the CPU generator too."""
    before, seed_state = global_state(), torch.get_rng_state()
    yield
    changes = describe_changes(before, global_state())
    assert not changes, f"global state changed: {changes}"
    if rng:
        assert torch.equal(seed_state, torch.get_rng_state()), "global random generator advanced"


# Whose functions and classes a library might be tempted to replace.
_PATCHABLE = (
    "torch",
    "torch.Tensor",
    "torch.nn.Module",
    "torch.nn.MultiheadAttention",
    "torch.nn.TransformerEncoderLayer",
    "torch.nn.functional",
    "torch.nn.attention",
    "torch.utils.checkpoint",
    "torch.export",
    "torch.fx.GraphModule",
    "torch.fx.Graph",
    "torch._dynamo",
    "torch._dynamo.eval_frame",
    "torch._functorch.aot_autograd",
    "torch._inductor.compile_fx",
    "torch.distributed",
    "transformers.masking_utils",
    "transformers.modeling_utils",
    "transformers.integrations.sdpa_attention",
)


def everything_global() -> dict[str, Any]:
    """Return :func:`global_state`, and generators, warning filters, loggers and attributes.

    Attributes are the functions and classes of modules that are imported, by identity.
    """
    state = global_state()
    state["python random"] = random.getstate()
    state["numpy random"] = repr(np.random.get_state())
    state["torch random"] = torch.get_rng_state().numpy().tobytes()
    state["warning filters"] = list(warnings.filters)
    state["log level"] = logging.getLogger().level
    state["log handlers"] = list(logging.getLogger().handlers)
    state["show warning"] = warnings.showwarning
    state["exception hook"] = sys.excepthook
    state["import path"] = list(sys.path)
    state["fast path"] = torch.backends.mha.get_fastpath_enabled()
    state["autocast"] = [torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")]
    for path in _PATCHABLE:
        for name, value in vars(_owner(path) or object).items():
            if callable(value) or isinstance(value, (property, classmethod, staticmethod)):
                state[f"{path}.{name}"] = _Identity(value)
    return state


class _Identity:
    """Equal to itself alone, whatever the value's own equality says."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.value is other.value

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(self.value)


def _owner(path: str) -> Any:
    if path in sys.modules:
        return sys.modules[path]
    module, _, name = path.rpartition(".")
    return getattr(sys.modules.get(module), name, None)


@contextmanager
def assert_nothing_global_changes(what: str = "the call"):
    """Fail when the block changes anything of :func:`everything_global`."""
    before = everything_global()
    yield
    changes = describe_changes(before, everything_global())
    assert not changes, f"{what} changed {changes}"


@contextmanager
def default_dtype(dtype):
    """Make floating-point tensors of a dtype where none is named, as a user may."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
