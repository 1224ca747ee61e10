"""Is what ``op_speed.py`` times right? Some rows of every selection against float64."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor

from seer_compile.kernels import by_device, gated_attention
from seer_compile.kernels.gate_arguments import GateArguments
from seer_compile.kernels.gated_attention import MODE_SPARSE
from seer_compile.kernels.recorded_calls import playing
from seer_compile.types import Visibility

LIMIT = 1e-2
"""Largest relative error of the checked rows: bf16 rounds probabilities and results."""


def check_rows(operator: Any) -> None:
    """Compare rows of every part of a sparse call with float64 attention to the kept blocks."""
    arguments = GateArguments(*operator.arguments(MODE_SPARSE))
    tensors = (operator.query, operator.key, operator.value)
    attend, calls = by_device.block_sparse_attention, []

    def kept(*args: Any) -> tuple[Tensor, Tensor]:
        result = attend(*args)
        calls.append((args, result[0]))
        return result

    patched = mock.patch.object(by_device, "block_sparse_attention", kept)
    with patched, playing(enabled=False):
        out, _ = gated_attention.forward(*tensors, arguments, operator.visibility)
    if not calls:
        raise SystemExit("the operator made no sparse attention call")
    for args, result in calls:
        check_call(result, *args)
    again = operator.call()()
    difference = (again.float() - out.float()).abs().max()
    if not float(difference) <= LIMIT:
        raise SystemExit(f"two calls differ by {float(difference):.3g}")


def check_call(
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selected: tuple[Tensor, Tensor],
    scale: float,
    blocks: tuple[int, int],
    visibility: Visibility,
    *_: Any,
) -> None:
    (indices, counts), (query_block, key_block) = selected, blocks
    batch, heads, q_len, _ = query.shape
    picks = [(0, 0, 0), (batch - 1, heads - 1, indices.shape[2] - 1)]
    picks.append((batch // 2, heads // 2, indices.shape[2] // 2))
    for item, head, block in picks:
        selection = head * indices.shape[1] // heads
        kept = indices[item, selection, block, : int(counts[item, selection, block])].long()
        keys = (kept[:, None] * key_block + torch.arange(key_block, device=kept.device)).flatten()
        keys = keys[keys < key.shape[2]]
        stop = min((block + 1) * query_block, q_len)
        rows = torch.arange(block * query_block, stop, device=kept.device)
        kv_head = head * key.shape[1] // heads
        logits = query[item, head, rows].double() @ key[item, kv_head, keys].double().T * scale
        visible = _visible(visibility, item, rows, keys)
        weights = logits.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num()
        exact = weights @ value[item, kv_head, keys].double()
        error = (out[item, head, rows].double() - exact).norm() / exact.norm().clamp(min=1e-6)
        if not float(error) <= LIMIT:
            raise SystemExit(
                f"batch {item} head {head} block {block}: relative error {float(error):.3g}"
            )


def _visible(visibility: Visibility, item: int, rows: Tensor, keys: Tensor) -> Tensor:
    distance = keys[None] - rows[:, None]
    visible = torch.ones_like(distance, dtype=torch.bool)
    if visibility.upper is not None:
        visible &= distance <= visibility.upper
    if visibility.lower is not None:
        visible &= distance >= visibility.lower
    if visibility.key_padding is not None:
        visible &= visibility.key_padding[item, keys]
    return visible


def check_against_dense(operator: Any, mode: int = MODE_SPARSE) -> None:
    """Compare a budget of every block with dense attention."""
    before = operator.gate.budget.clone()
    operator.gate.budget.fill_(1.0)
    out, dense = operator.call(mode)().float(), operator.dense("default")().float()
    error = float((out - dense).norm() / dense.norm())
    operator.gate.budget.copy_(before)
    if not error <= LIMIT:
        raise SystemExit(f"a full budget is off by {error:.3g} from dense attention")
