"""Typed validation of what callers hand to the operators, on the host, before anything runs.

Every function either returns or raises a :class:`~seer_compile.errors.SeerError` that names the
argument, what it was and what is accepted. Shapes, dtypes and devices only: values on a device
are never read here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seer_compile.config import SELECTORS
from seer_compile.errors import (
    DeviceError,
    DtypeError,
    HeadConfigError,
    RangeError,
    SelectionError,
    ShapeError,
)
from seer_compile.types import (
    POOL_KINDS,
    VISIBILITY_ARGUMENTS,
    BlockSelection,
    Visibility,
)

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
BUDGET_DTYPES = (torch.float32, torch.float64)
"""A share of mass next to 1 needs float64: float32 ends at 1 - 6e-8."""
MAX_HEAD_DIM = 256
SELECTOR_NAMES = tuple(selector.name for selector in SELECTORS)
_INTEGER_DTYPES = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
_AXES = {2: "b tokens", 3: "heads pooled gate_dim", 4: "b heads tokens dim"}


def blocks_of(tokens: int, size: int) -> int:
    """Return how many blocks of ``size`` hold ``tokens``; the last may be shorter."""
    return -(-tokens // size)


def check_tensor(
    argument: str,
    value: Any,
    *,
    rank: int,
    dtypes: Sequence[torch.dtype] = FLOAT_DTYPES,
    device: torch.device | None = None,
) -> None:
    """Check type, rank, dtype and device of one tensor.

    Raises:
        DtypeError: No tensor, or of another dtype.
        ShapeError: Of another rank.
        DeviceError: On another device.
    """
    if not isinstance(value, Tensor):
        raise DtypeError(argument=argument, got=_type_name(value), expected="a torch.Tensor")
    if value.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise DtypeError(argument=f"{argument}.dtype", got=value.dtype, expected=names)
    if value.ndim != rank:
        raise ShapeError(
            argument=f"{argument}.shape",
            got=tuple(value.shape),
            expected=f"{rank} axes ({_AXES.get(rank, 'see the docstring')})",
        )
    if device is not None and value.device != device:
        raise DeviceError(
            argument=f"{argument}.device", got=str(value.device), expected=str(device)
        )


def check_integer(argument: str, value: Any, *, minimum: int | None = None) -> None:
    """Check that a number is an integer (symbolic ones too), and at least ``minimum``.

    Raises:
        DtypeError: No integer; a bool is none.
        RangeError: Below the minimum.
    """
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise DtypeError(argument=argument, got=_shown(value), expected="an int")
    if minimum is not None and value < minimum:
        raise RangeError(argument=argument, got=value, expected=f">= {minimum}")


def check_scale(value: Any) -> None:
    """Check the factor on the logits.

    Raises:
        DtypeError: No number.
        RangeError: NaN or infinite.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | torch.SymFloat):
        raise DtypeError(argument="scale", got=_shown(value), expected="a float")
    if not isinstance(value, torch.SymFloat) and not math.isfinite(value):
        raise RangeError(argument="scale", got=value, expected="a finite number")


def check_softcap(value: Any) -> None:
    """Check the bound of the logits, where there is one.

    Raises:
        DtypeError: No number.
        RangeError: Not positive, NaN or infinite.
    """
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DtypeError(argument="softcap", got=_shown(value), expected="a float, or None")
    if not (math.isfinite(value) and value > 0):
        raise RangeError(argument="softcap", got=value, expected="a positive, finite number")


def check_choice(argument: str, value: Any, allowed: Sequence[str]) -> None:
    """Check that a string is one of a few.

    Raises:
        DtypeError: No string.
        RangeError: Another string.
    """
    if not isinstance(value, str):
        raise DtypeError(argument=argument, got=_shown(value), expected="a str")
    if value not in allowed:
        raise RangeError(argument=argument, got=value, expected=f"one of {', '.join(allowed)}")


def check_pools(argument: str, kinds: Any) -> None:
    """Check a comma-joined list of pool kinds.

    Raises:
        DtypeError: No string.
        RangeError: Empty, an unknown kind, or one twice.
    """
    if not isinstance(kinds, str):
        raise DtypeError(argument=argument, got=_shown(kinds), expected="a str, comma-joined")
    names = kinds.split(",")
    if not set(names) <= set(POOL_KINDS) or len(set(names)) != len(names):
        raise RangeError(
            argument=argument, got=kinds, expected=f"distinct kinds of {', '.join(POOL_KINDS)}"
        )


def check_blocks(
    query_block: Any, key_block: Any, sub_blocks: tuple[Any, Any] | None = None
) -> None:
    """Check block sizes, and that sub-blocks of queries and of keys divide their blocks.

    Raises:
        DtypeError: No integer.
        RangeError: Below 1, or a sub-block that does not divide its block.
    """
    check_integer("query_block", query_block, minimum=1)
    check_integer("key_block", key_block, minimum=1)
    if sub_blocks is None:
        return
    blocks = {"query": query_block, "key": key_block}
    for (side, block), sub_block in zip(blocks.items(), sub_blocks, strict=True):
        check_integer(f"{side}_sub_block", sub_block, minimum=1)
        if block % sub_block:
            raise RangeError(
                argument=f"{side}_sub_block",
                got=sub_block,
                expected=f"a divisor of {side}_block={block}",
            )


def check_heads(heads: int, kv_heads: int) -> None:
    """Check that query heads form equal groups.

    Raises:
        HeadConfigError: ``kv_heads`` does not divide ``heads``.
    """
    if (heads and not kv_heads) or (kv_heads and heads % kv_heads):
        raise HeadConfigError(
            argument="key.shape[1]",
            got=kv_heads,
            expected=f"a divisor of the {heads} query heads",
            hint="Grouped attention needs the same number of query heads per key head.",
        )


def check_visibility(
    visibility: Visibility, *, batch: int, q_len: int, k_len: int, device: torch.device
) -> None:
    """Check the six arguments that say which keys a query may read.

    Raises:
        DtypeError: A bound is no int, or a tensor has the wrong dtype.
        ShapeError: A tensor does not fit batch and lengths, or documents lack one side.
        DeviceError: A tensor is on another device; the offset may also be on the CPU.
    """
    for name in ("upper", "lower"):
        bound = getattr(visibility, name)
        if bound is not None:
            check_integer(name, bound)
    offset = visibility.offset
    if offset is not None:
        check_tensor("offset", offset, rank=0, dtypes=_INTEGER_DTYPES)
        if offset.device not in (device, torch.device("cpu")):
            raise DeviceError(
                argument="offset.device", got=str(offset.device), expected=str(device)
            )
    lengths = {"key_padding": k_len, "query_documents": q_len, "key_documents": k_len}
    for name, length in lengths.items():
        value = getattr(visibility, name)
        if value is None:
            continue
        dtypes = (torch.bool,) if name == "key_padding" else _INTEGER_DTYPES
        check_tensor(name, value, rank=2, dtypes=dtypes, device=device)
        if tuple(value.shape) != (batch, length):
            raise ShapeError(
                argument=f"{name}.shape",
                got=tuple(value.shape),
                expected=f"({batch}, {length}), batch and tokens",
            )
    if (visibility.query_documents is None) != (visibility.key_documents is None):
        missing = "query" if visibility.query_documents is None else "key"
        raise ShapeError(
            argument=f"{missing}_documents", got=None, expected="given together, or neither"
        )


def check_attention(query: Any, key: Any, value: Any = None) -> None:
    """Check query, key and (where given) value against each other.

    Raises:
        DtypeError: No tensors, not floating point of 16 or 32 bits, or of different dtypes.
        ShapeError: Rank, batch, key lengths or head dims that do not agree; head dim above 256.
        HeadConfigError: Key heads do not divide query heads, or differ from value heads.
        DeviceError: Different devices.
    """
    check_tensor("query", query, rank=4)
    others = {"key": key} if value is None else {"key": key, "value": value}
    for name, tensor in others.items():
        check_tensor(name, tensor, rank=4, dtypes=(query.dtype,), device=query.device)
        if tensor.shape[0] != query.shape[0]:
            raise ShapeError(
                argument=f"{name}.shape[0]",
                got=tensor.shape[0],
                expected=f"the batch of query, {query.shape[0]}",
            )
    check_heads(query.shape[1], key.shape[1])
    if key.shape[-1] != query.shape[-1]:
        raise ShapeError(
            argument="key.shape[-1]",
            got=key.shape[-1],
            expected=f"the head dim of query, {query.shape[-1]}",
        )
    if value is not None and tuple(value.shape[1:3]) != tuple(key.shape[1:3]):
        raise ShapeError(
            argument="value.shape",
            got=tuple(value.shape),
            expected=f"heads and tokens of key, {tuple(key.shape[1:3])}",
        )
    for name, tensor in {"query": query, **others}.items():
        if not 1 <= tensor.shape[-1] <= MAX_HEAD_DIM:
            raise ShapeError(
                argument=f"{name}.shape[-1]",
                got=tensor.shape[-1],
                expected=f"a head dim of 1 to {MAX_HEAD_DIM}",
            )


def check_selection(
    selection: BlockSelection, query: Tensor, *, query_block: int, kv_heads: int
) -> None:
    """Check shapes of a selection; see :func:`check_selection_values` for its content.

    Raises:
        DtypeError: Not int32.
        ShapeError: Batch, rows or the two tensors do not agree.
        HeadConfigError: Selection heads do not divide the query heads.
        DeviceError: On another device than the query.
    """
    indices, counts = selection
    check_tensor("indices", indices, rank=4, dtypes=(torch.int32,), device=query.device)
    check_tensor("counts", counts, rank=3, dtypes=(torch.int32,), device=query.device)
    if indices.shape[:3] != counts.shape:
        raise ShapeError(
            argument="counts.shape",
            got=tuple(counts.shape),
            expected=f"{tuple(indices.shape[:3])}, indices without its last axis",
        )
    rows = blocks_of(query.shape[2], query_block)
    if (indices.shape[0], indices.shape[2]) != (query.shape[0], rows):
        raise ShapeError(
            argument="indices.shape",
            got=tuple(indices.shape),
            expected=f"batch {query.shape[0]} and {rows} query blocks on axes 0 and 2: "
            f"q_len={query.shape[2]} with query_block={query_block}",
        )
    selections = indices.shape[1]
    if selections not in (1, kv_heads, query.shape[1]):
        raise HeadConfigError(
            argument="indices.shape[1]",
            got=selections,
            expected=f"1, {kv_heads} (key heads) or {query.shape[1]} (query heads)",
        )


def check_selection_values(selection: BlockSelection, key_blocks: int) -> None:
    """Check the content of a selection, by reading it: for tensors on the CPU only.

    Raises:
        SelectionError: A count outside the capacity, an index that is no key block, or indices
            of a row that are not strictly ascending.
    """
    indices, counts = selection
    capacity = indices.shape[-1]
    if counts.numel() == 0:
        return
    low, high = (int(value) for value in counts.aminmax())
    if low < 0 or high > capacity:
        raise SelectionError(
            argument="counts", got=(low, high), expected=f"in [0, {capacity}], the capacity"
        )
    if capacity == 0:
        return
    used = torch.arange(capacity) < counts[..., None]
    kept = indices.masked_fill(~used, 0)
    low, high = (int(value) for value in kept.aminmax())
    if used.any() and (low < 0 or high >= key_blocks):
        raise SelectionError(
            argument="indices", got=(low, high), expected=f"in [0, {key_blocks}), the key blocks"
        )
    if bool(((indices[..., 1:] <= indices[..., :-1]) & used[..., 1:]).any()):
        raise SelectionError(
            argument="indices",
            got="a row with repeated or descending indices",
            expected="strictly ascending indices in every row, up to its count",
        )


def as_visibility(visibility: Any) -> Visibility:
    """Return a visibility, full when None.

    Raises:
        DtypeError: Something else was given.
    """
    if visibility is None:
        return Visibility()
    if not isinstance(visibility, Visibility):
        raise DtypeError(
            argument="visibility",
            got=_type_name(visibility),
            expected=f"a Visibility ({', '.join(VISIBILITY_ARGUMENTS)})",
        )
    return visibility


def _type_name(value: Any) -> str:
    return type(value).__name__


def _shown(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str | None) else _type_name(value)
