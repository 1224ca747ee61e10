"""Values in registers and pointers of Gluon's language on the CPU, which know their layout."""

from __future__ import annotations

import operator
import types
from collections.abc import Callable
from typing import Any

import torch
import triton.experimental.gluon.language as real
from torch import Tensor

DTYPES = {
    real.float16: torch.float16,
    real.bfloat16: torch.bfloat16,
    real.float32: torch.float32,
    real.int32: torch.int32,
    real.int64: torch.int64,
}
NAMES = {kind: name for name, kind in DTYPES.items()}


def raw(value: Any) -> Any:
    """Return the tensor or number inside a value."""
    return value.data if isinstance(value, Value) else value


def sliced(layout: Any, axis: int) -> Any:
    return real.SliceLayout(axis, layout) if layout is not None else None


class Value:
    """A tensor in registers, or a scalar (no axes), with its layout."""

    def __init__(self, data: Any, layout: Any = None) -> None:
        self.data = data if isinstance(data, Tensor) else torch.tensor(data)
        self.layout = layout if self.data.ndim else None

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    @property
    def type(self) -> Any:
        return types.SimpleNamespace(layout=self.layout)

    def to(self, dtype: Any, *, bitcast: bool = False) -> Value:
        kind = DTYPES[dtype]
        return Value(self.data.view(kind) if bitcast else self.data.to(kind), self.layout)

    def reshape(self, shape: list[int]) -> Value:
        # Its layout is the compiler's choice: what is made of it names one.
        return Value(self.data.reshape([int(size) for size in shape]))

    def __getitem__(self, index: tuple[Any, Any]) -> Value:
        axis = index.index(None)
        assert isinstance(self.layout, real.SliceLayout), f"{self.layout} is no slice"
        assert self.layout.dim == axis, f"expanded along {axis}, sliced along {self.layout.dim}"
        return Value(self.data.unsqueeze(axis), self.layout.parent)

    def __index__(self) -> int:
        return int(self.data)

    def __bool__(self) -> bool:
        assert self.data.ndim == 0, "a tensor decides no branch"
        return bool(self.data)

    def __neg__(self) -> Value:
        return Value(-self.data, self.layout)


def joined(left: Any, right: Any) -> Any:
    layouts = [v.layout for v in (left, right) if isinstance(v, Value) and v.layout is not None]
    assert all(layout == layouts[0] for layout in layouts), f"layouts differ: {layouts}"
    return layouts[0] if layouts else None


def binary(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def apply(left: Any, right: Any) -> Any:
        if isinstance(right, Pointer):
            return NotImplemented
        if isinstance(left, Value) and left.data.dtype.is_floating_point:
            right = _typed(right, left.data.dtype)
        return Value(function(raw(left), raw(right)), joined(left, right))

    return apply


def _typed(number: Any, dtype: torch.dtype) -> Any:
    return number if isinstance(number, Value) else Value(torch.tensor(float(number), dtype=dtype))


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "and_", "or_", "xor"):
    _function = getattr(operator, _name)
    setattr(Value, f"__{_name.rstrip('_')}__", binary(_function))
    setattr(Value, f"__r{_name.rstrip('_')}__", binary(lambda a, b, f=_function: f(b, a)))
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Value, f"__{_name}__", binary(getattr(operator, _name)))


class Pointer:
    """Addresses into the memory of one tensor."""

    def __init__(self, memory: Tensor, offsets: Value) -> None:
        self.memory, self.offsets = memory, offsets

    def __add__(self, more: Any) -> Pointer:
        more = more if isinstance(more, Value) else Value(int(more))
        return Pointer(self.memory, Value(self.offsets.data.long(), self.offsets.layout) + more)

    def __getitem__(self, index: Any) -> Pointer:
        return Pointer(self.memory, self.offsets[index])

    def reach(self, mask: Any) -> tuple[Tensor, Tensor]:
        """Return addresses and which of them are used; none of these lies outside."""
        offsets = self.offsets.data
        used = torch.ones_like(offsets, dtype=torch.bool) if mask is None else raw(mask)
        used, offsets = torch.broadcast_tensors(torch.as_tensor(used), offsets)
        bad = used & ((offsets < 0) | (offsets >= len(self.memory)))
        assert not bad.any(), f"access outside of memory: {offsets[bad][:4].tolist()}"
        return offsets.where(used, 0), used


def pointer(tensor: Tensor | None) -> Pointer | None:
    """Return a pointer to the first entry of a tensor."""
    if tensor is None:
        return None
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    memory = torch.as_strided(tensor, (size,), (1,), 0)
    return Pointer(memory, Value(tensor.storage_offset()))
