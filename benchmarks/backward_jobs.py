"""The jobs of ``backward_speed.py``: one kernel of the backward on one case, checked or timed."""

# ruff: noqa: E402

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

sys.path[:0] = [
    str(Path(__file__).resolve().parent),
    *(str(Path(__file__).resolve().parents[1] / name) for name in (".", "tests")),
]

import kernels_speed
import torch
from kernels_cases import BF16, FP16, Draw, attention_inputs
from kernels_checks import (
    _check_bits,
    _check_gradient,
    _poison_unread,
    recomputed_gradients,
    reference_attention,
)
from kernels_speed import Bench
from torch import Tensor

from seer_compile.kernels.triton import (
    attention_backward,
    attention_forward,
    hopper_backward,
    tuning,
)
from seer_compile.kernels.triton.primitives import launching_on, make_band
from seer_compile.kernels.triton.transpose_plan import transpose_plan

Job = dict[str, Any]
NAMES = ("dquery", "dkey", "dvalue")

# consumers, key stages, value stages, in registers, ahead, programs, registers
QUERY_TILINGS: dict[str, dict[int, list[tuple[int, ...]]]] = {
    "per group": {
        128: [
            (2, 4, 4, 1, 1, 1, 168),
            (2, 4, 4, 1, 2, 1, 168),
            (2, 4, 4, 2, 2, 1, 168),
            (2, 4, 4, 2, 0, 1, 168),
            (2, 4, 4, 0, 2, 1, 168),
            (1, 3, 2, 1, 2, 2, 128),
            (1, 3, 2, 2, 0, 2, 128),
        ],
        64: [(2, 8, 8, 1, 2, 1, 168), (2, 8, 8, 2, 1, 1, 168), (1, 6, 5, 2, 2, 2, 128)],
    },
    "per head": {
        128: [
            (1, 3, 2, 1, 1, 2, 128),
            (1, 3, 2, 1, 2, 2, 128),
            (1, 3, 2, 2, 0, 2, 128),
            (1, 3, 2, 1, 2, 1 << 20, 128),
        ],
        64: [(1, 6, 5, 1, 2, 2, 128)],
    },
}
"""By how heads share lists, and head dim; the tuning table's first."""

# stages, parts, registers
KEY_TILINGS: dict[int, list[tuple[int, ...]]] = {
    128: [(2, 8, 128), (2, 2, 128), (2, 32, 128)],
    64: [(3, 8, 128), (5, 8, 128)],
}
SELECTIONS = {"per group": 8, "per head": 32}
BLOCKS = (64, 64)
CHECKS = (
    {"longest": 1030},
    {"longest": 700, "padding": True},
    {"longest": 700, "documents": True, "blocks": (128, 64), "dtype": FP16},
    {"longest": 500, "offset": True, "blocks": (128, 128), "layout": "fused"},
    {"longest": 2077, "seed": 5, "long": True},
)


def variants(quick: bool) -> Iterator[Job]:
    """Yield what to check and to time: which gradient, how heads share lists, tiling."""
    for dim in (128, 64):
        for sharing in SELECTIONS:
            queries = QUERY_TILINGS[sharing][dim]
            keys = KEY_TILINGS[dim][: 1 if sharing == "per head" else None]
            for side, tilings in (("query", queries), ("key", keys)):
                for tiling in tilings[: 1 if quick else None]:
                    yield {"side": side, "sharing": sharing, "dim": dim, "tiling": tiling}


def check_jobs(quick: bool) -> list[Job]:
    """Return one check per distinct kernel."""
    return [{"kind": "check", **variant} for variant in variants(quick)]


def portable_jobs() -> list[Job]:
    """Return what else is compiled: the portable kernels of every case."""
    return [
        {"kind": "portable", "sharing": sharing, "dim": dim, "number": number}
        for dim in (128, 64)
        for sharing in SELECTIONS
        for number in range(len(CHECKS) - 1)
    ]


def time_jobs(quick: bool) -> list[Job]:
    """Return the timings: tensors are made once per head dim and sharing."""
    jobs: list[Job] = []
    for sharing in SELECTIONS:
        for dim in (128, 64):
            shape = {"kind": "time", "sharing": sharing, "dim": dim}
            jobs += [
                {"kind": "time", **variant}
                for variant in variants(quick)
                if (variant["sharing"], variant["dim"]) == (sharing, dim)
            ]
            jobs += [{**shape, "side": side} for side in ("prepare", "transpose", "whole")]
            jobs.append({**shape, "side": "portable"})
    return jobs


def query_tiling(tiling: Any) -> tuning.HopperQueryTiling | None:
    """Return the tiling of the kernel for queries, None for the tuning table's."""
    return None if tiling is None else tuning.HopperQueryTiling(*tiling)


def key_tiling(tiling: Any) -> tuning.HopperKeyTiling | None:
    """Return the tiling of the kernel for keys, None for the tuning table's."""
    return None if tiling is None else tuning.HopperKeyTiling(*tiling)


def differentiate(job: Job, tensors: tuple[Tensor, ...], rest: tuple, rules: Job) -> list[Tensor]:
    """Run one of the two kernels; return its gradients."""
    query, key, value, out, lse, grad_out = tensors
    indices, counts, scale, query_block, key_block = rest
    fine = tuple(rules.get(n) for n in ("key_padding", "query_documents", "key_documents"))
    band = make_band(rules.get("upper"), rules.get("lower"), rules.get("offset"))
    with launching_on(query, "query") if query.is_cuda else contextlib.nullcontext():
        call = hopper_backward.prepare(
            grad_out, query, key, value, out, lse, indices, counts, scale,
            (query_block, key_block), band, fine,
        )  # fmt: skip
        return run_side(job, call, (query, key, value), query_block)


def run_side(job: Job, call: Any, like: tuple[Tensor, ...], query_block: int) -> list[Tensor]:
    """Launch one of the two kernels on a prepared call."""
    if job["side"] == "query":
        target = torch.empty(like[0].shape, dtype=like[0].dtype, device=like[0].device)
        tiling = query_tiling(job["tiling"])
        hopper_backward.query_gradient(call, target, query_block, tiling)
        return [target]
    targets = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in like[1:]]
    hopper_backward.key_value_gradient(call, *targets, query_block, key_tiling(job["tiling"]))
    return targets


@functools.cache
def check_case(sharing: str, dim: int, number: int, device: str) -> Job:
    """Return the inputs of a case, what is right, and what the portable kernels make of it."""
    settings = {"blocks": BLOCKS, "layout": "heads first", "dtype": BF16, **CHECKS[number]}
    settings["heads"] = (8, 2, 2 if sharing == "per group" else 8)
    settings["dims"] = (dim, dim)
    inputs = attention_inputs(settings, Draw(settings.pop("seed", 31), number), device, True)
    tensors = [inputs[name] for name in ("query", "key", "value")]
    rest = (*inputs["selection"], inputs["scale"], *inputs["blocks"])
    rules = inputs["visibility"].as_arguments()
    case = {"inputs": inputs, "rest": rest, "rules": rules}
    out, lse = attention_forward.launch(*tensors, *rest, **rules)
    case["tensors"] = (*tensors, out, lse, inputs["grad_out"])
    if device == "cpu":
        return case
    case["gold"] = dict(zip(NAMES, reference_attention(inputs, torch.float64)[2:], strict=True))
    case["recomputed"], case["size"] = recomputed_gradients(inputs)
    case["portable"] = dict(zip(NAMES, portable_gradients(case), strict=True))
    poisoned = {
        name: value.clone() if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }
    case["is_read"] = _poison_unread(poisoned)
    tensors = [poisoned[name] for name in ("query", "key", "value")]
    results = attention_forward.launch(*tensors, *rest, **rules)
    case["poisoned"] = (*tensors, *results, poisoned["grad_out"])
    return case


def portable_gradients(case: Job) -> tuple[Tensor, ...]:
    """Return the gradients of a case by the portable kernels."""
    *tensors, grad_out = case["tensors"]
    return attention_backward.launch(grad_out, *tensors, *case["rest"], **case["rules"])


def check(job: Job) -> Job:
    """Check one kernel on all cases; return its largest error and that of the portable kernels."""
    device = kernels_speed.DEVICE
    names = NAMES[:1] if job["side"] == "query" else NAMES[1:]
    worst, portable = 0.0, 0.0
    for number in range(len(CHECKS)):
        case = check_case(job["sharing"], job["dim"], number, device)
        if job["side"] == "query" and job["tiling"][0] == 2 and job["sharing"] != "per group":
            continue
        rest, rules = case["rest"], case["rules"]
        actual = differentiate(job, case["tensors"], rest, rules)
        if device == "cpu":
            continue
        for name, ours in zip(names, actual, strict=True):
            gold = case["gold"][name]
            try:
                _check_gradient(name, ours, case["recomputed"][name], case["size"][name], gold)
            except AssertionError as error:
                return {"failed": f"case {number}: {both_ends(str(error))}"}
            worst = max(worst, distance(ours, gold))
            portable = max(portable, distance(case["portable"][name], gold))
        try:
            again = differentiate(job, case["tensors"], rest, rules)
            _check_bits(actual, again, names, "a second run")
            poisoned = differentiate(job, case["poisoned"], rest, rules)
            is_read = case["is_read"]["query" if job["side"] == "query" else "key"][..., None]
            for name, ours, theirs in zip(names, actual, poisoned, strict=True):
                _check_bits((ours,), (theirs.where(is_read, ours),), (name,), "poison")
        except AssertionError as error:
            return {"failed": f"case {number}: {both_ends(str(error))}"}
    return {"error": f"{worst:.2e}", "portable_error": f"{portable:.2e}"}


def distance(actual: Tensor, exact: Tensor) -> float:
    """Return the relative L2 error; 0 where the exact gradient cancels to nothing."""
    norm = exact.norm()
    if norm < 1e-6 * exact.numel() ** 0.5:
        return 0.0
    return float((actual.double() - exact.double()).norm() / norm)


@functools.lru_cache(1)
def timed_case(sharing: str, dim: int, device: str) -> Job:
    """Return the tensors of the timings and the portable gradients."""
    bench = Bench(32768, dim=dim)
    bench.generator.manual_seed(1)
    selections = SELECTIONS[sharing]
    lists = bench.select(0.1, *BLOCKS, selections)
    tensors = (bench.query, bench.key, bench.value)
    rest = (*lists, bench.scale, *BLOCKS)
    out, lse = attention_forward.launch(*tensors, *rest, upper=0)
    grad_out = torch.randn(
        out.shape, generator=bench.generator, device=device, dtype=torch.bfloat16
    )
    case = {"tensors": (*tensors, out, lse, grad_out), "rest": rest}
    if device != "cpu":
        gradients = attention_backward.launch(grad_out, *tensors, out, lse, *rest, upper=0)
        case["gradients"] = dict(zip(NAMES, gradients, strict=True))
    kept = float(lists[1].double().sum()) * bench.query.shape[1] / selections
    case["product"] = 2 * dim * BLOCKS[0] * BLOCKS[1] * kept
    return case


def measure(job: Job) -> Iterator[Job]:
    """Time one kernel after comparing its result with the portable one."""
    device = kernels_speed.DEVICE
    case = timed_case(job["sharing"], job["dim"], device)
    query, key, value, out, lse, grad_out = case["tensors"]
    rest, side = case["rest"], job["side"]
    arguments = (grad_out, query, key, value, out, lse, *rest)
    if side == "portable":
        yield from measure_portable(arguments, case["product"])
        return
    if side == "whole":
        yield from measure_whole(arguments, case)
        return
    band = make_band(0, None, None)

    def prepare() -> Any:
        return hopper_backward.prepare(*arguments[:9], BLOCKS, band, (None, None, None))

    if side == "prepare":
        yield timed(prepare)
        return
    call = prepare()
    if side == "transpose":
        batch, selections, blocks, _, tiles = call.shape
        yield timed(lambda: transpose_plan(call.lists, batch * selections, blocks, tiles))
        return

    def run() -> list[Tensor]:
        return run_side(job, call, (query, key, value), BLOCKS[0])

    names = NAMES[:1] if side == "query" else NAMES[1:]
    compare(run(), case, names)
    yield timed(run, case["product"] * (3 if side == "query" else 4))


def compare(actual: Any, case: Job, names: tuple[str, ...]) -> None:
    """Refuse gradients that are not those of the portable kernels but for rounding."""
    for name, ours in zip(names, actual, strict=True):
        if "gradients" in case:
            theirs = case["gradients"][name].float()
            error = float((ours.float() - theirs).norm() / theirs.norm())
            assert error < 1e-2, f"{name}: relative difference from the portable kernels {error}"


def measure_whole(arguments: tuple, case: Job) -> Iterator[Job]:
    """Time the whole backward as it is called."""

    def run() -> tuple[Tensor, ...]:
        return hopper_backward.launch(*arguments, upper=0)

    compare(run(), case, NAMES)
    yield timed(run, case["product"] * 7)


def measure_portable(arguments: tuple, product: float) -> Iterator[Job]:
    """Time the portable kernels, together and one without the other."""

    def run() -> tuple[Tensor, ...]:
        return attention_backward.launch(*arguments, upper=0)

    yield {"part": "both", **timed(run, product * 7)}
    for part, other in (("key", "query_gradient"), ("query", "key_value_gradient")):
        with mock.patch.object(attention_backward, other, _Nothing()):
            yield {"part": part, **timed(run, product * (4 if part == "key" else 3))}


class _Nothing:
    """A kernel whose launch does nothing."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *_, **__: None


def timed(function: Callable[[], Any], work: float = 0.0) -> Job:
    """Return milliseconds (median, 20th and 80th percentile) and TFLOP/s."""
    if kernels_speed.DEVICE == "cpu":
        function()
        return {}
    from triton.testing import do_bench

    low, median, high = do_bench(function, warmup=15, rep=70, quantiles=[0.2, 0.5, 0.8])
    row = {"ms": round(median, 4), "p20": round(low, 4), "p80": round(high, 4)}
    if work:
        row["tflops"] = round(work / median / 1e9, 1)
    return row


def both_ends(text: str) -> str:
    """Return 300 characters of a message: a device's error begins with its name."""
    text = " ".join(text.split())
    return text if len(text) <= 300 else f"{text[:120]} ... {text[-175:]}"


def run_job(job: Job) -> list[Job]:
    """Run one job; return its rows, also those made before it failed."""
    rows: list[Job] = []
    try:
        if job["kind"] == "portable":
            case = check_case(job["sharing"], job["dim"], job["number"], kernels_speed.DEVICE)
            portable_gradients(case)
            return []
        if job["kind"] == "check":
            return [check(job)]
        for row in measure(job):
            # One by one: those made before a failure are kept.
            rows.append(row)
    except Exception as error:
        rows.append({"failed": f"{type(error).__name__}: {both_ends(str(error))}"})
    return rows
