"""A frozen attention model whose sparse pattern is planted, so that a gate can learn it.

Every key block hides one token that carries the block's code, and its neighbours cancel the code
out of the mean; every query block looks for the code of one earlier block. Means show nothing of
it, maxima and minima do: an untrained gate finds little, and a trained one finds the block.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from seer_compile.types import SiteInputs, Visibility
from support.inputs import generator, key_padding

BLOCK = 16
RUN = 8
HEAD_DIM = 24
OPERANDS = ("query", "key", "value")


class PlantedModel(nn.Module):
    """Two causal sites over queries and keys that a batch's seed determines.

    Args:
        heads: Query heads.
        kv_heads: Key/value heads.
        seed: Of the fixed rotations, one per site.
    """

    def __init__(self, heads: int = 2, kv_heads: int = 1, seed: int = 0) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads
        draw = generator(seed)
        self.rotations = nn.ParameterList(
            nn.Parameter(torch.linalg.qr(torch.randn(HEAD_DIM, HEAD_DIM, generator=draw))[0])
            for _ in range(2)
        )

    def run(self, batch, handler) -> list[Tensor]:
        """Answer both sites by a handler: ``batch`` is a dict of seed, length, padding, poison."""
        length = int(batch["length"])
        padding = key_padding([int(batch["real"])], length) if "real" in batch else None
        outputs = []
        for place, rotation in enumerate(self.rotations):
            query, key, value = self._tensors(int(batch["seed"]) * 2 + place, length)
            if int(batch.get("poison", -1)) == place:
                key[..., length // 2, :] = float("inf")
            outputs.append(
                handler(
                    SiteInputs(
                        name=f"layers.{place}.attn",
                        query=query @ rotation,
                        key=key @ rotation,
                        value=value,
                        scale=HEAD_DIM**-0.5,
                        visibility=Visibility(upper=0, key_padding=padding),
                    )
                )
            )
        return outputs

    def _tensors(self, seed: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
        draw = generator(1000 + seed)
        blocks = -(-length // BLOCK)
        codes = torch.rand(self.kv_heads, blocks, HEAD_DIM, generator=draw).sub(0.6).clamp(min=0)
        codes = 9 * codes / codes.norm(dim=-1, keepdim=True).clamp(min=1e-3)
        key = 0.4 * torch.randn(1, self.kv_heads, length, HEAD_DIM, generator=draw)
        query = 0.4 * torch.randn(1, self.heads, length, HEAD_DIM, generator=draw)
        group = self.heads // self.kv_heads
        for block in range(blocks):
            start, end = block * BLOCK, min(length, (block + 1) * BLOCK)
            hidden = start + int(torch.randint(0, end - start, (), generator=draw))
            run = slice(hidden - hidden % RUN, min(end, hidden - hidden % RUN + RUN))
            others = max(1, len(range(length)[run]) - 1)
            key[:, :, run] -= codes[:, block, None] / others
            key[:, :, hidden] += codes[:, block] * (1 + 1 / others)
            sought = int(torch.randint(0, block + 1, (), generator=draw))
            query[:, :, start:end] += codes[:, sought, None].repeat_interleave(group, 0)
        return query, key, torch.randn(1, self.kv_heads, length, HEAD_DIM, generator=draw)


class FirstHalf(PlantedModel):
    """The same model on the first half of every sequence."""

    def run(self, batch, handler) -> list[Tensor]:
        """Answer both sites by a handler that sees the half."""

        def on_half(inputs: SiteInputs) -> Tensor:
            tokens = inputs.query.shape[-2] // 2
            parts = {name: getattr(inputs, name)[..., :tokens, :] for name in OPERANDS}
            return handler(dataclasses.replace(inputs, **parts))

        return super().run(batch, on_half)


def batches(count: int, *lengths: int, first: int = 0) -> list[dict[str, Tensor]]:
    """Return batches for :class:`PlantedModel`, cycling through lengths."""
    return [
        {
            "seed": torch.tensor(first + place),
            "length": torch.tensor((lengths or (384,))[place % max(1, len(lengths))]),
        }
        for place in range(count)
    ]
