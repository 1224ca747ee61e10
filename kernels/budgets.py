"""Budgets between the lengths of a gate's table, straight over the logarithm of the length."""

from __future__ import annotations

import functools
import math
import struct
from typing import NamedTuple

import torch
from torch import Tensor


class BudgetColumns(NamedTuple):
    """Two columns of a budget table and how far the second one counts.

    Kernels interpolate themselves: that is a launch less, and nothing to wait for.
    """

    before: Tensor
    """``Float[s]``, a view of the table."""
    after: Tensor
    """``Float[s]``, a view of the table; equal to ``before`` at a length of the table."""
    share: float
    """In [0, 1]; of ``after``. A float32, as kernels take it."""

    def value(self) -> Tensor:
        """Return ``Float[s]``."""
        between = self.before + self.share * (self.after - self.before)
        # Infinite budgets have no difference.
        return torch.where(self.before == self.after, self.after, between)


def columns_at(budget: Tensor, lengths: list[int], k_len: int) -> BudgetColumns:
    """Return the columns that a key length lies between.

    Args:
        budget: ``Float[s L]``, float32 or float64.
        lengths: Key lengths of the columns, ascending, in tokens.
        k_len: Key tokens; outside the lengths the nearest column counts.
    """
    right, share = _place(tuple(lengths), k_len)
    after = budget[:, right]
    return BudgetColumns(after if share == 1 else budget[:, right - 1], after, share)


def budget_at(budget: Tensor, lengths: list[int], k_len: int) -> Tensor:
    """Return ``Float[s]``: the budget at a key length; arguments as :func:`columns_at`."""
    return columns_at(budget, lengths, k_len).value()


def only(budget: Tensor) -> BudgetColumns:
    """Return a budget ``Float[s]`` that holds at every length."""
    return BudgetColumns(budget, budget, 1.0)


@functools.lru_cache(maxsize=1024)
def _place(lengths: tuple[int, ...], k_len: int) -> tuple[int, float]:
    """Return the column at or after a key length, and its share against the one before."""
    logs = [math.log2(length) for length in lengths]
    place = min(max(math.log2(max(k_len, 1)), logs[0]), logs[-1])
    right = next((i for i, log in enumerate(logs) if log >= place), len(logs) - 1)
    if right == 0:
        return 0, 1.0
    share = (place - logs[right - 1]) / (logs[right] - logs[right - 1])
    return right, struct.unpack("f", struct.pack("f", share))[0]
