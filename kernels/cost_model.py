"""What calls cost on a device, for budgets in time. Data, and the sum they enter.

``python benchmarks/cost_model.py --write`` measures the numbers of the machine that it runs on and
rewrites its entry here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class CallSize(NamedTuple):
    """What the time of a self-attention call depends on."""

    heads: int
    kv_heads: int
    head_dim: int
    length: int
    gate_heads: int
    query_sub_block: int
    key_sub_block: int
    gate_dim: int


class CostModel(NamedTuple):
    """Prices of one call. All in microseconds; pairs are those of a call without a mask."""

    call: float
    """Of a gated call, before it does anything."""
    token: float
    """Per 1e6 channels of queries and keys: pooling and projecting."""
    gate: float
    """Per 1e9 gate channels of sub-block pairs: scoring and selecting."""
    kept: float
    """Per 1e9 kept products, each a channel of a query and key pair: the sparse attention."""
    dense: float
    """Per 1e9 products of dense attention."""

    def dense_time(self, size: CallSize) -> float:
        """Return the microseconds of dense attention."""
        return self.dense * _products(size)

    def sparse_time(self, size: CallSize, density: float) -> float:
        """Return the microseconds of a gated call that keeps a share of the blocks."""
        tokens = size.length * (size.heads + size.kv_heads) * size.head_dim / 1e6
        rows = -(-size.length // size.query_sub_block)
        columns = -(-size.length // size.key_sub_block)
        pairs = size.gate_heads * rows * columns * size.gate_dim / 1e9
        kept = self.kept * density * _products(size)
        return self.call + self.token * tokens + self.gate * pairs + kept


def _products(size: CallSize) -> float:
    return 2 * size.heads * size.length**2 * size.head_dim / 1e9


TABLE: dict[str, CostModel] = {
    "cpu": CostModel(call=3.0e3, token=2.4e4, gate=1.1e5, kept=2.6e4, dense=2.7e4),
    "cuda": CostModel(call=60, token=1.4, gate=3.6, kept=1.75, dense=1.7),
    "cuda-90": CostModel(call=44.6, token=1.87, gate=5.53, kept=1.43, dense=1.89),
}
"""By device class: ``cpu``, ``cuda`` for any GPU, ``cuda-90`` for one compute capability.

``cuda-90``: one H200, 8/2 heads of D64 and 32/8 of D128 at 4,096 to 32,768 tokens, on the device:
the worst time is off by a half, at the shortest calls; at 32,768 tokens all by less than 26 %.
``cuda`` is the portable kernels on that H200 at 32 heads of D128 and 32,768 tokens: 1.54 ms of
attention at 10 %, 0.97 of scores and selection, 0.24 of pooling, 14.9 of dense attention. A mask
that hides half of the pairs halves every price.
"""


def cost_model(device: torch.device) -> CostModel:
    """Return the prices of a device."""
    if device.type != "cuda":
        return TABLE["cpu"]
    major, minor = torch.cuda.get_device_capability(device)
    return TABLE.get(f"cuda-{major}{minor}", TABLE["cuda"])
