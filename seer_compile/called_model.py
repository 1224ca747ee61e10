"""Which model a verb runs that is given a wrapper, or a module that holds an optimized model.

    torch.compile(model), DataParallel(model)   ->  model: it is called with the same arguments
    a module that holds an optimized model      ->  refused: the part is called with others

A part that is optimized answers in graphs of its own, which a capture of the whole does not see.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from seer_compile.errors import ModelStateError
from seer_compile.session import check_module, optimized_parts
from seer_compile.wrappers import unwrap_call


def called_model(model: Any) -> nn.Module:
    """Return the model under ``torch.compile`` and data-parallel wrappers, to be captured whole.

    Raises:
        DtypeError: It is no module.
        ModelStateError: Parts of it are optimized, and it is not.
    """
    check_module(model)
    model = unwrap_call(model)
    parts = list(optimized_parts(model))
    if parts and "" not in parts:
        text = f"its part {parts[0]!r} is" if len(parts) == 1 else f"its parts {parts} are"
        raise ModelStateError(
            f"{type(model).__name__} is not optimized, but {text}",
            hint="Pass the part, with the arguments that it is called with; or restore it first.",
        )
    return model
