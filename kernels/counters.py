"""How each site was answered, as data: calls per path, and how dense the selections were.

Counting calls costs a dictionary update on the host. Densities are added up on the device that
made the selection and only where :func:`collect_density` is active; reading them waits for it.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor


class Tally:
    """Counts by name, from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def add(self, name: str) -> None:
        """Count one."""
        with self._lock:
            self._counts[name] += 1

    def snapshot(self) -> dict[str, int]:
        """Return a copy of the counts."""
        with self._lock:
            return dict(self._counts)

    def reset(self) -> None:
        """Forget the counts."""
        with self._lock:
            self._counts.clear()


_lock = threading.Lock()
_calls: dict[str, Counter[str]] = {}
_meters: list[DensityMeter] = []


def record(site: str, path: str) -> None:
    """Count one call of a site.

    Args:
        site: Name of the site.
        path: ``"sparse"``, or ``"dense:"`` and why.
    """
    with _lock:
        paths = _calls.get(site)
        if paths is None:
            paths = _calls[site] = Counter()
        paths[path] += 1


def snapshot() -> dict[str, dict[str, int]]:
    """Return calls per site and path since the start or the last :func:`reset`."""
    with _lock:
        return {site: dict(paths) for site, paths in _calls.items()}


def reset() -> None:
    """Forget all calls."""
    with _lock:
        _calls.clear()


@dataclass(eq=False)
class DensityMeter:
    """Kept and visible blocks per site, added up where the selections are made."""

    _totals: dict[str, Tensor] = field(default_factory=dict)

    def add(self, site: str, kept: Tensor, visible: Tensor) -> None:
        """Add one selection; both are ``Int64[]`` on one device, and nothing waits for it."""
        pair = torch.stack([kept, visible])
        with _lock:
            known = self._totals.get(site)
            # A site that moved to another device goes on there.
            self._totals[site] = pair if known is None else pair + known.to(pair.device)

    def totals(self) -> dict[str, tuple[int, int]]:
        """Return kept and visible blocks per site. Waits for the device."""
        with _lock:
            totals = dict(self._totals)
        pairs = {site: pair.tolist() for site, pair in totals.items()}
        return {site: (kept, visible) for site, (kept, visible) in pairs.items()}

    def densities(self) -> dict[str, float]:
        """Return kept / visible blocks per site, in [0, 1]. Waits for the device."""
        return {site: kept / visible for site, (kept, visible) in self.totals().items() if visible}


@contextmanager
def collect_density() -> Iterator[DensityMeter]:
    """Collect the density of every sparse answer given while the block runs, in any thread.

    Example:
        >>> with collect_density() as meter:
        ...     meter.add("layer", torch.tensor(3), torch.tensor(4))
        >>> meter.densities()
        {'layer': 0.75}
    """
    meter = DensityMeter()
    with _lock:
        _meters.append(meter)
    try:
        yield meter
    finally:
        with _lock:
            _meters.remove(meter)


def active_meters() -> tuple[DensityMeter, ...]:
    """Return the meters that want every selection now."""
    if not _meters:
        return ()
    with _lock:
        return tuple(_meters)
