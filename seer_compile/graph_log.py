"""What the compiler did to the graphs of one model, as data, and the warnings that follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from seer_compile.callers import warn_caller
from seer_compile.errors import DenseFallbackWarning
from seer_compile.types import SiteSummary, SkipCode

_EXPECTED = (SkipCode.DECODE.value, SkipCode.EXCLUDED.value)
_NAMES_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class GraphRecord:
    """One captured graph."""

    sites: tuple[SiteSummary, ...]
    seconds: dict[str, float]
    """Time of each pass."""
    error: str = ""
    """Why the graph was compiled untouched; empty when the passes succeeded."""


@dataclass(eq=False)
class GraphLog:
    """The graphs compiled so far; warns once about each thing that stays dense."""

    records: list[GraphRecord] = field(default_factory=list[GraphRecord])
    uncompiled_calls: int = 0
    """Calls that PyTorch ran without any graph."""
    _warned: set[tuple[str, str]] = field(default_factory=set[tuple[str, str]])

    def add(self, record: GraphRecord) -> None:
        """Append a graph and warn about what is new in it.

        Warns:
            DenseFallbackWarning: A pass failed, or a site stays dense for a reason that no
                warning has named for it yet (one query token and exclusion are as expected).
        """
        self.records.append(record)
        if record.error:
            self.warn_once(
                "",
                f"a pass failed, so this graph was compiled as it came, with dense attention: "
                f"{record.error}",
            )
        fresh: dict[str, list[str]] = {}
        for site in record.sites:
            if is_unexpected(site) and self._is_new(site.name, site.reason):
                fresh.setdefault(site.reason, []).append(site.name)
        if fresh:
            listed = "; ".join(
                f"{len(names)} x {reason} ({_abbreviated(names)})"
                for reason, names in fresh.items()
            )
            warn_caller(f"attention stays dense: {listed}", DenseFallbackWarning)

    def warn_once(self, subject: str, text: str) -> None:
        """Issue a DenseFallbackWarning unless the same one was issued before."""
        if self._is_new(subject, text):
            warn_caller(text, DenseFallbackWarning)

    def _is_new(self, subject: str, reason: str) -> bool:
        is_new = (subject, reason) not in self._warned
        self._warned.add((subject, reason))
        return is_new


def is_unexpected(site: SiteSummary) -> bool:
    """Whether a site stays dense though nobody asked for it and sparsity could have paid."""
    return site.decision == "dense" and not site.reason.startswith(_EXPECTED)


def _abbreviated(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NAMES_SHOWN])
    return f"{shown}, ..." if len(names) > _NAMES_SHOWN else shown
