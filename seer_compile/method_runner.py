"""Answers the sites of a model by one method after the other, and times them: any model, any task.

What is asked of the model and how an answer is scored belongs to the evaluators on top, for text in
:mod:`seer_compile.evaluate` and for every other task in :mod:`seer_compile.task_evaluation`.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import nn

from seer_compile.allocation import Allocation
from seer_compile.errors import ModelStateError
from seer_compile.evaluation_methods import (
    DenseTimer,
    GateTimer,
    MatchedHandler,
    Method,
    SiteClock,
    scorer,
)
from seer_compile.gate_store import GateStore
from seer_compile.kernels import counters
from seer_compile.session import run_with_handler
from seer_compile.types import BlockSize, SiteHandler

_TIMED = 3
"""Items whose forwards are timed, of gates and of the same graph answering densely."""

Item = TypeVar("Item")
Score = TypeVar("Score")


class Call(NamedTuple):
    """Arguments of the model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Timed(NamedTuple, Generic[Score]):
    """One forward: how its output was scored, and the time it took."""

    score: Score
    end_to_end_ms: float
    attention_ms: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome(Generic[Score]):
    """One method at one density, over all items."""

    scores: tuple[Score, ...]
    density: float
    """Kept / visible blocks measured, over all sites that are sparse; 1 for dense."""
    attention_ms: float
    """All sites of one forward: attention alone for matched methods, the whole gated operator
    (scores, selection, attention) for gates."""
    end_to_end_ms: float
    """One forward, the median. Matched methods run eagerly and solve densities inside it; for gates
    no density is measured meanwhile."""
    dense_end_to_end_ms: float | None = None
    """For gates: the same compiled graph with every gate answering densely."""
    dense_calls: Mapping[str, int] = field(default_factory=dict[str, int])
    """For gates: calls of one forward that are answered densely in use, because that is faster at
    this size, by reason. What was measured was sparse all the same."""


class MethodRunner(Generic[Item, Score]):
    """Runs methods over items and scores what the model returns.

    Args:
        model: Any module.
        call: Gives the model's arguments for an item, on the model's device.
        score: Scores what the model returned for an item.
        block_size: Tokens per block of the matched methods; gates bring their own.
    """

    def __init__(
        self,
        model: nn.Module,
        call: Callable[[Item], Call],
        score: Callable[[Any, Item], Score],
        *,
        block_size: BlockSize,
    ) -> None:
        self.model, self.block_size = model, block_size
        self.device = next(model.parameters()).device
        self._call, self._score = call, score
        self._dense_graph_ms: dict[Hashable, float] = {}
        self._warm: set[Hashable] = set()

    def dense(self, items: Sequence[Item], key: Hashable) -> Outcome[Score]:
        """Run the model as it is. ``key`` tells items of one size from those of others."""
        self._warm_up(("dense", key), items, self._forward)
        timed = [self._timed(item, self._forward) for item in items]
        clock = SiteClock(self.device)
        attention_ms = self._time_sites(items[0], DenseTimer(clock=clock), clock)
        return _outcome(timed, density=1.0, attention_ms=attention_ms)

    def matched(
        self,
        items: Sequence[Item],
        key: Hashable,
        method: Method,
        density: float,
        store: GateStore | None,
    ) -> Outcome[Score]:
        """Answer every site with a selection whose density is solved on the input at hand.

        Raises:
            ModelStateError: The forward reaches no site, or the method needs gates that are not.
        """
        clock = SiteClock(self.device)
        has_gates = method.uses_gates and store is not None
        handler = MatchedHandler(
            score=scorer(method, store, self.block_size),
            block_size=store.config.block_size if has_gates and store else self.block_size,
            selector=method.selector or "fraction",
            density=density,
            clock=clock,
        )

        def forward(call: Call) -> Any:
            return self._handled(call, handler)

        self._warm_up(("matched", key), items, forward)
        handler.forget()
        timed = [self._timed(item, forward, clock) for item in items]
        if handler.visible == 0:
            raise ModelStateError("the forward reached no site that can be sparse")
        return _outcome(
            timed,
            density=handler.measured_density,
            attention_ms=statistics.median(part.attention_ms for part in timed),
        )

    def gates(
        self,
        items: Sequence[Item],
        key: Hashable,
        method: Method,
        density: float,
        store: GateStore | None,
        allocation: Allocation | None,
    ) -> Outcome[Score]:
        """Run the optimized model at a density that its gates share by an allocation.

        Raises:
            ModelStateError: There are no calibrated gates.
        """
        if store is None or not store.is_calibrated:
            raise ModelStateError(
                f"the method {method.name!r} needs calibrated gates",
                hint="Calibrate the model or load gates first.",
            )
        store.set_budget(density=density, allocation=allocation)
        if (method.name, key) not in self._dense_graph_ms:
            self._dense_graph_ms[method.name, key] = self._time_dense_graph(
                items, (method.name, "dense", key), store
            )
        # What is measured is sparse attention, also at sizes that are answered densely in use.
        store.set_mode(True, at_any_size=True)
        self._warm_up((method.name, "sparse", key), items, self._forward)
        with counters.collect_density() as meter:
            scores = [self._timed(item, self._forward).score for item in items]
        # Counting blocks takes time that nobody spends who only answers.
        end_to_end_ms = self._forward_ms(items)
        clock = SiteClock(self.device)
        attention_ms = self._time_sites(items[0], GateTimer(store=store, clock=clock), clock)
        store.set_mode(True)
        before = counters.snapshot()
        self._timed(items[0], self._forward)
        return Outcome(
            scores=tuple(scores),
            density=_density(meter),
            attention_ms=attention_ms,
            end_to_end_ms=end_to_end_ms,
            dense_end_to_end_ms=self._dense_graph_ms[method.name, key],
            dense_calls=_dense_calls(before, counters.snapshot()),
        )

    def _time_dense_graph(self, items: Sequence[Item], key: Hashable, store: GateStore) -> float:
        """Time the optimized model with gates that answer densely."""
        store.set_mode(False)
        self._warm_up(key, items, self._forward)
        return self._forward_ms(items)

    @torch.no_grad()
    def _forward_ms(self, items: Sequence[Item]) -> float:
        """Return the median time of some forwards whose output nobody scores."""
        calls = [self._call(item) for item in items[:_TIMED]]
        return statistics.median(self._clocked(call, self._forward)[1] for call in calls)

    def _warm_up(
        self, kind: Hashable, items: Sequence[Item], forward: Callable[[Call], Any]
    ) -> None:
        """Run one forward that compiles what is not compiled, once per kind."""
        if kind not in self._warm:
            self._warm.add(kind)
            with torch.no_grad():
                forward(self._call(items[0]))

    def _time_sites(self, item: Item, handler: SiteHandler, clock: SiteClock) -> float:
        """Return the milliseconds that all sites of one forward take: the second of two runs."""
        call = self._call(item)
        for _ in range(2):
            clock.milliseconds()
            with torch.no_grad():
                self._handled(call, handler)
        return clock.milliseconds()

    def _forward(self, call: Call) -> Any:
        return self.model(*call.args, **call.kwargs)

    def _handled(self, call: Call, handler: SiteHandler) -> Any:
        return run_with_handler(self.model, call.args, call.kwargs, handler)

    @torch.no_grad()
    def _timed(
        self, item: Item, forward: Callable[[Call], Any], clock: SiteClock | None = None
    ) -> Timed[Score]:
        output, elapsed = self._clocked(self._call(item), forward)
        return Timed(
            score=self._score(output, item),
            end_to_end_ms=elapsed,
            attention_ms=clock.milliseconds() if clock else math.nan,
        )

    def _clocked(self, call: Call, forward: Callable[[Call], Any]) -> tuple[Any, float]:
        """Return what a forward returns, and its milliseconds, from idle to idle device."""
        self._synchronize()
        begun = time.perf_counter()
        output = forward(call)
        self._synchronize()
        return output, 1e3 * (time.perf_counter() - begun)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _outcome(timed: Sequence[Timed[Score]], **figures: Any) -> Outcome[Score]:
    return Outcome(
        scores=tuple(part.score for part in timed),
        end_to_end_ms=statistics.median(part.end_to_end_ms for part in timed),
        **figures,
    )


def _density(meter: counters.DensityMeter) -> float:
    """Return kept / visible blocks over all sparse answers; 1 where every answer was dense."""
    totals = meter.totals().values()
    visible = sum(pair[1] for pair in totals)
    return sum(pair[0] for pair in totals) / visible if visible else 1.0


def _dense_calls(
    before: Mapping[str, Mapping[str, int]], after: Mapping[str, Mapping[str, int]]
) -> dict[str, int]:
    """Return how many operator calls in between answered densely, by reason."""
    calls: dict[str, int] = {}
    for site, paths in after.items():
        for path, count in paths.items():
            new = count - before.get(site, {}).get(path, 0)
            if new and path.startswith("dense"):
                calls[path] = calls.get(path, 0) + new
    return calls
