"""The rules by which outputs, graphs and inputs are judged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

REL_L2_LIMIT = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
POISONS = (float("nan"), float("inf"), float("-inf"), 65504.0)


def assert_no_worse_than_eager(
    actual: Tensor,
    eager: Tensor,
    gold: Tensor,
    *,
    name: str = "output",
    head_axis: int | None = 1,
    stride: tuple[int, ...] | None = None,
) -> None:
    """Judge a result by the error that plain PyTorch makes in the same dtype.

    With ``floor = eps(dtype) * rms(gold)``, over the whole tensor and over each head: largest
    error <= 2 x eager's + floor, mean error <= 1.1 x eager's + floor, and over the whole tensor
    relative L2 within the limit of the dtype. Where gold is not finite, the result equals it.

    Args:
        actual: The result under test.
        eager: PyTorch's result from the same inputs, in the same dtype, with the same mask.
        gold: The float64 result from the same (rounded) inputs.
        name: For messages.
        head_axis: Axis judged slice by slice too; None for none.
        stride: Strides promised, if any.
    """
    assert gold.dtype is torch.float64, f"{name}: gold must be float64, got {gold.dtype}"
    assert actual.shape == gold.shape, f"{name}: shape {tuple(actual.shape)}, {tuple(gold.shape)}"
    assert actual.dtype is eager.dtype, f"{name}: dtype {actual.dtype}, expected {eager.dtype}"
    assert stride is None or actual.stride() == stride, f"{name}: stride {actual.stride()}"
    actual_wide, eager_wide = actual.detach().double(), eager.detach().double().to(actual.device)
    gold = gold.detach().to(actual.device)
    if gold.numel() == 0:
        return
    finite = gold.isfinite()
    assert torch.equal(actual_wide[~finite], gold[~finite]), f"{name}: wrong where not finite"
    assert actual_wide[finite].isfinite().all(), f"{name}: not finite where the reference is"
    error = (actual_wide - gold).where(finite, 0.0).abs()
    eager_error = (eager_wide - gold).where(finite, 0.0).abs().nan_to_num(nan=0.0)
    values = gold.where(finite, 0.0)
    eps = torch.finfo(actual.dtype).eps
    _assert_errors(error, eager_error, values, eps, name)
    if head_axis is not None and gold.ndim > head_axis:
        for head in range(gold.shape[head_axis]):
            parts = (part.select(head_axis, head) for part in (error, eager_error, values))
            _assert_errors(*parts, eps, f"{name}, head {head}")
    limit = REL_L2_LIMIT.get(actual.dtype, 1e-12)
    rel_l2 = error.norm().item() / max(values.norm().item(), 1e-30)
    assert rel_l2 <= limit or error.max().item() <= eps, f"{name}: rel L2 {rel_l2:.3g} > {limit}"


def _assert_errors(
    error: Tensor, eager_error: Tensor, values: Tensor, eps: float, name: str
) -> None:
    floor = eps * values.square().mean().sqrt().item()
    worst, worst_eager = error.max().item(), eager_error.max().item()
    mean, mean_eager = error.mean().item(), eager_error.mean().item()
    where = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    assert worst <= 2.0 * worst_eager + floor, (
        f"{name}: largest error {worst:.3g} at {where}, eager's {worst_eager:.3g}, "
        f"floor {floor:.3g}"
    )
    assert mean <= 1.1 * mean_eager + floor, (
        f"{name}: mean error {mean:.3g}, eager's {mean_eager:.3g}, floor {floor:.3g}"
    )


def count_ops(graph_module: GraphModule) -> Counter[str]:
    """Count calls by target name: ``aten.mm.default``, ``seer_compile.pool_blocks.v1``."""
    return Counter(
        str(node.target) for node in graph_module.graph.nodes if node.op == "call_function"
    )


def assert_ops(graph_module: GraphModule, expected: Mapping[Any, int]) -> None:
    """Assert how often each of some targets is called; keys are operators or their names."""
    counts = count_ops(graph_module)
    found = {str(target): counts[str(target)] for target in expected}
    wanted = {str(target): number for target, number in expected.items()}
    assert found == wanted, f"calls {found}, expected {wanted} in\n{graph_module.graph}"


def graph_fingerprint(graph_module: GraphModule) -> tuple[Any, ...]:
    """Return what identifies a graph: nodes in order, arguments, metadata keys, state."""
    nodes = tuple(
        (node.op, node.name, str(node.target), str(node.args), str(node.kwargs), tuple(node.meta))
        for node in graph_module.graph.nodes
    )
    state = tuple(
        (name, id(tensor), tensor._version)
        for named in (graph_module.named_parameters(), graph_module.named_buffers())
        for name, tensor in named
    )
    return nodes, state, tuple(name for name, _ in graph_module.named_modules())


@contextmanager
def assert_unchanged(graph_module: GraphModule):
    """Assert that a block leaves nodes, metadata, parameters and buffers as they were."""
    before = graph_fingerprint(graph_module)
    yield
    after = graph_fingerprint(graph_module)
    for part, old, new in zip(("nodes", "state", "modules"), before, after, strict=True):
        assert old == new, f"{part} changed in\n{graph_module.graph}"


def poisoned(tensor: Tensor, unread: Tensor, value: float) -> Tensor:
    """Return a copy that holds ``value`` where ``unread`` (broadcast over trailing axes) is True.

    Strides are kept.
    """
    copy = torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
    ).copy_(tensor)
    while unread.ndim < tensor.ndim:
        unread = unread[..., None]
    return copy.masked_fill_(unread.to(tensor.device), value)


def assert_ignores(
    function: Callable[..., Any],
    inputs: Mapping[str, Any],
    unread: Mapping[str, Tensor],
    *,
    poisons: tuple[float, ...] = POISONS,
) -> None:
    """Assert bitwise equal results whatever stands in the elements that must not be read.

    Args:
        function: Called as ``function(**inputs)``; returns a tensor or a tuple of tensors.
        inputs: All arguments.
        unread: For some arguments, the boolean mask of elements to overwrite.
        poisons: The values to write.
    """
    clean = _as_tuple(function(**inputs))
    for value in poisons:
        dirty_inputs = dict(inputs)
        for name, mask in unread.items():
            assert mask.any(), f"nothing of {name} is poisoned: the test would prove nothing"
            dirty_inputs[name] = poisoned(inputs[name], mask, value)
        for index, (expected, got) in enumerate(
            zip(clean, _as_tuple(function(**dirty_inputs)), strict=True)
        ):
            assert_bitwise_equal(got, expected, name=f"result {index} with {value} in {[*unread]}")


def assert_bitwise_equal(actual: Tensor, expected: Tensor, *, name: str = "output") -> None:
    """Assert equal dtype, shape and values, NaN equal to NaN."""
    assert actual.dtype is expected.dtype, f"{name}: {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{name}: {actual.shape}, expected {expected.shape}"
    differs = (actual != expected) & ~(actual.isnan() & expected.isnan())
    assert not differs.any(), f"{name}: {int(differs.sum())} of {differs.numel()} elements differ"


def _as_tuple(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)
