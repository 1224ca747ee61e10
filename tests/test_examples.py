"""The examples run as their docstrings say, in small."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from support.models import excused_where_inductor_cannot_decode

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
BUNDLED = EXAMPLES / "small_lm"


def load(name):
    """Return an example as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_example_names_its_command_and_what_to_expect(path):
    text = path.read_text()
    docstring = text.split('"""')[1]
    assert f"python examples/{path.name}" in docstring
    assert "Expected" in docstring
    assert "def main(" in text


def test_explain_model_tells_sparse_sites_from_dense_ones():
    lines = load("explain_model").main()
    assert lines == [
        "decoder: 2 of 2 sites sparse",
        "encoder with returned weights: 0 of 1 sites sparse",
    ]


@pytest.mark.slow
def test_tiny_transformer_keeps_what_it_learned_when_sparse():
    results = load("tiny_transformer").main()
    assert results["full_difference"] < 1e-4
    assert results["export_agreement"] > 0.99
    assert results["dense_found"] > 0.9
    assert results["sparse_sites"] == 2
    assert results["sparse_found"] > 0.8 * results["dense_found"]


@pytest.mark.slow
def test_vision_transformer_runs_sparse_in_all_directions():
    results = load("vision_transformer").main(steps=4)
    assert results["sparse_sites"] == 2
    assert results["full_error"] < 1e-4
    assert 1e-6 < results["sparse_error"] < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["weights", "adapters"])
def test_finetune_sparse_trains_model_and_gates(lora):
    if lora:
        pytest.importorskip("peft")
    results = load("finetune_sparse").main(length=384, steps=8, lora=lora)
    assert results["task"] < 0.97
    assert results["gate"] < 0.9
    assert results["sparse"] == 1.0


@pytest.mark.slow
def test_hf_causal_lm_continues_a_long_prompt(tmp_path):
    with excused_where_inductor_cannot_decode():
        text = load("hf_causal_lm").main(
            length=512, steps=3, new_tokens=4, gates=tmp_path / "gates.safetensors"
        )
    assert isinstance(text, str)
    assert text
    assert (tmp_path / "gates.safetensors").stat().st_size > 1000


def test_long_context_speed_declines_without_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("this test is about machines without a GPU")
    with pytest.raises(SystemExit, match="GPU"):
        load("long_context_speed").main([1024])


@pytest.mark.slow
def test_training_script_writes_a_model_that_transformers_loads(tmp_path):
    from transformers import AutoTokenizer, LlamaForCausalLM

    out = tmp_path / "model"
    precision = torch.get_float32_matmul_precision()
    words = "--tiny --minutes 0.02 --max-files 8 --layers 1 --hidden 64 --intermediate 64 "
    words += f"--vocabulary 300 --no-compile --workers 0 --device cpu --out {out}"
    try:
        results = load("train_small_lm").main(words.split())
    finally:
        # The script owns its process and chooses for speed; a test does not.
        torch.set_float32_matmul_precision(precision)
    assert set(results) == {"1024"}
    assert 3 < results["1024"]["loss"] < 8
    model = LlamaForCausalLM.from_pretrained(out)
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert AutoTokenizer.from_pretrained(out).decode([300 - 1])


def test_bundled_model_is_small_and_says_how_it_was_trained():
    files = list(BUNDLED.iterdir())
    assert sum(path.stat().st_size for path in files) <= 8_000_000
    record = json.loads((BUNDLED / "training.json").read_text())
    assert record["results"]["8192"]["retrieval"] >= 0.9
    config = json.loads((BUNDLED / "config.json").read_text())
    assert config["max_position_embeddings"] >= 8192
    assert config["num_key_value_heads"] < config["num_attention_heads"]


@pytest.mark.slow
def test_bundled_model_still_retrieves():
    from seer_compile import corpus
    from seer_compile.evaluate import next_token_loss
    from seer_compile.model_loading import load_model, load_tokenizer
    from seer_compile.retrieval import count_retrieved
    from seer_compile.token_data import planted_windows

    tokenizer = load_tokenizer(str(BUNDLED))
    files = corpus.standard_library_files(held_out=True)
    tokens = corpus.encode_files(files, tokenizer, max_tokens=2048)
    (window,) = planted_windows(tokens, tokenizer, length=2048, sequences=1, keys=16)
    ids = torch.from_numpy(window.tokens)[None]
    with torch.no_grad():
        model = load_model(str(BUNDLED), device=torch.device("cpu"))
        logits = model(input_ids=ids, use_cache=False).logits[0]
    loss, predicted = next_token_loss(logits, ids[0], window.ordinary)
    assert loss < 3.5
    assert count_retrieved(predicted, window) >= 14


@pytest.mark.slow
def test_vision_training_script_trains_and_compares(tmp_path):
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(60, 8, 8, generator=generator), torch.arange(60) % 10
    out = tmp_path / "rows.jsonl"
    words = f"--tiny --minutes 0.02 --steps 3 --densities 0.3 --device cpu --out {out}"
    script = load("train_vision_model")
    rows = script.main(words.split(), (images, labels))
    assert [row.method for row in rows] == ["dense", *script.METHODS[1:], "gate"]
    assert all(0 <= row.score <= 1 for row in rows)
    assert len(out.read_text().splitlines()) == len(rows)


def test_vision_pictures_ask_for_the_other_digit_of_a_colour():
    script = load("train_vision_model")
    images = torch.ones(10, 8, 8) * torch.linspace(0.5, 1.0, 10)[:, None, None]
    painter = script.Painter(images, torch.arange(10), seed=0, device="cpu")
    pixels, places, answers, own = painter.draw(3, 256)
    assert torch.equal(answers, own.roll(script.PAIRS, 1))
    # A digit's patches show its colour: that of the digit half the list away, and of no other.
    patches = pixels.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).mean((3, 5)).flatten(2)
    seen = patches.gather(2, places[:, None, :, 4].expand(-1, 3, -1))
    assert torch.equal(script.square_order(4)[:6], torch.tensor([0, 1, 4, 5, 2, 3]))
    centred = (seen + 1) / (seen + 1).norm(dim=1, keepdim=True)
    alike = torch.einsum("bcx,bcy->bxy", centred, centred) - 2 * torch.eye(16)
    assert torch.equal(alike.argmax(-1), torch.arange(16).roll(script.PAIRS).expand(3, -1))
