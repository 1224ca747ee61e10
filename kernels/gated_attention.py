"""A whole site in one call: pool, score, select, attend; or dense attention where that is faster.

    query -> pool and project --.
    key   -> pool and project --> scores -> select -> attention(query, key, value)

Query rows are streamed: scores and indices of one slab of rows exist at a time, and keys that the
band hides from a slab are left out of it. The selection is a function of the inputs alone, so the
backward makes it again instead of keeping it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from seer_compile.errors import RangeError
from seer_compile.kernels import (
    by_device,
    counters,
    engines,
    every_block,
    observation,
    recorded_calls,
)
from seer_compile.kernels.budgets import columns_at
from seer_compile.kernels.dense import dense_attention, dense_reason
from seer_compile.kernels.gate_arguments import GateArguments, look_of, selection_heads
from seer_compile.kernels.geometry import Grid, visible_range
from seer_compile.kernels.recorded_calls import CallRecords
from seer_compile.result_layout import empty_like_query, laid_like_query
from seer_compile.types import SiteInputs, Visibility

MODE_DENSE, MODE_AUTO, MODE_SPARSE, MODE_FULL_BUDGET = 0, 1, 2, 3
"""Values of ``mode``: dense; sparse where that is not slower; sparse whatever the size; dense,
because the budget covers every block."""

RECORDS = CallRecords()
"""Recorded sparse calls, of all sites."""

_SLAB_BYTES = 256 << 20
"""Scores and indices, four bytes each, of one slab of query rows."""


def _may_be_played(query: Tensor) -> bool:
    """Whether calls are launches alone now: nobody counts blocks or watches launches."""
    if not (query.is_cuda and recorded_calls.may_play()) or counters.active_meters():
        return False
    if torch.are_deterministic_algorithms_enabled():
        # PyTorch fills what it allocates then, by a launch of its own.
        return False
    from seer_compile.kernels.triton.launching import can_be_repeated

    return torch.cuda.current_device() == query.get_device() and can_be_repeated()


class _Slab(NamedTuple):
    """Consecutive query rows, the keys in reach, and the visibility counted from the first row."""

    rows: slice
    keys: slice
    visibility: Visibility


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: GateArguments,
    visibility: Visibility,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    look: Hashable = None,
) -> tuple[Tensor, Tensor]:
    """Return out and lse; see ``ops.gated_attention``.

    On a GPU a sparse call that looks like earlier ones is played from a recording, see
    :mod:`.recorded_calls`. ``look`` is its :func:`look_of` where that is at hand.
    """
    reason = path_of(query, key, value, gate)
    counters.record(gate.site, "sparse" if reason is None else f"dense:{reason}")
    _show(query, key, value, gate, visibility, softcap, sinks)
    if reason is not None and not (softcap is sinks is None):
        return every_block.forward(query, key, value, gate.scale, visibility, softcap, sinks)
    if reason is not None:
        # Nobody reads the log-sum-exp then: at short lengths filling it would show.
        lse = query.new_empty(query.shape[:3], dtype=torch.float32)
        out = dense_attention(query, key, value, scale=gate.scale, visibility=visibility)
        return laid_like_query(out, query), lse

    def compute() -> tuple[Tensor, Tensor]:
        return _forward_sparsely(query, key, value, gate, visibility, softcap, sinks)

    if not _may_be_played(query):
        return compute()
    if look is None:
        look = look_of(query, key, value, gate, visibility, softcap, sinks)
    tensors = (*visibility.as_arguments().values(), sinks)
    masks = [tensor for tensor in tensors if isinstance(tensor, Tensor)]
    operands = (query, key, value, gate.query_weight, gate.key_weight, gate.budget, *masks)
    out, lse = RECORDS.answer((look, engines.chosen()), operands, compute)
    return out, lse


def _forward_sparsely(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: GateArguments,
    visibility: Visibility,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    key_features = _key_features(key, gate, visibility)
    slabs = list(_slabs(query, key, gate, visibility))
    if len(slabs) == 1:
        return _attend(query, key, value, key_features, gate, slabs[0], softcap, sinks)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    out = empty_like_query(query, value)
    for slab in slabs:
        out[:, :, slab.rows], lse[:, :, slab.rows] = _attend(
            query, key, value, key_features, gate, slab, softcap, sinks
        )
    return out, lse


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_features: Tensor,
    gate: GateArguments,
    slab: _Slab,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Select and attend for one slab of rows."""
    queries = query[:, :, slab.rows]
    selection = _select(queries, key_features, gate, slab, key.shape[2])
    _meter(gate, slab, selection[1])
    operands = (queries, key[:, :, slab.keys], value[:, :, slab.keys])
    blocks = (gate.query_block, gate.key_block)
    return by_device.block_sparse_attention(
        *operands, selection, gate.scale, blocks, slab.visibility, softcap, sinks
    )


def _show(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: GateArguments,
    visibility: Visibility,
    softcap: float | None,
    sinks: Tensor | None,
) -> None:
    observers = observation.active()
    if observers:
        inputs = SiteInputs(
            name=gate.site,
            query=query,
            key=key,
            value=value,
            scale=gate.scale,
            visibility=visibility,
            softcap=softcap,
            sinks=sinks,
        )
        for observer in observers:
            observer(inputs)


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    gate: GateArguments,
    visibility: Visibility,
    softcap: float | None = None,
    *,
    has_sinks: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value, contiguous, given the forward's results."""
    is_dense = path_of(query, key, value, gate) is not None
    if is_dense and (has_sinks or softcap is not None):
        operands = (query, key, value, out, lse)
        return every_block.backward(grad_out, *operands, gate.scale, visibility, softcap)
    if is_dense:
        return _dense_backward(grad_out, query, key, value, gate.scale, visibility)
    key_features = _key_features(key, gate, visibility)
    grad_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    # Slabs add up in float32: the sum of rounded parts would lose what a single slab keeps.
    grad_key, grad_value = (
        torch.zeros(tensor.shape, dtype=torch.float32, device=tensor.device)
        for tensor in (key, value)
    )
    for slab in _slabs(query, key, gate, visibility):
        queries = query[:, :, slab.rows]
        selection = _select(queries, key_features, gate, slab, key.shape[2])
        parts = by_device.block_sparse_attention_backward(
            grad_out[:, :, slab.rows],
            queries,
            key[:, :, slab.keys],
            value[:, :, slab.keys],
            out[:, :, slab.rows],
            lse[:, :, slab.rows].contiguous(),
            selection,
            gate.scale,
            (gate.query_block, gate.key_block),
            slab.visibility,
            softcap,
        )
        grad_query[:, :, slab.rows] = parts[0]
        grad_key[:, :, slab.keys] += parts[1]
        grad_value[:, :, slab.keys] += parts[2]
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


def path_of(query: Tensor, key: Tensor, value: Tensor, gate: GateArguments) -> str | None:
    """Return why the call is answered densely, None where it is answered sparsely.

    Raises:
        RangeError: ``mode`` is none of the four.
    """
    mode = int(gate.mode)
    if mode not in (MODE_DENSE, MODE_AUTO, MODE_SPARSE, MODE_FULL_BUDGET):
        raise RangeError(
            argument="mode", got=mode, expected="0 dense, 1 auto, 2 sparse or 3 full budget"
        )
    if mode == MODE_DENSE:
        return "mode"
    if mode == MODE_FULL_BUDGET:
        return "full budget"
    if query.numel() == 0 or key.shape[2] == 0:
        return "empty"
    if mode == MODE_SPARSE:
        return None
    return dense_reason(
        q_len=query.shape[2],
        k_len=key.shape[2],
        heads=query.shape[0] * query.shape[1],
        dims=(query.shape[3], value.shape[3]),
        device=query.device,
    )


def _slabs(
    query: Tensor, key: Tensor, gate: GateArguments, visibility: Visibility
) -> Iterator[_Slab]:
    q_len, k_len = query.shape[2], key.shape[2]
    selections = query.shape[0] * selection_heads(query, key, gate)
    row_bytes = 8 * selections * -(-k_len // gate.key_block)
    step = max(1, _SLAB_BYTES // max(row_bytes, 1)) * gate.query_block
    if visibility.upper is None and q_len == k_len:
        # The diagonal of an unbounded band is known from the lengths of the whole call alone.
        step = q_len
    for start in range(0, q_len, step):
        rows = slice(start, min(start + step, q_len))
        end = k_len
        if visibility.upper is not None and visibility.offset is None:
            reach = max(rows.stop + visibility.upper, 1)
            end = min(k_len, -(-reach // gate.key_block) * gate.key_block)
        keys = slice(0, end)
        yield _Slab(rows, keys, _window(visibility, rows, keys))


def _window(visibility: Visibility, rows: slice, keys: slice) -> Visibility:
    """Return a visibility as counted from the first of some rows, over some keys from 0."""

    def cut(tensor: Tensor | None, span: slice) -> Tensor | None:
        return None if tensor is None else tensor[:, span]

    return Visibility(
        upper=None if visibility.upper is None else visibility.upper + rows.start,
        lower=None if visibility.lower is None else visibility.lower + rows.start,
        offset=visibility.offset,
        key_padding=cut(visibility.key_padding, keys),
        query_documents=cut(visibility.query_documents, rows),
        key_documents=cut(visibility.key_documents, keys),
    )


def _key_features(key: Tensor, gate: GateArguments, visibility: Visibility) -> Tensor:
    return by_device.pool_features(
        key, gate.key_weight, gate.key_sub_block, gate.key_pools, visibility.key_padding
    )


def _select(
    queries: Tensor, key_features: Tensor, gate: GateArguments, slab: _Slab, k_len: int
) -> tuple[Tensor, Tensor]:
    """Return indices and counts for one slab of rows; the budget is that of all the keys."""
    groups = queries.shape[1] // gate.budget.shape[0]
    is_gate_shared = gate.sharing == "gate"
    query_features = by_device.pool_features(
        queries,
        gate.query_weight,
        gate.query_sub_block,
        gate.query_pools,
        groups=groups if is_gate_shared else 1,
    )
    num_keys = slab.keys.stop
    grid = Grid(queries.shape[2], num_keys, gate.query_block, gate.key_block)
    scores = by_device.block_scores(
        query_features,
        key_features[:, :, : -(-num_keys // gate.key_sub_block)],
        gate.scale,
        (gate.query_sub_block, gate.key_sub_block),
        grid,
        1 if is_gate_shared else groups,
        slab.visibility,
    )
    budget = columns_at(gate.budget, gate.budget_lengths, k_len)
    return by_device.select_blocks(scores, budget, gate.selector, grid, slab.visibility)


def _meter(gate: GateArguments, slab: _Slab, counts: Tensor) -> None:
    meters = counters.active_meters()
    if not meters:
        return
    kept = counts.sum(dtype=torch.int64)
    _, per_selection = visible_range(
        slab.visibility,
        (slab.rows.stop - slab.rows.start, slab.keys.stop),
        (gate.query_block, gate.key_block),
        counts.device,
    )
    visible = per_selection.sum() * counts.shape[0] * counts.shape[1]
    for meter in meters:
        meter.add(gate.site, kept, visible)


def _dense_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    visibility: Visibility,
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate the dense path by running it again under autograd.

    An operator's kernel runs with the autograd keys excluded; they are let in for this call.
    """
    with (
        torch._C._SetExcludeDispatchKeyGuard(
            torch._C.DispatchKey.AutogradFunctionality,
            False,
        ),
        torch.enable_grad(),
    ):
        leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
        out = dense_attention(*leaves, scale=scale, visibility=visibility)
        if not out.requires_grad:
            return tuple(torch.zeros_like(leaf) for leaf in leaves)  # type: ignore[return-value]
        if grad_out.stride() != out.stride():
            # cuDNN would warn and copy.
            grad_out = torch.empty_like(out, requires_grad=False).copy_(grad_out)
        grads = torch.autograd.grad(out, leaves, grad_out)
    return tuple(grad.contiguous() for grad in grads)  # type: ignore[return-value]
