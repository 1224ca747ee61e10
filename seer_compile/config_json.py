"""Gate configurations as plain data, for files and state dicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from seer_compile.config import SELECTORS, GateConfig
from seer_compile.types import BlockSize


def config_to_json(config: GateConfig) -> dict[str, Any]:
    """Return a gate configuration as plain data."""
    selector = config.selector
    return {
        "query_pools": list(config.query_pools),
        "key_pools": list(config.key_pools),
        "sub_blocks": [config.query_sub_block, config.key_sub_block],
        "gate_dim": config.gate_dim,
        "block_size": [config.block_size.query, config.block_size.key],
        "sharing": config.sharing,
        "selector": [selector.name, selector.budget],
        "resolution": config.resolution,
    }


def config_from_json(data: Mapping[str, Any]) -> GateConfig:
    """Rebuild a gate configuration; raises as its constructor does, or KeyError."""
    name, budget = data["selector"]
    kinds = {kind.name: kind for kind in SELECTORS}
    number: Any = int(budget) if name == "top_k" else float(budget)
    (argument,) = kinds[name].__slots__
    query, key = data["block_size"]
    query_sub_block, key_sub_block = data["sub_blocks"]
    return GateConfig(
        query_pools=tuple(data["query_pools"]),
        key_pools=tuple(data["key_pools"]),
        query_sub_block=int(query_sub_block),
        key_sub_block=int(key_sub_block),
        gate_dim=int(data["gate_dim"]),
        block_size=BlockSize(query=int(query), key=int(key)),
        sharing=data["sharing"],
        selector=kinds[name](**{argument: number}),
        # Files written before sites had resolutions of their own have no such field.
        resolution=data.get("resolution", "uniform"),
    )
