"""Fine-tune a language model with its attention sparse, the gates learning along.

Gates are calibrated first. Then the model is trained on other text, through block-sparse attention;
the gates' own loss on the same forward is added, so that they keep up with queries and keys that
move. ``--lora`` trains adapters (PEFT) in place of all weights.

    python examples/finetune_sparse.py              # the bundled model, on a CPU, a minute or two
    python examples/finetune_sparse.py --lora --steps 50

Expected last lines (numbers vary a little between machines):

    step ... task ... gates ...
    task loss ... -> ..., gate loss ... -> ...        (both fall)
    sparse calls: ... of ...
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import seer_compile
from seer_compile import corpus
from seer_compile.model_loading import load_tokenizer


def windows(model: str, length: int, number: int, *, held_out: bool) -> list[Tensor]:
    """Return ``Int64[1 length]`` windows of the standard library's source, in the model's ids."""
    files = corpus.standard_library_files(held_out=held_out)
    tokens = corpus.encode_files(files, load_tokenizer(model), max_tokens=length * number)
    return list(torch.from_numpy(tokens).unflatten(0, (-1, length))[:, None])


def with_adapters(network: nn.Module) -> nn.Module:
    """Return the network with trainable low-rank adapters and everything else frozen."""
    from peft import LoraConfig, get_peft_model

    adapters = LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj"], lora_dropout=0.0)
    return get_peft_model(network, adapters)  # type: ignore[arg-type]


def finetune(
    network: nn.Module, data: list[Tensor], steps: int, learning_rate: float
) -> list[tuple[float, float]]:
    """Train model and gates together; return the task and the gate loss of every step."""
    gates = list(network.seer_gates.requires_grad_(True).parameters())
    ours = {id(gate) for gate in gates}
    weights = [p for p in network.parameters() if p.requires_grad and id(p) not in ours]
    groups: list[dict[str, Any]] = [
        {"params": weights, "lr": learning_rate},
        {"params": gates, "lr": 1e-3, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups)
    losses = []
    for step in range(steps):
        tokens = data[step % len(data)]
        with seer_compile.distillation(network) as sites:
            task = network(input_ids=tokens, labels=tokens, use_cache=False).loss
        gate = sites.loss()
        optimizer.zero_grad()
        (task + gate).backward()
        optimizer.step()
        losses.append((task.item(), gate.item()))
        print(f"step {step:3d} task {task.item():.3f} gates {gate.item():.3f}")
    return losses


def main(
    model: str = str(Path(__file__).parent / "small_lm"),
    *,
    length: int = 1024,
    steps: int = 16,
    density: float = 0.3,
    lora: bool = False,
) -> dict[str, float]:
    """Calibrate, fine-tune, and return the first and last losses and the share of sparse calls."""
    from transformers import AutoModelForCausalLM

    network: nn.Module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if lora:
        network = with_adapters(network)
    network = seer_compile.optimize(network, inner="aot_eager")
    config = seer_compile.CalibrationConfig(steps=12, learning_rate=3e-3, warmup_steps=4)
    data = windows(model, length, 16, held_out=False)
    print(seer_compile.calibrate(network, data, config=config, density=density))
    # Short windows, to be quick on a CPU: sparse also where dense attention would be faster.
    network.seer_gates.set_mode(True, at_any_size=True)

    text = windows(model, length, 4, held_out=True)
    rate = 5e-3 if lora else 2e-4
    losses = torch.tensor(finetune(network.train(), text, steps, rate))
    # The same windows in the first round and in the last.
    task, gate = losses[: len(text)].mean(0).tolist()
    last_task, last_gate = losses[-len(text) :].mean(0).tolist()
    print(f"task loss {task:.3f} -> {last_task:.3f}, gate loss {gate:.3f} -> {last_gate:.3f}")
    calls = [number for site in network.seer_report().calls.values() for number in site.items()]
    sparse, every = sum(n for path, n in calls if path == "sparse"), sum(n for _, n in calls)
    print(f"sparse calls: {sparse} of {every}")
    return {"task": last_task / task, "gate": last_gate / gate, "sparse": sparse / every}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(Path(__file__).parent / "small_lm"))
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--density", type=float, default=0.3)
    parser.add_argument("--lora", action="store_true")
    main(**vars(parser.parse_args()))
