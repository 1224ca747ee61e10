"""What a budget buys at one site: measured density and captured mass.

A curve is measured at calibration and stored with the gates, so that the budget can be moved at
run time without data. L lengths, P budgets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

from seer_compile.errors import NotConvergedError, RangeError, SeerInputError
from seer_compile.plain_data import (
    PlainData,
    Row,
    Table,
    lengths_of,
    reading,
    row_of,
    table_of,
)

# A mass of exactly 1 has no finite log odds; this is where it is drawn.
_LEAST_REST = 1e-14
_LEAST_DENSITY = 1e-6
_LEAST_RESOLVED_REST = 2e-12
# Between neighbouring budgets, in mass or relative error.
_JUMP = 0.05
# Octaves beyond the longest measured length for which its trend is trusted: docs/budgets.md.
_FURTHEST = 1.0
# Octaves between the lengths that show it: what differs over less is mostly the text.
_LEAST_SPAN = 0.75


@dataclass(frozen=True, kw_only=True, slots=True)
class BudgetCurve(PlainData):
    """Density and captured mass of one site against the selector's budget, per sequence length."""

    selector: str
    """Name of the selector that the budgets belong to."""
    lengths: tuple[int, ...]
    """Key tokens of the measured sequences, ascending."""
    budgets: Row
    """P numbers handed to the selector, in the order of rising density."""
    densities: Table
    """L x P: kept blocks / visible blocks."""
    captured_mass: Table
    """L x P: share of the dense attention probability inside the selection, mean over rows."""
    errors: Table | None = None
    """L x P: relative L2 error of the site's output; None when it was not measured."""
    halves: tuple[int, ...] = ()
    """Of the lengths those at which no whole sequence was measured, only the first half of one."""

    def __post_init__(self) -> None:
        if not self.lengths or not self.budgets or list(self.lengths) != sorted(set(self.lengths)):
            raise SeerInputError("a budget curve needs ascending lengths and at least one budget")
        for name in ("densities", "captured_mass", "errors"):
            table = getattr(self, name)
            if table is None:
                continue
            shape = (len(table), *{len(row) for row in table})
            if shape != (len(self.lengths), len(self.budgets)) or not np.isfinite(table).all():
                raise SeerInputError(
                    argument=name,
                    got=shape,
                    expected=f"{len(self.lengths)} x {len(self.budgets)} finite numbers",
                )

    @property
    def whole_lengths(self) -> tuple[int, ...]:
        """The lengths at which whole sequences were measured."""
        return tuple(length for length in self.lengths if length not in self.halves)

    def row(self, name: str, length: float) -> np.ndarray:
        """Return ``Float64[P]`` of one table at a length.

        Between measured lengths it is linear in log2(length), below them that of the shortest.
        Above them densities go on as they fell over the last octave, for one octave more: a
        budget that keeps a tenth of the blocks of 8,192 tokens keeps less of 16,384. The other
        tables stay as they are at the longest.
        """
        table = np.asarray(getattr(self, name), dtype=np.float64)
        places = np.log2(np.asarray(self.lengths, dtype=np.float64))
        wanted = math.log2(max(length, 1))
        place = float(np.clip(wanted, places[0], places[-1]))
        row = _mixed(table, places, place)
        octave = min(1.0, places[-1] - places[0])
        if name != "densities" or wanted <= places[-1] or octave < _LEAST_SPAN:
            return row
        before = np.maximum(_mixed(table, places, places[-1] - octave), _LEAST_DENSITY)
        # A density that rose with length is not taken to go on rising: budgets would be cut.
        fall = np.minimum(np.log(np.maximum(row, _LEAST_DENSITY) / before), 0.0) / octave
        return row * np.exp(fall * min(wanted - places[-1], _FURTHEST))

    def budget_for(self, length: float, *, density: float) -> float:
        """Return the budget that gives a density at a length; the nearest measured end outside.

        A share of the mass so close to 1 that float32 sums cannot tell it from 1 is never given,
        unless all blocks are asked for: where nearly all mass sits in few blocks, the density
        stays below the asked one.
        """
        if density >= 1:
            return self._everything()
        known = np.maximum.accumulate(np.maximum(self.row("densities", length), _LEAST_DENSITY))
        if self.reachable_density(length) <= density < known[-1]:
            return self.budgets[-2]
        wanted = math.log(max(density, _LEAST_DENSITY))
        return self.from_axis(np.interp(wanted, np.log(known), self.axis()))

    def reachable_density(self, length: float) -> float:
        """Return the density at a length above which only all blocks are to be had; 1 if any is.

        See :meth:`budget_for`.
        """
        if self.selector != "top_p" or len(self.budgets) < 2:
            return 1.0
        if 1 - self.budgets[-2] > _LEAST_RESOLVED_REST:
            return 1.0
        known = np.maximum(self.row("densities", length), _LEAST_DENSITY)
        return float(known[:-1].max())

    def budget_for_mass(self, length: float, *, mass: float) -> float:
        """Return the smallest budget whose captured mass reaches ``mass`` at a length.

        All of the mass takes every block, even if less held all of what was measured.
        """
        if mass >= 1:
            return self._everything()
        return self._reach(1 - self.row("captured_mass", length), 1 - mass)

    def budget_for_error(self, length: float, *, error: float) -> float:
        """Return the smallest budget whose output error stays within ``error`` at a length.

        Raises:
            SeerInputError: Errors were not measured.
        """
        if self.errors is None:
            raise SeerInputError(
                "output errors were not measured for these gates",
                hint="Calibrate with max_error=... to measure them.",
            )
        return self._reach(self.row("errors", length), error)

    def budget_at(self, length: float, target: str, value: float) -> float:
        """Return the budget for ``density``, ``mass`` or ``max_error`` at a length."""
        if target == "density":
            return self.budget_for(length, density=value)
        if target == "mass":
            return self.budget_for_mass(length, mass=value)
        return self.budget_for_error(length, error=value)

    def _everything(self) -> float:
        """Return the budget that keeps every visible block, whatever was measured."""
        has_full = self.selector in ("top_p", "fraction")
        return 1.0 if has_full else self.from_axis(self.axis()[-1])

    def _reach(self, lost: np.ndarray, allowed: float) -> float:
        """Return the first budget that loses no more than is allowed, between measured ones."""
        lost = np.minimum.accumulate(lost)
        axis, after = self.axis(), int(np.argmax(lost <= allowed + 1e-9))
        if lost[after] > allowed + 1e-9:
            return self.from_axis(axis[-1])
        # Where the loss jumps, a straight line across would promise what was not measured.
        if after == 0 or lost[after - 1] - lost[after] > _JUMP:
            return self.from_axis(axis[after])
        known = -np.log(np.maximum(lost[after - 1 : after + 1], _LEAST_REST))
        wanted = -math.log(max(allowed, _LEAST_REST))
        return self.from_axis(np.interp(wanted, known, axis[after - 1 : after + 1]))

    def value_at(self, name: str, length: float, budget: float) -> float:
        """Return one table's value at a length and budget, by interpolation.

        Densities are interpolated by their logarithm, the inverse of :meth:`budget_for`.
        """
        row = self.row(name, length)
        if name == "densities":
            return math.exp(self.interpolate(np.log(np.maximum(row, _LEAST_DENSITY)), budget))
        return self.interpolate(row, budget)

    def interpolate(self, values: Sequence[float] | np.ndarray, budget: float) -> float:
        """Return the value at a budget of a row of P values, one for each of the budgets."""
        axis, row = self.axis(), np.asarray(values, dtype=np.float64)
        place = self.to_axis(np.asarray([budget]))[0]
        if axis[0] > axis[-1]:
            axis, row = axis[::-1], row[::-1]
        return float(np.interp(place, axis, row))

    def mass_at_density(self, length: float, density: float) -> float:
        """Return the captured mass that a density buys at a length."""
        known = np.maximum.accumulate(self.row("densities", length))
        return float(np.interp(density, known, self.row("captured_mass", length)))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> BudgetCurve:
        """Rebuild a curve from :meth:`to_json`.

        Raises:
            SeerInputError: The data is not a curve.
        """
        with reading("a budget curve"):
            errors = data.get("errors")
            return cls(
                selector=str(data["selector"]),
                lengths=lengths_of(data["lengths"]),
                budgets=row_of(data["budgets"]),
                densities=table_of(data["densities"]),
                captured_mass=table_of(data["captured_mass"]),
                errors=None if errors is None else table_of(errors),
                halves=lengths_of(data.get("halves", ())),
            )

    def axis(self) -> np.ndarray:
        """Return ``Float64[P]``: the budgets in coordinates in which density is nearly straight."""
        return self.to_axis(np.asarray(self.budgets, dtype=np.float64))

    def to_axis(self, budgets: np.ndarray) -> np.ndarray:
        """Return budgets in the coordinates of :meth:`axis`."""
        if self.selector == "top_p":
            return -np.log(np.maximum(1 - budgets, _LEAST_REST))
        return np.log(np.maximum(budgets, 1e-12))

    def from_axis(self, place: float) -> float:
        """Return the budget at a place on :meth:`axis`."""
        if self.selector == "top_p":
            rest = math.exp(-float(place))
            return 1.0 if rest <= _LEAST_REST * (1 + 1e-9) else 1 - rest
        return math.exp(float(place))


def _mixed(table: np.ndarray, places: np.ndarray, place: float) -> np.ndarray:
    """Return the row of a table at a place between those of its rows."""
    return np.array([np.interp(place, places, column) for column in table.T])


def check_reachable(curves: Mapping[str, BudgetCurve], max_error: float) -> None:
    """Raise unless some measured budget keeps every site's output error within a limit.

    At the full budget the error is rounding, about 1e-3 in bfloat16: no budget goes below it.

    Raises:
        NotConvergedError: Naming the site whose least error is largest.
    """
    least = {name: max(map(min, curve.errors)) for name, curve in curves.items() if curve.errors}
    worst = max(least, key=lambda name: least[name], default=None)
    if worst is not None and least[worst] > max_error:
        raise NotConvergedError(
            f"no budget keeps the output error of {worst!r} within {max_error:g}; "
            f"the least measured is {least[worst]:.3g}",
            hint="Allow a larger max_error, or leave that site dense.",
        )


def check_fraction(argument: str, value: float) -> None:
    """Raise unless a value is a number in (0, 1]."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value <= 1:
        raise RangeError(argument=argument, got=value, expected="a number in (0, 1]")
