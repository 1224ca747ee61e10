"""Selections without a gate: oracles, static patterns and published heuristics, to compare with.

A scorer maps the operands of a site to block scores ``Float32[b h m n]``: at least 0, larger is
kept first, exactly 0 where the band or padding hides a block. Documents restrict the oracles only;
the attention itself always respects them. Letters of shapes: see :mod:`seer_compile.types`.

For evaluation: several cost as much as dense attention. Memory stays at the scores plus one piece
of about 256 MB.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from seer_compile.config import GateConfig
from seer_compile.errors import RangeError
from seer_compile.gate import AttnGate
from seer_compile.gate_scores import visible_units
from seer_compile.types import BlockSize, SiteInputs, Visibility

Scorer = Callable[[SiteInputs, BlockSize], Tensor]

_PIECE_BYTES = 256 * 2**20
_LAST_QUERIES = 64


def oracle(inputs: SiteInputs, block_size: BlockSize) -> Tensor:
    """Score a block by the true attention mass it carries for the query that needs it most."""
    return _attention_map(inputs, block_size, "max", "sum")


def oracle_mean(inputs: SiteInputs, block_size: BlockSize) -> Tensor:
    """Score a block by the true attention mass it carries, on average over the queries."""
    return _attention_map(inputs, block_size, "mean", "sum")


def oracle_max(inputs: SiteInputs, block_size: BlockSize) -> Tensor:
    """Score a block by its largest true attention probability, the published target.

    Source:
        Gao et al., "SeerAttention", arXiv:2410.13276 (max-pooled attention map).
    """
    return _attention_map(inputs, block_size, "max", "max")


def sink_local(inputs: SiteInputs, block_size: BlockSize) -> Tensor:
    """Score the first block highest and the others by nearness: the static A shape.

    Source:
        Xiao et al., "Efficient Streaming Language Models with Attention Sinks", arXiv:2309.17453.
    """
    visible = _visible_blocks(inputs, block_size)
    query_place, key_place = _places(inputs, block_size)
    distance = (key_place - query_place[:, None]).abs() / block_size.key
    nearness = (1 / (1 + distance)).expand(visible.shape) * visible
    # argmax returns the first of several maxima: the first visible block of each row.
    first = F.one_hot(visible.int().argmax(-1), visible.shape[-1]) * visible
    scores = torch.where(first.bool(), 2.0, nearness)
    return scores.expand(*inputs.query.shape[:2], -1, -1).float().contiguous()


def vertical_slash(inputs: SiteInputs, block_size: BlockSize) -> Tensor:
    """Score columns and diagonals by the attention of the last 64 queries.

    Source:
        Jiang et al., "MInference 1.0", arXiv:2407.02490 (vertical-slash pattern, by blocks).
    """
    q_len, k_len = inputs.query.shape[-2], inputs.key.shape[-2]
    first = max(q_len - _LAST_QUERIES, 0)
    last = range(first, q_len)
    visible = visible_units(
        inputs.visibility,
        units=(1, 1),
        lengths=(q_len, k_len),
        device=inputs.query.device,
        rows=torch.arange(first, q_len, device=inputs.query.device),
    )
    logits = _grouped_product(inputs.query[:, :, first:].float(), inputs.key.float())
    shares = _masked_softmax(logits * inputs.scale, visible)
    vertical = _sum_units(shares.sum(-2), block_size.key)

    query_place, key_place = _places(inputs, block_size)
    # Lines of blocks from far left to far right of a query; both ends are clamped to.
    middle = len(query_place) + len(key_place)
    shift = _band_shift(inputs.visibility, inputs.query.device)
    positions = torch.arange(k_len, dtype=torch.float32, device=inputs.query.device)
    slashes = shares.new_zeros(*shares.shape[:2], 2 * middle + 1)
    for row, query in enumerate(last):
        # A line of tokens at one distance crosses two lines of blocks, in these shares.
        distance = (positions - query - shift) / block_size.key
        low = distance.floor()
        part = distance - low
        place = (low.long() + middle).clamp(0, 2 * middle - 1)
        slashes.index_add_(-1, place, shares[:, :, row] * (1 - part))
        slashes.index_add_(-1, place + 1, shares[:, :, row] * part)
    lines = ((key_place - query_place[:, None]) / block_size.key).round().long() + middle
    scores = vertical[:, :, None] + slashes[:, :, lines.clamp(0, 2 * middle)]
    return scores * _visible_blocks(inputs, block_size)


def quest(inputs: SiteInputs, block_size: BlockSize) -> Tensor:
    """Score a block by an upper bound on its logits, from the extremes of its keys.

    The bound of each query goes through a softmax over the visible blocks; a query block takes the
    maximum over its queries.

    Source:
        Tang et al., "Quest", arXiv:2406.10774.
    """
    low = _pool(inputs.key, block_size.key, "min", inputs.visibility.key_padding)
    high = _pool(inputs.key, block_size.key, "max", inputs.visibility.key_padding)
    visible = _visible_blocks(inputs, block_size)

    def piece(rows: slice) -> Tensor:
        tokens = slice(rows.start * block_size.query, rows.stop * block_size.query)
        query = inputs.query[:, :, tokens].float()
        bound = _grouped_product(query.clamp(min=0), high)
        bound = bound + _grouped_product(query.clamp(max=0), low)
        per_token = visible[:, :, rows].repeat_interleave(block_size.query, 2)
        shares = _masked_softmax(bound * inputs.scale, per_token[:, :, : query.shape[2]])
        return _max_units(shares, block_size.query)

    return _over_rows(inputs, block_size, low.shape[2] * block_size.query, piece) * visible


def xattention(inputs: SiteInputs, block_size: BlockSize, *, stride: int = 8) -> Tensor:
    """Score a block by sums along antidiagonals of its logits.

    Each run of ``stride`` queries is compared with each run of ``stride`` keys at one pair per
    antidiagonal step; the means go through a softmax over the visible runs and are summed over the
    runs of a block.

    Source:
        Xu et al., "XAttention", arXiv:2503.16428.

    Raises:
        RangeError: The stride does not divide the block size.
    """
    if stride < 1 or block_size.query % stride or block_size.key % stride:
        raise RangeError(argument="stride", got=stride, expected=f"a divisor of {block_size}")
    lengths = (inputs.query.shape[-2], inputs.key.shape[-2])
    key_padding = inputs.visibility.key_padding
    key = inputs.key.float()
    if key_padding is not None:
        key = key * key_padding[:, None, :, None]
    key_runs = _runs(key, stride).flatten(-2)
    runs_per_row = block_size.query // stride

    def piece(rows: slice) -> Tensor:
        tokens = slice(rows.start * block_size.query, rows.stop * block_size.query)
        query_runs = _runs(inputs.query[:, :, tokens].float(), stride).flip(-2).flatten(-2)
        first = rows.start * runs_per_row
        wanted = torch.arange(first, first + query_runs.shape[2], device=key.device)
        visible = visible_units(
            inputs.visibility,
            units=(stride, stride),
            lengths=lengths,
            device=key.device,
            rows=wanted,
        )
        logits = _grouped_product(query_runs, key_runs) * (inputs.scale / stride)
        shares = _sum_units(_masked_softmax(logits, visible), block_size.key // stride)
        return _sum_units(shares.transpose(-1, -2), runs_per_row).transpose(-1, -2)

    scores = _over_rows(inputs, block_size, key_runs.shape[2] * runs_per_row, piece)
    return scores * _visible_blocks(inputs, block_size)


def mean_pool(inputs: SiteInputs, block_size: BlockSize) -> Tensor:
    """Score a block by the dot product of mean query and mean key, softmax over visible blocks."""
    query = _pool(inputs.query, block_size.query, "mean", None)
    key = _pool(inputs.key, block_size.key, "mean", inputs.visibility.key_padding)
    logits = _grouped_product(query, key) * inputs.scale
    return _masked_softmax(logits, _visible_blocks(inputs, block_size))


def zero_shot(inputs: SiteInputs, block_size: BlockSize) -> Tensor:
    """Score a block by a gate that was never trained: mean-pooled sub-blocks, compared."""
    sizes = (inputs.query.shape[1], inputs.key.shape[1], inputs.query.shape[-1])
    return _untrained_gate(sizes, block_size, inputs.query.device).block_scores(inputs)


@functools.lru_cache(maxsize=8)
def _untrained_gate(
    sizes: tuple[int, int, int], block_size: BlockSize, device: torch.device
) -> AttnGate:
    config = GateConfig(block_size=block_size, sharing="none")
    return AttnGate(*sizes, config=config, device=device).requires_grad_(False)


def random_blocks(inputs: SiteInputs, block_size: BlockSize) -> Tensor:
    """Score blocks by chance, the same in every call of one size."""
    visible = _visible_blocks(inputs, block_size)
    shape = (*inputs.query.shape[:2], *visible.shape[-2:])
    generator = torch.Generator(device="cpu").manual_seed(0)
    scores = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu") + 1e-3
    return scores.to(inputs.query.device) * visible


class Baseline(NamedTuple):
    """A scorer and the selector that its authors, or we, would use with it."""

    score: Scorer
    selector: str


BASELINES: dict[str, Baseline] = {
    "oracle": Baseline(oracle, "top_p"),
    "oracle_mean": Baseline(oracle_mean, "top_p"),
    "oracle_max": Baseline(oracle_max, "top_p"),
    "sink_local": Baseline(sink_local, "fraction"),
    "vertical_slash": Baseline(vertical_slash, "fraction"),
    "quest": Baseline(quest, "fraction"),
    "xattention": Baseline(functools.partial(xattention, stride=8), "top_p"),
    "xattention16": Baseline(functools.partial(xattention, stride=16), "top_p"),
    "mean_pool": Baseline(mean_pool, "fraction"),
    "zero_shot": Baseline(zero_shot, "top_p"),
    "random": Baseline(random_blocks, "fraction"),
}
"""By the names that the command line uses."""


def _attention_map(
    inputs: SiteInputs, block_size: BlockSize, query_reduce: str, key_reduce: str
) -> Tensor:
    return torch.ops.seer_compile.attention_mass.v1(
        inputs.query,
        inputs.key,
        inputs.scale,
        block_size.query,
        block_size.key,
        query_reduce,
        key_reduce,
        *inputs.visibility.as_arguments().values(),
        inputs.softcap,
    )


def _visible_blocks(inputs: SiteInputs, block_size: BlockSize) -> Tensor:
    """Return ``Bool[b or 1, 1, m n]``: band and padding, not documents."""
    band = Visibility(
        upper=inputs.visibility.upper,
        lower=inputs.visibility.lower,
        offset=inputs.visibility.offset,
        key_padding=inputs.visibility.key_padding,
    )
    return visible_units(
        band,
        units=(block_size.query, block_size.key),
        lengths=(inputs.query.shape[-2], inputs.key.shape[-2]),
        device=inputs.query.device,
    )


def _band_shift(visibility: Visibility, device: torch.device) -> Tensor:
    """Return how far along the keys the first query stands: ``Int[]`` tokens."""
    upper = 0 if visibility.upper is None else visibility.upper
    offset = 0 if visibility.offset is None else visibility.offset.to(device)
    return torch.zeros((), dtype=torch.int64, device=device) + upper + offset


def _places(inputs: SiteInputs, block_size: BlockSize) -> tuple[Tensor, Tensor]:
    """Return the first token of each query block, along the keys, and of each key block."""
    device = inputs.query.device
    query = torch.arange(0, inputs.query.shape[-2], block_size.query, device=device)
    key = torch.arange(0, inputs.key.shape[-2], block_size.key, device=device)
    return query + _band_shift(inputs.visibility, device), key


def _grouped_product(query: Tensor, key: Tensor) -> Tensor:
    """Return ``Float[b h t c]`` from ``[b h t e]`` and ``[b g c e]`` without expanding the keys."""
    grouped = query.unflatten(1, (key.shape[1], -1))
    return (grouped @ key[:, :, None].transpose(-1, -2)).flatten(1, 2)


def _masked_softmax(logits: Tensor, visible: Tensor) -> Tensor:
    """Return the softmax over visible entries, all zeros in a row that sees nothing."""
    shares = logits.masked_fill(~visible, float("-inf")).softmax(-1)
    return shares.nan_to_num(nan=0.0)


def _pool(tokens: Tensor, size: int, kind: str, padding: Tensor | None) -> Tensor:
    return torch.ops.seer_compile.pool_blocks.v1(tokens, size, kind, padding).float()


def _runs(tokens: Tensor, stride: int) -> Tensor:
    """Return ``[b x t/stride stride d]``; missing tokens at the end are zeros."""
    short = -tokens.shape[-2] % stride
    return F.pad(tokens, (0, 0, 0, short)).unflatten(-2, (-1, stride))


def _sum_units(values: Tensor, unit: int) -> Tensor:
    return F.pad(values, (0, -values.shape[-1] % unit)).unflatten(-1, (-1, unit)).sum(-1)


def _max_units(shares: Tensor, unit: int) -> Tensor:
    """Return ``[b h ceil(t/unit) n]``: the maximum over runs of rows, all values >= 0."""
    short = -shares.shape[-2] % unit
    return F.pad(shares, (0, 0, 0, short)).unflatten(-2, (-1, unit)).amax(-2)


def _over_rows(
    inputs: SiteInputs, block_size: BlockSize, entries: int, piece: Callable[[slice], Tensor]
) -> Tensor:
    """Concatenate ``piece(rows)`` over query blocks; a row of blocks takes ``entries`` floats."""
    batch, heads, q_len = inputs.query.shape[:3]
    rows = -(-q_len // block_size.query)
    # Logits, their softmax and one temporary live at the same time.
    per_row = 3 * 4 * batch * heads * max(entries, 1)
    step = max(_PIECE_BYTES // per_row, 1)
    return torch.cat([piece(part) for part in _slices(rows, step)], dim=2)


def _slices(total: int, step: int) -> Iterator[slice]:
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))
