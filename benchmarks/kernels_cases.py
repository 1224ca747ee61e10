"""What the kernel fuzzer draws: profiles, which fix what is compiled, and inputs, which vary.

Shared by ``fuzz_kernels.py`` and the tests of the kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seer_compile.types import BlockSelection, Visibility

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
POISONS = (float("nan"), float("inf"), float("-inf"), 65504.0)


class Draw:
    """Random choices of one case."""

    def __init__(self, seed: int, case: int) -> None:
        self.generator = torch.Generator().manual_seed(seed * 1_000_003 + case)

    def integer(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def choice(self, options: Any) -> Any:
        return options[self.integer(0, len(options) - 1)]

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def flags(self, *shape: int, share: float) -> Tensor:
        return torch.rand(*shape, generator=self.generator) < share

    def length(self, longest: int) -> int:
        special = (1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 191, longest)
        if self.integer(0, 2) == 0:
            return min(self.choice(special), longest)
        return self.integer(1, longest)

    def tokens(self, batch: int, heads: int, length: int, dim: int, dtype, layout: str) -> Tensor:
        """Return ``Float[b h t d]`` in one of several memory layouts."""
        if layout == "heads first":
            return self.normal(batch, heads, length, dim).to(dtype)
        if layout == "tokens first":
            return self.normal(batch, length, heads, dim).to(dtype).transpose(1, 2)
        if layout == "fused":
            return (
                self.normal(batch, length, heads, 3 * dim)
                .to(dtype)
                .transpose(1, 2)[..., dim : 2 * dim]
            )
        # No stride is 1.
        return self.normal(batch, heads, length, 2 * dim).to(dtype)[..., ::2]


def draw_visibility(
    draw: Draw, batch: int, q_len: int, k_len: int, profile: dict[str, Any], device: str
) -> Visibility:
    """Return a random visibility that uses what the profile says."""
    shift = draw.choice((0, 0, k_len - q_len, draw.integer(-5, k_len)))
    upper = draw.choice((None, shift, shift))
    lower = draw.choice((None, None, shift - draw.integer(0, k_len)))
    rules = {"upper": upper, "lower": lower}
    if profile.get("offset"):
        rules["offset"] = torch.tensor(draw.integer(-8, 8), device=device)
    if profile.get("padding"):
        edge = draw.integer(0, k_len)
        inside = torch.arange(k_len) >= edge if draw.integer(0, 1) else torch.arange(k_len) < edge
        scattered = draw.flags(batch, k_len, share=0.8)
        rules["key_padding"] = draw.choice((inside.expand(batch, -1), scattered)).to(device)
    if profile.get("documents"):
        documents = draw.flags(batch, max(q_len, k_len), share=0.03).cumsum(1)
        rules["query_documents"] = documents[:, :q_len].to(device)
        rules["key_documents"] = documents[:, :k_len].to(device)
    return Visibility(**rules)


def draw_selection(draw: Draw, shape: tuple[int, ...], device: str) -> BlockSelection:
    """Return random lists, some rows empty, some full; entries past the count are garbage."""
    mask = draw.flags(*shape, share=draw.choice((0.05, 0.3, 0.7, 1.0)))
    mask &= draw.flags(*shape[:3], 1, share=0.9)
    counts = mask.sum(-1, dtype=torch.int32)
    order = torch.argsort(~mask, dim=-1, stable=True).int()
    past = torch.arange(shape[-1]) >= counts[..., None]
    return BlockSelection(order.masked_fill(past, 1 << 30).to(device), counts.to(device))


def attention_inputs(
    profile: dict[str, Any], draw: Draw, device: str, full: bool
) -> dict[str, Any]:
    """Draw the inputs of forward and backward."""
    batch, heads, kv_heads, selections = draw.choice((1, 1, 2)), *profile["heads"]
    longest = profile["longest"] if full else 80
    q_len, k_len = draw.length(longest), draw.length(longest)
    dtype, layout = profile["dtype"], profile["layout"]
    dim, value_dim = profile["dims"]
    query_block, key_block = profile["blocks"]
    blocks = (-(-q_len // query_block), -(-k_len // key_block))
    return {
        "query": draw.tokens(batch, heads, q_len, dim, dtype, layout).to(device),
        "key": draw.tokens(batch, kv_heads, k_len, dim, dtype, layout).to(device),
        "value": draw.tokens(batch, kv_heads, k_len, value_dim, dtype, layout).to(device),
        "grad_out": draw.tokens(batch, heads, q_len, value_dim, dtype, layout).to(device),
        "selection": draw_selection(draw, (batch, selections, *blocks), device),
        "scale": draw.choice((dim**-0.5, 0.3, -0.1, 1.0)),
        "blocks": profile["blocks"],
        "visibility": draw_visibility(draw, batch, q_len, k_len, profile, device),
        "poison": draw.choice(POISONS),
    }


def map_inputs(profile: dict[str, Any], draw: Draw, device: str, full: bool) -> dict[str, Any]:
    """Draw the inputs of block scores and attention mass."""
    batch, (heads, kv_heads) = draw.choice((1, 2)), profile["heads"]
    longest = profile["longest"] if full else 80
    q_len, k_len = draw.length(longest), draw.length(longest)
    extents = profile.get("sub_blocks", (1, 1))
    rows, columns = -(-q_len // extents[0]), -(-k_len // extents[1])
    dtype, layout, dim = profile["dtype"], profile["layout"], profile["dim"]
    visibility = draw_visibility(draw, batch, q_len, k_len, profile, device)
    return {
        "profile": profile,
        "rows": draw.tokens(batch, heads, rows, dim, dtype, layout).to(device),
        "columns": draw.tokens(batch, kv_heads, columns, dim, dtype, layout).to(device),
        "scale": draw.choice((dim**-0.5, 1.0, -0.2)),
        "lengths": (q_len, k_len),
        "visibility": visibility,
    }


def hopper_scores_inputs(
    profile: dict[str, Any], draw: Draw, device: str, full: bool
) -> dict[str, Any]:
    """Draw the inputs of block scores; key features are followed by what must not count."""
    inputs = map_inputs(profile, draw, device, full)
    return {**inputs, "columns": with_room(inputs["columns"])}


def with_room(features: Tensor) -> Tensor:
    """Return equal features in memory that goes on, with NaN, for 32 sub-blocks."""
    room = features.new_full((32 * features.shape[-1],), float("nan"))
    return torch.cat([features.flatten(), room])[: features.numel()].view(features.shape)


def pool_inputs(profile: dict[str, Any], draw: Draw, device: str, full: bool) -> dict[str, Any]:
    """Draw the inputs of pooling."""
    batch = draw.choice((1, 2))
    length = draw.length(profile["longest"] if full else 99)
    dtype, layout = profile["dtype"], profile["layout"]
    padding = draw.flags(batch, length, share=0.6).to(device) if profile.get("padding") else None
    tokens = draw.tokens(batch, 4, length, profile["dim"], dtype, layout).to(device)
    return {"tokens": tokens, "padding": padding, "profile": profile}


def features_inputs(profile: dict[str, Any], draw: Draw, device: str, full: bool) -> dict[str, Any]:
    """Draw the inputs of pooling with projection."""
    inputs = pool_inputs(profile, draw, device, full)
    channels = inputs["tokens"].shape[3] * len(profile["kinds"].split(","))
    weight = draw.normal(inputs["tokens"].shape[1], channels, profile["gate_dim"])
    if draw.integer(0, 1):
        # The rows of a wider tensor: no stride is that of a whole one.
        weight = torch.cat([weight, weight], 2)[..., : profile["gate_dim"]]
    return {**inputs, "weight": (weight * channels**-0.5).to(device)}


def select_inputs(profile: dict[str, Any], draw: Draw, device: str, full: bool) -> dict[str, Any]:
    """Draw the inputs of selection."""
    batch, heads = (draw.choice((1, 2)), draw.choice((1, 3))) if full else (1, 2)
    query_block, key_block = profile["blocks"]
    columns = draw.integer(*profile["columns"]) if full else draw.integer(1, 40)
    rows = min(columns, draw.integer(1, 12 if full else 4))
    k_len = columns * key_block - draw.integer(0, key_block - 1)
    q_len = rows * query_block - draw.integer(0, query_block - 1)
    scores = draw.normal(batch, heads, rows, columns).mul(draw.choice((0.5, 4.0))).softmax(-1)
    if draw.integer(0, 1):
        scores = (scores * 200).round() / 200
    limit = {"top_p": 1.1, "fraction": 1.0, "top_k": columns, "threshold": 3.0}
    budget = torch.rand(heads, generator=draw.generator) * limit[profile["selector"]]
    return {
        "scores": scores.to(device),
        "budget": budget.to(device),
        "selector": profile["selector"],
        "sizes": (query_block, key_block, q_len, k_len),
        "visibility": draw_visibility(draw, batch, q_len, k_len, profile, device),
    }


def _attention_profile(dtype, dims, blocks, heads, layout="heads first", longest=520, **rules):
    return {
        "dtype": dtype, "dims": dims, "blocks": blocks, "heads": heads, "layout": layout,
        "longest": longest, **rules,
    }  # fmt: skip


def _map_profile(dtype, dim, heads, layout="heads first", longest=700, **rest):
    return {
        "dtype": dtype,
        "dim": dim,
        "heads": heads,
        "layout": layout,
        "longest": longest,
        **rest,
    }


def _scores_profile(dtype, dim, sub_blocks, blocks, groups, **rest):
    return _map_profile(
        *(dtype, dim, (4, 4)),
        sub_blocks=sub_blocks,
        blocks=blocks,
        groups=groups,
        longest=1500,
        **rest,
    )


def _pool_profile(dtype, dim, size, kinds, layout="heads first", longest=2000, **rest):
    return {
        "dtype": dtype, "dim": dim, "size": size, "kinds": kinds, "layout": layout,
        "longest": longest, **rest,
    }  # fmt: skip


PROFILES: dict[str, list[dict[str, Any]]] = {
    "attention": [
        _attention_profile(BF16, (128, 128), (64, 64), (8, 2, 8), "tokens first", 1030),
        _attention_profile(BF16, (128, 128), (64, 64), (8, 2, 2), padding=True),
        _attention_profile(BF16, (128, 128), (128, 64), (4, 4, 4), documents=True),
        _attention_profile(BF16, (128, 128), (128, 128), (8, 2, 8), offset=True),
        _attention_profile(FP16, (64, 64), (64, 64), (4, 1, 4), "fused", 1030),
        _attention_profile(FP16, (64, 64), (16, 16), (4, 2, 1), padding=True, longest=300),
        _attention_profile(BF16, (64, 64), (32, 128), (4, 2, 2), "last strided", offset=True),
        _attention_profile(BF16, (256, 256), (64, 64), (2, 2, 2), padding=True),
        _attention_profile(FP16, (256, 256), (128, 128), (4, 2, 4), "tokens first"),
        _attention_profile(BF16, (80, 80), (64, 32), (4, 2, 4), "tokens first", documents=True),
        _attention_profile(BF16, (96, 48), (64, 64), (4, 2, 4), "tokens first", padding=True),
        _attention_profile(FP16, (16, 32), (32, 64), (6, 2, 6), "tokens first"),
        _attention_profile(FP32, (64, 64), (64, 64), (4, 2, 4), "tokens first", 300),
        _attention_profile(FP32, (128, 128), (32, 64), (4, 2, 2), padding=True, longest=300),
        _attention_profile(FP32, (256, 256), (64, 64), (2, 1, 2), documents=True, longest=200),
        _attention_profile(FP32, (24, 8), (16, 32), (4, 2, 4), "tokens first", 300, offset=True),
    ],
    "block_scores": [
        _scores_profile(BF16, 64, (2, 4), (64, 64), 1),
        _scores_profile(BF16, 64, (8, 8), (64, 64), 1),
        _scores_profile(BF16, 64, (8, 8), (64, 64), 1, programs=5),
        _scores_profile(FP16, 64, (2, 4), (64, 64), 4, padding=True),
        _scores_profile(FP16, 64, (8, 8), (64, 64), 4, programs=4),
        _scores_profile(BF16, 128, (64, 64), (64, 64), 1, layout="tokens first"),
        _scores_profile(BF16, 32, (8, 16), (128, 64), 2, documents=True),
        _scores_profile(FP16, 16, (1, 4), (32, 128), 1, offset=True),
        _scores_profile(FP16, 40, (24, 16), (48, 80), 2),
        _scores_profile(BF16, 256, (8, 8), (64, 64), 1),
        _scores_profile(FP32, 64, (8, 8), (64, 64), 1, padding=True),
        _scores_profile(FP32, 32, (32, 32), (32, 64), 4, documents=True),
        _scores_profile(FP32, 64, (8, 8), (64, 64), 1, layout="last strided"),
    ],
    "hopper_scores": [
        _scores_profile(BF16, 64, (2, 4), (64, 64), 1),
        _scores_profile(BF16, 64, (2, 4), (64, 64), 4),
        _scores_profile(FP16, 128, (4, 8), (64, 64), 2, offset=True),
        _scores_profile(FP16, 32, (8, 16), (64, 64), 1),
        _scores_profile(BF16, 64, (2, 8), (128, 128), 2),
        _scores_profile(BF16, 64, (1, 2), (64, 64), 1),
        _scores_profile(FP16, 128, (2, 2), (64, 64), 4, offset=True),
    ],
    "attention_mass": [
        _map_profile(BF16, 128, (4, 2), "tokens first", units=(64, 64), reduce=("mean", "sum")),
        _map_profile(BF16, 128, (4, 2), units=(8, 64), reduce=("mean", "sum"), padding=True),
        _map_profile(FP16, 64, (4, 1), units=(64, 64), reduce=("max", "max"), documents=True),
        _map_profile(FP16, 64, (2, 2), "fused", units=(64, 1), reduce=("max", "sum"), offset=True),
        _map_profile(BF16, 256, (2, 1), units=(128, 128), reduce=("mean", "max")),
        _map_profile(BF16, 80, (2, 2), "tokens first", units=(1, 16), reduce=("mean", "sum")),
        _map_profile(FP32, 64, (2, 1), units=(64, 64), reduce=("mean", "sum"), padding=True),
        _map_profile(FP32, 40, (2, 2), "tokens first", units=(5, 12), reduce=("mean", "max")),
    ],
    "pool_blocks": [
        _pool_profile(BF16, 128, 8, "mean,max,min", "tokens first"),
        _pool_profile(BF16, 128, 64, "max,min,mean", padding=True),
        _pool_profile(FP16, 80, 8, "mean", "tokens first", padding=True),
        _pool_profile(FP32, 64, 4, "min,mean", "last strided", padding=True),
        _pool_profile(FP32, 24, 12, "max", "tokens first"),
    ],
    "pool_features": [
        _pool_profile(BF16, 128, 8, "mean,max,min", "tokens first", groups=1, gate_dim=64),
        _pool_profile(BF16, 128, 2, "mean", "tokens first", groups=4, gate_dim=64),
        _pool_profile(FP16, 40, 4, "mean", "last strided", groups=2, gate_dim=24, padding=True),
        _pool_profile(BF16, 128, 64, "max,min,mean", groups=2, gate_dim=32, padding=True),
        _pool_profile(FP16, 80, 8, "mean", "tokens first", groups=2, gate_dim=48, padding=True),
        _pool_profile(FP16, 64, 4, "min,mean", "last strided", groups=1, gate_dim=16, padding=True),
        _pool_profile(FP16, 24, 12, "max", "fused", groups=4, gate_dim=128),
        _pool_profile(BF16, 256, 16, "mean,max", groups=1, gate_dim=200),
    ],
    "select_blocks": [
        {
            "selector": selector, "blocks": blocks, "columns": columns, "padding": padding,
            "offset": offset,
        }
        for selector, blocks, columns, padding, offset in (
            ("top_p", (64, 64), (1, 16), False, False),
            ("top_p", (64, 64), (257, 512), True, False),
            ("top_p", (64, 64), (8193, 16384), False, False),
            ("fraction", (64, 64), (33, 64), False, True),
            ("fraction", (128, 64), (257, 512), True, False),
            ("fraction", (64, 64), (8193, 16384), False, False),
            ("top_k", (64, 64), (65, 128), True, False),
            ("threshold", (64, 128), (65, 128), False, False),
        )
    ],
}  # fmt: skip
