"""More attention as people write it: what repositories, papers and tutorials have."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.architecture import Batch, Situation
from zoo.home_made import (
    HEADS,
    PLAIN,
    RIGHT,
    WIDTH,
    Residual,
    bare,
    home_made,
    layers,
    values,
)
from zoo.text_situations import CAPACITY, PREFIX

SIZE = WIDTH // HEADS


def split_heads(x: Tensor) -> Tensor:
    """``b t (h d)`` to ``b h t d``."""
    return x.unflatten(-1, (-1, SIZE)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """``b h t d`` to ``b t (h d)``."""
    return x.transpose(1, 2).flatten(2)


class Projections(nn.Module):
    """Queries, keys, values."""

    def __init__(self, spelling: str = "", kv_heads: int = HEADS) -> None:
        super().__init__()
        del spelling
        self.q = nn.Linear(WIDTH, WIDTH)
        self.k, self.v = (nn.Linear(WIDTH, kv_heads * SIZE) for _ in range(2))


class FlashFlag(nn.Module):
    """nanoGPT as it is today: a flag, and dropout that is off in evaluation."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.attn_dropout, self.resid_dropout, self.dropout = nn.Dropout(0.1), nn.Dropout(0.1), 0.1
        self.flash = spelling == "flash"
        if not self.flash:
            triangle = torch.tril(torch.ones(512, 512)).view(1, 1, 512, 512)
            self.register_buffer("bias", triangle, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        t = x.shape[1]
        q, k, v = (split_heads(part) for part in self.c_attn(x).split(WIDTH, dim=2))
        if self.flash:
            dropout = self.dropout if self.training else 0
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=None, dropout_p=dropout, is_causal=True
            )
        else:
            att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            att = att.masked_fill(self.bias[:, :, :t, :t] == 0, float("-inf"))
            y = self.attn_dropout(F.softmax(att, dim=-1)) @ v
        return self.resid_dropout(self.c_proj(join_heads(y).contiguous()))


class Alibi(Projections):
    """x-transformers with normed queries and keys and ALiBi: a bias by distance."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(f(x)) for f in (self.q, self.k, self.v))
        q, k = (F.normalize(part, dim=-1) for part in (q, k))
        slopes = 2.0 ** -torch.arange(1, HEADS + 1, device=x.device, dtype=x.dtype)
        i = torch.arange(x.shape[1], device=x.device)
        bias = -(i[None, :] - i[:, None]).abs() * slopes[:, None, None]
        dots = torch.einsum("b h i d, b h j d -> b h i j", q, k) * 10.0 + bias
        dots = dots.masked_fill(i[None, :] > i[:, None], -torch.finfo(dots.dtype).max)
        return join_heads(torch.einsum("b h i j, b h j d -> b h i d", dots.softmax(-1), v))


class Perceiver(nn.Module):
    """Latents that read the tokens, heads folded into the batch, as in perceiver-pytorch."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(70, WIDTH))
        self.to_q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.to_kv = nn.Linear(WIDTH, 2 * WIDTH, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        b, latents = x.shape[0], self.latents[None].expand(x.shape[0], -1, -1)
        k, v = self.to_kv(x).chunk(2, dim=-1)
        q, k, v = (
            split_heads(part).reshape(b * HEADS, -1, SIZE) for part in (self.to_q(latents), k, v)
        )
        sim = torch.einsum("b i d, b j d -> b i j", q, k) * SIZE**-0.5
        if mask is not None:
            most_negative = -torch.finfo(sim.dtype).max
            seen = mask[:, None].expand(b, HEADS, -1).reshape(b * HEADS, 1, -1)
            sim = sim.masked_fill(~seen, most_negative)
        out = torch.einsum("b i j, b j d -> b i d", sim.softmax(dim=-1), v)
        return join_heads(out.view(b, HEADS, -1, SIZE))


class MultiQuery(Projections):
    """One key head, three-dimensional products: queries of all heads are rows (GPT-BigCode)."""

    def __init__(self, spelling: str) -> None:
        super().__init__(spelling, kv_heads=1)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.q(x).reshape(b, t * HEADS, SIZE), self.k(x), self.v(x)
        empty = torch.empty((b, t * HEADS, t), dtype=x.dtype, device=x.device)
        weights = torch.baddbmm(empty, q, k.transpose(1, 2), beta=0, alpha=SIZE**-0.5)
        weights = weights.view(b, t, HEADS, t)
        causal = torch.ones((t, t), dtype=torch.bool, device=x.device).tril().view(1, t, 1, t)
        least = torch.full([], torch.finfo(weights.dtype).min, dtype=weights.dtype)
        weights = torch.where(causal, weights, least).softmax(dim=-1)
        return torch.bmm(weights.view(b, t * HEADS, t), v).view(b, t, WIDTH)


class OldBert(Projections):
    """Hugging Face before SDPA: (1 - mask) * the least number, added to the logits."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (
            f(x).view(*x.shape[:2], HEADS, SIZE).permute(0, 2, 1, 3)
            for f in (self.q, self.k, self.v)
        )
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(SIZE)
        if mask is not None:
            extended = mask[:, None, None, :].to(dtype=scores.dtype)
            scores = scores + (1.0 - extended) * torch.finfo(scores.dtype).min
        context = torch.matmul(nn.functional.softmax(scores, dim=-1), v)
        context = context.permute(0, 2, 1, 3).contiguous()
        return context.view(*context.size()[:-2], WIDTH)


class OldGPT2(Projections):
    """Hugging Face's GPT-2 of 2022: a byte triangle, where, and -10000 for padding."""

    def __init__(self, spelling: str) -> None:
        super().__init__(spelling)
        triangle = torch.tril(torch.ones((512, 512), dtype=torch.uint8)).view(1, 1, 512, 512)
        self.register_buffer("bias", triangle)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (split_heads(f(x)) for f in (self.q, self.k, self.v))
        weights = torch.matmul(q, k.transpose(-1, -2)) / torch.full([], SIZE**0.5, dtype=x.dtype)
        i, j = q.size(-2), k.size(-2)
        causal = self.bias[:, :, j - i : j, :j].to(torch.bool)
        least = torch.full([], torch.finfo(weights.dtype).min, dtype=weights.dtype)
        weights = torch.where(causal, weights, least)
        if mask is not None:
            weights = weights + (1.0 - mask[:, None, None, :].to(x.dtype)) * -10000.0
        return join_heads(torch.matmul(F.softmax(weights, dim=-1).type(v.dtype), v))


class Vision(nn.Module):
    """vit-pytorch: one projection, ``nn.Softmax``, dropout as modules."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        del spelling
        self.to_qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.attend, self.dropout = nn.Softmax(dim=-1), nn.Dropout(0.1)
        self.to_out = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(part) for part in self.to_qkv(x).chunk(3, dim=-1))
        attention = self.dropout(self.attend(torch.matmul(q, k.transpose(-1, -2)) * SIZE**-0.5))
        return self.to_out(join_heads(torch.matmul(attention, v)))


class PackedHeads(nn.Module):
    """Queries, keys and values in one tensor ``b s 3 h d``, as FlashAttention takes them."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        del spelling
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).view(*x.shape[:2], 3, HEADS, SIZE)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(dim=2))
        return join_heads(F.scaled_dot_product_attention(q, k, v))


class TrilTriu(Projections):
    """A window as a triangle of a triangle."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(f(x)) for f in (self.q, self.k, self.v))
        t = x.shape[1]
        band = torch.ones(t, t, dtype=torch.bool, device=x.device).tril().triu(-69)
        return join_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=band))


class TalkingHeads(Projections):
    """Heads mixed after the softmax: somebody else reads the weights."""

    def __init__(self, spelling: str) -> None:
        super().__init__(spelling)
        self.mix = nn.Parameter(torch.randn(HEADS, HEADS))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(f(x)) for f in (self.q, self.k, self.v))
        weights = (q @ k.mT * SIZE**-0.5).softmax(-1)
        weights = torch.einsum("b h i j, h g -> b g i j", weights, self.mix)
        return join_heads(weights @ v)


class Cosine(Projections):
    """Swin V2: cosines with a temperature per head that is learned."""

    def __init__(self, spelling: str) -> None:
        super().__init__(spelling)
        self.logit_scale = nn.Parameter(torch.log(10 * torch.ones((HEADS, 1, 1))))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(f(x)) for f in (self.q, self.k, self.v))
        logits = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        scale = torch.clamp(self.logit_scale, max=math.log(100.0)).exp()
        return join_heads(F.softmax(logits * scale, dim=-1) @ v)


class Documents(Projections):
    """Packed documents told by where one ends; the mask compares running counts."""

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        q, k, v = (split_heads(f(x)) for f in (self.q, self.k, self.v))
        document = ends.long().cumsum(-1) - ends.long()
        same = document[:, :, None] == document[:, None, :]
        causal = torch.ones(x.shape[1], x.shape[1], device=x.device, dtype=torch.bool).tril()
        mask = torch.zeros_like(same, dtype=x.dtype).masked_fill(~(same & causal), -math.inf)
        return join_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None]))


class PrefixModel(Projections):
    """A prefix that all may read, then causal (GLM, UniLM): a union of two sets."""

    def forward(self, x: Tensor, prefix: Tensor) -> Tensor:
        q, k, v = (split_heads(f(x)) for f in (self.q, self.k, self.v))
        i = torch.arange(x.shape[1], device=x.device)
        visible = (i[None, :] <= i[:, None]) | (i[None, None, :] < prefix[:, None, None])
        return join_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None]))


class MetaLlama(Projections):
    """Llama as Meta wrote it: a cache that is written in place, a mask of -inf, heads repeated."""

    def __init__(self, spelling: str) -> None:
        super().__init__(spelling, kv_heads=HEADS // 2)
        generator = torch.Generator().manual_seed(5)
        for name in ("cache_k", "cache_v"):
            filled = torch.randn(2, CAPACITY, HEADS // 2, SIZE, generator=generator)
            self.register_buffer(name, filled)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.q(x).view(b, t, HEADS, SIZE)
        self.cache_k[:b, PREFIX : PREFIX + t] = self.k(x).view(b, t, -1, SIZE)
        self.cache_v[:b, PREFIX : PREFIX + t] = self.v(x).view(b, t, -1, SIZE)
        keys, held = self.cache_k[:b, : PREFIX + t], self.cache_v[:b, : PREFIX + t]
        keys, held = (
            part[:, :, :, None, :].expand(b, PREFIX + t, HEADS // 2, 2, SIZE).flatten(2, 3)
            for part in (keys, held)
        )
        mask = torch.full((t, t), float("-inf"), device=x.device, dtype=x.dtype).triu(1)
        mask = torch.hstack([torch.zeros((t, PREFIX), device=x.device, dtype=x.dtype), mask])
        q, keys, held = q.transpose(1, 2), keys.transpose(1, 2), held.transpose(1, 2)
        scores = torch.matmul(q, keys.transpose(2, 3)) / math.sqrt(SIZE)
        scores = F.softmax((scores + mask).float(), dim=-1).type_as(q)
        return torch.matmul(scores, held).transpose(1, 2).contiguous().view(b, t, -1)


class QuantisedCache(Projections):
    """Past keys and values in eight bits, with a scale per token (KIVI and the like)."""

    def __init__(self, spelling: str) -> None:
        super().__init__(spelling)
        generator = torch.Generator().manual_seed(5)
        for name in ("past_k", "past_v"):
            codes = torch.randint(-127, 128, (2, HEADS, PREFIX, SIZE), generator=generator)
            self.register_buffer(name, codes.to(torch.int8))
            self.register_buffer(f"{name}_scale", torch.full((2, HEADS, PREFIX, 1), 0.01))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(f(x)) for f in (self.q, self.k, self.v))
        past_k = self.past_k.to(x.dtype) * self.past_k_scale
        past_v = self.past_v.to(x.dtype) * self.past_v_scale
        k, v = torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)
        place = torch.arange(k.shape[2], device=x.device)
        visible = place[None, :] <= place[PREFIX:, None]
        return join_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=visible))


class LitMask(Projections):
    """lit-gpt: a mask made once, of which rows are taken by position."""

    def __init__(self, spelling: str) -> None:
        super().__init__(spelling)
        ones = torch.ones((CAPACITY, CAPACITY), dtype=torch.bool)
        self.register_buffer("mask_cache", torch.tril(ones)[None, None])

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(f(x)) for f in (self.q, self.k, self.v))
        place = torch.arange(x.shape[1], device=x.device)
        mask = self.mask_cache.index_select(2, place)[:, :, :, : x.shape[1]]
        return join_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


class WholeTransformer(nn.Module):
    """``nn.Transformer``: encoder, decoder, a causal target, padding in the source."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Transformer(WIDTH, HEADS, 1, 1, 48, batch_first=True, dropout=0.1)
        # As a nested tensor, padding would leave the graph.
        self.model.encoder.enable_nested_tensor = False

    def forward(self, x: Tensor, memory: Tensor, padding: Tensor) -> Tensor:
        future = self.model.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        return self.model(
            memory,
            x,
            tgt_mask=future,
            src_key_padding_mask=padding,
            memory_key_padding_mask=padding,
            tgt_is_causal=True,
        )


class SoftmaxPlusOne(Projections):
    """One added to the denominator ("attention is off by one"), as a key of zeros."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(f(x)) for f in (self.q, self.k, self.v))
        logits = q @ k.mT * SIZE**-0.5
        logits = torch.cat([torch.zeros_like(logits[..., :1]), logits], dim=-1)
        return join_heads(logits.softmax(-1)[..., 1:] @ v)


class Given(nn.Module):
    """Two layers of one kind that take something beside the tokens."""

    def __init__(self, layer: type[nn.Module], name: str) -> None:
        super().__init__()
        self.stack, self.name = Residual(layer, ""), name

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.stack(inputs["x"], inputs[self.name])


def _with_ends(model: nn.Module, size: int) -> Batch:
    ends = torch.zeros(2, size, dtype=torch.bool)
    ends[0, size // 3], ends[1, size // 2] = True, True
    return Batch(inputs={"x": values(model, size), "ends": ends})


def _with_prefix(model: nn.Module, size: int) -> Batch:
    return Batch(inputs={"x": values(model, size), "prefix": torch.tensor([10, 30])})


def _with_source(model: nn.Module, size: int) -> Batch:
    padding = torch.zeros(2, 90, dtype=torch.bool)
    padding[1, 70:] = True
    inputs = {"x": values(model, size), "memory": values(model, 90, seed=1), "padding": padding}
    return Batch(inputs=inputs)


def _tokens_that_latents_read(model: nn.Module, size: int) -> Batch:
    return Batch(inputs=RIGHT.make(model, size).inputs)


def _situation(name: str, make: Any, dynamic: dict[str, Any]) -> Situation:
    return Situation(name=name, wrap=bare, make=make, dynamic={"x": (1,)} | dynamic)


_PLAIN, _PADDED = (PLAIN,), (PLAIN, RIGHT)
_CHUNK = (Situation(
    name="dynamic cache, chunk", wrap=bare, make=PLAIN.make, dynamic={"x": (1,)}, sizes=(75, 66)
),)  # fmt: skip
_EINSUM, _MATMUL, _SDPA = ("einsum",), ("matmul",), ("sdpa",)
ARCHITECTURES = (
    home_made("nanogpt, flag and dropout", layers(FlashFlag), _PLAIN, ("flash", "written out")),
    home_made(
        "x-transformers-like, alibi", layers(Alibi), _PLAIN, _EINSUM, barred={"float bias": 2}
    ),
    home_made(
        "perceiver-like",
        lambda _: Perceiver(),
        (PLAIN, _situation("right padding", _tokens_that_latents_read, {"mask": (1,)})),
        _EINSUM,
        sites=1,
    ),
    home_made("multi-query, bmm", layers(MultiQuery), _PLAIN, ("bmm",)),
    home_made("bert of 2020", layers(OldBert), _PADDED, _MATMUL),
    home_made("gpt2 of 2022", layers(OldGPT2), _PADDED, _MATMUL),
    home_made("vit-pytorch-like", layers(Vision), _PLAIN, _MATMUL),
    home_made("packed heads", layers(PackedHeads), _PLAIN, _SDPA),
    home_made("tril of triu", layers(TrilTriu), _PLAIN, _SDPA),
    home_made("talking heads", layers(TalkingHeads), _PLAIN, _MATMUL, barred={"weights": 2}),
    home_made("cosine, learned scale", layers(Cosine), _PLAIN, _MATMUL, barred={"scale": 2}),
    home_made(
        "documents by their ends",
        lambda _: Given(Documents, "ends"),
        (_situation("packed", _with_ends, {"ends": (1,)}),),
        _SDPA,
    ),
    home_made(
        "prefix model",
        lambda _: Given(PrefixModel, "prefix"),
        (_situation("no mask", _with_prefix, {}),),
        _SDPA,
    ),
    home_made("llama by Meta", layers(MetaLlama), _CHUNK, _MATMUL),
    home_made("cache of eight bits", layers(QuantisedCache), _CHUNK, _SDPA),
    home_made("lit-gpt-like", layers(LitMask), _PLAIN, _SDPA),
    home_made(
        "nn.Transformer",
        lambda _: WholeTransformer(),
        (_situation("right padding", _with_source, {}),),
        ("nn",),
        sites=3,
    ),
    home_made("softmax plus one", layers(SoftmaxPlusOne), _PLAIN, _MATMUL),
)
