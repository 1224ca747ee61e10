"""List the attention sites of a model: which can be sparse, which stay dense and why.

    python examples/explain_model.py

Expected last lines:

    decoder: 2 of 2 sites sparse
    encoder with returned weights: 0 of 1 sites sparse
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import seer_compile


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads."""

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.head_dim = width // heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.value = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map ``Float[b t width]`` to the same shape."""
        query, key, value = (
            layer(hidden).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Decoder(nn.Module):
    """Two layers of attention, enough to have sites with names."""

    def __init__(self, width: int = 128, heads: int = 4, kv_heads: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention(width, heads, kv_heads) for _ in range(2))

    def forward(self, hidden: Tensor) -> Tensor:
        """Map ``Float[b t width]`` to the same shape."""
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return hidden


class Inspected(nn.Module):
    """Attention whose weights the caller wants to see: they cannot be left uncomputed."""

    def __init__(self, width: int = 128, heads: int = 4) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return ``Float[b t width]`` and the weights ``Float[b t t]``."""
        return self.attention(hidden, hidden, hidden, need_weights=True)


def count_sparse(name: str, model: nn.Module, *inputs: Tensor) -> str:
    """Print a model's table and return one line about it."""
    explanation = seer_compile.explain(model.eval(), *inputs)
    print(explanation)
    sparse = sum(site.decision == "sparse" for site in explanation.sites)
    return f"{name}: {sparse} of {len(explanation.sites)} sites sparse"


def main() -> list[str]:
    """Explain two models and return the closing lines."""
    hidden = torch.zeros(1, 512, 128)
    lines = [
        count_sparse("decoder", Decoder(), hidden),
        count_sparse("encoder with returned weights", Inspected(), hidden),
    ]
    print("\n".join(lines))
    return lines


if __name__ == "__main__":
    main()
