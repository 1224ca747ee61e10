"""A transformer of one's own, from optimize to export, on a CPU in half a minute.

The data has something to find. Tokens come in pairs, ``key value``; keys belong to topics, the
topic changes every 64 tokens, and a key that comes back is followed by the same value again. So
what a stretch of text needs stands in the few earlier stretches of its topic, near or far. After a
short training, gates are calibrated, saved and loaded, and the model is exported as one program
with the budget still adjustable.

    python examples/tiny_transformer.py

Expected last lines (numbers vary a little between machines):

    full budget: largest difference from dense 0.0000...
    density 0.25 at 2 sites: copied values found ..., dense ...
    exported program: ... of the answers are the same
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import seer_compile

TOPICS, KEYS, VALUES, WIDTH, HEADS, LENGTH = 8, 128, 32, 64, 2, 3072


class Layer(nn.Module):
    """Attention and a two-layer perceptron, each on normalised input."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """Map ``Float[b t WIDTH]`` to the same shape."""
        query, key, value = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for part in self.qkv(self.norms[0](hidden)).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.out(mixed.transpose(1, 2).flatten(2))
        return hidden + self.mlp(self.norms[1](hidden))


class TinyTransformer(nn.Module):
    """Two layers over token embeddings; every token also sees the embedding of its predecessor."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(KEYS + VALUES, WIDTH)
        self.previous = nn.Linear(WIDTH, WIDTH, bias=False)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.head = nn.Linear(WIDTH, KEYS + VALUES)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits ``Float[b t KEYS+VALUES]`` of ``Int64[b t]``."""
        embedded = self.embedding(tokens)
        hidden = embedded + self.previous(F.pad(embedded, (0, 0, 1, 0))[:, :-1])
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden)


def pairs(batch: int, length: int, generator: torch.Generator) -> Tensor:
    """Return ``Int64[batch length]``: keys by topic, each followed by its value of this row."""
    values = torch.randint(KEYS, KEYS + VALUES, (batch, KEYS), generator=generator)
    per_topic = KEYS // TOPICS
    topics = torch.randint(0, TOPICS, (batch, length // 64), generator=generator)
    keys = torch.randint(0, per_topic, (batch, length // 2), generator=generator)
    keys = keys + per_topic * topics.repeat_interleave(32, dim=1)
    return torch.stack([keys, values.gather(1, keys)], dim=-1).flatten(1)


def seen_before(tokens: Tensor) -> Tensor:
    """Return ``Bool[b t/2]``: which keys occurred earlier in their row."""
    keys = tokens[:, ::2]
    return torch.tril(keys[:, :, None] == keys[:, None], diagonal=-1).any(-1)


def found(logits: Tensor, tokens: Tensor) -> float:
    """Return the share of values predicted right, where the key was seen before."""
    hits = logits[:, ::2].argmax(-1) == tokens[:, 1::2]
    return hits[seen_before(tokens)].float().mean().item()


def train(model: TinyTransformer, steps: int, generator: torch.Generator) -> None:
    """Teach the model to copy values."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * min(1.0, (step + 1) / 20, (steps - step) / (0.3 * steps))
        tokens = pairs(8, 256, generator)
        repeated = seen_before(tokens)
        loss = F.cross_entropy(model(tokens)[:, ::2][repeated], tokens[:, 1::2][repeated])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main(train_steps: int = 150, calibration_steps: int = 24) -> dict[str, float]:
    """Run the story; return the numbers that it prints."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = TinyTransformer()
    train(model, train_steps, generator)
    model.eval()
    tokens = pairs(2, LENGTH, generator)
    with torch.no_grad():
        dense = model(tokens)

    model = seer_compile.optimize(model)
    data = [pairs(1, LENGTH, generator) for _ in range(16)]
    config = seer_compile.CalibrationConfig(steps=calibration_steps, learning_rate=5e-3)
    report = seer_compile.calibrate(model, data, config=config, density=0.25, progress=False)
    print(report)
    with torch.no_grad():
        sparse = model(tokens)
        calls = seer_compile.seer_report(model).calls.values()
        seer_compile.set_budget(model, mass=1.0)
        full = model(tokens)
    results = {
        "full_difference": (full - dense).abs().max().item(),
        "dense_found": found(dense, tokens),
        "sparse_found": found(sparse, tokens),
        "sparse_sites": sum("sparse" in paths for paths in calls),
    }
    results["export_agreement"] = export(model, tokens)
    print(f"full budget: largest difference from dense {results['full_difference']:.6f}")
    print(
        f"density 0.25 at {results['sparse_sites']} sites: copied values found "
        f"{results['sparse_found']:.3f}, dense {results['dense_found']:.3f}"
    )
    print(f"exported program: {results['export_agreement']:.4f} of the answers are the same")
    return results


def export(model: TinyTransformer, tokens: Tensor) -> float:
    """Save gates, export, load again; return the share of answers that are the model's.

    The program rounds in other places. Where two blocks score alike it may keep the other one.
    """
    with tempfile.TemporaryDirectory() as folder:
        gates, path = Path(folder) / "gates.safetensors", Path(folder) / "program.pt2"
        seer_compile.set_budget(model, density=0.25)
        seer_compile.save_gates(model, gates)
        with torch.no_grad():
            expected = model(tokens)
        seer_compile.restore(model)
        length = torch.export.Dim("length", min=2, max=4096)
        program = seer_compile.export(
            model, (tokens,), dynamic_shapes={"tokens": {1: length}}, gates=gates
        )
        torch.export.save(program, path)
        loaded = torch.export.load(path).module()
        with torch.no_grad():
            return (loaded(tokens).argmax(-1) == expected.argmax(-1)).float().mean().item()


if __name__ == "__main__":
    main()
