"""From which size on the sparse path is worth its overhead, and who answers below: measured data.

On the machine that they run on, ``python benchmarks/dense_rules.py --write`` measures the entries
of ``DENSE`` and, after it, ``python benchmarks/break_even.py --write`` those of ``TABLE``.
"""

from __future__ import annotations

from typing import NamedTuple


def head_dim_class(head_dim: int) -> int:
    """Return the key of the tables for a head dim, the larger one of keys and values."""
    return 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256


class BreakEven(NamedTuple):
    """A call below any of these numbers is answered densely."""

    q_len: int
    """Query tokens."""
    k_len: int
    """Key tokens."""
    work: float
    """Products of dense attention: batch x heads x q_len x k_len x (head dim + value dim)."""


TABLE: dict[tuple[str, int], BreakEven] = {
    ("cpu", 64): BreakEven(q_len=64, k_len=3072, work=1.33e08),
    ("cpu", 128): BreakEven(q_len=64, k_len=2048, work=9.57e09),
    ("cpu", 256): BreakEven(q_len=64, k_len=1536, work=5.32e08),
    ("cuda", 64): BreakEven(q_len=128, k_len=2048, work=1.2e11),
    ("cuda", 128): BreakEven(q_len=128, k_len=2048, work=1.2e11),
    ("cuda", 256): BreakEven(q_len=128, k_len=2048, work=1.2e11),
    ("cuda-90", 64): BreakEven(q_len=256, k_len=3072, work=1.36e11),
    ("cuda-90", 128): BreakEven(q_len=256, k_len=2048, work=2.72e11),
    ("cuda-90", 256): BreakEven(q_len=256, k_len=2048, work=1.53e11),
}
"""By device class (``cpu``, ``cuda`` for any GPU, ``cuda-90`` for one compute capability) and by
:func:`head_dim_class`. Times are what a caller waits for, host and all, at a fifth of the blocks:
where a model keeps its GPU busy or replays a graph, smaller calls would gain as well.

``cpu``: AMD EPYC with AVX-512, one thread, float32: 4/2 heads of D64 take 49.5 ms at 2,048 tokens
and 48.8 densely, 76 and 100 at 3,072. ``cuda-90``: one H200 with torch 2.11.0+cu130, where a caller
waits .2 to .3 ms for the smallest gated call and .07 for the smallest dense one: 32/8 heads of D128
take .37 ms at 4,096 tokens and .35 densely, .39 and .95 at 8,192 (.29 and .91 on the device alone).
``cuda`` stands in for GPUs without entries of their own: 32 heads of D128 at 4,096 tokens, from
where an H200 itself takes less time for the sparse path.
"""


class DenseRule(NamedTuple):
    """Who answers a dense call without a mask, by its ``work``; in between, SDPA chooses.

    It counts from 128 queries on, the fewest that were measured.
    """

    flash_below: float
    """Below it flash attention is faster than cuDNN, for shapes that cuDNN has a plan for."""
    cudnn_from: float
    """From it on cuDNN is faster even if it builds a plan: it does for every new shape, and the 32
    layers of a model share one."""


DENSE: dict[tuple[str, int], DenseRule] = {
    ("cuda-90", 64): DenseRule(flash_below=6.78e07, cudnn_from=4.35e12),
    ("cuda-90", 128): DenseRule(flash_below=0.0, cudnn_from=2.18e12),
    ("cuda-90", 256): DenseRule(flash_below=0.0, cudnn_from=1.09e12),
}
"""By device class and :func:`head_dim_class`. Without an entry, SDPA chooses.

``cuda-90``: one H200, torch 2.11.0+cu130: 32/8 heads of D128 at 32,768 tokens take 14.4 ms by cuDNN
and 24.9 ms by flash; a plan takes 37 to 63 ms.
"""
