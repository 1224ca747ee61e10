"""A real architecture, padded batches of several lengths: calibrated through the whole pipeline."""

import pytest
import torch

import seer_compile
from seer_compile.config import CalibrationConfig, GateConfig
from seer_compile.types import BlockSize
from support.inputs import generator

CONFIG = CalibrationConfig(steps=4, warmup_steps=1, holdout_batches=2, checkpoint_every=2)


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    return LlamaForCausalLM(config).eval()


def padded_batches(count):
    batches = []
    for place in range(count):
        length = (96, 144)[place % 2]
        tokens = torch.randint(0, 64, (2, length), generator=generator(place))
        mask = torch.ones_like(tokens)
        mask[0, : 17 + place] = 0
        batches.append({"input_ids": tokens, "attention_mask": mask})
    return batches


@pytest.mark.slow
def test_padded_batches_of_two_lengths_calibrate_resume_and_load(tmp_path):
    gates = GateConfig(gate_dim=16, block_size=BlockSize(query=16, key=16))
    data, model = padded_batches(8), llama()
    frozen = {key: value.clone() for key, value in model.state_dict().items()}
    seer_compile.optimize(model, config=gates, inner="aot_eager")
    options = {
        "config": CONFIG,
        "density": 0.5,
        "checkpoint_dir": tmp_path / "checkpoints",
        "progress": False,
    }
    report = seer_compile.calibrate(model, data, **options)
    assert len(report.sites) == 1
    assert report.sites[0].curve.lengths == (96, 144)
    assert seer_compile.calibrate(model, data, **options) == report
    seer_compile.save_gates(model, tmp_path / "gates.safetensors")
    loaded = seer_compile.optimize(
        llama(), config=gates, gates=tmp_path / "gates.safetensors", inner="aot_eager"
    )
    with torch.no_grad():
        for batch in data[:2]:
            expected = model(**batch).logits
            assert torch.equal(loaded(**batch).logits, expected)
            real = batch["attention_mask"].bool()
            seer_compile.set_budget(loaded, density=1.0)
            dense = llama()(**batch).logits
            torch.testing.assert_close(loaded(**batch).logits[real], dense[real], rtol=0, atol=1e-5)
            seer_compile.set_budget(loaded, density=0.5)
    for key, value in frozen.items():
        assert torch.equal(model.state_dict()[key], value)
