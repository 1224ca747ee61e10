"""One cell of the matrix: an architecture, a spelling, a situation, sizes, a door; and its row."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from zoo.architecture import Architecture, Door, Situation

Outcome = Literal["equal", "different", "failed", "unavailable"]
"""``unavailable``: the model itself fails in this situation, or PyTorch alone cannot compile it."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What is tried."""

    architecture: Architecture
    spelling: str
    situation: Situation
    dynamic: bool
    door: Door

    @property
    def lengths(self) -> str:
        """Return ``static`` or ``dynamic``."""
        return "dynamic" if self.dynamic else "static"

    @property
    def way(self) -> str:
        """Return how the model gets to the compiler: lengths and door."""
        return f"{self.lengths} {self.door}"

    @property
    def sites(self) -> int:
        """Return how many attention computations run."""
        own = self.situation.sites
        return self.architecture.sites if own is None else own

    @property
    def barred(self) -> int:
        """Return how many of them cannot be block-sparse in principle."""
        if self.situation.decodes:
            return self.sites
        own = self.situation.barred
        return sum(self.architecture.barred.values()) if own is None else own

    def __str__(self) -> str:
        parts = (
            self.architecture.name,
            self.spelling,
            self.situation.name,
            self.lengths,
            self.door,
        )
        return " / ".join(parts)


@dataclass(kw_only=True)
class Row:
    """What came of it: plain data."""

    architecture: str
    family: str
    spelling: str
    situation: str
    lengths: str
    door: str
    counted: int = 0
    """Attention computations that ran in the eager model."""
    barred: int = 0
    """Those that cannot be block-sparse in principle: float bias, one query token."""
    found: int = 0
    sparse: int = 0
    visible: str = ""
    reasons: dict[str, int] = field(default_factory=dict[str, int])
    """Why the others stay dense, and how many."""
    outcome: Outcome = "failed"
    error: float = 0.0
    """Largest distance from float64, over what eager's own distance allows; at most 1."""
    note: str = ""
    seconds: float = 0.0
    versions: str = ""
    """Of torch and the libraries."""

    @property
    def name(self) -> str:
        """Return what the cell is called."""
        parts = (self.architecture, self.spelling, self.situation, self.lengths, self.door)
        return " / ".join(parts)

    @property
    def missed(self) -> int:
        """Sites that could be sparse and are not."""
        return max(self.counted - self.barred - self.sparse, 0)

    @property
    def passes(self) -> bool:
        """Whether numbers agree and every site is accounted for."""
        if self.outcome == "unavailable":
            return True
        accounted = self.found == self.counted == self.sparse + sum(self.reasons.values())
        return self.outcome == "equal" and accounted


def cells_of(architecture: Architecture) -> list[Cell]:
    """Return every cell of an architecture; those that share a reference are neighbours."""
    return [
        Cell(
            architecture=architecture,
            spelling=spelling,
            situation=situation,
            dynamic=dynamic,
            door=door,
        )
        for spelling in architecture.spellings
        for situation in architecture.situations
        for dynamic in ((False, True) if situation.dynamic else (False,))
        for door in ("dynamo", "export")
    ]
