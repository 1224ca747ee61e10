"""Run a model in float64 throughout, also where it asks for float32 by name."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map


class InFloat64(TorchFunctionMode):
    """While it is on, float32 means float64.

    Norms, rotary angles and softmaxes are commonly computed in float32 whatever the model's dtype
    is; a reference that keeps this would carry the rounding that it is there to measure. Worse,
    the least float64 in a mask becomes -inf in float32, and rows of nothing but padding NaN.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        return func(*tree_map(_widened, args), **tree_map(_widened, kwargs or {}))


def _widened(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value
