"""The report: plain frozen data, a page that needs no network, a picture."""

import builtins
import dataclasses
import html.parser
import json
import math
import re

import pytest

from seer_compile.budget_curve import BudgetCurve
from seer_compile.calibration.budget import BlockMap, SiteTable
from seer_compile.calibration.report import build_report
from seer_compile.config import GateConfig
from seer_compile.errors import FeatureUnsupportedError
from seer_compile.gate_store import GateStore

BUDGETS = (0.5, 0.9, 1.0)


def curve(masses, *, selector="top_p", budgets=BUDGETS, densities=(0.1, 0.4, 1.0)):
    return BudgetCurve(
        selector=selector,
        lengths=(512, 2048),
        budgets=budgets,
        densities=(densities, densities),
        captured_mass=(masses, masses),
    )


def table():
    return SiteTable(
        gate=curve((0.6, 0.9, 1.0)),
        oracle=curve((0.8, 0.98, 1.0)),
        control=curve((0.3, 0.5, 1.0), selector="sink_local", budgets=(0.0, 1.0, 2.0)),
        head_densities=((0.05, 0.15), (0.3, 0.5), (1.0, 1.0)),
        block_map=BlockMap(head=1, scores=((0.9, 0.0), (0.2, 0.8)), oracle=((1, 0.0), (0.1, 0.9))),
    )


@pytest.fixture
def report():
    store = GateStore(GateConfig(gate_dim=16))
    names = ("layers.0.attn", "<b>&amp")
    for name in names:
        gate = store.get_or_create(name, heads=2, kv_heads=1, head_dim=8)
        gate.curve, gate.is_trained = table().gate, True
    store.set_budget(density=0.4)
    return build_report(
        store,
        {name: table() for name in names},
        losses={names[0]: (1.0, 0.5), names[1]: (2.0, math.nan)},
        config={"steps": 2},
        target={"density": 0.4},
        allocation="uniform",
    )


def test_numbers_are_those_of_the_curves_at_the_budget(report):
    site = report.sites[0]
    assert site.length == 2048
    assert site.budget == pytest.approx(0.9)
    assert site.density == pytest.approx(0.4, abs=1e-5)
    assert site.captured_mass == pytest.approx(0.9, abs=1e-5)
    assert site.oracle_mass == pytest.approx(0.98, abs=1e-5)
    assert site.control_mass == pytest.approx(0.5, abs=1e-5)
    assert site.closed_gap == pytest.approx(0.4 / 0.48, abs=1e-4)
    assert site.head_densities == pytest.approx((0.3, 0.5), abs=1e-5)
    assert report.density == pytest.approx(0.4, abs=1e-5)


def test_losses_average_over_the_sites_that_a_step_reached(report):
    assert report.losses == (1.5, 0.5)
    assert report.sites[1].losses == (2.0, None)


def test_report_is_frozen(report):
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.steps = 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.sites[0].density = 0.0


def test_json_holds_everything_and_is_strict(report, tmp_path):
    text = report.to_json(tmp_path / "report.json")
    assert (tmp_path / "report.json").read_text() == text

    def refuse(token):
        raise AssertionError(token)

    data = json.loads(text, parse_constant=refuse)
    assert data["sites"][1]["losses"] == [2.0, None]
    assert data["sites"][0]["oracle"]["captured_mass"][1] == [0.8, 0.98, 1.0]
    assert data["summary"]["density"] == pytest.approx(0.4, abs=1e-5)


def test_table_names_every_site_and_the_mean(report):
    lines = str(report).splitlines()
    assert [line.split()[0] for line in lines] == ["site", "layers.0.attn", "<b>&amp", "mean"]


class _Page(html.parser.HTMLParser):
    """Collects tags, attributes and text, and checks that tags close."""

    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_page_is_well_formed_self_contained_and_escaped(report, tmp_path):
    report.save_html(tmp_path / "report.html")
    source = (tmp_path / "report.html").read_text()
    page = _Page()
    page.feed(source)
    assert page.open == []
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not {"src", "href", "onload", "onclick"} & {name for name, _ in page.attributes}
    assert not re.search(r"https?://|@import|url\(", source)
    text = " ".join(page.text)
    assert "<b>&amp" in text
    assert "0.9800" in text
    assert page.tags.count("polyline") == 2 * 3 + 1


def test_picture_is_a_png_and_needs_no_window_system(report, tmp_path):
    pytest.importorskip("matplotlib")
    report.save_png(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_missing_matplotlib_is_named(report, tmp_path, monkeypatch):
    imported = builtins.__import__

    def without(name, *rest, **options):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return imported(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(FeatureUnsupportedError, match="matplotlib"):
        report.save_png(tmp_path / "report.png")
