"""How the sites of a model share an average density."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import numpy as np

from seer_compile.budget_curve import BudgetCurve, check_fraction
from seer_compile.errors import ModelStateError, RangeError, SeerInputError
from seer_compile.sensitivity import SensitivityCurve
from seer_compile.shares import ShareTable

Allocation = Literal["uniform", "sensitivity", "searched", "equal_marginal", "equal_budget"]
ALLOCATIONS: tuple[Allocation, ...] = get_args(Allocation)

# Divergence falls over orders of magnitude between the smallest density and 1.
_GRID_POINTS = 96
_Points = Sequence[tuple[float, float]]


def allocate(
    curves: Mapping[str, BudgetCurve],
    density: float,
    *,
    length: float,
    allocation: Allocation | None = None,
    sensitivities: Mapping[str, SensitivityCurve | None] | None = None,
    tables: Mapping[str, ShareTable | None] | None = None,
) -> dict[str, float]:
    """Share an average density between sites.

    ``uniform`` gives every site the same density. ``sensitivity`` spends the blocks where the
    output of the model suffers most without them: it minimises the sum of the divergences that
    the sites cause one at a time. ``searched`` gives what a search with all sites sparse at once
    found best. ``equal_marginal`` spends them where the measured captured mass
    rises fastest. ``equal_budget`` gives every site the same budget of the selector. No exchange
    of blocks between two sites would improve the sum of ``sensitivity`` or ``equal_marginal``,
    and neither gives a site less than its selector keeps anyway, or blocks that no budget of it
    keeps while another can use them.

    Args:
        curves: Measured curve of each site.
        density: Mean over sites of kept blocks / visible blocks, in (0, 1].
        length: Key tokens.
        allocation: How to share; None is ``searched`` where a search was made, ``sensitivity``
            where it was measured for every site, and ``uniform`` otherwise.
        sensitivities: Measured sensitivity of each site.
        tables: What a search found for each site.

    Returns:
        Density of each site.

    Raises:
        RangeError: The density is not in (0, 1], or the allocation is unknown.
        ModelStateError: Sensitivities or searched shares are asked for and are not there.
    """
    check_fraction("density", density)
    known = {name: (sensitivities or {}).get(name) for name in curves}
    searched = {name: (tables or {}).get(name) for name in curves}
    allocation = choose_allocation(allocation, known, searched)
    if density == 1:
        return dict.fromkeys(curves, 1.0)
    if allocation == "searched":
        least = least_densities(curves, length)
        found = {
            name: _searched(table, curves[name], density, length, least[name])
            for name, table in searched.items()
            if table is not None
        }
        return with_mean(found, density, least=least)
    if allocation == "uniform":
        return dict.fromkeys(curves, density)
    if allocation == "equal_budget":
        return _densities_at_one_budget(curves, density, length)
    if allocation == "equal_marginal":
        return _spend({name: _lost_mass(curve, length) for name, curve in curves.items()}, density)
    least = least_densities(curves, length)
    divergences = {
        name: _divergence(curve, length, least[name], curves[name].reachable_density(length))
        for name, curve in known.items()
        if curve is not None
    }
    return _spend(divergences, density)


def check_known(allocation: Allocation) -> None:
    """Raise unless an allocation is known.

    Raises:
        RangeError: It is not.
    """
    if allocation not in ALLOCATIONS:
        raise RangeError(argument="allocation", got=allocation, expected=f"one of {ALLOCATIONS}")


def check_shares(allocation: Allocation | None, target: str) -> None:
    """Raise where an allocation is given for a target that is set per site.

    Raises:
        SeerInputError: It is.
    """
    if allocation is not None and target not in ("density", "latency"):
        raise SeerInputError(
            argument="allocation", got=allocation, expected=f"None: {target} is set per site"
        )


def choose_allocation(
    allocation: Allocation | None,
    sensitivities: Mapping[str, SensitivityCurve | None],
    tables: Mapping[str, ShareTable | None] | None = None,
) -> Allocation:
    """Return the allocation that is meant, given what was measured at each site.

    Raises:
        RangeError: The allocation is unknown.
        ModelStateError: Sensitivities or searched shares are asked for and absent at some site.
    """
    is_searched = bool(tables) and all(table is not None for table in tables.values())
    if allocation == "searched" and not is_searched:
        raise ModelStateError(
            "no search was made over all sites",
            hint="Calibrate with CalibrationConfig(search_evaluations=40) or so.",
        )
    if allocation is None and is_searched:
        return "searched"
    absent = sorted(name for name, curve in sensitivities.items() if curve is None)
    if allocation is None:
        return "uniform" if absent else "sensitivity"
    check_known(allocation)
    if allocation == "sensitivity" and absent:
        raise ModelStateError(
            f"the sensitivity of {absent[0]!r} was not measured",
            hint="Calibrate with CalibrationConfig(sensitivity_batches=1) or more.",
            context={"sites without": len(absent)},
        )
    return allocation


def least_densities(curves: Mapping[str, BudgetCurve], length: float) -> dict[str, float]:
    """Return the density of each site at its smallest measured budget."""
    return {name: float(curve.row("densities", length).min()) for name, curve in curves.items()}


def with_mean(
    shares: Mapping[str, float],
    density: float,
    *,
    least: Mapping[str, float] | None = None,
    fixed: str | None = None,
) -> dict[str, float]:
    """Scale shares by one factor such that their mean is a density, as far as bounds allow.

    Args:
        shares: Density of each site, above 0.
        density: The mean, in (0, 1].
        least: Smallest density of each site: what every selection keeps.
        fixed: A site that is not scaled, where the others can make up for it.
    """
    floors = least or {}
    total = density * len(shares)

    def scaled(factor: float) -> dict[str, float]:
        return {
            name: min(1.0, max(floors.get(name, 0.0), share * (1.0 if name == fixed else factor)))
            for name, share in shares.items()
        }

    low, high = -40.0, 40.0
    for _ in range(80):
        middle = (low + high) / 2
        is_short = sum(scaled(2**middle).values()) < total
        low, high = (middle, high) if is_short else (low, middle)
    found = scaled(2**high)
    if fixed is None or abs(sum(found.values()) - total) < 1e-6:
        return found
    return with_mean(found, density, least=least)


def _spend(losses: Mapping[str, _Points], density: float) -> dict[str, float]:
    """Minimise the sum of falling losses, given as (density, loss), at a mean density.

    What is left when every site is at its last point goes to all, in proportion to their room.
    """
    hulls = {name: _lower_hull(points) for name, points in losses.items()}
    shares = {name: hull[0][0] for name, hull in hulls.items()}
    segments = [
        (_slope(left, right), name, right[0] - left[0])
        for name, hull in hulls.items()
        for left, right in itertools.pairwise(hull)
    ]
    left_over = density * len(hulls) - sum(shares.values())
    for _, name, width in sorted(segments, key=lambda segment: segment[0]):
        if left_over <= 0:
            break
        spent = min(width, left_over)
        shares[name] += spent
        left_over -= spent
    room = len(shares) - sum(shares.values())
    if left_over > 0 and room > 0:
        step = min(1.0, left_over / room)
        shares = {name: share + step * (1 - share) for name, share in shares.items()}
    return shares


def _lost_mass(curve: BudgetCurve, length: float) -> _Points:
    densities = np.maximum.accumulate(curve.row("densities", length))
    lost = 1 - curve.row("captured_mass", length)
    points = list(zip(densities.tolist(), lost.tolist(), strict=True))
    return points if curve.reachable_density(length) == 1 else points[:-1]


def _searched(
    table: ShareTable, curve: BudgetCurve, density: float, length: float, least: float
) -> float:
    nearest = min(max(length, table.lengths[0]), table.lengths[-1])
    measured = float(curve.row("densities", nearest).min())
    power = _power(table.lengths, length, least, measured)
    return table.at(length, density**power) ** (1 / power)


def _divergence(curve: SensitivityCurve, length: float, least: float, reach: float) -> _Points:
    measured = curve.least_density(length)
    power = _power(curve.lengths, length, least, measured)
    if length <= curve.lengths[-1]:
        least = max(least, measured)
    grid = np.geomspace(least, max(reach, least), _GRID_POINTS)
    return list(zip(grid.tolist(), curve.at(length, grid**power).tolist(), strict=True))


def _power(lengths: Sequence[int], length: float, least: float, measured: float) -> float:
    """Return the power that makes densities at a length those of as many blocks where measured.

    The same blocks are a smaller share of a longer sequence and a larger one of a shorter: the
    least density moves, the others with it, and all blocks stay all blocks.

    Args:
        lengths: Measured, ascending; between them nothing is moved.
        length: Where densities are asked for.
        least: Density that every selection keeps at the length.
        measured: The same at the nearest measured length.
    """
    is_longer = length > lengths[-1] and least < measured
    is_shorter = length < lengths[0] and least > measured
    if not (is_longer or is_shorter) or not (0 < least < 1 and 0 < measured < 1):
        return 1.0
    return math.log(measured) / math.log(least)


def _lower_hull(points: _Points) -> list[tuple[float, float]]:
    """Return the convex hull from below, so that gains per block only fall along it."""
    hull: list[tuple[float, float]] = []
    for point in points:
        if hull and point[0] - hull[-1][0] < 1e-12:
            hull[-1] = (hull[-1][0], min(hull[-1][1], point[1]))
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(left: Sequence[float], right: Sequence[float]) -> float:
    return (right[1] - left[1]) / (right[0] - left[0])


def _densities_at_one_budget(
    curves: Mapping[str, BudgetCurve], density: float, length: float
) -> dict[str, float]:
    """Return each site's density at the one budget whose mean density is the asked one."""
    first = next(iter(curves.values()))

    def densities_at(place: float) -> dict[str, float]:
        budget = first.from_axis(place)
        return {name: curve.value_at("densities", length, budget) for name, curve in curves.items()}

    # Density only rises along the axis; halving a grid's width 60 times leaves rounding.
    low, high = sorted((float(first.axis()[0]), float(first.axis()[-1])))
    rises = first.axis()[-1] > first.axis()[0]
    for _ in range(60):
        middle = (low + high) / 2
        is_above = float(np.mean(list(densities_at(middle).values()))) > density
        low, high = (low, middle) if is_above == rises else (middle, high)
    return densities_at((low + high) / 2)
