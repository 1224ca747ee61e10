"""How the kernel fuzzer judges: what it runs, what it compares with, what it allows.

Shared by ``fuzz_kernels.py`` and the tests of the kernels.
"""

# ruff: noqa: E402

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / name) for name in (".", "tests")]

import torch
from kernels_cases import FP32
from torch import Tensor

from seer_compile.kernels import reference, selection
from seer_compile.kernels.geometry import Grid
from seer_compile.types import BlockSelection, Visibility
from support.assertions import REL_L2_LIMIT, assert_no_worse_than_eager


def run_attention(inputs: dict[str, Any]) -> tuple[Tensor, ...]:
    """Return out, lse, dquery, dkey, dvalue of the kernels."""
    from seer_compile.kernels.triton import attention_backward, attention_forward

    rest = (*inputs["selection"], inputs["scale"], *inputs["blocks"])
    visibility = inputs["visibility"].as_arguments()
    tensors = tuple(inputs[name] for name in ("query", "key", "value"))
    out, lse = attention_forward.launch(*tensors, *rest, **visibility)
    gradients = attention_backward.launch(
        inputs["grad_out"], *tensors, out, lse, *rest, **visibility
    )
    return out, lse, *gradients


def reference_attention(inputs: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return the same from the eager oracle in a dtype."""
    leaves = [
        inputs[name].detach().clone().to(dtype).requires_grad_()
        for name in ("query", "key", "value")
    ]
    rest = (inputs["selection"], inputs["scale"], *inputs["blocks"], inputs["visibility"])
    out, lse = reference.block_sparse_attention(*leaves, *rest)
    gradients = torch.autograd.grad(out, leaves, inputs["grad_out"].to(dtype))
    return out.detach(), lse.detach(), *gradients


def check_attention(inputs: dict[str, Any]) -> None:
    """Judge numbers, poison and repetition of both directions."""
    names = ("out", "lse", "dquery", "dkey", "dvalue")
    actual = run_attention(inputs)
    dtype = inputs["query"].dtype
    exact, eager = (reference_attention(inputs, kind) for kind in (torch.float64, dtype))
    recomputed, magnitude = recomputed_gradients(inputs)
    logit = _largest_logit(inputs["query"].double(), inputs["key"].double(), inputs["scale"])
    for name, ours, theirs, gold in zip(names, actual, eager, exact, strict=True):
        if name == "lse":
            _check_lse(ours, gold)
            continue
        if dtype is FP32:
            _check_float32(name, ours, gold, magnitude[name], logit)
            continue
        try:
            assert_no_worse_than_eager(ours, theirs, gold, name=name)
        except AssertionError:
            if name == "out":
                raise
            _check_gradient(name, ours, recomputed[name], magnitude[name], gold)
    _check_bits(actual, run_attention(inputs), names, "second run")
    is_read = _poison_unread(inputs)
    poisoned = run_attention(inputs)
    _check_bits(actual[:2], poisoned[:2], names[:2], f"{inputs['poison']} in unread positions")
    for name, ours, theirs in zip(names[2:], actual[2:], poisoned[2:], strict=True):
        # A gradient may hold anything only where its own input was replaced.
        mask = is_read["query" if name == "dquery" else "key"]
        _check_bits((ours,), (theirs.where(mask[..., None], ours),), (name,), "poison")


def _check_float32(
    name: str, actual: Tensor, exact: Tensor, magnitude: Tensor, logit: float
) -> None:
    """Bound errors by the rounding of a logit, made twice, and of sums of terms of known size.

    Eager cancels the rounding of its logits where one key has all the weight; two passes that
    multiply in different orders do not.
    """
    bound = torch.finfo(torch.float32).eps * (16 + 2 * logit)
    excess = ((actual - exact).abs() - bound * magnitude).max()
    assert bool(excess <= 1e-30), f"{name}: off by {float(excess)} beyond {bound} of its terms"
    limit = REL_L2_LIMIT[torch.float32] * magnitude.norm()
    assert bool((actual - exact).norm() <= limit), f"{name}: relative L2 over the limit"


def _check_lse(actual: Tensor, exact: Tensor) -> None:
    assert torch.equal(actual == -torch.inf, exact == -torch.inf), "lse of empty rows"
    worst = (actual - exact).nan_to_num(0.0).abs().max()
    largest = exact.nan_to_num(0.0, neginf=0.0).abs().max()
    assert worst <= 1e-5 * (1 + largest), f"lse off by {worst}"


def recomputed_gradients(inputs: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return gradients by FlashAttention's formula in plain PyTorch, in the dtype of the inputs.

    The second result is the sum of the sizes of what each gradient adds up.

    Autograd keeps the probabilities, rounded to the dtype, and so cancels their rounding exactly
    where one key dominates a row. No algorithm that recomputes them from rounded outputs can:
    a gradient may be as wrong as this one.
    """
    query, key, value = (inputs[name] for name in ("query", "key", "value"))
    grad_out, scale = inputs["grad_out"], inputs["scale"]
    dtype, per_head = query.dtype, query.shape[1] // key.shape[1]
    mask = _read_mask(inputs)
    wide_key = key.float().repeat_interleave(per_head, 1)
    wide_value = value.float().repeat_interleave(per_head, 1)
    _, lse = reference.probabilities(query.float(), key.float(), scale, mask)
    logits = (query.float() @ wide_key.mT * scale).masked_fill(~mask, -torch.inf)
    shares = (logits - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
    rounded = shares.to(dtype).float()
    out = (rounded @ wide_value).to(dtype).float()
    delta = (out * grad_out.float()).sum(-1, keepdim=True)
    grad_shares = grad_out.float() @ wide_value.mT
    grad_logits = (shares * (grad_shares - delta)).to(dtype).float()
    gradients = _products(grad_logits * scale, rounded, query.float(), wide_key, grad_out.float())
    delta_size = ((rounded @ wide_value.abs()) * grad_out.float().abs()).sum(-1, keepdim=True)
    terms = shares * (grad_out.float().abs() @ wide_value.abs().mT + delta_size) * abs(scale)
    sizes = _products(
        terms, shares, *(tensor.float().abs() for tensor in (query, wide_key, grad_out))
    )
    by_name = {}
    for kind, results in (("gradient", gradients), ("size", sizes)):
        dquery, dkey, dvalue = results
        by_name[kind] = {
            "dquery": dquery,
            "dkey": dkey.unflatten(1, (-1, per_head)).sum(2),
            "dvalue": dvalue.unflatten(1, (-1, per_head)).sum(2),
        }
    by_name["size"]["out"] = shares @ wide_value.abs()
    rounded_gradients = {name: value.to(dtype) for name, value in by_name["gradient"].items()}
    return rounded_gradients, by_name["size"]


def _products(
    grad_logits: Tensor, shares: Tensor, query: Tensor, key: Tensor, grad_out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return grad_logits @ key, grad_logits.mT @ query, shares.mT @ grad_out


def _check_gradient(
    name: str, actual: Tensor, recomputed: Tensor, magnitude: Tensor, exact: Tensor
) -> None:
    """Allow three times the largest and 1.65 times the mean error, as FlashAttention's tests do.

    The floor is the rounding of the terms that a gradient sums: where one key has all of a row's
    weight they cancel, and nothing is left to be relative to.
    """
    error, allowed = (actual.double() - exact).abs(), (recomputed.double() - exact).abs()
    floor = torch.finfo(actual.dtype).eps * magnitude.double().square().mean().sqrt()
    worst, mean = error.max(), error.mean()
    assert actual.isfinite().all(), f"{name}: not finite"
    assert worst <= 3 * allowed.max() + 2 * floor, f"{name}: {worst} over {allowed.max()}, {floor}"
    assert mean <= 1.65 * allowed.mean() + floor, f"{name}: mean {mean} over {allowed.mean()}"


def _read_mask(inputs: dict[str, Any]) -> Tensor:
    """Return ``Bool[b h q k]``: what each query reads."""
    query, key = inputs["query"], inputs["key"]
    query_block, key_block = inputs["blocks"]
    mask = reference.selection_mask(inputs["selection"], -(-key.shape[2] // key_block))
    mask = mask.repeat_interleave(query_block, 2)[:, :, : query.shape[2]]
    mask = mask.repeat_interleave(key_block, 3)[..., : key.shape[2]]
    mask = mask.repeat_interleave(query.shape[1] // mask.shape[1], 1)
    rules = inputs["visibility"]
    return mask & reference.token_mask(rules, query.shape[2], key.shape[2], query.device)


def _check_bits(first: Any, second: Any, names: Any, what: str) -> None:
    for name, one, other in zip(names, first, second, strict=True):
        assert torch.equal(one, other), f"{name} changes with {what}"


def _poison_unread(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Replace keys and values that no query reads, and queries that read nothing."""
    mask, kv_heads = _read_mask(inputs), inputs["key"].shape[1]
    is_read = {"key": mask.unflatten(1, (kv_heads, -1)).any(2).any(-2), "query": mask.any(-1)}
    poison = inputs["poison"]
    for name, kind in (("query", "query"), ("key", "key"), ("value", "key"), ("grad_out", "query")):
        inputs[name].masked_fill_(~is_read[kind][..., None], poison)
    return is_read


def _map_arguments(inputs: dict[str, Any]) -> tuple[Any, ...]:
    profile = inputs["profile"]
    if "sub_blocks" in profile:
        return (*profile["sub_blocks"], *profile["blocks"], *inputs["lengths"], profile["groups"])
    return (*profile["units"], *profile["reduce"])


def run_map(inputs: dict[str, Any]) -> tuple[Tensor, ...]:
    """Return block scores or attention mass from the kernels."""
    from seer_compile.kernels.triton import attention_mass, block_scores

    module = block_scores if "sub_blocks" in inputs["profile"] else attention_mass
    start = (inputs["rows"], inputs["columns"], inputs["scale"])
    visibility = inputs["visibility"].as_arguments()
    tiling = _few_programs(inputs) if inputs["profile"].get("programs") else None
    return (module.launch(*start, *_map_arguments(inputs), **visibility, tiling=tiling),)


def _few_programs(inputs: dict[str, Any]) -> Any:
    """Return the tiling of block scores with fewer programs: each takes many tiles."""
    import triton

    from seer_compile.kernels.triton import primitives, tuning

    profile, rows, columns = inputs["profile"], inputs["rows"], inputs["columns"]
    sizes = zip(profile["blocks"], profile["sub_blocks"], strict=True)
    units = tuple(triton.next_power_of_2(block // sub_block) for block, sub_block in sizes)
    number = -(-inputs["lengths"][1] // profile["blocks"][1])
    dim = primitives.padded_dim(profile["dim"])
    tiling = tuning.scores_tiling(dim, rows.dtype, units, number, columns.device)
    return tiling._replace(programs=profile["programs"], keep=profile["programs"] % 2 == 1)


def check_map(inputs: dict[str, Any]) -> None:
    """Judge numbers, exact zeros, poison and repetition."""
    is_scores = "sub_blocks" in inputs["profile"]
    oracle = reference.block_scores if is_scores else reference.attention_mass
    (actual,) = run_map(inputs)
    rows, columns = inputs["rows"].double(), inputs["columns"].double()
    exact = oracle(rows, columns, inputs["scale"], *_map_arguments(inputs), inputs["visibility"])
    _check_map_numbers(actual, exact, _largest_logit(rows, columns, inputs["scale"]))
    assert torch.equal(actual != 0, exact != 0) or _tiny(actual, exact), "wrong zeros"
    _check_bits((actual,), run_map(inputs), ("map",), "second run")
    padding = inputs["visibility"].key_padding
    if padding is not None and not is_scores:
        inputs["columns"].masked_fill_(~padding[:, None, :, None], float("nan"))
        _check_bits((actual,), run_map(inputs), ("map",), "poison")


def _largest_logit(rows: Tensor, columns: Tensor, scale: float) -> float:
    lengths = rows.norm(dim=-1).max() * columns.norm(dim=-1).max()
    return float(lengths) * abs(scale)


def _check_map_numbers(
    actual: Tensor, exact: Tensor, largest_logit: float, rounding: float = 0.0
) -> None:
    """Bound each weight's relative error by the rounding of a logit, made twice, and of sums.

    ``rounding`` is the relative error of a logit on top: of what is kept in 16 bits.
    """
    bound = torch.finfo(torch.float32).eps * (16 + 2 * largest_logit)
    bound += math.expm1(rounding * largest_logit)
    excess = ((actual - exact).abs() - bound * exact).max() if exact.numel() else torch.zeros(())
    assert actual.shape == exact.shape, f"shape {tuple(actual.shape)}"
    assert bool(excess <= 1e-30), f"weight off by {float(excess)} beyond {bound} of itself"


def run_hopper_scores(inputs: dict[str, Any]) -> tuple[Tensor, ...]:
    """Return block scores from the Hopper kernel."""
    from seer_compile.kernels.triton import hopper_scores

    sizes, visibility = _map_arguments(inputs), inputs["visibility"]
    features = (inputs["rows"], inputs["columns"])
    reason = hopper_scores.obstacle(*features, sizes[:2], sizes[2:4], sizes[5], is_fine=False)
    assert reason is None, reason
    band = (visibility.upper, visibility.lower, visibility.offset)
    return (hopper_scores.launch(*features, inputs["scale"], *sizes, *band),)


def check_hopper_scores(inputs: dict[str, Any]) -> None:
    """Judge numbers, exact zeros and repetition; maxima are kept as float16."""
    (actual,) = run_hopper_scores(inputs)
    rows, columns = inputs["rows"].double(), inputs["columns"].double()
    rest = (*_map_arguments(inputs), inputs["visibility"])
    exact = reference.block_scores(rows, columns, inputs["scale"], *rest)
    largest_logit = _largest_logit(rows, columns, inputs["scale"])
    _check_map_numbers(actual, exact, largest_logit, torch.finfo(torch.float16).eps / 2)
    assert torch.equal(actual != 0, exact != 0) or _tiny(actual, exact), "wrong zeros"
    _check_bits((actual,), run_hopper_scores(inputs), ("scores",), "second run")


def _tiny(actual: Tensor, exact: Tensor) -> bool:
    """Whether all zeros that differ are rounding, below the smallest normal float32."""
    differs = (actual != 0) != (exact != 0)
    return bool((exact[differs] < 1e-30).all() and (actual[differs] < 1e-30).all())


def run_pool(inputs: dict[str, Any]) -> tuple[Tensor, ...]:
    """Return the pooled tokens from the kernel."""
    from seer_compile.kernels.triton import pool_blocks

    profile = inputs["profile"]
    arguments = (inputs["tokens"], profile["size"], profile["kinds"], inputs["padding"])
    return (pool_blocks.launch(*arguments),)


def check_pool(inputs: dict[str, Any]) -> None:
    """Judge numbers, poison and repetition."""
    (actual,) = run_pool(inputs)
    rest = (inputs["profile"]["size"], inputs["profile"]["kinds"], inputs["padding"])
    exact = reference.pool_blocks(inputs["tokens"].double(), *rest)
    # A mean is rounded once to the dtype; before that, float32 rounds each of its sums.
    size = reference.pool_blocks(inputs["tokens"].double().abs(), *rest)
    bound = torch.finfo(actual.dtype).eps * exact.abs()
    bound += torch.finfo(torch.float32).eps * inputs["profile"]["size"] * size
    assert actual.shape == exact.shape
    assert actual.dtype is inputs["tokens"].dtype
    assert bool(((actual - exact).abs() <= bound).all()), "pooled: off by more than its rounding"
    if inputs["padding"] is not None:
        inputs["tokens"].masked_fill_(~inputs["padding"][:, None, :, None], float("nan"))
    _check_bits((actual,), run_pool(inputs), ("pooled",), "poison")


def run_features(inputs: dict[str, Any]) -> tuple[Tensor, ...]:
    """Return the pooled and projected tokens from the kernel."""
    from seer_compile.kernels.triton import pool_features

    profile = inputs["profile"]
    arguments = (inputs["tokens"], inputs["weight"], profile["size"], profile["kinds"])
    return (pool_features.launch(*arguments, inputs["padding"], profile["groups"]),)


def check_features(inputs: dict[str, Any]) -> None:
    """Judge numbers, poison and repetition; eager pools, rounds the weights and multiplies."""
    (actual,) = run_features(inputs)
    tokens, weight, padding = inputs["tokens"], inputs["weight"], inputs["padding"]
    profile = inputs["profile"]
    rest = (profile["size"], profile["kinds"], padding, profile["groups"])
    exact = reference.pool_features(tokens.double(), weight.double(), *rest)
    eager = reference.pool_features(tokens, weight.to(tokens.dtype), *rest)
    assert actual.shape == exact.shape
    assert actual.dtype is tokens.dtype
    assert_no_worse_than_eager(actual, eager, exact, name="features")
    _check_bits((actual,), run_features(inputs), ("features",), "second run")
    if padding is not None:
        tokens.masked_fill_(~padding[:, None, :, None], float("nan"))
        _check_bits((actual,), run_features(inputs), ("features",), "poison")


def run_select(inputs: dict[str, Any]) -> tuple[Tensor, ...]:
    """Return indices and counts from the kernel."""
    from seer_compile.kernels.budgets import only
    from seer_compile.kernels.triton import select_blocks

    arguments = (inputs["scores"], only(inputs["budget"]), inputs["selector"], *inputs["sizes"])
    return select_blocks.launch(*arguments, **inputs["visibility"].as_arguments())


def check_select(inputs: dict[str, Any]) -> None:
    """Compare the kept blocks; a sum at the budget within float32 rounding may fall either way."""
    indices, counts = run_select(inputs)
    columns = indices.shape[-1]
    ours = reference.selection_mask(BlockSelection(indices, counts), columns).cpu()
    used = torch.arange(columns) < counts.cpu()[..., None]
    steps = indices.cpu().diff(dim=-1)
    assert bool((steps[used[..., 1:]] > 0).all()), "indices do not ascend"
    kept = []
    for factor in (1.0, 1 - 2e-6, 1 + 2e-6):
        budget = inputs["budget"].cpu().double() * factor
        kept.append(reference.selection_mask(_select_exactly(inputs, budget), columns))
    matches = torch.stack([(ours == mask).all(-1) for mask in kept]).any(0)
    assert bool(matches.all()), f"{int((~matches).sum())} of {matches.numel()} rows differ"
    again = run_select(inputs)
    assert torch.equal(counts, again[1]), "counts change with second run"


def _select_exactly(inputs: dict[str, Any], budget: Tensor) -> BlockSelection:
    """Select in float64: block by block in Python, wide rows by the vectorised CPU kernel."""
    query_block, key_block, q_len, k_len = inputs["sizes"]
    scores, selector, visibility = inputs["scores"].cpu(), inputs["selector"], inputs["visibility"]
    visibility = Visibility(
        **{
            name: value.cpu() if isinstance(value, Tensor) else value
            for name, value in visibility.as_arguments().items()
        }
    )
    if scores.shape[-1] <= 40:
        sizes = inputs["sizes"]
        return reference.select_blocks(scores, budget, selector, *sizes, visibility)
    grid = Grid(q_len, k_len, query_block, key_block)
    return selection.select(scores, budget, selector, grid, visibility)
