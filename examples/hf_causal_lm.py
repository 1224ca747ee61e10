"""A Hugging Face language model: calibrate, set a budget, generate.

    python examples/hf_causal_lm.py                       # the bundled model, on a CPU
    python examples/hf_causal_lm.py --model FOLDER_OR_HUB_ID --length 8192 --steps 400

Expected last lines (the text depends on the model):

    gates written to gates.safetensors
    density 0.25: ... sparse calls while reading ... tokens
    'def main(...'
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

import seer_compile
from seer_compile import corpus
from seer_compile.model_loading import load_tokenizer


def calibration_data(model: str, length: int, batches: int) -> list[Tensor]:
    """Return windows ``Int64[1 length]`` of the standard library's source, in the model's ids."""
    tokens = corpus.encode_files(
        corpus.standard_library_files(held_out=False),
        load_tokenizer(model),
        max_tokens=length * batches,
    )
    return list(torch.from_numpy(tokens).unflatten(0, (-1, length))[:, None])


def main(
    model: str = str(Path(__file__).parent / "small_lm"),
    *,
    length: int = 3072,
    steps: int = 20,
    new_tokens: int = 16,
    density: float = 0.25,
    gates: Path = Path("gates.safetensors"),
    device: str = "cpu",
) -> str:
    """Calibrate, save the gates, and continue a long prompt; return the new text."""
    from transformers import AutoModelForCausalLM

    dtype = torch.float32 if device == "cpu" else "auto"
    network = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(device).eval()
    data = calibration_data(model, length, batches=min(steps, 32) + 4)
    prompt = data.pop().to(device)

    network = seer_compile.optimize(network)
    config = seer_compile.CalibrationConfig(steps=steps, learning_rate=3e-3, warmup_steps=4)
    report = seer_compile.calibrate(network, data, config=config, density=density)
    print(report)
    seer_compile.save_gates(network, gates)
    print(f"gates written to {gates}")

    seer_compile.set_budget(network, density=density)
    # The budget holds while the prompt is read; new tokens attend to everything.
    answer = network.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new_tokens, do_sample=False
    )
    report = seer_compile.seer_report(network)
    print(report)
    sparse = sum(paths.get("sparse", 0) for paths in report.calls.values())
    print(f"density {density}: {sparse} sparse calls while reading {prompt.shape[1]:,} tokens")
    text = load_tokenizer(model).decode(answer[0, prompt.shape[1] :].tolist())
    print(repr(text))
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=str(Path(__file__).parent / "small_lm"))
    parser.add_argument("--length", type=int, default=3072)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--density", type=float, default=0.25)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    main(
        args.model,
        length=args.length,
        steps=args.steps,
        density=args.density,
        device=args.device,
    )
