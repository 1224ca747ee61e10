"""One gate as plain data: what is needed to build it and to choose its budgets, not its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from seer_compile.budget_curve import BudgetCurve
from seer_compile.config import GateConfig
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
    sub_blocks: tuple[int, int] | None
    """Tokens of queries and keys per sub-block; None where they are the store's."""
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
            sub_blocks=gate.config.sub_blocks,
            curve=gate.curve,
            sensitivity=gate.sensitivity,
            shares=gate.shares,
        )

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> GateEntry:
        """Rebuild an entry from :meth:`to_json`; raises as its parts do, or KeyError."""
        # Files written before there was a field do not have it.
        curve, sensitivity = data["curve"], data.get("sensitivity")
        shares, sub_blocks = data.get("shares"), data.get("sub_blocks")
        return cls(
            name=str(data["name"]),
            sizes=(int(data["heads"]), int(data["kv_heads"]), int(data["head_dim"])),
            scale=float(data["scale"]),
            seed=int(data["seed"]),
            is_trained=bool(data["is_trained"]),
            sub_blocks=None if sub_blocks is None else _pair(sub_blocks),
            curve=None if curve is None else BudgetCurve.from_json(curve),
            sensitivity=None if sensitivity is None else SensitivityCurve.from_json(sensitivity),
            shares=None if shares is None else ShareTable.from_json(shares),
        )

    def config_in(self, config: GateConfig) -> GateConfig:
        """Return the gate's configuration in a store of one; raises as it does."""
        return config if self.sub_blocks is None else config.with_sub_blocks(*self.sub_blocks)

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
            "sub_blocks": None if self.sub_blocks is None else list(self.sub_blocks),
            "curve": _to_json(self.curve),
            "sensitivity": _to_json(self.sensitivity),
        }
        return data if self.shares is None else data | {"shares": self.shares.to_json()}


def _pair(sizes: Sequence[Any]) -> tuple[int, int]:
    query, key = sizes
    return int(query), int(key)


def _to_json(curve: BudgetCurve | SensitivityCurve | None) -> dict[str, Any] | None:
    return None if curve is None else curve.to_json()
