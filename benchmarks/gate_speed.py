"""The figure ``gate`` of ``kernels_speed.py``: pooling, scores, selection, and what they add up to.

Each variant is compared with the plain composition or the other algorithm before it is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from seer_compile.kernels import ops, scoring, selection  # noqa: F401  (registers the operators)
from seer_compile.kernels.geometry import Grid
from seer_compile.kernels.triton import block_scores, pool_blocks, pool_features, select_blocks
from seer_compile.kernels.triton.tuning import PoolTiling, ScoresTiling, pool_tiling
from seer_compile.types import Visibility

Row = dict[str, Any]
Timed = Callable[..., Row]
KINDS, SUB_BLOCK, BLOCK, GATE_DIM = "mean,max,min", 4, 64, 64


def tried(label: Row, check: Callable[[], None], timed: Timed, run: Callable[[], Any]) -> Row:
    """Return the time of a run that passes its check, or what went wrong."""
    try:
        check()
        return {**label, **timed(run)}
    except Exception as error:
        return {**label, "error": f"{type(error).__name__}: {str(error)[:120]}"}


def pooling(bench: Any, weights: dict[str, Tensor], timed: Timed) -> Iterator[Row]:
    """Time pooling with projection, beside the two steps that it replaces."""
    extra = {
        "query": [PoolTiling(64, 64, 4, 128, 8), PoolTiling(64, 64, 8, 128, 8)],
        "key": [PoolTiling(64, 32, 8, 128, 8), PoolTiling(64, 32, 8, 64, 8)],
    }
    for side, variants in extra.items():
        tokens, weight = getattr(bench, side), weights[side]

        def steps(tokens: Tensor = tokens, weight: Tensor = weight) -> Tensor:
            return scoring.project(pool_blocks.launch(tokens, SUB_BLOCK, KINDS), weight)

        yield {"what": f"pool, then project {side}", **bench.shape, **timed(steps)}
        expected = steps().float()
        for tiling in (pool_tiling(tokens.shape[2] // SUB_BLOCK), *variants):

            def run(
                tokens: Tensor = tokens, weight: Tensor = weight, tiling: PoolTiling = tiling
            ) -> Tensor:
                return pool_features.launch(tokens, weight, SUB_BLOCK, KINDS, None, tiling)

            def check(run: Callable = run, expected: Tensor = expected) -> None:
                result = run().float()
                if bench.is_real:
                    error = float((result - expected).norm() / expected.norm())
                    assert error < 2**-8, f"relative error {error}"

            label = {"what": f"pool and project {side}", **bench.shape, "tiling": str(tiling)}
            yield tried(label, check, timed, run)


def scoring_rows(
    bench: Any, features: Tensor, sub_block: int, timed: Timed, *, is_table_only: bool = False
) -> Iterator[Row]:
    """Time block scores, the table's tiling beside others, the first of which is the check."""
    multiprocessors = 132
    if features.is_cuda:
        multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    tiling = ScoresTiling
    variants = [
        tiling(64, 64, 4, 3, 3 * multiprocessors, 168, False),
        None,
        tiling(128, 128, 8, 4, 2 * multiprocessors, 128, True),
        tiling(128, 64, 8, 3, 2 * multiprocessors, 128, True),
        tiling(128, 64, 8, 4, 3 * multiprocessors, 80, True),
        tiling(128, 128, 8, 3, multiprocessors, 255, True),
        tiling(64, 128, 4, 3, 3 * multiprocessors, 168, True),
        tiling(64, 128, 4, 3, 4 * multiprocessors, 128, True),
        tiling(256, 128, 16, 3, multiprocessors, 128, True),
        tiling(256, 128, 8, 3, multiprocessors, 255, True),
        tiling(128, 128, 8, 3, 2 * multiprocessors, 128, False),
    ]
    expected = None
    for groups in (1, 4):
        for number, choice in enumerate(variants):
            if number > 1 and (groups > 1 or is_table_only):
                break

            def run(groups: int = groups, choice: ScoresTiling | None = choice) -> Tensor:
                length = bench.query.shape[2]
                sizes = (sub_block, BLOCK, BLOCK, length, length, groups)
                return block_scores.launch(*features, 0.125, *sizes, upper=0, tiling=choice)

            if number == 0:
                expected = run()

            def check(run: Callable = run, expected: Tensor | None = expected) -> None:
                result = run()
                if bench.is_real and expected is not None:
                    assert torch.equal(result == 0, expected == 0), "wrong zeros"
                    error = float(((result - expected).abs() / expected.clamp(min=1e-30)).max())
                    assert error < 1e-4, f"relative error {error}"

            what = f"block scores, sub-blocks of {sub_block}, selection per {groups} heads"
            label = {"what": what, **bench.shape, "tiling": str(choice or "table")}
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
            return select_blocks.launch(scores, budget, selector, BLOCK, BLOCK, *lengths, upper=0)

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


def whole(bench: Any, weights: dict[str, Tensor], timed: Timed) -> Iterator[Row]:
    """Time gate and selection as a site calls them, and what the host spends on the calls."""
    if not bench.query.is_cuda:
        return
    call, length = torch.ops.seer_compile, bench.query.shape[2]
    heads = bench.query.shape[1]
    for groups in (1, heads // bench.key.shape[1]):
        budget = torch.full((heads // groups,), 0.9, device=bench.query.device)

        def run(groups: int = groups, budget: Tensor = budget) -> tuple[Tensor, Tensor]:
            query = call.pool_features.v1(bench.query, weights["query"], SUB_BLOCK, KINDS)
            key = call.pool_features.v1(bench.key, weights["key"], SUB_BLOCK, KINDS)
            sizes = (BLOCK, BLOCK, length, length)
            scores = call.block_scores.v1(query, key, 0.125, SUB_BLOCK, *sizes, groups, 0)
            return call.select_blocks.v1(scores, budget, "top_p", *sizes, 0)

        row = timed(run)
        start = time.perf_counter()
        for _ in range(50):
            run()
        host = round((time.perf_counter() - start) / 50 * 1e6)
        torch.cuda.synchronize()
        what = f"gate: pool, project, score, select per {groups} heads"
        yield {"what": what, **bench.shape, **row, "host_us": host}


def gate_rows(quick: bool, bench_of: Callable[[int], Any], timed: Timed) -> Iterator[Row]:
    """Yield the rows; at short lengths the whole alone, which the host then bounds."""
    for tokens in (32768, 2048) if quick else (32768, 8192, 131072, 2048):
        bench = bench_of(tokens)
        device, length = bench.query.device, bench.query.shape[2]
        generator = torch.Generator(device).manual_seed(1)

        def draw(*shape: int, generator: Any = generator, device: Any = device) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        heads, dim = bench.query.shape[1], bench.query.shape[3]
        channels = 3 * dim
        weights = {
            side: draw(heads, channels, GATE_DIM) * channels**-0.5 for side in ("query", "key")
        }
        yield from whole(bench, weights, timed)
        if tokens == 2048:
            continue
        yield from pooling(bench, weights, timed)
        for sub_block in (8, SUB_BLOCK):
            features = draw(2, 1, heads, length // sub_block, GATE_DIM)
            # Logits with a standard deviation of 3: some blocks carry most of a row.
            features[0] *= 3
            features = features.to(bench.query.dtype)
            is_long = length > 32768
            yield from scoring_rows(bench, features, sub_block, timed, is_table_only=is_long)
        sizes = (SUB_BLOCK, BLOCK, BLOCK, length, length, 1)
        scores = block_scores.launch(*features, 0.125, *sizes, upper=0)
        yield from selecting(bench, scores, timed)
