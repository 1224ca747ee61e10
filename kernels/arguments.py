"""What the typed fronts of the operators do to arguments: unpack them, and refuse wrong types.

Shapes, dtypes and devices are checked inside the operators; only what their schemas could not
even take is refused here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from seer_compile.errors import DtypeError
from seer_compile.kernels.checks import (
    as_visibility,
    check_integer,
    check_pools,
    check_scale,
    check_tensor,
)
from seer_compile.types import BlockSize


def require_tensor(argument: str, value: Any) -> None:
    """Raise unless a value is a tensor."""
    if not isinstance(value, Tensor):
        raise DtypeError(argument=argument, got=type(value).__name__, expected="a torch.Tensor")


def require_optional_tensor(argument: str, value: Any) -> None:
    """Raise unless a value is a tensor or None."""
    if value is not None:
        require_tensor(argument, value)


def require_attention(query: Any, key: Any, value: Any) -> None:
    """Raise unless query, key and value are tensors."""
    for name, tensor in {"query": query, "key": key, "value": value}.items():
        require_tensor(name, tensor)


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


def readable_arguments(visibility: Any) -> tuple[Any, ...]:
    """Return the fields of a visibility, in the order in which operators take them."""
    visibility = as_visibility(visibility)
    for name in ("upper", "lower"):
        bound = getattr(visibility, name)
        if bound is not None:
            check_integer(name, bound)
    for name in ("offset", "key_padding", "query_documents", "key_documents"):
        require_optional_tensor(name, getattr(visibility, name))
    return tuple(visibility.as_arguments().values())
