"""The figure ``gate`` of ``kernels_speed.py``: pooling, scores, selection, and what they add up to.

Each variant is compared with the plain composition or the other algorithm before it is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seer_compile.kernels import by_device, scoring, selection
from seer_compile.kernels.budgets import only
from seer_compile.kernels.geometry import Grid
from seer_compile.kernels.triton import block_scores, pool_blocks, pool_features, select_blocks
from seer_compile.kernels.triton.tuning import PoolTiling, ScoresTiling, pool_tiling
from seer_compile.types import Sharing, Visibility

Row = dict[str, Any]
Timed = Callable[..., Row]
BLOCK, GATE_DIM = 64, 64
SIDES = ("query", "key")


class Form(NamedTuple):
    """What a gate costs depends on."""

    name: str
    sharing: Sharing
    query_pools: str
    query_sub_block: int
    key_sub_block: int
    key_pools: str = "mean,max,min"


FORMS = (
    Form("one selection per group", "selection", "mean", 2, 4),
    Form("one gate per group", "gate", "mean", 2, 4),
)


def tried(label: Row, check: Callable[[], None], timed: Timed, run: Callable[[], Any]) -> Row:
    """Return the time of a run that passes its check, or what went wrong."""
    try:
        check()
        return {**label, **timed(run)}
    except Exception as error:
        return {**label, "error": f"{type(error).__name__}: {str(error)[:120]}"}


def pooling(bench: Any, weights: dict[str, Tensor], form: Form, timed: Timed) -> Iterator[Row]:
    """Time pooling with projection, beside the two steps that it replaces."""
    extra = {
        "query": [
            PoolTiling(128, 64, 4, 8),
            PoolTiling(256, 64, 4, 8),
            PoolTiling(128, 128, 4, 8),
            PoolTiling(128, 64, 4, 4),
            PoolTiling(64, 64, 4, 4),
            PoolTiling(64, 128, 4, 4),
        ],
        "key": [PoolTiling(64, 64, 4, 4), PoolTiling(32, 128, 4, 4), PoolTiling(32, 64, 4, 4)],
    }
    groups = {"query": bench.query.shape[1] // bench.key.shape[1], "key": 1}
    for side, variants in extra.items():
        tokens, weight = getattr(bench, side), weights[side]
        size, kinds = getattr(form, f"{side}_sub_block"), getattr(form, f"{side}_pools")
        count = groups[side] if form.sharing == "gate" else 1
        expected = scoring.project(pool_blocks.launch(tokens, size, kinds), weight, count).float()
        if weight.shape[0] > tokens.shape[1]:
            continue
        for tiling in (pool_tiling(tokens.shape[2] // size, size), *variants):

            def run(
                tokens: Tensor = tokens,
                weight: Tensor = weight,
                tiling: PoolTiling = tiling,
                rest: tuple[Any, ...] = (size, kinds, None, count),
            ) -> Tensor:
                return pool_features.launch(tokens, weight, *rest, tiling)

            def check(run: Callable = run, expected: Tensor = expected) -> None:
                result = run().float()
                if bench.is_real:
                    error = float((result - expected).norm() / expected.norm())
                    assert error < 2**-7, f"relative error {error}"

            what = f"{form.name}: pool and project {side}"
            yield tried({"what": what, **bench.shape, "tiling": str(tiling)}, check, timed, run)


def scoring_rows(
    bench: Any, features: tuple[Tensor, Tensor], form: Form, timed: Timed, *, is_table_only: bool
) -> Iterator[Row]:
    """Time block scores, the table's tiling beside others, the first of which is the check."""
    groups = bench.query.shape[1] // bench.key.shape[1] if form.sharing == "selection" else 1
    multiprocessors = 132
    if features[0].is_cuda:
        multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    tiling = ScoresTiling
    variants = [
        tiling(64, 64, 4, 3, 3 * multiprocessors, 168, False),
        None,
        tiling(128, 128, 8, 3, multiprocessors, 255, True),
        tiling(64, 128, 4, 3, 3 * multiprocessors, 168, True),
        tiling(256, 128, 8, 3, multiprocessors, 255, True),
        tiling(256, 128, 8, 4, multiprocessors, 255, True),
        tiling(256, 64, 8, 4, multiprocessors, 255, True),
        tiling(128, 256, 8, 3, multiprocessors, 255, True),
    ]
    expected = None
    for number, choice in enumerate(variants):
        if number > 1 and is_table_only:
            break

        def run(choice: ScoresTiling | None = choice) -> Tensor:
            length = bench.query.shape[2]
            sizes = (form.query_sub_block, form.key_sub_block, BLOCK, BLOCK, length, length, groups)
            return block_scores.launch(*features, 0.125, *sizes, upper=0, tiling=choice)

        if number == 0:
            expected = run()

        def check(run: Callable = run, expected: Tensor | None = expected) -> None:
            result = run()
            if bench.is_real and expected is not None:
                assert torch.equal(result == 0, expected == 0), "wrong zeros"
                error = float(((result - expected).abs() / expected.clamp(min=1e-30)).max())
                assert error < 1e-4, f"relative error {error}"

        label = {"what": f"{form.name}: scores", **bench.shape, "tiling": str(choice or "table")}
        yield tried(label, check, timed, run)


def selecting(bench: Any, scores: Tensor, timed: Timed) -> Iterator[Row]:
    """Time selection."""
    if not bench.is_real:
        # The width at 32,768 tokens, whatever the length that is compiled at.
        scores = torch.zeros(1, 1, 2, 512)
    _, heads, rows, columns = scores.shape
    lengths = (rows * BLOCK, columns * BLOCK)
    for selector, amount in (("top_p", 0.5), ("top_p", 0.9), ("fraction", 0.1)):
        budget = torch.full((heads,), amount, device=scores.device)

        def run(selector: str = selector, budget: Tensor = budget) -> tuple[Tensor, Tensor]:
            return select_blocks.launch(
                scores, only(budget), selector, BLOCK, BLOCK, *lengths, upper=0
            )

        indices, counts = run()

        def check(
            indices: Tensor = indices,
            counts: Tensor = counts,
            selector: str = selector,
            budget: Tensor = budget,
        ) -> None:
            if not bench.is_real:
                return
            grid = Grid(*lengths, BLOCK, BLOCK)
            visibility = Visibility(upper=0)
            head = scores[:1, :1].cpu(), budget[:1].cpu()
            expected = selection.select(*head, selector, grid, visibility)
            used = torch.arange(columns) < expected.counts[0, 0, :, None]
            same = counts[0, 0].cpu() == expected.counts[0, 0]
            same &= ((indices[0, 0].cpu() == expected.indices[0, 0]) | ~used).all(-1)
            # A sum at the budget within float32 rounding may fall either way.
            assert float(same.float().mean()) > 0.98, f"{int((~same).sum())} rows differ"

        label = {"what": f"select {selector} {amount}", **bench.shape}
        if bench.is_real:
            label["density"] = round(float(counts.sum()) * 2 / (scores.numel() + counts.numel()), 3)
        yield tried(label, check, timed, run)


def whole(bench: Any, weights: dict[str, Tensor], form: Form, timed: Timed) -> Row:
    """Time gate and selection as a site calls them, and what the host spends on the calls."""
    length, (heads, kv_heads) = bench.query.shape[2], (bench.query.shape[1], bench.key.shape[1])
    selections = heads if form.sharing == "none" else kv_heads
    budget = torch.full((selections,), 0.9, device=bench.query.device)
    grid, visibility = Grid(length, length, BLOCK, BLOCK), Visibility(upper=0)
    groups = heads // kv_heads

    def run() -> tuple[Tensor, Tensor]:
        query = by_device.pool_features(
            bench.query,
            weights["query"],
            form.query_sub_block,
            form.query_pools,
            groups=groups if form.sharing == "gate" else 1,
        )
        key = by_device.pool_features(bench.key, weights["key"], form.key_sub_block, form.key_pools)
        sub_blocks = (form.query_sub_block, form.key_sub_block)
        scores = by_device.block_scores(
            query,
            key,
            0.125,
            sub_blocks,
            grid,
            groups if form.sharing == "selection" else 1,
            visibility,
        )
        return by_device.select_blocks(scores, only(budget), "top_p", grid, visibility)

    row = timed(run)
    start = time.perf_counter()
    for _ in range(50):
        run()
    host = round((time.perf_counter() - start) / 50 * 1e6)
    torch.cuda.synchronize()
    return {"what": f"{form.name}: the whole gate", **bench.shape, **row, "host_us": host}


def gate_rows(quick: bool, bench_of: Callable[[int], Any], timed: Timed) -> Iterator[Row]:
    """Yield the rows; at short lengths the whole alone, which the host then bounds."""
    for tokens in (32768, 2048) if quick else (32768, 8192, 131072, 2048):
        bench = bench_of(tokens)
        for form in FORMS:
            yield from form_rows(bench, form, tokens, timed)


def form_rows(bench: Any, form: Form, tokens: int, timed: Timed) -> Iterator[Row]:
    """Yield the rows of one form of gate."""
    device, length = bench.query.device, bench.query.shape[2]
    generator = torch.Generator(device).manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    (heads, kv_heads), dim = (bench.query.shape[1], bench.key.shape[1]), bench.query.shape[3]
    gate_heads = kv_heads if form.sharing == "gate" else heads
    channels = {side: dim * len(getattr(form, f"{side}_pools").split(",")) for side in SIDES}
    weights = {
        side: draw(count, channels[side], GATE_DIM) * channels[side] ** -0.5
        for side, count in zip(SIDES, (heads, gate_heads), strict=True)
    }
    if bench.query.is_cuda:
        yield whole(bench, weights, form, timed)
    if tokens == 2048:
        return
    yield from pooling(bench, weights, form, timed)
    # Logits with a standard deviation of 3: some blocks carry most of a row.
    features = (
        draw(1, gate_heads, length // form.query_sub_block, GATE_DIM) * 3,
        draw(1, gate_heads, length // form.key_sub_block, GATE_DIM),
    )
    features = (features[0].to(bench.query.dtype), features[1].to(bench.query.dtype))
    is_table_only = length > 32768
    yield from scoring_rows(bench, features, form, timed, is_table_only=is_table_only)
    if form is FORMS[0]:
        sizes = (form.query_sub_block, form.key_sub_block, BLOCK, BLOCK, length, length, 1)
        scores = block_scores.launch(*features, 0.125, *sizes, upper=0)
        yield from selecting(bench, scores, timed)
