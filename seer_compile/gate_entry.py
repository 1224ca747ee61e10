"""One gate as plain data: what is needed to build it and to choose its budgets, not its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from seer_compile.budget_curve import BudgetCurve
from seer_compile.gate import AttnGate
from seer_compile.sensitivity import SensitivityCurve
from seer_compile.shares import ShareTable


class GateEntry(NamedTuple):
    """The metadata of one gate."""

    name: str
    sizes: tuple[int, int, int]
    """Query heads, key heads, head dim."""
    scale: float
    seed: int
    is_trained: bool
    curve: BudgetCurve | None
    sensitivity: SensitivityCurve | None
    shares: ShareTable | None

    @classmethod
    def of(cls, name: str, gate: AttnGate) -> GateEntry:
        """Describe a gate."""
        return cls(
            name=name,
            sizes=(gate.heads, gate.kv_heads, gate.head_dim),
            scale=gate.scale,
            seed=gate.seed,
            is_trained=gate.is_trained,
            curve=gate.curve,
            sensitivity=gate.sensitivity,
            shares=gate.shares,
        )

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> GateEntry:
        """Rebuild an entry from :meth:`to_json`; raises as its parts do, or KeyError."""
        # Files written before sensitivities or shares were measured have no such field.
        curve, sensitivity = data["curve"], data.get("sensitivity")
        shares = data.get("shares")
        return cls(
            name=str(data["name"]),
            sizes=(int(data["heads"]), int(data["kv_heads"]), int(data["head_dim"])),
            scale=float(data["scale"]),
            seed=int(data["seed"]),
            is_trained=bool(data["is_trained"]),
            curve=None if curve is None else BudgetCurve.from_json(curve),
            sensitivity=None if sensitivity is None else SensitivityCurve.from_json(sensitivity),
            shares=None if shares is None else ShareTable.from_json(shares),
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain data; shares are left out where no search was made."""
        heads, kv_heads, head_dim = self.sizes
        data = {
            "name": self.name,
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "scale": self.scale,
            "seed": self.seed,
            "is_trained": self.is_trained,
            "curve": _to_json(self.curve),
            "sensitivity": _to_json(self.sensitivity),
        }
        return data if self.shares is None else data | {"shares": self.shares.to_json()}


def _to_json(curve: BudgetCurve | SensitivityCurve | None) -> dict[str, Any] | None:
    return None if curve is None else curve.to_json()
