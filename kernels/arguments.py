"""What the typed fronts of the operators do to arguments: unpack them, and refuse wrong types.

Shapes, dtypes and devices are checked inside the operators; only what their schemas could not
even take is refused here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seer_compile.errors import DeviceError, DtypeError
from seer_compile.kernels.checks import (
    as_visibility,
    blocks_of,
    check_attention,
    check_integer,
    check_pools,
    check_scale,
    check_selection,
    check_selection_values,
    check_tensor,
)
from seer_compile.types import BlockSelection, BlockSize


def require_tensor(argument: str, value: Any, *, like: Tensor | None = None) -> None:
    """Raise unless a value is a tensor, on the device of another one where given.

    Devices are compared here too: the dispatcher takes a mixture with meta tensors for a trace.
    """
    if not isinstance(value, Tensor):
        raise DtypeError(argument=argument, got=type(value).__name__, expected="a torch.Tensor")
    if like is not None and value.device != like.device:
        raise DeviceError(
            argument=f"{argument}.device", got=str(value.device), expected=str(like.device)
        )


def require_optional_tensor(argument: str, value: Any, *, like: Tensor) -> None:
    """Raise unless a value is None or a tensor on the device of another one."""
    if value is not None:
        require_tensor(argument, value, like=like)


def require_attention(query: Any, key: Any, value: Any) -> None:
    """Raise unless query, key and value are tensors on one device."""
    require_tensor("query", query)
    for name, tensor in {"key": key, "value": value}.items():
        require_tensor(name, tensor, like=query)


def require_selection(
    selection: Any, query: Tensor, key: Tensor, value: Tensor, blocks: tuple[int, int]
) -> BlockSelection:
    """Return a selection that fits its operands; its values are checked where that is free.

    Raises:
        SeerInputError: Something else, or a selection that does not fit.
    """
    if not isinstance(selection, tuple) or len(selection) != 2:
        raise DtypeError(
            argument="selection", got=type(selection).__name__, expected="a BlockSelection"
        )
    for name, tensor in zip(("indices", "counts"), selection, strict=True):
        require_tensor(name, tensor, like=query)
    selection = BlockSelection(*selection)
    if not torch.compiler.is_compiling() and query.device.type == "cpu":
        check_attention(query, key, value)
        check_selection(selection, query, query_block=blocks[0], kv_heads=key.shape[1])
        check_selection_values(selection, blocks_of(key.shape[2], blocks[1]))
    return selection


def joined_pools(argument: str, kinds: Any) -> str:
    """Return pool kinds as operators take them: comma-joined."""
    if isinstance(kinds, str) or not isinstance(kinds, Sequence):
        raise DtypeError(
            argument=argument, got=type(kinds).__name__, expected="a sequence of pool kinds"
        )
    joined = ",".join(str(kind) for kind in kinds)
    check_pools(argument, joined)
    return joined


def block_tokens(block_size: Any) -> tuple[int, int]:
    """Return tokens per query block and per key block."""
    if not isinstance(block_size, BlockSize):
        raise DtypeError(
            argument="block_size", got=type(block_size).__name__, expected="a BlockSize"
        )
    return block_size.query, block_size.key


def scale_or_default(scale: Any, query: Tensor) -> float:
    """Return the factor on the logits, ``1 / sqrt(d)`` when None."""
    if scale is None:
        check_tensor("query", query, rank=4)
        return 1 / math.sqrt(query.shape[-1])
    check_scale(scale)
    return float(scale)


def readable_arguments(visibility: Any, like: Tensor) -> tuple[Any, ...]:
    """Return the fields of a visibility, in the order in which operators take them."""
    visibility = as_visibility(visibility)
    for name in ("upper", "lower"):
        bound = getattr(visibility, name)
        if bound is not None:
            check_integer(name, bound)
    if visibility.offset is not None:
        require_tensor("offset", visibility.offset)
    for name in ("key_padding", "query_documents", "key_documents"):
        require_optional_tensor(name, getattr(visibility, name), like=like)
    return tuple(visibility.as_arguments().values())
