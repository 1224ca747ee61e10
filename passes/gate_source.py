"""Where the gates of a graph come from, seen from the passes."""

from __future__ import annotations

from typing import Protocol

import torch

from seer_compile.gate import AttnGate
from seer_compile.gate_store import GateStore
from seer_compile.types import AttentionSite

STORE_PREFIX = "seer_gates"
"""Name of the submodule that owns all gates, in a model and in every rewritten graph."""


class GateSource(Protocol):
    """Gives sites their gates."""

    def has_gate_for(self, site: AttentionSite) -> bool:
        """Whether :meth:`provide` would succeed; changes nothing."""
        ...

    def provide(self, site: AttentionSite, device: torch.device) -> tuple[str, AttnGate]:
        """Return the gate of a site and the path under which a graph holds it."""
        ...


class StoreGates:
    """Gates out of a store.

    Args:
        store: Owner of the gates.
        may_create: Whether a site without a gate gets a new one. A store of calibrated gates is
            complete: what it does not hold was not calibrated, and stays dense.
    """

    def __init__(self, store: GateStore, *, may_create: bool = True) -> None:
        self.store = store
        self.may_create = may_create

    def has_gate_for(self, site: AttentionSite) -> bool:
        """Whether the store holds a gate of the site's name and sizes, or may create one."""
        gate = self.store.get(site.name)
        if gate is None:
            return self.may_create
        sizes = (site.heads, site.kv_heads, site.head_dim)
        return (gate.heads, gate.kv_heads, gate.head_dim) == sizes

    def provide(self, site: AttentionSite, device: torch.device) -> tuple[str, AttnGate]:
        """Return the gate of a site, new on ``device`` if the store had none, and its path."""
        is_new = self.store.get(site.name) is None
        gate = self.store.get_or_create(
            site.name,
            heads=site.heads,
            kv_heads=site.kv_heads,
            head_dim=site.head_dim,
            scale=site.scale,
            device=device,
        )
        if is_new:
            # Outside of training a gate must not make the output of a frozen model differentiable.
            gate.requires_grad_(False)
        if gate.query_weight.device != device:
            # Loading builds gates on one device; a sharded model has its sites on several.
            gate.to(device)
        path = next(name for name, module in self.store.named_modules() if module is gate)
        return f"{STORE_PREFIX}.{path}", gate
