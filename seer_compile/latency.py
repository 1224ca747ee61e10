"""Budgets in time: the share of dense attention's time that sites take, by a device's prices."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from seer_compile.errors import NotConvergedError
from seer_compile.gate import AttnGate
from seer_compile.kernels.cost_model import CallSize, CostModel, cost_model

_HALVINGS = 16


def relative_time(
    gates: Mapping[str, AttnGate],
    shares: Mapping[str, float],
    length: int,
    prices: CostModel | None = None,
) -> float:
    """Return the time of all sites, gates included, relative to dense attention.

    Args:
        gates: Of the sites.
        shares: Density of each site; a site at 1 is answered densely.
        length: Query and key tokens.
        prices: Of the device; those of the gates' own device when None.
    """
    sparse = dense = 0.0
    for name, share in shares.items():
        gate = gates[name]
        size = call_size(gate, length)
        known = prices or cost_model(gate.query_weight.device)
        dense += known.dense_time(size)
        sparse += known.dense_time(size) if share >= 1 else known.sparse_time(size, share)
    return sparse / dense


def call_size(gate: AttnGate, length: int) -> CallSize:
    """Return what the price of a gate's call depends on."""
    return CallSize(
        heads=gate.heads,
        kv_heads=gate.kv_heads,
        head_dim=gate.head_dim,
        length=length,
        gate_heads=gate.gate_heads,
        query_sub_block=gate.config.query_sub_block,
        key_sub_block=gate.config.key_sub_block,
        gate_dim=gate.config.gate_dim,
    )


def density_for_time(
    wanted: float,
    time_at: Callable[[float], float],
    *,
    must_reach: bool,
    length: int,
) -> float:
    """Return the largest mean density whose relative time is not above a wanted one.

    Args:
        wanted: Relative time, in (0, 1].
        time_at: Relative time at a mean density; rises with it.
        must_reach: Raise where no density is fast enough; otherwise the smallest stands, or all
            blocks where dense attention is faster than that.
        length: Named in the error.

    Raises:
        NotConvergedError: Gates and least selections alone take longer.
    """
    if wanted >= 1 or time_at(1.0) <= wanted:
        return 1.0
    low, high = 1e-3, 1.0
    least = time_at(low)
    if least > wanted:
        if must_reach:
            raise NotConvergedError(
                f"at {length:,} tokens gates and the blocks that are always kept take "
                f"{least:.2f} of dense attention's time",
                hint=f"Ask for more than latency={wanted:g}, or for longer inputs.",
            )
        return low if least < 1 else 1.0
    for _ in range(_HALVINGS):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if time_at(middle) <= wanted else (low, middle)
    return low
