"""From which size on the sparse path is worth its overhead, and who answers below it. Data only.

``python benchmarks/break_even.py --write`` measures the numbers of the machine that it runs on and
rewrites its entries here.
"""

from __future__ import annotations

from typing import NamedTuple


def head_dim_class(head_dim: int) -> int:
    """Return the key of the tables for a head dim, the larger one of keys and values."""
    return next((bound for bound in (64, 128) if head_dim <= bound), 256)


class BreakEven(NamedTuple):
    """A call below any of these numbers is answered densely."""

    q_len: int
    """Query tokens."""
    k_len: int
    """Key tokens."""
    work: float
    """Products of dense attention: batch x heads x q_len x k_len x (head dim + value dim)."""


TABLE: dict[tuple[str, int], BreakEven] = {
    ("cpu", 64): BreakEven(q_len=128, k_len=1536, work=2.15e09),
    ("cpu", 128): BreakEven(q_len=128, k_len=1536, work=2.15e09),
    ("cpu", 256): BreakEven(q_len=128, k_len=1536, work=2.15e09),
    ("cuda", 64): BreakEven(q_len=128, k_len=2048, work=1.2e11),
    ("cuda", 128): BreakEven(q_len=128, k_len=2048, work=1.2e11),
    ("cuda", 256): BreakEven(q_len=128, k_len=2048, work=1.2e11),
}
"""By device class (``cpu``, ``cuda`` for any GPU, ``cuda-90`` for one compute capability) and by
:func:`head_dim_class`. Times are those of a caller who waits, host and all.
"""


class DenseRule(NamedTuple):
    """Who answers a dense call without a mask, by its ``work``; in between, SDPA chooses."""

    flash_below: float
    """Below it flash attention is faster than cuDNN, for shapes that cuDNN has a plan for."""
    cudnn_from: float
    """From it on cuDNN is faster even if it builds a plan: it does for every new shape, and the 32
    layers of a model share one."""


DENSE: dict[tuple[str, int], DenseRule] = {
    ("cuda-90", 128): DenseRule(flash_below=0.0, cudnn_from=8.7e12),
}
"""By device class and :func:`head_dim_class`. Without an entry, SDPA chooses.

``cuda-90``: one H200, torch 2.11.0+cu130: 32/8 heads of D128 at 32,768 tokens take 14.8 ms by cuDNN
and 25.5 ms by flash.
"""
