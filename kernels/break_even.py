"""From which size on the sparse path is worth its overhead. Data only.

``benchmarks/break_even.py`` measures the numbers on the machine that it runs on and rewrites them
here; the command and what it saw stand beside each entry.
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
    "cpu": BreakEven(q_len=128, k_len=1024, work=1e9),
    "cuda": BreakEven(q_len=128, k_len=2048, work=1.2e11),
}
"""By device class: ``cpu``, ``cuda`` for any GPU, ``cuda-90`` for one compute capability."""
