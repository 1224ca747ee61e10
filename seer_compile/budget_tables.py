"""From a target for the whole model to the budget of every gate at every length."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Mapping

from seer_compile.allocation import Allocation, allocate
from seer_compile.budget_curve import BudgetCurve, check_reachable
from seer_compile.callers import warn_caller
from seer_compile.config import GateConfig
from seer_compile.errors import DensityNotReachedWarning, ModelStateError
from seer_compile.gate import BUDGET_LENGTHS
from seer_compile.latency import density_for_time
from seer_compile.sensitivity import SensitivityCurve
from seer_compile.shares import ShareTable

# Between measured budgets densities are interpolated.
_REACHED_WITHIN = 0.05


def budget_tables(
    curves: Mapping[str, BudgetCurve | None],
    config: GateConfig,
    target: str,
    value: float,
    *,
    allocation: Allocation | None,
    sensitivities: Mapping[str, SensitivityCurve | None],
    searched: Mapping[str, ShareTable | None] | None = None,
    time_of: Callable[[Mapping[str, float], int], float] | None = None,
) -> dict[str, list[float]]:
    """Translate a target into budgets of the selector.

    Args:
        curves: What budgets were measured to buy, by site; None where nothing was measured.
        config: The gates' selector.
        target: ``density``, ``mass``, ``max_error`` or ``latency``.
        value: Of the target, in (0, 1].
        allocation: How sites share an average density; see
            :func:`seer_compile.allocation.allocate`.
        sensitivities: What it costs the model when one site is sparse, by site.
        searched: What a search over all sites found, by site.
        time_of: Relative time of all sites, given their densities and a length; for ``latency``.

    Returns:
        For each site whose budget moves, the budget at each of ``BUDGET_LENGTHS``. A site without
        a curve beside others that have one was never trained, answers densely and is left out.

    Raises:
        ModelStateError: No gate has a curve, and the target is not the selector's own unit; or
            the allocation needs sensitivities that were not measured.
        NotConvergedError: No budget keeps the error within ``max_error``, or is fast enough.

    Warns:
        DensityNotReachedWarning: What every selection keeps is more than ``density``.
    """
    known = {name: curve for name, curve in curves.items() if curve is not None}
    if not known:
        return {
            name: [_in_own_unit(target, value, config, name)] * len(BUDGET_LENGTHS)
            for name in curves
        }
    if target == "max_error":
        check_reachable(known, value)
    measured = sorted({length for curve in known.values() for length in curve.whole_lengths})

    def shared(density: float, length: int) -> dict[str, float]:
        return allocate(
            known,
            density,
            length=length,
            allocation=allocation,
            sensitivities=sensitivities,
            tables=searched,
        )

    tables: dict[str, list[float]] = {name: [] for name in known}
    for length in BUDGET_LENGTHS:
        shares: Mapping[str, float] = {}
        if target == "density":
            shares = shared(value, length)
        elif target == "latency" and time_of is not None:
            density = density_for_time(
                value,
                functools.partial(_time_at, shared, time_of, length),
                must_reach=length >= measured[-1],
                length=length,
            )
            shares = shared(density, length)
        unit = "density" if shares else target
        for name, curve in known.items():
            tables[name].append(curve.budget_at(length, unit, shares.get(name, value)))
    if target == "density":
        _warn_of_floors(known, value, {length: shared(value, length) for length in measured})
    return tables


def _warn_of_floors(
    curves: Mapping[str, BudgetCurve], asked: float, shares: Mapping[int, Mapping[str, float]]
) -> None:
    """Compare the density that was asked for with the one that the curves give, per length."""
    reached: dict[int, float] = {}
    for length, by_site in shares.items():
        budgets = {
            name: curve.budget_for(length, density=by_site[name]) for name, curve in curves.items()
        }
        found = [
            curve.value_at("densities", length, budgets[name]) for name, curve in curves.items()
        ]
        if statistics.fmean(found) > asked * (1 + _REACHED_WITHIN):
            reached[length] = statistics.fmean(found)
    if not reached:
        return
    listed = ", ".join(f"{density:.3g} at {length:,} tokens" for length, density in reached.items())
    warn_caller(
        DensityNotReachedWarning(
            f"density={asked:g} is not reached: what every selection keeps (the query's own block, "
            f"the first and the best) makes {listed}. Of longer inputs it is a smaller share.",
            asked=asked,
            reached=reached,
        )
    )


def _time_at(
    shared: Callable[[float, int], Mapping[str, float]],
    time_of: Callable[[Mapping[str, float], int], float],
    length: int,
    density: float,
) -> float:
    return time_of(shared(density, length), length)


def _in_own_unit(target: str, value: float, config: GateConfig, name: str) -> float:
    """Return the budget of a gate without a curve, where the target is the selector's own unit."""
    own_unit = {"top_p": "mass", "fraction": "density"}
    if own_unit.get(config.selector.name) == target:
        return value
    raise ModelStateError(
        f"the gate of {name!r} has no measured curve, so {target}={value} cannot be translated "
        f"into a budget of the {config.selector.name!r} selector",
        hint="Calibrate the model, load calibrated gates, or give the selector's own unit.",
    )
