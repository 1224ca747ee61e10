"""The report as one HTML page: inline styles and SVG, no script, no network."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from seer_compile.calibration.report import (
    CalibrationReport,
    SiteReport,
    show_divergence,
    show_sub_blocks,
)

_WIDTH, _HEIGHT, _MARGIN = 420, 260, 44
_COLOURS = {"gate": "#1b6ac9", "oracle": "#2a8f4e", "sink + local": "#b4562b", "loss": "#1b6ac9"}
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;
color:#1d2430}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.9rem}
td,th{padding:.25rem .7rem;text-align:right;border-bottom:1px solid #dfe3ea}
td:first-child,th:first-child{text-align:left}
figure{display:inline-block;margin:.5rem 1rem .5rem 0;vertical-align:top}
figcaption{font-size:.85rem;color:#566072;max-width:26rem}
.cells td{padding:.1rem .35rem;font-size:.75rem;border:1px solid #fff}
"""

_Points = Sequence[tuple[float, float]]


def render_html(report: CalibrationReport) -> str:
    """Return the page for a report."""
    target = ", ".join(f"{name} = {value:g}" for name, value in report.target.items())
    first = report.sites[len(report.sites) // 2]
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        f"<title>Calibration report</title><style>{_STYLE}</style></head><body>",
        "<h1>Calibration report</h1>",
        f"<p>{len(report.sites)} sites, {report.steps} steps, target {html.escape(target)} "
        f"({html.escape(report.allocation)}). Mean density <b>{report.density:.3f}</b>, "
        f"mean captured mass <b>{report.captured_mass:.3f}</b>.</p>",
        "<p>Density is kept blocks / visible blocks. Captured mass is the share of the dense "
        "attention probability inside the selection. The oracle selects on the true map; the "
        "control keeps the sink and a local window. Both are given at the gate's density. "
        "Divergence is that of the model's output when the site alone is sparse: the largest "
        "ones cost most quality.</p>",
        _sites_table(report),
        "<h2>Mass against density</h2>",
        *(_curve_figure(site) for site in report.sites),
        "<h2>Training loss</h2>",
        _loss_figure(report),
        "<h2>Density per site and head</h2>",
        _heads_table(report),
        f"<h2>Block map of {html.escape(first.name)}, head {first.block_map.head}</h2>",
        _map_figure(first.block_map.scores, "Gate: block scores"),
        _map_figure(first.block_map.oracle, "Oracle: attention mass"),
        "</body></html>",
    ]
    return "\n".join(parts)


def _sites_table(report: CalibrationReport) -> str:
    head = "".join(
        f"<th>{name}</th>"
        for name in (
            "site",
            "pools",
            "budget",
            "density",
            "mass",
            "oracle",
            "control",
            "gap closed",
            "loss",
            "divergence",
        )
    )
    rows = []
    for site in report.sites:
        numbers = (
            show_sub_blocks(site.sub_blocks),
            f"{site.budget:.4g}",
            f"{site.density:.3f}",
            f"{site.captured_mass:.4f}",
            f"{site.oracle_mass:.4f}",
            f"{site.control_mass:.4f}",
            f"{site.closed_gap:.0%}",
            f"{site.last_loss:.4f}",
            show_divergence(site.divergence),
        )
        cells = "".join(f"<td>{number}</td>" for number in numbers)
        rows.append(f"<tr><td>{html.escape(site.name)}</td>{cells}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _heads_table(report: CalibrationReport) -> str:
    rows = []
    for site in report.sites:
        cells = "".join(
            f"<td style='background:{_shade(density)}'>{density:.2f}</td>"
            for density in site.head_densities
        )
        rows.append(f"<tr><td>{html.escape(site.name)}</td>{cells}</tr>")
    return f"<table class='cells'>{''.join(rows)}</table>"


def _curve_figure(site: SiteReport) -> str:
    length = site.length
    lines: dict[str, _Points] = {
        label: list(
            zip(
                curve.row("densities", length).tolist(),
                curve.row("captured_mass", length).tolist(),
                strict=True,
            )
        )
        for label, curve in (
            ("oracle", site.oracle),
            ("gate", site.curve),
            ("sink + local", site.control),
        )
    }
    chart = _chart(lines, x_label="density", y_label="captured mass", is_log_x=True)
    caption = f"{html.escape(site.name)}, {length:,} tokens"
    return f"<figure>{chart}<figcaption>{caption}</figcaption></figure>"


def _loss_figure(report: CalibrationReport) -> str:
    points = [
        (float(step), loss) for step, loss in enumerate(report.losses) if not math.isnan(loss)
    ]
    chart = _chart({"loss": points}, x_label="step", y_label="mean loss", is_log_x=False)
    return f"<figure>{chart}<figcaption>Mean over sites</figcaption></figure>"


def _chart(lines: dict[str, _Points], *, x_label: str, y_label: str, is_log_x: bool) -> str:
    xs = [x for points in lines.values() for x, _ in points if x > 0 or not is_log_x]
    ys = [y for points in lines.values() for _, y in points]
    if not xs or not ys:
        return "<p>No data.</p>"
    low_x, high_x, low_y, high_y = min(xs), max(xs), min(0.0, *ys), max(*ys, 1e-9)

    def place(x: float, y: float) -> tuple[float, float]:
        share = _share(x, low_x, high_x, is_log=is_log_x)
        across = _MARGIN + share * (_WIDTH - 2 * _MARGIN)
        return across, _HEIGHT - _MARGIN - (y - low_y) / (high_y - low_y) * (_HEIGHT - 2 * _MARGIN)

    parts = [f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' width='{_WIDTH}' height='{_HEIGHT}'>"]
    parts += _axes((low_x, high_x), (low_y, high_y), x_label, y_label)
    for row, (label, points) in enumerate(lines.items()):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
        colour = _COLOURS[label]
        parts.append(
            f"<polyline points='{path}' fill='none' stroke='{colour}' stroke-width='2'/>"
            f"<text x='{_WIDTH - 8}' y='{16 + 15 * row}' text-anchor='end' font-size='12' "
            f"fill='{colour}'>{label}</text>"
        )
    return "".join([*parts, "</svg>"])


def _share(x: float, low: float, high: float, *, is_log: bool) -> float:
    if is_log:
        x, low, high = (math.log(max(value, low)) for value in (x, low, high))
    return (x - low) / (high - low) if high > low else 0.5


def _axes(
    x_range: tuple[float, float], y_range: tuple[float, float], x_label: str, y_label: str
) -> list[str]:
    left, bottom, right = _MARGIN, _HEIGHT - _MARGIN, _WIDTH - _MARGIN
    text = "<text x='{}' y='{}' font-size='11' fill='#566072' text-anchor='{}'>{}</text>"
    return [
        f"<path d='M{left} {_MARGIN}V{bottom}H{right}' fill='none' stroke='#9aa3b2'/>",
        text.format(left, bottom + 15, "start", f"{x_range[0]:.3g}"),
        text.format(right, bottom + 15, "end", f"{x_range[1]:.3g}"),
        text.format((left + right) / 2, bottom + 30, "middle", x_label),
        text.format(left - 4, bottom, "end", f"{y_range[0]:.2g}"),
        text.format(left - 4, _MARGIN + 4, "end", f"{y_range[1]:.2g}"),
        text.format(left, _MARGIN - 12, "start", y_label),
    ]


def _map_figure(cells: Sequence[Sequence[float]], caption: str) -> str:
    rows, columns = len(cells), max(1, len(cells[0]) if cells else 1)
    size = max(2, 360 // max(rows, columns, 1))
    parts = [
        f"<rect x='{column * size}' y='{row * size}' width='{size}' height='{size}' "
        f"fill='{_shade(value)}'/>"
        for row, line in enumerate(cells)
        for column, value in enumerate(line)
        if value > 1e-3
    ]
    chart = (
        f"<svg width='{columns * size}' height='{rows * size}' style='background:#f4f6f9'>"
        f"{''.join(parts)}</svg>"
    )
    return f"<figure>{chart}<figcaption>{caption}</figcaption></figure>"


def _shade(value: float) -> str:
    # The square root shows small shares, of which maps mostly consist.
    depth = math.sqrt(min(max(value, 0.0), 1.0))
    return f"rgb({round(245 - 218 * depth)},{round(247 - 141 * depth)},{round(250 - 49 * depth)})"
