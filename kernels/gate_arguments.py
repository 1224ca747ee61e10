"""What a gate adds to the arguments of attention, and what a whole call looks like."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

from torch import Tensor

from seer_compile.types import Visibility


class GateArguments(NamedTuple):
    """What a gate adds to query, key and value; the fields are the operator's, in its order."""

    query_weight: Tensor
    key_weight: Tensor
    budget: Tensor
    mode: Tensor
    scale: float
    query_pools: str
    key_pools: str
    query_sub_block: int
    key_sub_block: int
    query_block: int
    key_block: int
    sharing: str
    selector: str
    budget_lengths: list[int]
    site: str


def selection_heads(query: Tensor, key: Tensor, gate: GateArguments) -> int:
    """Return the number of selections per batch item."""
    return (query if gate.sharing == "none" else key).shape[1]


def look_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: GateArguments,
    visibility: Visibility,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Hashable:
    """Return all of a call but the numbers in its tensors and how these lie in memory."""
    masks = (visibility.offset, visibility.key_padding)
    documents = (visibility.query_documents, visibility.key_documents)
    tensors = (query, key, value, *gate[:4], *masks, *documents, sinks)
    return (
        # A list, as every call pays for it: a generator takes twice as long.
        *[None if x is None else (x.shape, x.dtype, x.device) for x in tensors],
        *gate[4:-2],
        tuple(gate.budget_lengths),
        visibility.upper,
        visibility.lower,
        softcap,
    )
