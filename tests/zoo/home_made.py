"""Attention as people write it themselves: nanoGPT, einsum, PyTorch's own layers and more."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.architecture import Architecture, Batch, Door, Situation
from zoo.text_situations import SIDES, Side, padding
from zoo.wrappers import Forward

WIDTH, HEADS = 32, 4


class NanoGPT(nn.Module):
    """nanoGPT: packed projections; fused, or masked by a triangle that is a buffer."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.packed, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.is_fused = spelling == "sdpa"
        triangle = torch.tril(torch.ones(512, 512)).view(1, 1, 512, 512)
        self.register_buffer("bias", triangle)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.packed(x).split(c, dim=2)
        q, k, v = (part.view(b, t, HEADS, c // HEADS).transpose(1, 2) for part in (q, k, v))
        if self.is_fused:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            weights = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            weights = weights.masked_fill(self.bias[:, :, :t, :t] == 0, float("-inf"))
            y = F.softmax(weights, dim=-1) @ v
        return self.out(y.transpose(1, 2).contiguous().view(b, t, c))


class XTransformer(nn.Module):
    """In the manner of x-transformers: grouped einsum, masks filled with the least number."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        del spelling
        self.to_q, self.to_k, self.to_v = (
            nn.Linear(WIDTH, WIDTH, bias=False),
            nn.Linear(WIDTH, WIDTH // 2, bias=False),
            nn.Linear(WIDTH, WIDTH // 2, bias=False),
        )
        self.to_out = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q = self.to_q(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        k, v = (
            f(x).unflatten(-1, (HEADS // 2, -1)).transpose(1, 2) for f in (self.to_k, self.to_v)
        )
        q = F.normalize(q, dim=-1).unflatten(1, (HEADS // 2, 2))
        k = F.normalize(k, dim=-1)
        dots = torch.einsum("b g r i d, b g j d -> b g r i j", q, k) * 10.0
        least = -torch.finfo(dots.dtype).max
        if mask is not None:
            dots = dots.masked_fill(~mask[:, None, None, None, :], least)
        i, j = dots.shape[-2:]
        causal = torch.ones((i, j), dtype=torch.bool, device=x.device).triu(j - i + 1)
        dots = dots.masked_fill(causal, least)
        weights = dots.softmax(dim=-1, dtype=torch.float32).type(dots.dtype)
        out = torch.einsum("b g r i j, b g j d -> b g r i d", weights, v)
        return self.to_out(out.flatten(1, 2).transpose(1, 2).flatten(2))


class TokensFirst(nn.Module):
    """Einsum over ``b t h d``, without moving the heads; a window by distance."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        del spelling
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (HEADS, -1)) for f in (self.q, self.k, self.v))
        logits = torch.einsum("bqhd,bkhd->bhqk", q * q.shape[-1] ** -0.5, k)
        place = torch.arange(x.shape[1], device=x.device)
        distance = place[:, None] - place[None, :]
        visible = (distance >= 0) & (distance < 70)
        if mask is not None:
            visible = visible & mask[:, None, None, :]
        logits = torch.where(visible, logits, torch.finfo(logits.dtype).min)
        return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), v).flatten(2)


class Fairseq(nn.Module):
    """Heads folded into the batch, scale on the queries, products by ``bmm``."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        del spelling
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        b, t, c = x.shape
        folded = (
            f(x).view(b, t, HEADS, c // HEADS).transpose(1, 2).reshape(b * HEADS, t, -1)
            for f in (self.q, self.k, self.v)
        )
        q, k, v = folded
        logits = torch.bmm(q * (c // HEADS) ** -0.5, k.transpose(1, 2))
        future = torch.triu(torch.full((t, t), float("-inf"), device=x.device), 1)
        logits = logits + future.to(logits.dtype)
        if mask is not None:
            logits = logits.view(b, HEADS, t, t)
            logits = logits.masked_fill(~mask[:, None, None], float("-inf"))
            logits = logits.view(b * HEADS, t, t)
        out = torch.bmm(logits.softmax(-1), v)
        return out.view(b, HEADS, t, -1).transpose(1, 2).reshape(b, t, c)


class Residual(nn.Module):
    """Two layers of one kind with norms between."""

    def __init__(self, layer: type[nn.Module], spelling: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer(spelling) for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = x + (layer(self.norm(x)) if mask is None else layer(self.norm(x), mask))
        return x


class TorchEncoder(nn.Module):
    """``nn.TransformerEncoder`` with ``src_key_padding_mask`` (True on padding)."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 48, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.encoder(x, src_key_padding_mask=None if mask is None else ~mask)


class TorchDecoder(nn.Module):
    """``nn.TransformerDecoder``: causal self attention, attention to a memory."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 48, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, 2)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        future = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        return self.decoder(x, memory, tgt_mask=future, tgt_is_causal=True)


class Weighing(nn.Module):
    """``nn.MultiheadAttention`` that is asked for its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out, weights = self.attention(x, x, x, need_weights=True)
        return out * weights.amax(dim=-1, keepdim=True)


def values(model: nn.Module, size: int, seed: int = 0) -> Tensor:
    """Return tokens ``b t c``."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(2, size, WIDTH, generator=generator)
    return values.to(next(model.parameters()).dtype)


def _plain(model: nn.Module, size: int) -> Batch:
    return Batch(inputs={"x": values(model, size)})


def _padded(model: nn.Module, size: int, side: Side) -> Batch:
    mask = padding(size, side)[:2].bool()
    return Batch(inputs={"x": values(model, size), "mask": mask}, rows=mask)


def _with_memory(model: nn.Module, size: int) -> Batch:
    return Batch(inputs={"x": values(model, size), "memory": values(model, 90, seed=1)})


def bare(model: nn.Module, door: Door) -> nn.Module:
    """Wrap as it is."""
    del door
    return Forward(model)


_TOKENS: dict[str, Any] = {"x": (1,)}
PLAIN = Situation(name="no mask", wrap=bare, make=_plain, dynamic=_TOKENS)
LEFT, RIGHT = (
    Situation(
        name=f"{side} padding",
        wrap=bare,
        make=partial(_padded, side=side),
        dynamic=_TOKENS | {"mask": (1,)},
    )
    for side in SIDES
)
PADDED = (PLAIN, LEFT, RIGHT)
"""Not on the left where masks are -inf: a causal query that is padding there gets NaN."""
MEMORY = Situation(name="no mask", wrap=bare, make=_with_memory, dynamic=_TOKENS)


def home_made(
    name: str,
    make: Callable[[str], nn.Module],
    situations: tuple[Situation, ...],
    spellings: tuple[str, ...],
    *,
    sites: int = 2,
    barred: dict[str, int] | None = None,
) -> Architecture:
    """Return an architecture from a function that builds it per spelling."""

    def build(spelling: str) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return make(spelling).eval()

    return Architecture(
        name=name,
        family="home-made",
        build=build,
        situations=situations,
        sites=sites,
        spellings=spellings,
        barred=barred or {},
    )


def layers(layer: type[nn.Module]) -> Callable[[str], nn.Module]:
    """Return how two layers of a kind are built."""
    return lambda spelling: Residual(layer, spelling)


_BOTH, _EINSUM, _TORCH = ("sdpa", "eager"), ("einsum",), ("nn",)
ARCHITECTURES = (
    home_made("nanogpt", layers(NanoGPT), (PLAIN,), _BOTH),
    home_made("x-transformers-like", layers(XTransformer), PADDED, _EINSUM),
    home_made("einsum, tokens first", layers(TokensFirst), PADDED, _EINSUM),
    home_made("fairseq-like", layers(Fairseq), (PLAIN, RIGHT), ("bmm",)),
    home_made("nn.TransformerEncoder", lambda _: TorchEncoder(), PADDED, _TORCH),
    home_made("nn.TransformerDecoder", lambda _: TorchDecoder(), (MEMORY,), _TORCH, sites=4),
    home_made(
        "nn.MultiheadAttention, weights used",
        lambda _: Weighing(),
        (PLAIN,),
        _TORCH,
        sites=1,
        barred={"weights": 1},
    ),
)
