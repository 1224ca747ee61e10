"""Learned block-sparse attention for any PyTorch model, as a compiler pass.

    model = seer_compile.optimize(model)
    report = seer_compile.calibrate(model, data)
    seer_compile.set_budget(model, density=0.1)

Importing the package registers its operators, so that saved programs can be loaded; names are
loaded on first use. Neither triton nor transformers is imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import seer_compile.kernels.ops  # noqa: F401  (registers the operators)

if TYPE_CHECKING:
    from seer_compile.api import (
        calibrate,
        load_gates,
        optimize,
        restore,
        save_gates,
        seer_report,
        set_budget,
    )
    from seer_compile.config import (
        CalibrationConfig,
        Fraction,
        GateConfig,
        Threshold,
        TopK,
        TopP,
    )
    from seer_compile.distilling import Distillation, distillation
    from seer_compile.errors import (
        DenseFallbackWarning,
        SeerError,
        SeerWarning,
    )
    from seer_compile.explaining import Explanation, explain
    from seer_compile.exporting import export
    from seer_compile.gate import AttnGate
    from seer_compile.gate_store import GateStore
    from seer_compile.kernels.ops import block_sparse_attention
    from seer_compile.report import SeerReport
    from seer_compile.task_evaluation import TaskEvaluator, TaskRow
    from seer_compile.types import BlockSelection, BlockSize, Visibility

__version__ = "0.1.0"

_HOMES = {
    "seer_compile.api": (
        "calibrate",
        "load_gates",
        "optimize",
        "restore",
        "save_gates",
        "seer_report",
        "set_budget",
    ),
    "seer_compile.config": (
        "CalibrationConfig",
        "Fraction",
        "GateConfig",
        "Threshold",
        "TopK",
        "TopP",
    ),
    "seer_compile.distilling": ("Distillation", "distillation"),
    "seer_compile.errors": (
        "DenseFallbackWarning",
        "SeerError",
        "SeerWarning",
    ),
    "seer_compile.explaining": ("Explanation", "explain"),
    "seer_compile.exporting": ("export",),
    "seer_compile.gate": ("AttnGate",),
    "seer_compile.gate_store": ("GateStore",),
    "seer_compile.kernels.ops": ("block_sparse_attention",),
    "seer_compile.report": ("SeerReport",),
    "seer_compile.task_evaluation": ("TaskEvaluator", "TaskRow"),
    "seer_compile.types": ("BlockSelection", "BlockSize", "Visibility"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AttnGate",
    "BlockSelection",
    "BlockSize",
    "CalibrationConfig",
    "DenseFallbackWarning",
    "Distillation",
    "Explanation",
    "Fraction",
    "GateConfig",
    "GateStore",
    "SeerError",
    "SeerReport",
    "SeerWarning",
    "TaskEvaluator",
    "TaskRow",
    "Threshold",
    "TopK",
    "TopP",
    "Visibility",
    "block_sparse_attention",
    "calibrate",
    "distillation",
    "explain",
    "export",
    "load_gates",
    "optimize",
    "restore",
    "save_gates",
    "seer_report",
    "set_budget",
]


def __getattr__(name: str) -> Any:
    """Load a public name from its module."""
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
