"""The part of a call that is a shorter call of its own: the first half of a causal sequence.

What a budget buys and what a density costs change with length. A causal row knows nothing of what
comes after it, so the first half of a sequence is measured exactly as a sequence of half the length
would be: two lengths from one batch.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from seer_compile.gate import AttnGate
from seer_compile.types import SiteInputs

_LEAST_HALF_BLOCKS = 32
"""Key blocks, below which what every selection keeps hides the trend."""


class Span(NamedTuple):
    """The first rows of a call, which are a shorter call of their own, or all of them."""

    tokens: int
    rows: int
    """Query blocks."""
    columns: int
    """Key blocks."""
    is_half: bool = False

    def of(self, blocks: Tensor) -> Tensor:
        """Return the part of ``[... m n]`` that these rows may see."""
        return blocks[..., : self.rows, : self.columns]


def spans_of(gate: AttnGate, inputs: SiteInputs) -> list[Span]:
    """Return the whole call and, where attention is causal and nothing is padding, its first half.

    A half ends between blocks; one of fewer than 32 key blocks is left out.
    """
    size, (q_len, k_len) = gate.config.block_size, (inputs.query.shape[-2], inputs.key.shape[-2])
    spans = [Span(k_len, -(-q_len // size.query), -(-k_len // size.key))]
    step = math.lcm(size.query, size.key)
    half = k_len // 2 // step * step
    if q_len != k_len or half // size.key < _LEAST_HALF_BLOCKS:
        return spans
    visibility, padding = inputs.visibility, inputs.visibility.key_padding
    is_causal = visibility.upper == 0 and visibility.offset is None
    # A tokenizer hands over a mask where nothing is padding as well.
    if is_causal and (padding is None or bool(padding.all())):
        spans.append(Span(half, half // size.query, half // size.key, is_half=True))
    return spans
