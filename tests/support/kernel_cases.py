"""Random calls of the operators, one per seed: shapes, heads, layouts, visibility, selection."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seer_compile.kernels import reference
from seer_compile.types import BlockSelection, Visibility
from support.inputs import AttentionInputs, attention_inputs, generator, random_selection

LENGTHS = (1, 2, 15, 16, 17, 31, 63, 64, 65, 100, 127, 129, 193)
BANDS = ("full", "causal", "lower_right", "window", "tensor_offset", "anti_causal", "disjoint")


@dataclass(frozen=True, kw_only=True, eq=False)
class KernelCase:
    """One call of block-sparse attention."""

    inputs: AttentionInputs
    selection: BlockSelection
    query_block: int
    key_block: int
    visibility: Visibility

    @property
    def readable(self) -> tuple[Any, ...]:
        """The last arguments of an operator."""
        return tuple(self.visibility.as_arguments().values())

    @property
    def lengths(self) -> tuple[int, int]:
        """Query and key tokens."""
        return self.inputs.query.shape[2], self.inputs.key.shape[2]

    @property
    def grid(self) -> tuple[int, int, int, int]:
        """Block sizes and lengths, as operators take them."""
        return (self.query_block, self.key_block, *self.lengths)

    def mask(self) -> Tensor:
        """Return ``Bool[b h q k]``: what each query reads."""
        heads, (q_len, k_len) = self.inputs.query.shape[1], self.lengths
        blocks = reference.selection_mask(self.selection, -(-k_len // self.key_block))
        keep = blocks.repeat_interleave(self.query_block, 2)[:, :, :q_len]
        keep = keep.repeat_interleave(self.key_block, 3)[..., :k_len]
        keep = keep.repeat_interleave(heads // keep.shape[1], 1)
        device = self.inputs.query.device
        return keep & reference.token_mask(self.visibility, q_len, k_len, device)


def random_visibility(
    rng: random.Random, batch: int, q_len: int, k_len: int, *, band: str | None = None
) -> Visibility:
    """Return a band, with padding and documents now and then."""
    band = band or rng.choice(BANDS)
    shift = k_len - q_len
    fields: dict[str, Any] = {
        "full": {},
        "causal": {"upper": 0},
        "lower_right": {"upper": shift},
        "window": {"upper": shift, "lower": shift - rng.choice((0, 5, 40, 90))},
        "tensor_offset": {"upper": 0, "offset": torch.tensor(shift)},
        "anti_causal": {"lower": rng.choice((-20, 0, 7))},
        "disjoint": {"upper": 3, "lower": 5},
    }[band]
    draws = generator(rng.randrange(1 << 30))
    if rng.random() < 0.4:
        share = rng.choice((0.05, 0.5, 0.95))
        fields["key_padding"] = torch.rand(batch, k_len, generator=draws) < share
    if rng.random() < 0.3:
        size = rng.choice((7, 50))
        fields["query_documents"] = (torch.arange(q_len) // size).expand(batch, q_len)
        fields["key_documents"] = (torch.arange(k_len) // size).expand(batch, k_len)
    return Visibility(**fields)


def random_case(seed: int, dtype: torch.dtype = torch.float32) -> KernelCase:
    """Return the call of a seed; the same values, rounded, in every dtype."""
    rng = random.Random(seed)
    batch, kv_heads = rng.choice((1, 2)), rng.choice((1, 2, 3))
    heads = kv_heads * rng.choice((1, 2, 3))
    q_len, k_len = rng.choice(LENGTHS), rng.choice(LENGTHS)
    head_dim = rng.choice((1, 8, 17, 48, 64))
    inputs = attention_inputs(
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        q_len=q_len,
        k_len=k_len,
        head_dim=head_dim,
        value_dim=rng.choice((head_dim, 5)),
        dtype=dtype,
        layout=rng.choice(("contiguous", "tokens_first", "sliced", "expanded_batch")),
        seed=seed,
        sharpness=rng.choice((1.0, 3.0)),
    )
    query_block, key_block = rng.choice((16, 32, 64, 128)), rng.choice((16, 32, 64))
    selection = random_selection(
        batch,
        rng.choice((1, kv_heads, heads)),
        -(-q_len // query_block),
        -(-k_len // key_block),
        density=rng.choice((0.0, 0.2, 0.6, 1.0)),
        seed=seed,
    )
    return KernelCase(
        inputs=inputs,
        selection=selection,
        query_block=query_block,
        key_block=key_block,
        visibility=random_visibility(rng, batch, q_len, k_len),
    )


def eager_attention(inputs: AttentionInputs, mask: Tensor) -> Tensor:
    """Return what plain PyTorch computes in the dtype of the inputs; 0 in rows without a key."""
    query, key, value, scale = inputs
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    logits = (query @ key.transpose(-1, -2) * scale).masked_fill(~mask, -torch.inf)
    weights = logits.softmax(-1).masked_fill(~mask.any(-1, keepdim=True), 0.0)
    return weights @ value


ORDERS = 5
"""Orders of summation that :func:`worst_of_eager` tries."""


def worst_of_eager(
    compute: Callable[[AttentionInputs, Tensor, Tensor], tuple[Tensor, ...]],
    inputs: AttentionInputs,
    mask: Tensor,
    gold: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    """Return results that are, element by element, off by the largest error PyTorch makes.

    How plain PyTorch rounds depends on the order in which channels, keys and queries are
    summed; one order is a matter of luck where a result has a hundred elements. In float32
    queries, keys and scale also move by one unit in the last place, which tells how well the
    call is conditioned.

    Args:
        compute: Returns the output, or the gradients of query, key and value, from inputs, mask
            and the order of the queries, ``Int64[q]``.
        inputs: Operands in the dtype under test.
        mask: ``Bool[b h q k]``.
        gold: The exact results.
    """
    worst: list[Tensor] = []
    dim, (q_len, k_len) = inputs.query.shape[-1], mask.shape[-2:]
    for seed in range(ORDERS):
        draws = generator(seed)
        channels = torch.randperm(dim, generator=draws) if seed else torch.arange(dim)
        keys = torch.randperm(k_len, generator=draws) if seed else torch.arange(k_len)
        rows = torch.randperm(mask.shape[-2], generator=draws) if seed else torch.arange(q_len)
        turned = AttentionInputs(
            nudged(inputs.query, seed)[..., channels][:, :, rows],
            nudged(inputs.key, seed)[..., channels][:, :, keys],
            inputs.value[:, :, keys],
            nudged(torch.tensor(inputs.scale, dtype=inputs.query.dtype), seed).item(),
        )
        results = list(compute(turned, mask[..., rows, :][..., keys], rows))
        results[0] = results[0][:, :, rows.argsort()]
        if len(results) == 3:
            channels, keys = channels.argsort(), keys.argsort()
            results[0] = results[0][..., channels]
            results[1] = results[1][:, :, keys][..., channels]
            results[2] = results[2][:, :, keys]
        if not worst:
            worst = results
        for place, (result, exact) in enumerate(zip(results, gold, strict=True)):
            is_worse = (result.double() - exact).abs() > (worst[place].double() - exact).abs()
            worst[place] = result.where(is_worse, worst[place])
    return tuple(worst)


def nudged(tensor: Tensor, seed: int) -> Tensor:
    """Move float32 values by one unit in the last place up or down; seed 0 and others stay."""
    if seed == 0 or tensor.dtype is not torch.float32:
        return tensor
    signs = torch.rand(tensor.shape, generator=generator(seed)) - 0.5
    return torch.nextafter(tensor, signs.sign() * torch.inf)


def eager_gradients(
    inputs: AttentionInputs, mask: Tensor, grad_out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate in plain PyTorch by the formula of every fused attention.

    Probabilities come from the log-sum-exp, whose own rounding they inherit; and where a row has
    a single key, two roundings of the same number are subtracted.

    Source:
        Dao, "FlashAttention-2", arXiv:2307.08691, algorithm 2.
    """
    query, key, value, scale = inputs
    groups = query.shape[1] // key.shape[1]
    keys, values = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    logits = (query @ keys.transpose(-1, -2) * scale).masked_fill(~mask, -torch.inf)
    weights = (logits - logits.logsumexp(-1, keepdim=True)).exp().masked_fill(~mask, 0.0)
    delta = (grad_out * (weights @ values)).sum(-1, keepdim=True)
    grad_logits = weights * (grad_out @ values.transpose(-1, -2) - delta)
    grad_key = grad_logits.transpose(-1, -2) @ query * scale
    grad_value = weights.transpose(-1, -2) @ grad_out
    return (
        grad_logits @ keys * scale,
        grad_key.unflatten(1, (-1, groups)).sum(2),
        grad_value.unflatten(1, (-1, groups)).sum(2),
    )


def full_selection(
    batch: int, heads: int, rows: int, columns: int, device: str | torch.device = "cpu"
) -> BlockSelection:
    """Return the selection of every block."""
    indices = torch.arange(columns, dtype=torch.int32, device=device)
    counts = torch.full((batch, heads, rows), columns, dtype=torch.int32, device=device)
    return BlockSelection(indices.expand(batch, heads, rows, columns).contiguous(), counts)
