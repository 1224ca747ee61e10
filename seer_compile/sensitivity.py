"""How much a model's output suffers when one site alone is sparse.

The mass that a selection captures says what a site loses, not what the model loses: some sites
spread their attention thinly and hardly matter, others carry one fact in one block. L lengths, D
densities.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from seer_compile.errors import SeerInputError
from seer_compile.plain_data import PlainData, Table, lengths_of, reading, table_of

# Below this, divergences are rounding: their logarithm flattens out, and 0 stays 0.
_LEAST_DIVERGENCE = 1e-9


@dataclass(frozen=True, kw_only=True, slots=True)
class SensitivityCurve(PlainData):
    """Divergence of the model's output against the density of one site, per sequence length.

    Every other site is dense. At density 1 the divergence is 0 and is not stored.
    """

    lengths: tuple[int, ...]
    """Key tokens of the measured sequences, ascending."""
    densities: Table
    """L x D: kept blocks / visible blocks, ascending."""
    divergences: Table
    """L x D: of the model's output from the dense one; see
    :func:`seer_compile.calibration.sensitivity.output_divergence`."""

    def __post_init__(self) -> None:
        if not self.lengths or list(self.lengths) != sorted(set(self.lengths)):
            raise SeerInputError("a sensitivity curve needs ascending lengths")
        shapes = {
            name: (len(table), *{len(row) for row in table})
            for name, table in (("densities", self.densities), ("divergences", self.divergences))
        }
        shape = shapes["densities"]
        if shapes["divergences"] != shape or len(shape) != 2 or shape[0] != len(self.lengths):
            raise SeerInputError(argument="shapes", got=shapes, expected="equal, a row per length")
        numbers = np.asarray([self.densities, self.divergences])
        if numbers.size == 0 or not np.isfinite(numbers).all() or (numbers < 0).any():
            raise SeerInputError("a sensitivity curve needs finite numbers that are not negative")

    def at(self, length: float, densities: Sequence[float] | np.ndarray) -> np.ndarray:
        """Return ``Float64[len(densities)]``: divergences at a length, never rising with density.

        Between measured points logarithms are straight; lengths are interpolated by their
        logarithm and clamped.
        """
        wanted = np.log(np.maximum(np.asarray(densities, dtype=np.float64), 1e-6))
        rows = [np.interp(wanted, *self._log_points(place)) for place in range(len(self.lengths))]
        places = np.log2(np.asarray(self.lengths, dtype=np.float64))
        place = float(np.clip(math.log2(max(length, 1)), places[0], places[-1]))
        mixed = np.array([np.interp(place, places, column) for column in np.array(rows).T])
        return _LEAST_DIVERGENCE * np.expm1(np.minimum.accumulate(mixed))

    def least_density(self, length: float) -> float:
        """Return the smallest density measured at a length: what every selection keeps."""
        places = np.log2(np.asarray(self.lengths, dtype=np.float64))
        firsts = [row[0] for row in self.densities]
        return float(np.interp(math.log2(max(length, 1)), places, firsts))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SensitivityCurve:
        """Rebuild a curve from :meth:`to_json`.

        Raises:
            SeerInputError: The data is not a curve.
        """
        with reading("a sensitivity curve"):
            return cls(
                lengths=lengths_of(data["lengths"]),
                densities=table_of(data["densities"]),
                divergences=table_of(data["divergences"]),
            )

    def _log_points(self, place: int) -> tuple[np.ndarray, np.ndarray]:
        densities = np.asarray((*self.densities[place], 1.0))
        divergences = np.asarray((*self.divergences[place], 0.0))
        return np.log(np.maximum(densities, 1e-6)), np.log1p(divergences / _LEAST_DIVERGENCE)
