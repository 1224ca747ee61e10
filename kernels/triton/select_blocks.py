"""Turn block scores into the ascending list of kept key blocks of each query block.

Layout: one program per row, the whole row in registers. The cut is found by bisection on the bits
of the scores (for floats of one sign their integer order is their order), 32 rounds of one
comparison, selection and sum each; no sort. Kept blocks are then numbered by a prefix sum and
written in order.

Numerics: sums in float32, in a fixed order, so a selection is reproducible. Top-p compares the
rest that it drops, so that shares of mass very close to 1 differ.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from seer_compile.config import SELECTORS
from seer_compile.errors import FeatureUnsupportedError, RangeError
from seer_compile.kernels.triton.block_scores import column_rules
from seer_compile.kernels.triton.primitives import launching_on, make_band, shifted_band

_LARGEST_ROW = 32768
_BLOCK_SLACK = 0.01
"""Blocks by which a budget may be missed before one more is kept: float32 has no exact 0.1."""
_PER_WARP = 1024
"""Blocks of a row per warp: 32 scores in each thread."""


LOWEST = tl.constexpr(-0x7FFFFFFF)
HIGHEST = tl.constexpr(0x7FFFFFFF)
"""Below and above the order of every score."""


@triton.jit
def _ordered_bits(score):
    """Map floats to int32 numbers of the same order; NaN above all, minus zero equal to zero."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(score == score, order, HIGHEST - 1)


@triton.jit
def _forced_blocks(
    blocks,
    visible,
    is_usable,
    order,
    first_query,
    last_query,
    upper,
    k_len,
    KEY_BLOCK: tl.constexpr,
    DIAGONAL: tl.constexpr,
):
    """Return which visible blocks are always kept: diagonal, sink, best."""
    highest = tl.max(tl.where(visible, order, LOWEST), 0)
    best = tl.min(tl.where(visible & (order == highest), blocks, 1 << 30), 0)
    sink = tl.min(tl.where(visible & is_usable, blocks, 1 << 30), 0)
    forced = (blocks == best) | (blocks == sink)
    if DIAGONAL != "none":
        if DIAGONAL == "same_position":
            upper = 0
        begin = tl.minimum(tl.maximum(first_query + upper, 0), k_len - 1) // KEY_BLOCK
        end = tl.minimum(tl.maximum(last_query + upper, 0), k_len - 1) // KEY_BLOCK
        forced = forced | (blocks == begin) | (blocks == end)
    return forced & visible


@triton.jit
def _cut(order, weight, low, high, needed):
    """Return the largest cut in ``[low, high]`` at which the weights at or above it suffice.

    ``low`` is taken to suffice. Everything that decides what counts is folded into ``order``
    beforehand: one comparison, selection and addition per block and round.
    """
    # A fixed number of rounds: a condition that every thread works out for itself would make
    # the compiler guard each later exchange between threads against divergence.
    for _ in range(32):
        middle = (low | high) - ((low ^ high) >> 1)
        suffices = tl.sum(tl.where(order >= middle, weight, tl.zeros_like(weight)), 0) >= needed
        low = tl.where(suffices, middle, low)
        # Bounds that have met stay: low suffices, so middle does.
        high = tl.maximum(tl.where(suffices, high, middle - 1), low)
    return low


@triton.jit
def _cut_by_rest(order, weight, low, high, allowed):
    """Return the largest cut in ``[low, high]`` below which the weights sum to at most ``allowed``.

    The rest is summed, not what is kept: beside a sum near 1, float32 loses the 1e-9 that a budget
    of ``1 - 1e-9`` is about.
    """
    for _ in range(32):
        middle = (low | high) - ((low ^ high) >> 1)
        fits = tl.sum(tl.where(order < middle, weight, tl.zeros_like(weight)), 0) <= allowed
        low = tl.where(fits, middle, low)
        high = tl.maximum(tl.where(fits, high, middle - 1), low)
    return low


@triton.jit
def _kept_by_count(order, visible, forced, low, high, wanted):
    """Return forced blocks and the best others until ``wanted`` are kept, ties by lower index."""
    others = visible & (forced == 0)
    needed = wanted - tl.sum(forced.to(tl.int32), 0)
    ranked = tl.where(others, order, LOWEST)
    cut = _cut(ranked, tl.full(order.shape, 1, tl.int32), low, high, needed)
    above = others & (order > cut)
    ties = others & (order == cut)
    rank = tl.cumsum(ties.to(tl.int32), 0)
    room = needed - tl.sum(above.to(tl.int32), 0)
    return forced | above | (ties & (rank <= room))


@triton.jit(
    do_not_specialize=[
        "num_rows", "num_blocks", "q_len", "k_len", "upper", "lower", "selections",
    ]
)  # fmt: skip
def _select_blocks(
    scores_ptr,
    budget_ptr,
    indices_ptr,
    counts_ptr,
    offset_ptr,
    usable_ptr,
    num_rows,
    num_blocks,
    q_len,
    k_len,
    upper,
    lower,
    selections,
    QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    SELECTOR: tl.constexpr,
    DIAGONAL: tl.constexpr,
    BLOCK_SLACK: tl.constexpr,
):
    program = tl.program_id(0)
    row = program % num_rows
    selection = (program // num_rows % selections).to(tl.int64)
    batch = (program // num_rows // selections).to(tl.int64)
    upper, lower = shifted_band(upper, lower, offset_ptr)
    blocks = tl.arange(0, WIDTH)
    first_query = row * QUERY_BLOCK
    last_query = tl.minimum(first_query + QUERY_BLOCK, q_len) - 1
    first_key = blocks * KEY_BLOCK
    last_key = tl.minimum(first_key + KEY_BLOCK, k_len) - 1
    visible = (first_key - last_query <= upper) & (last_key - first_query >= lower)
    visible = visible & (blocks < num_blocks)
    row_ptr = scores_ptr + program.to(tl.int64) * num_blocks
    score = tl.load(row_ptr + blocks, mask=visible, other=0.0)
    is_usable = visible
    if usable_ptr is not None:
        flags = usable_ptr + batch * num_blocks + blocks
        is_usable = tl.load(flags, mask=visible, other=0) != 0
    given = tl.load(budget_ptr + selection)
    budget = given.to(tl.float32)
    order = _ordered_bits(score)
    forced = _forced_blocks(
        blocks,
        visible,
        is_usable,
        order,
        first_query,
        last_query,
        upper,
        k_len,
        KEY_BLOCK,
        DIAGONAL,
    )
    low = tl.min(tl.where(visible, order, HIGHEST), 0)
    high = tl.max(tl.where(visible, order, LOWEST), 0) + 1
    num_visible = tl.sum(visible.to(tl.int32), 0).to(tl.float32)
    BY_SUM: tl.constexpr = (SELECTOR == "top_p") | (SELECTOR == "threshold")
    if BY_SUM:
        total = tl.sum(tl.where(visible, score, 0.0), 0)
        # A score that is NaN cannot be judged: the row then answers as dense attention would.
        if SELECTOR == "top_p":
            ranked = tl.where(visible, tl.where(forced, HIGHEST, order), LOWEST)
            cut = _cut_by_rest(ranked, score, low, high, (1.0 - given).to(tl.float32) * total)
            cut = tl.where(given >= 1.0, low, cut)
            kept = order >= tl.where(total == total, cut, low)
        else:
            limit = tl.where(total > 0.0, budget * total, float("inf"))
            limit = tl.where(total == total, limit, float("-inf"))
            kept = (score * num_visible >= limit) | (score != score)
        kept = forced | (visible & kept)
    else:
        wanted = budget * num_visible if SELECTOR == "fraction" else budget
        wanted = tl.math.ceil(wanted - BLOCK_SLACK).to(tl.int32)
        kept = _kept_by_count(order, visible, forced, low, high, wanted)
    places = tl.cumsum(kept.to(tl.int32), 0) - 1
    target = program.to(tl.int64)
    tl.store(indices_ptr + target * num_blocks + places, blocks, mask=kept)
    tl.store(counts_ptr + target, tl.sum(kept.to(tl.int32), 0))


def launch(
    scores: Tensor,
    budget: Tensor,
    selector: str,
    query_block: int,
    key_block: int,
    q_len: int,
    k_len: int,
    upper: int | None = None,
    lower: int | None = None,
    offset: Tensor | None = None,
    key_padding: Tensor | None = None,
    query_documents: Tensor | None = None,
    key_documents: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Select key blocks.

    Args:
        scores: ``Float32[b s m n]``, any strides.
        budget: ``Float[s]``, float32 or float64: mass, share of visible blocks, number of blocks,
            or ratio.
        selector: ``top_p``, ``fraction``, ``top_k`` or ``threshold``.
        query_block: Tokens per query block.
        key_block: Tokens per key block.
        q_len: Query tokens.
        k_len: Key tokens.
        upper: Largest visible ``j - i``.
        lower: Smallest visible ``j - i``.
        offset: ``Int[]``, added to both bounds.
        key_padding: ``Bool[b k]``; moves the sink to the first block with a readable key.
        query_documents: ``Int[b q]``; does not enter.
        key_documents: ``Int[b k]``; does not enter.

    Returns:
        ``Int32[b s m n]``, ascending, entries past the count undefined, and ``Int32[b s m]``.

    Raises:
        RangeError: Unknown selector.
        FeatureUnsupportedError: More than 32,768 key blocks.

    Cost:
        One read of the scores of visible blocks.
    """
    del query_documents, key_documents
    names = tuple(kind.name for kind in SELECTORS)
    if selector not in names:
        raise RangeError(argument="selector", got=selector, expected=f"one of {names}")
    batch, selections, num_rows, num_blocks = scores.shape
    if num_blocks > _LARGEST_ROW:
        raise FeatureUnsupportedError(
            argument="k_len", got=k_len, expected=f"at most {_LARGEST_ROW} key blocks"
        )
    indices = torch.empty(scores.shape, dtype=torch.int32, device=scores.device)
    counts = torch.empty(scores.shape[:3], dtype=torch.int32, device=scores.device)
    if scores.numel() == 0:
        return indices, counts.zero_()
    usable = column_rules(key_block, key_padding, None, None).usable
    band = make_band(upper, lower, offset)
    without_bound = "same_position" if q_len == k_len else "none"
    diagonal = without_bound if upper is None else "upper_bound"
    width = max(16, triton.next_power_of_2(num_blocks))
    with launching_on(scores, "scores"):
        _select_blocks[(batch * selections * num_rows,)](
            scores.contiguous(),
            budget.contiguous(),
            indices,
            counts,
            band.offset,
            usable,
            num_rows,
            num_blocks,
            q_len,
            k_len,
            band.upper,
            band.lower,
            selections,
            QUERY_BLOCK=query_block,
            KEY_BLOCK=key_block,
            WIDTH=width,
            SELECTOR=selector,
            DIAGONAL=diagonal,
            BLOCK_SLACK=_BLOCK_SLACK,
            num_warps=max(1, width // _PER_WARP),
        )
    return indices, counts
