"""Turn block scores into the ascending list of kept key blocks of each query block.

Layout: one program per row, the visible part of the row in registers, in the narrowest of three
widths that holds it. The cut is found by bisection on the bits of the scores (for floats of one
sign their integer order is their order), a comparison, selection and sum per round; no sort. Every
few rounds the bounds move to the nearest scores between them, and the search ends when that leaves
one. Kept blocks are then numbered by a prefix sum and written in order.

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
from seer_compile.kernels.triton.column_rules import column_rules
from seer_compile.kernels.triton.launching import launch_kernel
from seer_compile.kernels.triton.primitives import launching_on, make_band, shifted_band

_LARGEST_ROW = 32768
_BLOCK_SLACK = 0.01
"""Blocks by which a budget may be missed before one more is kept: float32 has no exact 0.1."""
_PER_WARP = 512
"""Blocks of a row per warp, 16 scores in each thread. (2,048 rows and blocks of 8 heads, one H200:
0.245 ms; 1,024 per warp 0.276, 2,048 0.317. Two rounds of the search at a time, by three sums of
which the last round uses one: 0.27 to 0.30.)"""


LOWEST = tl.constexpr(-0x7FFFFFFF)
HIGHEST = tl.constexpr(0x7FFFFFFF)
"""Below and above the order of every score."""


@triton.jit
def _ordered_bits(score):
    """Map floats to int32 numbers of the same order; NaN above all, minus zero equal to zero."""
    # The sum of minus zero and zero is zero.
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(score == score, order, HIGHEST - 1)


@triton.jit
def _visible_range(first_query, last_query, upper, lower, k_len, num_blocks, KEY_BLOCK):
    """Return the range of key blocks that the band lets any of the queries see."""
    reach = last_query + upper
    end = tl.where(reach < 0, 0, tl.minimum(tl.maximum(reach, 0) // KEY_BLOCK + 1, num_blocks))
    nearest = first_query + lower
    begin = tl.maximum(nearest, 0) // KEY_BLOCK
    return tl.where(nearest >= k_len, end, tl.minimum(begin, end)), end


@triton.jit
def _forced_blocks(
    blocks,
    visible,
    is_usable,
    order,
    highest,
    first_query,
    last_query,
    upper,
    k_len,
    KEY_BLOCK: tl.constexpr,
    DIAGONAL: tl.constexpr,
):
    """Return which visible blocks are always kept: diagonal, sink, best."""
    best = tl.min(tl.where(visible & (order == highest), blocks, 1 << 30), 0)
    sink = tl.min(tl.where(is_usable, blocks, 1 << 30), 0)
    forced = (blocks == best) | (blocks == sink)
    if DIAGONAL != "none":
        if DIAGONAL == "same_position":
            upper = 0
        begin = tl.minimum(tl.maximum(first_query + upper, 0), k_len - 1) // KEY_BLOCK
        end = tl.minimum(tl.maximum(last_query + upper, 0), k_len - 1) // KEY_BLOCK
        forced = forced | (blocks == begin) | (blocks == end)
    return forced & visible


@triton.jit
def _probe(order, weight, low, high, middle, limit, BY_REST: tl.constexpr):
    """Return the bounds after one round: whether ``middle``, above ``low``, is a cut that holds."""
    zero = tl.zeros_like(weight)
    if BY_REST:
        holds = tl.sum(tl.where(order < middle, weight, zero), 0) <= limit
    else:
        holds = tl.sum(tl.where(order >= middle, weight, zero), 0) >= limit
    # Bounds that have met stay: low holds, so middle does.
    return tl.where(holds, middle, low), tl.where(holds, high, tl.maximum(middle - 1, low))


@triton.jit
def _cut(order, weight, low, high, limit, BY_REST: tl.constexpr):
    """Return a cut that keeps what the largest cut in ``[low, high]`` that holds would keep.

    A cut holds where the weights below it sum to ``limit`` at most (``BY_REST``), or those at or
    above it to ``limit`` at least; ``low`` is taken to hold. By the rest, because beside a sum near
    1 float32 loses the 1e-9 that a budget of ``1 - 1e-9`` is about. Everything that decides what
    counts is folded into ``order`` beforehand; ``high`` lies above all of it.
    """
    low, high = _probe(order, weight, low, high, high, limit, BY_REST)
    if BY_REST:
        # A block above the limit cannot be dropped, and blocks below its n-th part all can.
        guess = _ordered_bits(limit)
        low, high = _probe(order, weight, low, high, _within(guess, low, high), limit, BY_REST)
        guess = _ordered_bits(limit * (1.0 / order.shape[0]))
        low, high = _probe(order, weight, low, high, _within(guess, low, high), limit, BY_REST)
    rounds = 0
    while (low < high) & (rounds < 36):
        for _ in range(6):
            middle = (low | high) - ((low ^ high) >> 1)
            low, high = _probe(order, weight, low, high, middle, limit, BY_REST)
        # No cut between two scores differs from the upper one. What is between the bounds holds a
        # score unless rounding made a sum of more blocks the smaller one.
        inside = (order >= low) & (order <= high)
        lowest = tl.min(tl.where(inside, order, HIGHEST), 0)
        highest = tl.max(tl.where(inside, order, LOWEST), 0)
        low = tl.where(lowest <= highest, lowest, low)
        high = tl.where(lowest <= highest, highest, low)
        rounds += 6
    return low


@triton.jit
def _within(guess, low, high):
    """Return the guess, or the nearest cut between the bounds that a round may ask for."""
    return tl.maximum(tl.minimum(guess, high), tl.minimum(low + 1, high))


@triton.jit
def _kept_by_count(order, visible, forced, low, high, wanted):
    """Return forced blocks and the best others until ``wanted`` are kept, ties by lower index."""
    others = visible & (forced == 0)
    needed = wanted - tl.sum(forced.to(tl.int32), 0)
    ranked = tl.where(others, order, LOWEST)
    cut = _cut(ranked, tl.full(order.shape, 1, tl.int32), low, high, needed, BY_REST=False)
    above = others & (order > cut)
    ties = others & (order == cut)
    rank = tl.cumsum(ties.to(tl.int32), 0)
    room = needed - tl.sum(above.to(tl.int32), 0)
    return forced | above | (ties & (rank <= room))


@triton.jit
def _select_row(
    row_ptr,
    usable_ptr,
    indices_ptr,
    given,
    base,
    begin,
    end,
    first_query,
    last_query,
    upper,
    k_len,
    num_blocks,
    WIDTH: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    SELECTOR: tl.constexpr,
    DIAGONAL: tl.constexpr,
    BLOCK_SLACK: tl.constexpr,
):
    """Write the kept blocks of a row of which ``[begin, end)`` is visible; return their number."""
    blocks = base + tl.arange(0, WIDTH)
    visible = (blocks >= begin) & (blocks < end)
    # Whole vectors are read, then what is not visible is dropped.
    score = tl.load(row_ptr + blocks, mask=blocks < num_blocks, other=0.0)
    score = tl.where(visible, score, 0.0)
    is_usable = visible
    if usable_ptr is not None:
        is_usable = visible & (tl.load(usable_ptr + blocks, mask=visible, other=0) != 0)
    budget = given.to(tl.float32)
    order = _ordered_bits(score)
    low = tl.min(tl.where(visible, order, HIGHEST), 0)
    highest = tl.max(tl.where(visible, order, LOWEST), 0)
    forced = _forced_blocks(
        blocks, visible, is_usable, order, highest, first_query, last_query, upper, k_len,
        KEY_BLOCK, DIAGONAL,
    )  # fmt: skip
    num_visible = (end - begin).to(tl.float32)
    BY_SUM: tl.constexpr = (SELECTOR == "top_p") | (SELECTOR == "threshold")
    if BY_SUM:
        total = tl.sum(score, 0)
        # A score that is NaN cannot be judged: the row then answers as dense attention would.
        if SELECTOR == "top_p":
            ranked = tl.where(visible, tl.where(forced, HIGHEST, order), LOWEST)
            limit = (1.0 - given).to(tl.float32) * total
            cut = _cut(ranked, score, low, highest + 1, limit, BY_REST=True)
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
        kept = _kept_by_count(order, visible, forced, low, highest + 1, wanted)
    places = tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(indices_ptr + places, blocks, mask=kept)
    return tl.sum(kept.to(tl.int32), 0)


@triton.jit(
    do_not_specialize=[
        "num_rows", "q_len", "k_len", "upper", "lower", "selections", "budget_stride",
    ]
)  # fmt: skip
def _select_blocks(
    scores_ptr,
    before_ptr,
    after_ptr,
    share,
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
    budget_stride,
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
    first_query = row * QUERY_BLOCK
    last_query = tl.minimum(first_query + QUERY_BLOCK, q_len) - 1
    begin, end = _visible_range(first_query, last_query, upper, lower, k_len, num_blocks, KEY_BLOCK)
    base = begin // 16 * 16
    target = program.to(tl.int64)
    row_ptr, indices_ptr = scores_ptr + target * num_blocks, indices_ptr + target * num_blocks
    if usable_ptr is not None:
        usable_ptr += batch * num_blocks
    before = tl.load(before_ptr + selection * budget_stride)
    after = tl.load(after_ptr + selection * budget_stride)
    # Infinite budgets have no difference.
    given = tl.where(before == after, after, before + share * (after - before))
    if WIDTH >= 128 and end - base <= WIDTH // 4:
        count = _select_row(
            row_ptr, usable_ptr, indices_ptr, given, base, begin, end, first_query, last_query,
            upper, k_len, num_blocks, WIDTH // 4, KEY_BLOCK, SELECTOR, DIAGONAL, BLOCK_SLACK,
        )  # fmt: skip
    elif WIDTH >= 128 and end - base <= WIDTH // 2:
        count = _select_row(
            row_ptr, usable_ptr, indices_ptr, given, base, begin, end, first_query, last_query,
            upper, k_len, num_blocks, WIDTH // 2, KEY_BLOCK, SELECTOR, DIAGONAL, BLOCK_SLACK,
        )  # fmt: skip
    else:
        count = _select_row(
            row_ptr, usable_ptr, indices_ptr, given, base, begin, end, first_query, last_query,
            upper, k_len, num_blocks, WIDTH, KEY_BLOCK, SELECTOR, DIAGONAL, BLOCK_SLACK,
        )  # fmt: skip
    tl.store(counts_ptr + target, count)


def launch(
    scores: Tensor,
    budget: tuple[Tensor, Tensor, float],
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
        budget: Two columns ``Float[s]`` of one stride, float32 or float64, and how far from the
            first one to the second: mass, share of visible blocks, number of blocks, or ratio.
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
    usable = column_rules((1, key_block), key_padding, None, None).usable
    band = make_band(upper, lower, offset)
    without_bound = "same_position" if q_len == k_len else "none"
    diagonal = without_bound if upper is None else "upper_bound"
    width = max(16, triton.next_power_of_2(num_blocks))
    with launching_on(scores, "scores"):
        launch_kernel(
            _select_blocks,
            batch * selections * num_rows,
            scores.contiguous(),
            *budget,
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
            budget[0].stride(0),
            QUERY_BLOCK=query_block,
            KEY_BLOCK=key_block,
            WIDTH=width,
            SELECTOR=selector,
            DIAGONAL=diagonal,
            BLOCK_SLACK=_BLOCK_SLACK,
            num_warps=max(1, width // _PER_WARP),
        )
    return indices, counts
