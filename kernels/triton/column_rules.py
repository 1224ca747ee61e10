"""What decides, besides the band, whether a row of a softmax map sees a column: padding, documents.

Rows and columns stand for ``extents`` tokens each, rows of queries and columns of keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ColumnRules(NamedTuple):
    """Padding and documents per row and column; each None where not given."""

    usable: Tensor | None
    """``UInt8[b c]``: 0 where a column holds no readable key."""
    row_low: Tensor | None
    row_high: Tensor | None
    column_low: Tensor | None
    column_high: Tensor | None
    """``Int32[b r]`` and ``Int32[b c]``: smallest and largest document id."""


def _in_units(tokens: Tensor, extent: int, fill: int) -> Tensor:
    """Return ``[b t]`` as ``[b units extent]``, the last unit filled up."""
    missing = -tokens.shape[1] % extent
    padded = torch.nn.functional.pad(tokens, (0, missing), value=fill)
    return padded.unflatten(1, (-1, extent))


def column_rules(
    extents: tuple[int, int],
    key_padding: Tensor | None,
    query_documents: Tensor | None,
    key_documents: Tensor | None,
) -> ColumnRules:
    """Return the rules for rows and columns of so many tokens."""
    usable = None
    if key_padding is not None:
        usable = _in_units(key_padding.to(torch.uint8), extents[1], 0).amax(2)
    if query_documents is None or key_documents is None:
        return ColumnRules(usable, None, None, None, None)
    limits = torch.iinfo(torch.int32)
    ranges = []
    for documents, extent in zip((query_documents, key_documents), extents, strict=True):
        ranges.append(_in_units(documents.int(), extent, limits.max).amin(2).contiguous())
        ranges.append(_in_units(documents.int(), extent, limits.min).amax(2).contiguous())
    return ColumnRules(usable, *ranges)
