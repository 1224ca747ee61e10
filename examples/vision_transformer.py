"""An image model: nothing here is about language, causality or tokens in a row.

A ViT over 4,096 patches attends in all directions. Its weights are random, so the example shows
that the compiler and the gates work, not what sparsity costs a trained model.

    python examples/vision_transformer.py

Expected last lines (numbers vary a little between machines):

    ... sites sparse, full budget: relative error 0.00...
    density 0.30: relative error ...
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import seer_compile


def build_model(size: int, patch: int) -> nn.Module:
    """Return a small ViT whose heads have sharp, uneven attention."""
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        image_size=size,
        patch_size=patch,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ViTModel(config, add_pooling_layer=False).eval()
        for name, parameter in model.named_parameters():
            # At the initial scale every patch attends evenly to all, which no selection can keep.
            if name.endswith(("query.weight", "key.weight", "q_proj.weight", "k_proj.weight")):
                nn.init.normal_(parameter, std=0.35)
    return model


def images(count: int, size: int, seed: int) -> list[dict[str, Tensor]]:
    """Return smooth random pictures as keyword arguments of the model."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 12, 12, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic")
    return [{"pixel_values": picture[None]} for picture in fine]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the L2 norm of the difference over that of the expected value."""
    return ((actual - expected).norm() / expected.norm()).item()


@torch.no_grad()
def main(
    size: int = 512, patch: int = 8, steps: int = 24, density: float = 0.3
) -> dict[str, float]:
    """Optimize, calibrate and compare with dense; return the numbers that it prints."""
    model = build_model(size, patch)
    picture = images(1, size, seed=1)[0]
    explanation = seer_compile.explain(model, **picture)
    print(explanation)
    dense = model(**picture).last_hidden_state

    model = seer_compile.optimize(model)
    config = seer_compile.CalibrationConfig(steps=steps, learning_rate=5e-3, warmup_steps=3)
    with torch.enable_grad():
        report = seer_compile.calibrate(
            model, images(12, size, seed=2), config=config, density=density
        )
    print(report)
    sparse = model(**picture).last_hidden_state
    seer_compile.set_budget(model, mass=1.0)
    full = model(**picture).last_hidden_state
    results = {
        "sparse_sites": float(sum(site.decision == "sparse" for site in explanation.sites)),
        "full_error": relative_error(full, dense),
        "sparse_error": relative_error(sparse, dense),
    }
    print(
        f"{results['sparse_sites']:.0f} sites sparse, full budget: relative error "
        f"{results['full_error']:.6f}"
    )
    print(f"density {density:.2f}: relative error {results['sparse_error']:.4f}")
    return results


if __name__ == "__main__":
    main()
