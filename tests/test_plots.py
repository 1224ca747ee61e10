"""The pictures of the benchmarks are drawn from the results as they are."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT / "benchmarks"))

pytest.importorskip("matplotlib")

import plots  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402


@pytest.mark.parametrize("name", plots.PICTURES)
def test_every_series_has_points_and_the_picture_is_written(name, tmp_path):
    axis = Figure().subplots()
    plots.PICTURES[name](axis, RESULTS)
    series = [line for line in axis.lines if not line.get_label().startswith("_")]
    assert len(series) >= 2
    assert all(len(line.get_xdata()) >= 3 for line in series)
    path = plots.draw(name, RESULTS, tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert (ROOT / "docs" / "images" / path.name).exists()


def test_the_last_line_of_a_figure_counts():
    lines = [{"a": 1, "ms": 3}, {"a": 2, "ms": 5}, {"a": 1, "ms": 4}]
    assert plots.points(plots.latest(lines, "a"), "a", "ms") == ([1, 2], [4, 5])
