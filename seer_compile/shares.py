"""Which density a site had when a search shared a mean density between all of them.

L lengths, D densities.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from seer_compile.errors import SeerInputError
from seer_compile.plain_data import (
    PlainData,
    Row,
    Table,
    lengths_of,
    reading,
    row_of,
    table_of,
)

_LEAST_DENSITY = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class ShareTable(PlainData):
    """The density of one site against the mean over all sites, per sequence length."""

    lengths: tuple[int, ...]
    """Key tokens, ascending."""
    asked: Row
    """D mean densities, ascending."""
    shares: Table
    """L x D: kept / visible blocks of this site."""

    def __post_init__(self) -> None:
        for name in ("lengths", "asked"):
            values = getattr(self, name)
            if not values or list(values) != sorted(set(values)):
                raise SeerInputError(argument=name, got=values, expected="ascending numbers")
        table = np.asarray(self.shares, dtype=np.float64)
        shape = (len(self.lengths), len(self.asked))
        if table.shape != shape or not (np.isfinite(table) & (table > 0) & (table <= 1)).all():
            raise SeerInputError(
                argument="shares", got=table.shape, expected=f"{shape} numbers in (0, 1]"
            )

    def at(self, length: float, density: float) -> float:
        """Return the site's density at a length and a mean density.

        Logarithms are straight between what was searched; at a mean density of 1 all blocks are
        kept, and below the smallest the site keeps its proportion.
        """
        asked = np.log(np.asarray((*self.asked, 1.0) if self.asked[-1] < 1 else self.asked))
        wanted = math.log(max(density, _LEAST_DENSITY))
        rows = []
        for row in self.shares:
            logs = np.log(np.asarray((*row, 1.0) if self.asked[-1] < 1 else row))
            below = min(0.0, wanted - float(asked[0]))
            rows.append(float(np.interp(wanted, asked, logs)) + below)
        places = np.log2(np.asarray(self.lengths, dtype=np.float64))
        return float(math.exp(np.interp(math.log2(max(length, 1)), places, rows)))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ShareTable:
        """Rebuild a table from :meth:`to_json`.

        Raises:
            SeerInputError: The data is not a table.
        """
        with reading("a table of shares"):
            return cls(
                lengths=lengths_of(data["lengths"]),
                asked=row_of(data["asked"]),
                shares=table_of(data["shares"]),
            )
