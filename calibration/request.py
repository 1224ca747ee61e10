"""What is asked of calibration, checked before anything is trained: training can take hours."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from seer_compile.allocation import Allocation, check_known, check_shares
from seer_compile.budget_curve import check_fraction
from seer_compile.calibration.record import split_batch
from seer_compile.config import CalibrationConfig
from seer_compile.errors import CalibrationDataError, SeerInputError

DEFAULT_MASS = 0.95
"""Share of the attention mass captured at every site when no target is given."""

_MEASURED_BY = {"searched": "search_evaluations", "sensitivity": "sensitivity_batches"}
"""What of a configuration an allocation lives on."""


class Targets(NamedTuple):
    """What the budgets are chosen for after training; exactly one is set."""

    density: float | None = None
    mass: float | None = None
    max_error: float | None = None
    latency: float | None = None


def checked_targets(targets: Targets) -> Targets:
    """Return the targets as floats, the default one where none is given.

    Raises:
        SeerInputError: More than one target, or one out of range.
    """
    given = {name: value for name, value in targets._asdict().items() if value is not None}
    if len(given) > 1:
        raise SeerInputError(
            argument="targets", got=given, expected=f"at most one of {', '.join(Targets._fields)}"
        )
    for name, value in given.items():
        check_fraction(name, value)
    given = {name: float(value) for name, value in given.items()}
    return Targets(**given) if given else Targets(mass=DEFAULT_MASS)


def check_allocation(
    allocation: Allocation | None, targets: Targets, config: CalibrationConfig
) -> None:
    """Raise unless the allocation can share what is asked for by what will be measured.

    Raises:
        RangeError: The allocation is unknown.
        SeerInputError: The target is set per site, or the configuration does not measure what the
            allocation shares by.
    """
    if allocation is None:
        return
    check_known(allocation)
    (target,) = (name for name, value in targets._asdict().items() if value is not None)
    check_shares(allocation, target)
    needed = _MEASURED_BY.get(allocation)
    if needed is not None and not getattr(config, needed):
        raise SeerInputError(
            argument="allocation",
            got=allocation,
            expected=f"another one, or a configuration with {needed} above 0",
        )


def checked_curve_data(curve_data: Iterable[Any]) -> tuple[Any, ...]:
    """Return the batches that budgets are measured on besides those held out.

    Raises:
        CalibrationDataError: Something else than batches.
    """
    if not isinstance(curve_data, Iterable):
        raise CalibrationDataError(
            argument="curve_data", got=type(curve_data).__name__, expected="an iterable of batches"
        )
    batches = tuple(curve_data)
    for batch in batches:
        split_batch(batch)
    return batches
