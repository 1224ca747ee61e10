"""From which size on the sparse path is worth its overhead, and who answers below it. Data only.

``python benchmarks/break_even.py --write`` measures the numbers of the machine that it runs on and
rewrites its entries here.
"""

from __future__ import annotations

from typing import NamedTuple


class BreakEven(NamedTuple):
    """A call below any of these numbers is answered densely."""

    q_len: int
    """Query tokens."""
    k_len: int
    """Key tokens."""
    work: float
    """Products of dense attention: batch x heads x q_len x k_len x (head dim + value dim)."""


TABLE: dict[str, BreakEven] = {
    "cpu": BreakEven(q_len=128, k_len=1536, work=2.15e09),
    "cuda": BreakEven(q_len=128, k_len=2048, work=1.2e11),
}
"""By device class: ``cpu``, ``cuda`` for any GPU, ``cuda-90`` for one compute capability.

``cpu``: AMD EPYC with AVX-512, one thread, float32; 4/2 heads of D64 at 2,048 tokens take 28.9 ms
at 20 % of the blocks and 32.8 ms densely; at 1,536 tokens 21.3 and 19.4 ms. ``cuda`` stands in for
GPUs without an entry of their own: 32 heads of D128 at 4,096 tokens, where launches stop to count.
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
"""By device class and head dim (64: up to 64, 128: up to 128, 256: above). Without an entry, SDPA
chooses.

``cuda-90``: one H200, torch 2.11.0+cu130: 32/8 heads of D128 at 32,768 tokens take 14.8 ms by cuDNN
and 25.5 ms by flash.
"""
