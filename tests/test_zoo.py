"""A sample of the matrix over real architectures, and the tools that judge it.

``make models`` runs all of it and writes ``docs/models.md``.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from seer_compile.config import GateConfig, TopP
from seer_compile.passes import pipeline
from zoo import catalogue, doors, workers
from zoo.__main__ import CATALOGUE, in_order, is_installed, main, read_rows
from zoo.cell import Cell, Row, cells_of
from zoo.count_attention import count_attention
from zoo.home_made import NanoGPT, XTransformer
from zoo.in_float64 import InFloat64
from zoo.matrix import run_cell
from zoo.registry import ARCHITECTURES

SAMPLE = (
    "llama / sdpa / left padding / dynamic / dynamo",
    "mistral / eager / static cache, chunk / static / dynamo",
    "gemma3 / sdpa / packed / static / export",
    "gpt2 / sdpa / dynamic cache, chunk / dynamic / export",
    "gpt-oss / eager / no mask / static / export",
    "deepseek-v3 / sdpa / left padding / static / export",
    "llama4 / sdpa / packed / static / dynamo",
    "jamba / eager / static cache, chunk / static / export",
    "modernbert / sdpa / left padding / static / export",
    "t5 / sdpa / right padding / static / export",
    "bart / eager / padding in encoder and decoder / static / export",
    "whisper / sdpa / static cache, prefill / static / dynamo",
    "vit / sdpa / no mask / dynamic / export",
    "wav2vec2 / sdpa / right padding / static / export",
    "clip / eager / right padding / static / export",
    "llava / sdpa / static cache, prefill / dynamic / export",
    "timm vit / eager / no mask / static / export",
    "flux / sdpa / no mask / dynamic / dynamo",
    "unet / sdpa / no mask / static / export",
    "x-transformers-like / einsum / right padding / dynamic / export",
    "nn.TransformerEncoder / nn / right padding / static / dynamo",
)
"""Every family, spelling, situation, door and kind of length; 60 s on two cores in all."""

CELLS = {str(cell): cell for each in ARCHITECTURES.values() for cell in cells_of(each)}
PAGE = catalogue.read(CATALOGUE.read_text())


def cell_named(name: str) -> Cell:
    """Return a cell, or skip where its library is absent."""
    cell = CELLS[name]
    if not is_installed(cell.architecture.name):
        pytest.skip(f"needs {', '.join(cell.architecture.needs)}")
    return cell


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE)
def test_rewritten_model_is_the_model_and_the_catalogue_says_so(name):
    row = run_cell(cell_named(name))
    assert row.passes, (row.outcome, row.error, row.note, row)
    if row.outcome == "unavailable" and f"With {workers.versions()}:" not in CATALOGUE.read_text():
        pytest.skip(f"PyTorch itself refuses it: {row.note}")
    entry = PAGE[row.architecture, row.spelling, row.situation]
    assert str(row.counted) in entry.sites.split(" / "), row
    assert str(row.sparse) in entry.sparse.split(" / "), row
    if f"With {workers.versions()}:" in CATALOGUE.read_text():
        fresh = catalogue.entries([row])[0]
        assert fresh.visible in entry.visible.split(" / ") or not fresh.visible, row
        assert fresh.reason in entry.reason.split(" / ") or not fresh.reason, row


def test_catalogue_lists_every_situation_of_every_architecture():
    expected = {(c.architecture.name, c.spelling, c.situation.name) for c in CELLS.values()}
    assert set(PAGE) == expected
    assert len(ARCHITECTURES) >= 45


def test_a_rewrite_that_drops_blocks_is_called_different(monkeypatch):
    monkeypatch.setattr(doors, "EVERYTHING", GateConfig(selector=TopP(mass=0.1)))
    row = run_cell(cell_named("nanogpt / sdpa / no mask / static / dynamo"))
    assert row.outcome == "different"
    assert row.error > 100
    assert not row.passes


@pytest.mark.parametrize("door", ["dynamo", "export"])
def test_a_site_that_is_not_found_is_missed(monkeypatch, door):
    monkeypatch.setattr(pipeline, "find_sites", lambda *_: ())
    row = run_cell(cell_named(f"nanogpt / eager / no mask / static / {door}"))
    assert (row.counted, row.found, row.missed) == (2, 0, 2)
    assert not row.passes


def test_only_what_torch_itself_refuses_is_unavailable(monkeypatch):
    cell = cell_named("nanogpt / sdpa / no mask / static / export")

    def failing(*_, **__):
        raise RuntimeError("ours")

    monkeypatch.setattr(doors, "export_sparse", failing)
    row = run_cell(cell)
    assert (row.outcome, row.note) == ("failed", "RuntimeError: ours")
    monkeypatch.setattr(doors, "export_plain", failing)
    assert run_cell(cell).outcome == "unavailable"


@pytest.mark.parametrize("make", [NanoGPT, XTransformer])
@pytest.mark.parametrize("spelling", ["sdpa", "eager"])
def test_attention_is_counted_in_every_spelling(make, spelling):
    module, x = make(spelling), torch.randn(1, 20, 32)
    assert count_attention(lambda: module(module(x))) == 2


def test_softmaxes_that_weigh_no_tokens_are_not_counted():
    hidden, router = torch.randn(20, 32), torch.randn(32, 4)

    def route():
        weights, chosen = (hidden @ router).softmax(-1).topk(2)
        return (hidden[:, None] * weights[..., None]).sum(1) @ router, chosen

    assert count_attention(route) == 0


def test_float64_reaches_what_asks_for_float32():
    x = torch.randn(3, 5, dtype=torch.float64)
    with InFloat64():
        results = (
            F.softmax(x, dim=-1, dtype=torch.float32),
            x.float(),
            x.to(torch.float32),
            torch.ones(3, dtype=torch.float32),
        )
    assert all(result.dtype is torch.float64 for result in results)
    assert torch.equal(results[0], x.softmax(-1))


def test_page_is_read_back_as_it_was_written():
    base = Row(
        architecture="a", family="decoder", spelling="sdpa", situation="no mask", lengths="static",
        door="dynamo", counted=3, barred=1, found=3, sparse=2, visible="causal(offset=s3)",
        reasons={"floating-point bias | on the logits": 1}, outcome="equal", error=0.3,
    )  # fmt: skip
    other = dataclasses.replace(base, door="export", outcome="unavailable", note="refused")
    text = catalogue.render([base, other])
    (entry,) = catalogue.read(text).values()
    assert entry == catalogue.entries([base])[0]
    assert (entry.sites, entry.sparse, entry.visible) == ("3", "2", "causal(offset)")
    assert "100.0%" in text
    assert "refused" in text


def test_page_tells_versions_apart():
    base = Row(
        architecture="nanogpt", family="home-made", spelling="sdpa", situation="no mask",
        lengths="static", door="dynamo", counted=2, found=2, sparse=2, outcome="equal",
        versions="torch 2",
    )  # fmt: skip
    older = dataclasses.replace(base, versions="torch 1", sparse=1, reasons={"why": 1})
    gone = dataclasses.replace(base, situation="no longer a situation")
    rows = in_order([base, gone, dataclasses.replace(older, outcome="failed"), older])
    assert rows == [older, base]
    text = catalogue.render(rows)
    assert text.index("With torch 2:") < text.index("With torch 1:")
    (entry,) = catalogue.read(text).values()
    assert (entry.sparse, entry.reason) == ("1 / 2", "1 x why")
    assert "| nanogpt | sdpa | no mask | static dynamo | 1 | 1 x why |" in text


@pytest.mark.slow
def test_matrix_runs_in_processes_and_shards_and_goes_on(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    only = ["--only", "nanogpt", "--ways", "static dynamo", "--rows", str(path)]
    assert main([*only, "--minutes", "0"]) == 0
    assert read_rows(path) == []
    assert main([*only, "--shard", "1/2", "--jobs", "2"]) == 0
    (first,) = read_rows(path)
    assert main([*only]) == 0
    rows = read_rows(path)
    assert rows[0] == first
    assert {row.name for row in rows} == {
        f"nanogpt / {spelling} / no mask / static / dynamo" for spelling in ("sdpa", "eager")
    }
    assert all(row.passes and row.versions == workers.versions() for row in rows)
    assert "4 of 4 possible sites are sparse" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change", [{"found": 2}, {"reasons": {}}, {"outcome": "different"}, {"sparse": 1}]
)
def test_a_row_with_a_site_unaccounted_for_does_not_pass(change):
    row = Row(
        architecture="a", family="f", spelling="s", situation="n", lengths="static", door="dynamo",
        counted=3, found=3, sparse=2, reasons={"why": 1}, outcome="equal",
    )  # fmt: skip
    assert row.passes
    assert not dataclasses.replace(row, **change).passes
