"""The report as one picture, by matplotlib, which is optional."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from seer_compile.errors import FeatureUnsupportedError

if TYPE_CHECKING:
    from seer_compile.calibration.report import CalibrationReport


def save_png(report: CalibrationReport, path: str | os.PathLike[str]) -> None:
    """Draw loss, mass against density, density per head, and one block map beside its oracle.

    No window system is needed and matplotlib's global state stays as it is.

    Raises:
        FeatureUnsupportedError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as cause:
        raise FeatureUnsupportedError(
            "save_png needs matplotlib", hint="pip install 'seer_compile[plots]'"
        ) from cause
    figure = Figure(figsize=(15, 9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3)
    _draw_losses(axes[0, 0], report)
    _draw_curves(axes[0, 1], report)
    _draw_sites(axes[0, 2], report)
    _draw_heads(figure, axes[1, 0], report)
    site = report.sites[len(report.sites) // 2]
    _draw_map(axes[1, 1], site.block_map.scores, f"{site.name}: gate")
    _draw_map(axes[1, 2], site.block_map.oracle, f"{site.name}: oracle")
    figure.suptitle(
        f"{len(report.sites)} sites, density {report.density:.3f}, "
        f"captured mass {report.captured_mass:.3f}"
    )
    figure.savefig(path, dpi=120, format="png")


def _draw_losses(axis: Any, report: CalibrationReport) -> None:
    for site in report.sites:
        losses = [np.nan if loss is None else loss for loss in site.losses]
        axis.plot(losses, color="0.75", linewidth=0.8)
    axis.plot(report.losses, color="tab:blue", label="mean over sites")
    axis.set(title="Training loss", xlabel="step", ylabel="loss")
    axis.legend()


def _draw_curves(axis: Any, report: CalibrationReport) -> None:
    grid = np.geomspace(0.005, 1, 60)
    for label, colour in (("oracle", "tab:green"), ("gate", "tab:blue"), ("control", "tab:orange")):
        masses = [
            [
                getattr(site, "curve" if label == "gate" else label).mass_at_density(
                    site.length, density
                )
                for density in grid
            ]
            for site in report.sites
        ]
        axis.plot(grid, np.mean(masses, axis=0), color=colour, label=label)
    axis.axvline(report.density, color="0.5", linewidth=0.8)
    axis.set(title="Captured mass, mean over sites", xlabel="density", ylabel="mass", xscale="log")
    axis.legend()


def _draw_sites(axis: Any, report: CalibrationReport) -> None:
    places = np.arange(len(report.sites))
    for offset, name in ((-0.25, "oracle_mass"), (0, "captured_mass"), (0.25, "control_mass")):
        values = [getattr(site, name) for site in report.sites]
        axis.bar(places + offset, values, width=0.25, label=name.replace("_", " "))
    axis.set(title="Mass at the chosen density", xlabel="site", ylabel="mass")
    axis.legend()


def _draw_heads(figure: Any, axis: Any, report: CalibrationReport) -> None:
    heads = max(len(site.head_densities) for site in report.sites)
    table = np.full((len(report.sites), heads), np.nan)
    for row, site in enumerate(report.sites):
        table[row, : len(site.head_densities)] = site.head_densities
    image = axis.imshow(table, aspect="auto", cmap="viridis", vmin=0)
    figure.colorbar(image, ax=axis)
    axis.set(title="Density per site and head", xlabel="head", ylabel="site")


def _draw_map(axis: Any, cells: tuple[tuple[float, ...], ...], title: str) -> None:
    axis.imshow(np.sqrt(np.asarray(cells)), cmap="Blues", vmin=0, vmax=1)
    axis.set(title=title, xlabel="key block", ylabel="query block")
