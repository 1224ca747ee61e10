"""Which dtypes hold the values of a mask exactly."""

from __future__ import annotations

from typing import Any

import sympy
import torch

from seer_compile.passes.mask_domain import Choice, Real

_NARROW = (torch.uint8, torch.int8, torch.int16)
_EXACT_FLOATS = (torch.float32, torch.float64)


def fits(value: Any, dtype: torch.dtype) -> bool:
    """Whether the dtype holds the value exactly, as far as positions and constants go."""
    if isinstance(value, Choice):
        return fits(value.then, dtype) and fits(value.other, dtype)
    if isinstance(value, Real):
        return dtype.is_floating_point
    if isinstance(value, (float, int)):
        return dtype.is_floating_point
    if isinstance(value, sympy.Expr) and value.is_number:
        return dtype.is_floating_point or _in_range(int(value), dtype)
    return isinstance(value, sympy.Expr) and (
        dtype in _EXACT_FLOATS if dtype.is_floating_point else dtype not in _NARROW
    )


def _in_range(value: int, dtype: torch.dtype) -> bool:
    limits = torch.iinfo(dtype)
    return limits.min <= value <= limits.max
