"""A whole site as one operator: schema, fake, kernels and autograd, once each.

``ops`` is the typed front of it, ``gated_attention`` what it computes, on either device. Results
lie as those of ``attention_contracts``.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from seer_compile.errors import RangeError, ShapeError
from seer_compile.kernels import gated_attention
from seer_compile.kernels.attention_contracts import (
    check_results,
    fake_attention,
    fake_gradients,
    gradient_of_sinks,
    save_inputs,
    saved_inputs,
)
from seer_compile.kernels.checks import (
    BUDGET_DTYPES,
    SELECTOR_NAMES,
    check_attention,
    check_blocks,
    check_choice,
    check_integer,
    check_pools,
    check_scale,
    check_softcap,
    check_tensor,
    check_visibility,
)
from seer_compile.kernels.contracts import NAMESPACE
from seer_compile.kernels.gate_arguments import GateArguments, look_of, selection_heads
from seer_compile.kernels.sinks import check_sinks
from seer_compile.types import SHARINGS, Visibility


@custom_op(f"{NAMESPACE}::gated_attention.v1", mutates_args=(), device_types=("cpu", "cuda"))
def gated(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    budget: Tensor,
    mode: Tensor,
    scale: float,
    query_pools: str,
    key_pools: str,
    query_sub_block: int,
    key_sub_block: int,
    query_block: int,
    key_block: int,
    sharing: str,
    selector: str,
    budget_lengths: list[int],
    site: str,
    upper: int | None = None,
    lower: int | None = None,
    offset: Tensor | None = None,
    key_padding: Tensor | None = None,
    query_documents: Tensor | None = None,
    key_documents: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Both devices: the composition calls ``by_device``."""
    gate = GateArguments(
        query_weight,
        key_weight,
        budget,
        mode,
        scale,
        query_pools,
        key_pools,
        query_sub_block,
        key_sub_block,
        query_block,
        key_block,
        sharing,
        selector,
        budget_lengths,
        site,
    )
    visibility = Visibility.from_arguments(
        upper, lower, offset, key_padding, query_documents, key_documents
    )
    look = _check_gated(query, key, value, gate, visibility, softcap, sinks)
    return gated_attention.forward(query, key, value, gate, visibility, softcap, sinks, look)


@gated.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return fake_attention(query, value)


@custom_op(
    f"{NAMESPACE}::gated_attention_backward.v1", mutates_args=(), device_types=("cpu", "cuda")
)
def gated_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    budget: Tensor,
    mode: Tensor,
    scale: float,
    query_pools: str,
    key_pools: str,
    query_sub_block: int,
    key_sub_block: int,
    query_block: int,
    key_block: int,
    sharing: str,
    selector: str,
    budget_lengths: list[int],
    site: str,
    upper: int | None = None,
    lower: int | None = None,
    offset: Tensor | None = None,
    key_padding: Tensor | None = None,
    query_documents: Tensor | None = None,
    key_documents: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Both devices; makes the selection again."""
    gate = GateArguments(
        query_weight,
        key_weight,
        budget,
        mode,
        scale,
        query_pools,
        key_pools,
        query_sub_block,
        key_sub_block,
        query_block,
        key_block,
        sharing,
        selector,
        budget_lengths,
        site,
    )
    visibility = Visibility.from_arguments(
        upper, lower, offset, key_padding, query_documents, key_documents
    )
    _check_gated(query, key, value, gate, visibility, softcap, sinks)
    check_results(query, value, grad_out=grad_out, out=out, lse=lse)
    operands = (query, key, value, out, lse, gate, visibility, softcap)
    return gated_attention.backward(grad_out, *operands, has_sinks=sinks is not None)


@gated_backward.register_fake
def _(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    return fake_gradients(query, key, value)


_PASSED: set[Hashable] = set()
"""What calls looked like that passed the checks: a short call would pay for them every time."""
_MOST_PASSED = 1024


def _check_gated(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: GateArguments,
    visibility: Visibility,
    softcap: float | None,
    sinks: Tensor | None,
) -> Hashable:
    """Check a call unless one like it has passed; return what it looks like."""
    look = look_of(query, key, value, gate, visibility, softcap, sinks)
    if look in _PASSED:
        return look
    _check_gated_in_full(query, key, value, gate, visibility)
    check_softcap(softcap)
    check_sinks(sinks, query)
    if len(_PASSED) >= _MOST_PASSED:
        _PASSED.clear()
    _PASSED.add(look)
    return look


def _check_gated_in_full(
    query: Tensor, key: Tensor, value: Tensor, gate: GateArguments, visibility: Visibility
) -> None:
    check_attention(query, key, value)
    check_scale(gate.scale)
    sub_blocks = (gate.query_sub_block, gate.key_sub_block)
    check_blocks(gate.query_block, gate.key_block, sub_blocks)
    weights = (gate.query_weight, gate.key_weight)
    _check_gate(query, key, weights, (gate.query_pools, gate.key_pools), gate.sharing)
    check_choice("selector", gate.selector, SELECTOR_NAMES)
    check_tensor("mode", gate.mode, rank=0, dtypes=(torch.int8,), device=torch.device("cpu"))
    for length in gate.budget_lengths:
        check_integer("budget_lengths", length, minimum=1)
    if list(gate.budget_lengths) != sorted(set(gate.budget_lengths)) or not gate.budget_lengths:
        raise RangeError(
            argument="budget_lengths", got=list(gate.budget_lengths), expected="ascending lengths"
        )
    check_tensor("budget", gate.budget, rank=2, dtypes=BUDGET_DTYPES, device=query.device)
    selections = selection_heads(query, key, gate)
    if tuple(gate.budget.shape) != (selections, len(gate.budget_lengths)):
        raise ShapeError(
            argument="budget.shape",
            got=tuple(gate.budget.shape),
            expected=f"({selections}, {len(gate.budget_lengths)}): selection heads (with "
            f"sharing={gate.sharing!r}), lengths",
        )
    lengths = {"q_len": query.shape[2], "k_len": key.shape[2]}
    check_visibility(visibility, batch=query.shape[0], device=query.device, **lengths)


def _check_gate(
    query: Tensor, key: Tensor, weights: tuple[Any, Any], pools: tuple[Any, Any], sharing: Any
) -> None:
    """Check the weights of a gate against the tensors that it pools.

    Raises:
        DtypeError: Weights are not float32, or pools are no pool kinds.
        RangeError: An unknown pool kind or kind of sharing.
        ShapeError: Weights do not fit heads, head dim, pools, or each other.
        DeviceError: Weights on another device.
    """
    check_choice("sharing", sharing, SHARINGS)
    for side, weight, kinds in zip(("query", "key"), weights, pools, strict=True):
        check_pools(f"{side}_pools", kinds)
        heads = (key if side == "key" and sharing == "gate" else query).shape[1]
        name = f"{side}_weight"
        check_tensor(name, weight, rank=3, dtypes=(torch.float32,), device=query.device)
        pooled = query.shape[-1] * len(kinds.split(","))
        if tuple(weight.shape[:2]) != (heads, pooled):
            raise ShapeError(
                argument=f"{name}.shape",
                got=tuple(weight.shape),
                expected=f"({heads}, {pooled}, gate_dim): heads, pooled channels",
            )
    if weights[0].shape[-1] != weights[1].shape[-1]:
        raise ShapeError(
            argument="key_weight.shape[-1]",
            got=weights[1].shape[-1],
            expected=f"the gate dim of query_weight, {weights[0].shape[-1]}",
        )


def _save_gated(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    # The knobs may be turned before the backward runs, which must see what the forward saw.
    query, key, value, query_weight, key_weight, budget, mode, *rest = inputs
    knobs = (budget.detach().clone(), mode.detach().clone())
    save_inputs(ctx, (query, key, value, query_weight, key_weight, *knobs, *rest), output)


def _gated_gradients(ctx: Any, grad_out: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    results, inputs = saved_inputs(ctx)
    operator = torch.ops.seer_compile.gated_attention_backward.v1
    gradients = operator(grad_out, *inputs[:3], *results, *inputs[3:])
    sinks = gradient_of_sinks(ctx, grad_out, results, inputs[-1])
    return (*gradients, *(None for _ in inputs[3:-1]), sinks)


gated.register_autograd(_gated_gradients, setup_context=_save_gated)
