"""The command line: verbs, exit codes, messages, JSON. Nothing here reads a printed table."""

import argparse
import dataclasses
import json

import numpy as np
import pytest
import torch

from seer_compile import cli, cli_commands
from seer_compile.config import CalibrationConfig
from seer_compile.console import evaluation_text, write_json
from seer_compile.errors import SeerInputError
from seer_compile.evaluate import EvaluationRow

EVALUATE = "evaluate --model {model} --tokens {tokens} --device cpu"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Return a folder with a tiny Llama and its tokenizer, and a token file."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=256,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            max_position_embeddings=1024,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    np.random.default_rng(0).integers(0, 256, 20_000).astype("<u2").tofile(folder / "tokens.u16")
    return folder


def run(line, tiny, **places):
    words = line.format(model=tiny, tokens=tiny / "tokens.u16", **places).split()
    return cli.main(words)


@pytest.mark.parametrize("verb", ["explain", "calibrate", "evaluate", "export", "demo"])
def test_every_verb_has_help_and_json(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([verb, "--help"])
    assert stop.value.code == 0
    assert "--json" in capsys.readouterr().out


def test_an_unknown_verb_or_no_verb_ends_with_code_2():
    for words in (["nonsense"], []):
        with pytest.raises(SystemExit) as stop:
            cli.main(words)
        assert stop.value.code == 2


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("--methods nonsense", "methods='nonsense'"),
        ("--methods gate", "Give --gates G or --calibrate FILE"),
        ("--methods paper_gate --gates g.safetensors", "trains gates of its own"),
        ("--methods dense --densities 1.5", "densities=1.5"),
        ("--methods dense --lengths 30000", "20000 tokens"),
        ("--methods dense --lengths 512 --retrieval 500", "keys=500"),
        ("--methods dense --lengths 512 --sequences 0", "count=0"),
        ("--methods dense --device tpu9", "device='tpu9'"),
        ("--methods gate --gates absent.safetensors --lengths 256 --retrieval 0", "absent"),
    ],
)
def test_wrong_input_ends_with_code_2_and_says_what(extra, message, tiny, capsys):
    assert run(f"{EVALUATE} {extra}", tiny) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("explain --model {model} --length 0", "length=0; expected >= 1"),
        ("export --model {model} --gates g --length 2000", "length=2000; expected 2 to 1024"),
        ("export --model {model} --gates g --max-length 0", "max_length=0; expected >= 2"),
        (
            "calibrate --model {model} --tokens {tokens} --calibration-length 64 --learning-rate 0",
            "learning_rate=0.0; expected > 0",
        ),
        ("demo --length 0", "length=0; expected >= 2"),
        ("demo --steps 0", "steps=0; expected >= 1"),
        ("demo --densities 0.5 1.5", "densities=1.5"),
    ],
)
def test_numbers_out_of_range_are_refused_and_not_replaced(
    line, message, tiny, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert run(line, tiny) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["calibrate", "evaluate", "demo"])
def test_a_negative_seed_is_refused(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([verb, "--seed", "-1", "--model", "m", "--tokens", "t"])
    assert stop.value.code == 2
    assert "--seed: -1; expected >= 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    [
        "calibrate --model absent --tokens absent --out {place}",
        "calibrate --model absent --tokens absent --report {place}",
        "evaluate --model absent --tokens absent --json {place}",
        "export --model absent --gates absent --out {place}",
        "explain --model absent --draw {place}",
    ],
)
def test_results_that_could_not_be_written_are_refused_before_the_work(
    line, tiny, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    for place in (tmp_path, tmp_path / "file" / "below.json"):
        assert run(line, tiny, place=place) == 2
        assert "expected a path that can be written" in capsys.readouterr().err


def test_json_files_hold_no_numbers_that_json_does_not_know(tmp_path):
    path = tmp_path / "out.json"
    write_json(path, {"losses": (1.0, float("nan")), "worst": {"ratio": float("inf")}})
    assert json.loads(path.read_text()) == {"losses": [1.0, None], "worst": {"ratio": None}}


def test_missing_files_are_named(tiny, tmp_path, capsys):
    words = ["evaluate", "--methods", "dense", "--tokens", "absent.u16"]
    assert cli.main([*words, "--model", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert cli.main([*words, "--model", str(tiny)]) == 2
    assert "absent.u16" in capsys.readouterr().err


def test_explain_writes_every_site(tiny, tmp_path):
    path = tmp_path / "out.json"
    assert run("explain --model {model} --json {out}", tiny, out=path) == 0
    found = json.loads(path.read_text())
    assert [site["decision"] for site in found["sites"]] == ["sparse", "sparse"]
    assert [site["name"] for site in found["sites"]] == [
        f"model.layers.{layer}.self_attn" for layer in range(2)
    ]


@pytest.fixture(scope="module")
def evaluation(tiny, tmp_path_factory):
    """Return the JSON of one evaluation that uses every kind of method."""
    path = tmp_path_factory.mktemp("evaluation") / "out.json"
    line = (
        f"{EVALUATE} --calibrate {{tokens}} --lengths 1024 --densities 0.6 0.45 --sequences 2 "
        "--methods dense gate gate_top_p oracle sink_local paper_gate --retrieval 4 "
        "--steps 3 --calibration-length 512 --inner aot_eager --json {out}"
    )
    assert run(line, tiny, out=path) == 0
    return json.loads(path.read_text())


@pytest.mark.slow
def test_evaluation_has_a_row_per_method_and_density(evaluation):
    found = [(row["method"], row["asked_density"]) for row in evaluation["rows"]]
    sparse = ["gate", "gate_top_p", "oracle", "sink_local", "paper_gate"]
    assert found == [("dense", None)] + [(name, d) for d in (0.6, 0.45) for name in sparse]
    assert all(row["length"] == 1024 and row["keys"] == 8 for row in evaluation["rows"])


@pytest.mark.slow
def test_evaluation_measures_what_it_says(evaluation):
    rows = {(row["method"], row["asked_density"]): row for row in evaluation["rows"]}
    dense = rows["dense", None]
    assert dense["ratio"] == 1.0
    assert dense["density"] == 1.0
    # Diagonal, sink and best block alone are a third of 16 blocks.
    for name in ("gate_top_p", "oracle"):
        for density in (0.6, 0.45):
            assert abs(rows[name, density]["density"] - density) < 0.08
    for row in rows.values():
        assert row["attention_ms"] > 0
        assert row["end_to_end_ms"] > 0
        assert np.isclose(row["ratio"], np.exp(row["loss"] - dense["loss"]))
        assert row["retrieval"] is not None
    assert {"torch", "transformers", "device"} <= evaluation["versions"].keys()


@pytest.mark.slow
def test_calibrate_saves_gates_that_evaluate_and_export_use(tiny, tmp_path):
    gates, program, out = (tmp_path / name for name in ("g.safetensors", "p.pt2", "o.json"))
    line = (
        "calibrate --model {model} --tokens {tokens} --out {gates} --steps 3 --device cpu "
        "--calibration-length 512 --curve-lengths 1024 --density 0.4 --report {page} --json {out}"
    )
    assert run(line, tiny, gates=gates, page=tmp_path / "r.html", out=out) == 0
    assert json.loads(out.read_text())["summary"]["steps"] == 3
    assert "<svg" in (tmp_path / "r.html").read_text()
    line = f"{EVALUATE} --gates {{gates}} --lengths 512 --densities 0.4 --sequences 1 "
    assert run(line + "--methods gate --retrieval 0 --json {out}", tiny, gates=gates, out=out) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert row["method"] == "gate"
    assert row["retrieval"] is None
    line = "export --model {model} --gates {gates} --out {program}"
    assert run(line, tiny, gates=gates, program=program) == 0
    loaded = torch.export.load(program).module()
    tokens = torch.arange(300)[None] % 256
    logits = loaded(input_ids=tokens, use_cache=False).logits
    assert logits.shape == (1, 300, 256)


def test_an_evaluation_says_where_gates_keep_another_density_than_was_asked_for():
    row = EvaluationRow(
        method="gate",
        length=32768,
        asked_density=0.1,
        density=0.059,
        loss=1.0,
        perplexity=2.7,
        ratio=1.0,
        retrieval=None,
        attention_ms=1.0,
        end_to_end_ms=2.0,
        dense_end_to_end_ms=3.0,
        sequences=1,
        keys=0,
        dense_calls={},
    )
    text = evaluation_text([row])
    assert "density 0.1 was asked for and 0.059 kept" in text
    assert "seer-compile calibrate --curve-lengths 32768" in text
    more = evaluation_text([dataclasses.replace(row, density=0.16)])
    assert "density 0.1 was asked for and 0.16 kept" in more
    assert "--curve-lengths" not in more
    for fine in (
        dataclasses.replace(row, density=0.11),
        # Others than gates have no budget that was measured; dense was asked for none.
        dataclasses.replace(row, dense_end_to_end_ms=None),
        dataclasses.replace(row, asked_density=None, density=1.0),
    ):
        assert "asked for" not in evaluation_text([fine])


def test_interruption_ends_with_code_130(tiny, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("seer_compile.cli_commands.load_model", interrupt)
    assert run("explain --model {model}", tiny) == 130


def test_demo_without_a_bundled_model_says_what_to_do(monkeypatch, tmp_path):
    from seer_compile import demo

    monkeypatch.setattr(demo, "__file__", str(tmp_path / "seer_compile" / "demo.py"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SeerInputError, match="checkout of the repository"):
        demo.bundled_model()


@pytest.mark.slow
def test_demo_beats_the_static_control_at_the_same_density(tmp_path):
    out, page = tmp_path / "out.json", tmp_path / "report.html"
    words = (
        f"demo --length 3072 --steps 6 --sequences 1 --densities 0.3 --report {page} --json {out}"
    )
    assert cli.main(words.split()) == 0
    dense, gate, oracle, control = json.loads(out.read_text())["rows"]
    assert [row["method"] for row in (dense, gate, oracle, control)] == [
        "dense",
        "gate",
        "oracle",
        "sink_local",
    ]
    assert gate["dense_calls"] == {}
    assert abs(gate["density"] - 0.3) < 0.1
    assert abs(control["density"] - gate["density"]) < 0.01
    assert oracle["ratio"] < gate["ratio"] < control["ratio"]
    assert gate["retrieval"] > control["retrieval"]
    text = page.read_text()
    assert text.count("<h1>") == 2
    assert "sink_local" in text


def test_searched_shares_are_refused_where_nothing_searches_them(tiny, capsys):
    line = f"{EVALUATE} --calibrate {{tokens}} --lengths 256 --allocation searched --methods gate"
    assert run(line, tiny) == 2
    assert "search" in capsys.readouterr().err


def test_the_published_gate_gives_every_site_the_same_share():
    args = argparse.Namespace(steps=5, learning_rate=None, seed=0)
    paper, ours = (cli_commands._training_config(args, kind) for kind in ("paper", "default"))
    assert (paper.target, paper.sensitivity_batches, paper.start_share) == ("max", 0, 0)
    assert ours == dataclasses.replace(CalibrationConfig(), steps=5)
