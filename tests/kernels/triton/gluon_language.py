"""Gluon's language on the CPU, as far as the Hopper kernels use it, on a :class:`Machine`.

The functions of the kernel run as they stand, with the names ``gl``, ``hopper``, ``mbarrier`` and
``tma`` bound to what is here. Values know their layout, and two that meet must agree, as on the
GPU. Shared memory is a view of one tensor: writing to a view writes to the tile.
"""

from __future__ import annotations

import math
import re
import types
from collections.abc import Callable
from typing import Any

import torch
import triton.experimental.gluon.language as real
from gluon_machine import Barrier, Machine, Product, empty_memory
from gluon_values import DTYPES, NAMES, Pointer, Value, binary, joined, pointer, raw, sliced
from torch import Tensor


class Shared:
    """A view of shared memory."""

    def __init__(self, machine: Machine, data: Any, layout: Any = None) -> None:
        self.machine, self.data, self.layout = machine, data, layout

    @property
    def dtype(self) -> Any:
        return NAMES[self.data.dtype]

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    def index(self, index: Any) -> Any:
        entry = self.data[int(index)]
        return entry if isinstance(entry, Barrier) else Shared(self.machine, entry, self.layout)

    def reshape(self, shape: list[int]) -> Shared:
        return Shared(self.machine, self.data.view(shape), self.layout)

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.machine, self.data.permute(order), self.layout)

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        return Shared(self.machine, self.data.narrow(dim, start, length), self.layout)

    def reinterpret(self, dtype: Any, shape: list[int], layout: Any) -> Shared:
        view = self.data.view(DTYPES[dtype])
        assert list(view.shape) == shape, f"{shape} of {list(view.shape)}"
        return Shared(self.machine, view, layout)

    _reinterpret = reinterpret

    def load(self, layout: Any) -> Value:
        self.machine.pause()
        return Value(self.data.clone(), layout)

    def store(self, value: Value) -> None:
        self.machine.pause()
        self.data.copy_(value.data)


class Descriptor:
    """What the copy engine knows of a tensor: tiles past its end read as zeros."""

    def __init__(self, described: Any) -> None:
        self.tensor = torch.as_strided(
            described.base,
            described.shape,
            described.strides,
            described.base.storage_offset(),
        )
        self.layout, self.dtype = described.layout, NAMES[described.base.dtype]
        size = math.prod(described.block_shape) * described.base.element_size()
        self.block_type = types.SimpleNamespace(shape=described.block_shape, nbytes=size)

    def tile(self, where: list[Any]) -> Tensor:
        """Return a copy of the tile at a position."""
        tile = torch.zeros(self.block_type.shape, dtype=self.tensor.dtype)
        starts = [int(start) for start in where]
        sizes = [
            max(0, min(extent - start, length))
            for start, extent, length in zip(starts, self.tensor.shape, tile.shape, strict=True)
        ]
        if min(sizes) > 0:
            inside = tuple(slice(s, s + n) for s, n in zip(starts, sizes, strict=True))
            tile[tuple(slice(n) for n in sizes)] = self.tensor[inside]
        return tile


class Language:
    """The modules that a kernel sees, for one program of a grid."""

    def __init__(self, machine: Machine, program: int, programs: int) -> None:
        self.machine, self.program, self.programs = machine, program, programs
        barrier = types.SimpleNamespace(
            init=lambda bar, count: bar.init(int(count)),
            expect=lambda bar, size: (machine.pause(), bar.expect(int(size))),
            arrive=lambda bar, count=1, pred=True: (
                machine.pause(),
                bar.arrive(int(count)) if pred else None,
            ),
            wait=lambda bar, phase: machine.wait(bar, int(phase)),
            MBarrierLayout=lambda: None,
        )
        language = self._language()
        self.names = {
            "gl": language,
            # Of functions that kernels of both kinds call.
            "tl": language,
            "mbarrier": barrier,
            "hopper": types.SimpleNamespace(
                warpgroup_mma=self._multiply,
                warpgroup_mma_wait=self._wait,
                warpgroup_mma_init=lambda value: value,
                fence_async_shared=machine.pause,
            ),
            "copy_tile": self._copy,
            "range": lambda *bounds: map(Value, range(*map(int, bounds))),
            "meet_warps": machine.pause,
        }

    def _language(self) -> Any:
        names = {name: getattr(real, name) for name in dir(real) if not name.startswith("_")}
        names.update(
            program_id=lambda axis: Value(self.program),
            num_programs=lambda axis: Value(self.programs),
            allocate_shared_memory=self._allocate,
            warp_specialize=self._specialize,
            atomic_add=_atomic_add,
            static_range=range,
            static_assert=_assert,
            arange=lambda start, end, layout: Value(torch.arange(start, end), layout),
            full=lambda shape, fill, dtype, layout: Value(
                torch.zeros(shape, dtype=DTYPES[dtype]) + raw(fill), layout
            ),
            zeros=lambda shape, dtype, layout: Value(
                torch.zeros(shape, dtype=DTYPES[dtype]), layout
            ),
            where=_where,
            maximum=_keeping_nan(binary(lambda a, b: torch.maximum(*_tensors(a, b)))),
            minimum=_keeping_nan(binary(lambda a, b: torch.minimum(*_tensors(a, b)))),
            max=lambda value, axis: Value(value.data.amax(axis), sliced(value.layout, axis)),
            sum=lambda value, axis: Value(value.data.sum(axis), sliced(value.layout, axis)),
            reduce_or=_reduce_or,
            reduce=_reduce,
            expand_dims=_expand_dims,
            atomic_max=_atomic_max,
            exp2=lambda value: Value(value.data.exp2(), value.layout),
            log2=lambda value: Value(value.data.log2(), value.layout),
            log=lambda value: Value(value.data.log(), value.layout),
            convert_layout=_convert_layout,
            load=_load,
            store=_store,
            inline_asm_elementwise=self._assembly,
        )  # fmt: skip
        return types.SimpleNamespace(**names)

    def _allocate(self, dtype: Any, shape: list[int], layout: Any) -> Shared:
        if dtype == real.int64:
            barriers = [Barrier(f"barrier {index}") for index in range(shape[0])]
            return Shared(self.machine, barriers)
        return Shared(self.machine, empty_memory(shape, DTYPES[dtype]), layout)

    def _specialize(self, parts: list[Any], warps: list[int], registers: list[int]) -> None:
        assert len(parts) == len(warps) + 1 == len(registers) + 1
        run = [
            (f"{function.__name__} {number}", lambda f=function, a=arguments: f(*a))
            for number, (function, arguments) in enumerate(parts)
        ]
        self.machine.run(run)

    def _assembly(self, text: str, constraints: str, values: list[Any], *_: Any, **options: Any):
        """Play barriers of the hardware for a group of four warps; nothing else is known."""
        pattern = r"bar\.(sync|arrive) (\d+), (\d+); mov\.b32 \$0, \$1;"
        found = re.fullmatch(pattern, str(raw(text)))
        assert found is not None, text
        assert not options["is_pure"]
        number, threads = int(found[2]), int(found[3])
        assert number < 16, text
        self.machine.meet(number, threads, is_waiting=found[1] == "sync")
        return values[0]

    def _copy(
        self, descriptor: Descriptor, where: list[Any], barrier: Barrier, target: Shared
    ) -> None:
        self.machine.copy(descriptor.tile(where), target.data, barrier)

    def _multiply(
        self, left: Any, right: Shared, accumulator: Any, *, use_acc: bool = True, is_async: bool
    ) -> Any:
        assert is_async
        before = accumulator if use_acc else None
        layout = accumulator.layout
        left_operand = (lambda: left.data) if isinstance(left, Shared) else left.data
        if isinstance(left, Value):
            wanted = real.DotOperandLayout(0, layout, 2)
            assert left.layout == wanted or left.layout.operand_index == 0
        product = Product(
            left_operand,
            lambda: right.data,
            before.data if isinstance(before, Value) else before,
            layout,
        )
        return self.machine.begin(product)

    def _wait(self, outstanding: Any, deps: tuple[Any, ...]) -> Any:
        self.machine.finish(int(outstanding))
        results = []
        for value in deps:
            if isinstance(value, Product):
                assert value not in self.machine.current.products, "read before it is waited for"
                value = Value(value.make(), value.layout)  # noqa: PLW2901
            results.append(value)
        return results[0] if len(results) == 1 else tuple(results)


def _assert(condition: bool) -> None:
    assert condition


def _tensors(*values: Any) -> tuple[Tensor, ...]:
    return tuple(torch.as_tensor(value) for value in values)


def _keeping_nan(function: Callable[[Any, Any], Value]) -> Callable[..., Value]:
    """Take the argument that says so: what runs here always keeps NaN."""
    return lambda left, right, propagate_nan=None: function(_as_value(left), right)


def _as_value(value: Any) -> Value:
    return value if isinstance(value, Value) else Value(value)


def _reduce(value: Value, axis: int, combine: Callable[[Value, Value], Value]) -> Value:
    parts = [Value(part) for part in value.data.unbind(axis)]
    result = parts[0]
    for part in parts[1:]:
        result = combine(result, part)
    return Value(result.data, sliced(value.layout, axis))


def _expand_dims(value: Value, axis: int) -> Value:
    layout = value.layout
    assert isinstance(layout, real.SliceLayout), f"{layout} is no slice"
    assert layout.dim == axis, f"expanded along {axis}, sliced along {layout.dim}"
    return Value(value.data.unsqueeze(axis), layout.parent)


def _atomic_max(target: Pointer, value: Value, mask: Any, sem: str) -> None:
    offsets, used = target.reach(mask)
    assert value.layout == target.offsets.layout
    places, found = offsets[used], value.data.expand(offsets.shape)[used]
    # No place occurs twice in one tile.
    target.memory[places] = torch.maximum(target.memory[places], found)


def _atomic_add(target: Pointer, amount: int, sem: str) -> Value:
    offsets, _ = target.reach(None)
    before = target.memory[offsets].clone()
    target.memory[offsets] += amount
    return Value(before)


def _where(condition: Any, left: Any, right: Any) -> Value:
    data = [torch.as_tensor(raw(value)) for value in (condition, left, right)]
    if data[1].dtype.is_floating_point != data[2].dtype.is_floating_point:
        raise AssertionError("branches of different kinds")
    values = [value for value in (left, right) if isinstance(value, Value)]
    if values:
        data[1:] = [part.to(values[0].data.dtype) for part in data[1:]]
    layout = joined(condition, left) or joined(condition, right)
    return Value(torch.where(*data), layout)


def _reduce_or(value: Value, axis: int) -> Value:
    parts = value.data.unbind(axis)
    result = parts[0].clone()
    for part in parts[1:]:
        result |= part
    return Value(result, sliced(value.layout, axis))


def _convert_layout(value: Value, layout: Any) -> Value:
    return Value(value.data, layout)


def _load(source: Pointer, mask: Any = None, other: Any = None) -> Value:
    offsets, used = source.reach(mask)
    assert mask is None or other is not None, "what is masked has no value"
    data = source.memory[offsets]
    if mask is not None:
        data = data.where(used, torch.tensor(other, dtype=data.dtype))
    return Value(data, source.offsets.layout)


def _store(target: Pointer, value: Value, mask: Any = None) -> None:
    offsets, used = target.reach(mask)
    assert value.layout == target.offsets.layout
    target.memory[offsets[used]] = value.data.expand(offsets.shape)[used].to(target.memory.dtype)


class PlayedKernel:
    """A Gluon kernel whose launches run here, program after program.

    Args:
        kernel: The jitted function.
        modules: The modules whose jitted functions it calls.
        seed: Of the order of events.
    """

    def __init__(self, kernel: Any, modules: tuple[Any, ...], seed: int) -> None:
        self.kernel, self.modules, self.seed = kernel, modules, seed

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*arguments: Any, num_warps: int, maxnreg: int, **constants: Any) -> None:
            del num_warps, maxnreg
            for program in range(grid[0]):
                language = Language(Machine(self.seed + program), program, grid[0])
                kernel = self._bound(language)
                kernel(*(_argument(value) for value in arguments), **constants)

        return launch

    def _bound(self, language: Language) -> Callable[..., None]:
        names: dict[str, Any] = {}
        for module in self.modules:
            for name, value in vars(module).items():
                source = getattr(value, "fn", None)
                if isinstance(source, types.FunctionType):
                    names[name] = types.FunctionType(source.__code__, names, name)
                elif isinstance(value, real.constexpr):
                    names[name] = value.value
        names.update(language.names, __builtins__=__builtins__)
        return types.FunctionType(self.kernel.fn.__code__, names)


def _argument(value: Any) -> Any:
    if hasattr(value, "block_shape"):
        return Descriptor(value)
    return pointer(value) if isinstance(value, Tensor) else value
