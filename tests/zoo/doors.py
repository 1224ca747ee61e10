"""Two ways into the compiler: ``torch.compile`` with our backend, and ``seer_compile.export``."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import seer_compile
from seer_compile.config import GateConfig, TopP
from seer_compile.gate_store import GateStore
from seer_compile.kernels.gated_attention import MODE_SPARSE
from seer_compile.passes import pipeline
from seer_compile.types import SiteSummary

EVERYTHING = GateConfig(selector=TopP(mass=1.0))
"""Gates that keep every visible block."""

Compiled = Callable[[Any], Tensor]


@contextlib.contextmanager
def recorded_plans() -> Iterator[list[tuple[SiteSummary, ...]]]:
    """Collect what the pipeline decided for each graph while the block runs."""
    plans: list[tuple[SiteSummary, ...]] = []
    run = pipeline.run

    def recording_run(*args: Any, **kwargs: Any) -> Any:
        result = run(*args, **kwargs)
        plans.append(result.summaries)
        return result

    pipeline.run = recording_run
    try:
        yield plans
    finally:
        pipeline.run = run


def compile_sparse(module: nn.Module, *, dynamic: bool) -> Compiled:
    """Compile with the backend ``seer``: gates answer sparsely at any size and keep everything."""
    store = GateStore(EVERYTHING)
    store.set_mode(True, untrained=True, at_any_size=True)
    options = {"inner": "eager", "gates": store, "root": module}
    return torch.compile(module, backend="seer", dynamic=dynamic, options=options)


def export_sparse(module: nn.Module, inputs: Any, dynamic_shapes: Any) -> Compiled:
    """Export with gates that answer sparsely at any size and keep everything."""
    seer_compile.optimize(module, config=EVERYTHING, zero_shot=True, inner="eager")
    try:
        program = seer_compile.export(module, (inputs,), dynamic_shapes=dynamic_shapes)
    finally:
        seer_compile.restore(module)
    for name, tensor in program.state_dict.items():
        if name.endswith(".mode"):
            tensor.fill_(MODE_SPARSE)
    return program.module()


def compile_plain(module: nn.Module, *, dynamic: bool) -> Compiled:
    """Compile without us."""
    return torch.compile(module, backend="eager", dynamic=dynamic)


def export_plain(module: nn.Module, inputs: Any, dynamic_shapes: Any) -> Compiled:
    """Export without us as ``seer_compile.export`` does it: the module, then what came out."""
    once = _exported(module, inputs, dynamic_shapes)
    return _exported(once.module(check_guards=False), inputs, dynamic_shapes).module()


def _exported(module: nn.Module, inputs: Any, dynamic_shapes: Any) -> torch.export.ExportedProgram:
    failures = []
    for defers in (False, True):
        try:
            return torch.export.export(
                module,
                (inputs,),
                dynamic_shapes=dynamic_shapes,
                prefer_deferred_runtime_asserts_over_guards=defers,
            )
        except Exception as failure:
            failures.append(failure)
    raise failures[0]


def dynamic_shapes(inputs: Mapping[str, Any], axes: Mapping[str, Any]) -> Any:
    """Return the dynamic axes in the form that ``torch.export`` takes."""

    def of(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [of(name, item) for item in value]
        return dict.fromkeys(axes.get(name, ()), torch.export.Dim.DYNAMIC)

    return ({name: of(name, value) for name, value in inputs.items()},)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what models and exporters warn about; the matrix judges results."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
