"""What a calibration learned, as frozen plain data: per site, beside the oracle and the control."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from seer_compile.budget_curve import BudgetCurve
from seer_compile.calibration.budget import BlockMap, SiteTable
from seer_compile.gate_store import GateStore
from seer_compile.sensitivity import SensitivityCurve

_SCHEMA = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteReport:
    """One site at the budget that was chosen, at one sequence length.

    Density is kept blocks / visible blocks. Captured mass (recall) is the share of the dense
    attention probability inside the selection, mean over rows.
    """

    name: str
    losses: tuple[float | None, ...]
    """Training loss per step; None where a step did not reach the site."""
    curve: BudgetCurve
    """The gate's own curve, at every length."""
    oracle: BudgetCurve
    """The same selector on the true mass map."""
    control: BudgetCurve
    """Sink and local window."""
    sub_blocks: tuple[int, int]
    """Tokens of queries and of keys that the gate pools together."""
    length: int
    """Key tokens at which the numbers below hold."""
    budget: float
    density: float
    captured_mass: float
    oracle_mass: float
    """What the oracle captures at the same density."""
    control_mass: float
    """What sink and local window capture at the same density."""
    head_densities: tuple[float, ...]
    """Density per selection head at the chosen budget."""
    block_map: BlockMap
    sensitivity: SensitivityCurve | None = None
    """What the site's sparsity alone costs the model's output; None when not measured."""
    divergence: float | None = None
    """Of the model's output when this site alone has this density."""

    @property
    def last_loss(self) -> float:
        """Loss of the last step that reached the site; NaN when none did."""
        return next((loss for loss in reversed(self.losses) if loss is not None), math.nan)

    @property
    def closed_gap(self) -> float:
        """Share of the way from the control to the oracle: 0 is the control, 1 the oracle."""
        gap = self.oracle_mass - self.control_mass
        return (self.captured_mass - self.control_mass) / gap if gap > 1e-9 else 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationReport:
    """The result of a calibration."""

    sites: tuple[SiteReport, ...]
    target: dict[str, float]
    """The target asked for, by name."""
    allocation: str
    """How sites share an average density."""
    config: dict[str, Any]
    """The calibration's configuration."""
    steps: int
    """Steps that were done."""

    @property
    def density(self) -> float:
        """Mean density over sites."""
        return _mean([site.density for site in self.sites])

    @property
    def captured_mass(self) -> float:
        """Mean captured mass over sites."""
        return _mean([site.captured_mass for site in self.sites])

    @property
    def losses(self) -> tuple[float, ...]:
        """Mean loss over sites, per step; NaN where a step reached no site."""
        steps = zip(*(site.losses for site in self.sites), strict=True)
        return tuple(_mean([loss for loss in step if loss is not None]) for step in steps)

    def summary(self) -> dict[str, Any]:
        """Return the few numbers that a gate file keeps."""
        return {
            "target": self.target,
            "allocation": self.allocation,
            "steps": self.steps,
            "config": self.config,
            "density": self.density,
            "captured_mass": self.captured_mass,
            "oracle_mass": _mean([site.oracle_mass for site in self.sites]),
            "control_mass": _mean([site.control_mass for site in self.sites]),
        }

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return everything as JSON, and write it when a path is given."""
        data = {"schema": _SCHEMA, **dataclasses.asdict(self), "summary": self.summary()}
        text = json.dumps(data, indent=1, allow_nan=False)
        if path is not None:
            with open(path, "w", encoding="utf-8") as file:
                file.write(text)
        return text

    def save_html(self, path: str | os.PathLike[str]) -> None:
        """Write one self-contained page with tables and plots; it needs no network."""
        from seer_compile.calibration.report_html import render_html

        with open(path, "w", encoding="utf-8") as file:
            file.write(render_html(self))

    def save_png(self, path: str | os.PathLike[str]) -> None:
        """Draw the report's plots into one picture.

        Raises:
            FeatureUnsupportedError: matplotlib is not installed.
        """
        from seer_compile.calibration.plots import save_png

        save_png(self, path)

    def __str__(self) -> str:
        """Return a table of the sites."""
        width = max([4, *(len(site.name) for site in self.sites)])
        lines = [
            f"{'site':<{width}}  pools  budget  density    mass  oracle  control    loss  "
            "divergence"
        ]
        lines += [
            f"{site.name:<{width}}  {show_sub_blocks(site.sub_blocks):>5}  {site.budget:6.4g}  "
            f"{site.density:7.3f}  {site.captured_mass:6.3f}  {site.oracle_mass:6.3f}  "
            f"{site.control_mass:7.3f}  "
            f"{site.last_loss:6.4f}  {show_divergence(site.divergence):>10}"
            for site in self.sites
        ]
        mean = f"{'mean':<{width}}  {'':5}  {'':6}  {self.density:7.3f}  {self.captured_mass:6.3f}"
        return "\n".join([*lines, mean])


def build_report(
    store: GateStore,
    tables: Mapping[str, SiteTable],
    *,
    losses: Mapping[str, Sequence[float]],
    config: Mapping[str, Any],
    target: Mapping[str, float],
    allocation: str,
) -> CalibrationReport:
    """Assemble the report of the budgets that the store holds now.

    Args:
        store: The gates, with their budgets set.
        tables: What was measured per site.
        losses: Loss of every step per site; NaN where a step did not reach the site.
        config: The calibration's configuration.
        target: The target by name.
        allocation: How sites share an average density.
    """
    sites = tuple(
        _site_report(store, name, table, losses.get(name, ())) for name, table in tables.items()
    )
    return CalibrationReport(
        sites=sites,
        target=dict(target),
        allocation=allocation,
        config=dict(config),
        steps=max((len(site.losses) for site in sites), default=0),
    )


def _site_report(
    store: GateStore, name: str, table: SiteTable, losses: Sequence[float]
) -> SiteReport:
    gate = store.get(name)
    assert gate is not None
    length = table.gate.lengths[-1]
    budget = float(gate.budget_at(length).mean())
    density = table.gate.value_at("densities", length, budget)
    heads = zip(*table.head_densities, strict=True)
    return SiteReport(
        name=name,
        losses=tuple(None if math.isnan(loss) else loss for loss in losses),
        curve=table.gate,
        oracle=table.oracle,
        control=table.control,
        sub_blocks=gate.config.sub_blocks,
        length=length,
        budget=budget,
        density=density,
        captured_mass=table.gate.value_at("captured_mass", length, budget),
        oracle_mass=table.oracle.mass_at_density(length, density),
        control_mass=table.control.mass_at_density(length, density),
        head_densities=tuple(table.gate.interpolate(head, budget) for head in heads),
        block_map=table.block_map,
        sensitivity=gate.sensitivity,
        divergence=(
            None if gate.sensitivity is None else float(gate.sensitivity.at(length, [density])[0])
        ),
    )


def show_sub_blocks(sizes: tuple[int, int]) -> str:
    """Return sub-block sizes for a table: queries, keys."""
    return ",".join(map(str, sizes))


def show_divergence(divergence: float | None) -> str:
    """Return a divergence for a table."""
    return "-" if divergence is None else f"{divergence:.2g}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
