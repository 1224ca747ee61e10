"""Bands of visible positions and how blocks lie in them; for tensors whose values may be read.

A band holds the pairs of query ``i`` and key ``j`` with ``lower <= j - i <= upper``. Between two
runs of consecutive tokens ``j - i`` takes every value from its least to its largest, so that two
corners of a block pair say everything about it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from seer_compile.types import Visibility

UNBOUNDED = 1 << 40
"""Beyond the difference of any two positions."""


class Band(NamedTuple):
    """Smallest and largest visible ``j - i``, the offset added."""

    lower: int
    upper: int

    @classmethod
    def of(cls, visibility: Visibility) -> Band:
        """Return the band of a visibility. Reads the offset, which waits for a device."""
        shift = 0 if visibility.offset is None else int(visibility.offset)
        lower = -UNBOUNDED if visibility.lower is None else int(visibility.lower) + shift
        upper = UNBOUNDED if visibility.upper is None else int(visibility.upper) + shift
        return cls(lower, upper)

    def key_range(self, first_query: int, last_query: int, k_len: int) -> tuple[int, int]:
        """Return begin and end of the keys that any of some consecutive queries may read."""
        begin = min(max(first_query + self.lower, 0), k_len)
        return begin, max(min(last_query + self.upper + 1, k_len), begin)


class Grid(NamedTuple):
    """Lengths cut into units: sub-blocks or blocks of queries and keys."""

    q_len: int
    k_len: int
    query_unit: int
    key_unit: int

    @property
    def shape(self) -> tuple[int, int]:
        """Units of queries and of keys."""
        return -(-self.q_len // self.query_unit), -(-self.k_len // self.key_unit)


def edges(length: int, unit: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Return first and last token of every unit."""
    first = torch.arange(0, length, unit, device=device)
    return first, (first + unit - 1).clamp_(max=length - 1)


def visible_pairs(
    band: Band, grid: Grid, rows: slice = slice(None), columns: slice = slice(None)
) -> Tensor:
    """Return ``Bool[m n]``: pairs of units with a pair of tokens inside the band.

    Args:
        band: The band.
        grid: The lengths and units.
        rows: Query units wanted.
        columns: Key units wanted.
    """
    query_first, query_last = (edge[rows, None] for edge in edges(grid.q_len, grid.query_unit))
    key_first, key_last = (edge[columns] for edge in edges(grid.k_len, grid.key_unit))
    visible = (key_first - query_last <= band.upper) & (key_last - query_first >= band.lower)
    return visible if band.lower <= band.upper else torch.zeros_like(visible)


def diagonal(band: Band, grid: Grid, *, has_upper: bool, rows: slice = slice(None)) -> Tensor:
    """Return ``Bool[m n]``: the key units that hold the own position of a query unit.

    The position of query ``i`` among the keys is ``i + upper``; without an upper bound it is
    ``i`` where both sides have the same length, and nowhere otherwise.
    """
    query_edges = [edge[rows, None] for edge in edges(grid.q_len, grid.query_unit)]
    num_rows, num_columns = query_edges[0].shape[0], grid.shape[1]
    if num_columns == 0 or (not has_upper and grid.q_len != grid.k_len):
        return torch.zeros(num_rows, num_columns, dtype=torch.bool)
    shift = band.upper if has_upper else 0
    columns = torch.arange(num_columns)
    own = [((edge + shift).clamp(0, grid.k_len - 1) // grid.key_unit) for edge in query_edges]
    return (columns == own[0]) | (columns == own[1])


def units_with_key(key_padding: Tensor, unit: int) -> Tensor:
    """Return ``Bool[b n]`` from ``Bool[b k]``: units that hold a key which is not padding."""
    number = -(-key_padding.shape[1] // unit)
    padded = torch.nn.functional.pad(key_padding, (0, number * unit - key_padding.shape[1]))
    return padded.unflatten(1, (number, unit)).any(-1)


def document_range(documents: Tensor, unit: int) -> tuple[Tensor, Tensor]:
    """Return smallest and largest document of every unit, ``Int64[b m]`` twice."""
    documents = documents.long()
    short = -documents.shape[1] % unit
    if documents.shape[1] == 0:
        return documents, documents
    # The last token again never widens the range of the unit that it is in.
    tail = documents[:, -1:].expand(-1, short)
    units = torch.cat([documents, tail], 1).unflatten(1, (-1, unit))
    return units.amin(-1), units.amax(-1)


def visible_range(
    visibility: Visibility,
    lengths: tuple[int, int],
    blocks: tuple[int, int],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Return the key blocks that the band lets each query block see, without a sync.

    Args:
        visibility: The band; padding and documents do not count.
        lengths: Query and key tokens.
        blocks: Tokens per query block and per key block.
        device: Of the result.

    Returns:
        ``Int64[m]`` twice: the first key block, and how many there are from it on.
    """
    first = torch.arange(0, lengths[0], blocks[0], device=device)
    last = (first + blocks[0] - 1).clamp(max=lengths[0] - 1)
    shift = 0 if visibility.offset is None else visibility.offset.to(device)
    begin, end = torch.zeros_like(first), torch.full_like(first, lengths[1])
    if visibility.lower is not None:
        begin = (first + visibility.lower + shift).clamp(min=0)
    if visibility.upper is not None:
        end = (last + visibility.upper + shift + 1).clamp(max=lengths[1])
    number = (end + blocks[1] - 1) // blocks[1] - begin // blocks[1]
    is_open = end > begin
    if visibility.lower is not None and visibility.upper is not None:
        is_open &= visibility.lower <= visibility.upper
    return begin // blocks[1], number.where(is_open, torch.zeros_like(number))
