"""Measure what sparse attention costs and buys: perplexity, retrieval, density and time.

Every method answers the same windows with the same keys planted in them, and each layer's
selection acts on what the already sparse layers below it computed, as in use.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seer_compile.allocation import Allocation
from seer_compile.budget_curve import check_fraction
from seer_compile.errors import ModelStateError, SeerInputError
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
from seer_compile.retrieval import PlantedTokens, count_retrieved
from seer_compile.session import run_with_handler
from seer_compile.types import BlockSize, SiteHandler

# Logits of so many tokens are held in float32 at a time.
_LOSS_TOKENS = 2048


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationRow:
    """One method at one length and density, over all windows."""

    method: str
    length: int
    """Tokens per window."""
    asked_density: float | None
    """Kept / visible blocks asked for; None for dense."""
    density: float
    """Kept / visible blocks measured, over all sites that are sparse; 1 for dense."""
    loss: float
    """Mean cross-entropy on ordinary tokens, nats."""
    perplexity: float
    ratio: float
    """Perplexity / dense perplexity."""
    retrieval: float | None
    """Share of planted keys whose value is predicted in full; None where none were planted."""
    attention_ms: float
    """All sites of one window: attention alone for matched methods, the whole gated operator
    (scores, selection, attention) for gates."""
    end_to_end_ms: float
    """Forward of one window. Matched methods run eagerly and solve densities inside it."""
    dense_end_to_end_ms: float | None
    """For gates: the same compiled graph with every gate answering densely."""
    sequences: int
    keys: int
    """Planted keys, over all windows."""
    dense_calls: Mapping[str, int]
    """For gates: calls of one forward that are answered densely in use, because that is faster at
    this size, by reason. The row was measured sparsely all the same."""

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Measured:
    loss: float
    retrieved: int
    end_to_end_ms: float
    attention_ms: float


class Evaluator:
    """Runs methods over windows of text and keeps the dense result to compare with.

    Args:
        model: A causal language model whose forward takes ``input_ids Int64[1 t]`` and returns
            something with ``logits Float[1 t vocabulary]``.
        windows: Texts by length, all of one length alike; see
            :func:`seer_compile.token_data.planted_windows`.
        block_size: Tokens per block of the matched methods; gates bring their own.
        allocation: How the gates of the sites share a density; matched methods give every site
            the asked one. May be changed between runs.
        model_arguments: Further keyword arguments of the forward.
        notify: Called with one line of text before each piece of work.
    """

    def __init__(
        self,
        model: nn.Module,
        windows: Mapping[int, Sequence[PlantedTokens]],
        *,
        block_size: BlockSize | None = None,
        allocation: Allocation | None = None,
        model_arguments: Mapping[str, Any] | None = None,
        notify: Callable[[str], None] = lambda _: None,
    ) -> None:
        if not windows or not all(windows.values()):
            raise SeerInputError(argument="windows", got=dict(windows), expected="at least one")
        self.model = model
        self.windows = windows
        self.block_size = block_size or BlockSize()
        self.device = next(model.parameters()).device
        self._arguments = dict(model_arguments or {})
        self.allocation: Allocation | None = allocation
        self._notify = notify
        self._dense_loss: dict[int, float] = {}
        self._dense_graph_ms: dict[tuple[str, int], float] = {}
        self._warm: set[tuple[str, int]] = set()

    def run(
        self, method: Method, length: int, density: float | None, store: GateStore | None = None
    ) -> EvaluationRow:
        """Measure one method at one length and density.

        Dense must be measured first, on the model as it was before :func:`seer_compile.optimize`.

        Args:
            method: What answers the sites.
            length: One of the lengths of the windows.
            density: Kept / visible blocks; not read for dense.
            store: The gates of the optimized model, for methods that use them.

        Raises:
            ModelStateError: Gates are missing, or dense was not measured yet.
        """
        label = "dense" if density is None else f"{method.name} at density {density:g}"
        self._notify(f"{length:,} tokens: {label}")
        if method.base == "dense":
            return self._run_dense(length)
        if density is None:
            raise SeerInputError(argument="density", got=None, expected="a number in (0, 1]")
        check_fraction("density", density)
        if length not in self._dense_loss:
            raise ModelStateError("measure dense first: every row is compared with it")
        if method.selector is None:
            return self._run_gates(method, length, density, store)
        return self._run_matched(method, length, density, store)

    def _run_dense(self, length: int) -> EvaluationRow:
        measured = [
            self._measure(window, self._plain_forward)
            for window in self._with_warm_up("dense", length, self._plain_forward)
        ]
        clock = SiteClock(self.device)
        attention = self._time_sites(length, DenseTimer(clock=clock), clock)
        self._dense_loss[length] = statistics.fmean(part.loss for part in measured)
        return self._row(
            "dense", length, None, measured, density=1.0, attention_ms=attention, dense_ms=None
        )

    def _run_matched(
        self, method: Method, length: int, density: float, store: GateStore | None
    ) -> EvaluationRow:
        clock = SiteClock(self.device)
        handler = MatchedHandler(
            score=scorer(method, store, self.block_size),
            block_size=store.config.block_size if method.uses_gates and store else self.block_size,
            selector=method.selector or "fraction",
            density=density,
            clock=clock,
        )

        def forward(tokens: Tensor) -> Tensor:
            return self._handled_forward(tokens, handler)

        windows = self._with_warm_up("matched", length, forward)
        handler.forget()
        measured = [self._measure(window, forward, clock) for window in windows]
        if handler.visible == 0:
            raise ModelStateError("the forward reached no site that can be sparse")
        return self._row(
            method.name,
            length,
            density,
            measured,
            density=handler.measured_density,
            attention_ms=statistics.median(part.attention_ms for part in measured),
            dense_ms=None,
        )

    def _run_gates(
        self, method: Method, length: int, density: float, store: GateStore | None
    ) -> EvaluationRow:
        if store is None or not store.is_calibrated:
            raise ModelStateError(
                f"the method {method.name!r} needs calibrated gates",
                hint="Calibrate the model or load gates first.",
            )
        store.set_budget(density=density, allocation=self.allocation)
        key = (method.name, length)
        if key not in self._dense_graph_ms:
            self._dense_graph_ms[key] = self._time_dense_graph(method, length, store)
        # What is measured is sparse attention, also at sizes that are answered densely in use.
        store.set_mode(True, at_any_size=True)
        windows = self._with_warm_up(f"{method.name} sparse", length, self._plain_forward)
        with counters.collect_density() as meter:
            measured = [self._measure(window, self._plain_forward) for window in windows]
        clock = SiteClock(self.device)
        attention_ms = self._time_sites(length, GateTimer(store=store, clock=clock), clock)
        store.set_mode(True)
        before = counters.snapshot()
        self._measure(windows[0], self._plain_forward)
        dense_calls = _dense_calls(before, counters.snapshot())
        return self._row(
            method.name,
            length,
            density,
            measured,
            density=_density(meter),
            attention_ms=attention_ms,
            dense_ms=self._dense_graph_ms[key],
            dense_calls=dense_calls,
        )

    def _time_dense_graph(self, method: Method, length: int, store: GateStore) -> float:
        """Time the optimized model with gates that answer densely."""
        store.set_mode(False)
        windows = self._with_warm_up(f"{method.name} dense", length, self._plain_forward)
        times = [self._measure(window, self._plain_forward).end_to_end_ms for window in windows[:3]]
        return statistics.median(times)

    def _with_warm_up(
        self, kind: str, length: int, forward: Callable[[Tensor], Tensor]
    ) -> Sequence[PlantedTokens]:
        """Return the windows of a length, after one forward that compiles what is not compiled."""
        windows = self.windows[length]
        if (kind, length) not in self._warm:
            self._warm.add((kind, length))
            with torch.no_grad():
                forward(self._tokens(windows[0]))
        return windows

    def _time_sites(self, length: int, handler: SiteHandler, clock: SiteClock) -> float:
        """Return the milliseconds that all sites of one window take: the second of two runs."""
        tokens = self._tokens(self.windows[length][0])
        for _ in range(2):
            clock.milliseconds()
            with torch.no_grad():
                self._handled_forward(tokens, handler)
        return clock.milliseconds()

    def _plain_forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens, **self._arguments).logits

    def _handled_forward(self, tokens: Tensor, handler: SiteHandler) -> Tensor:
        keywords = {"input_ids": tokens, **self._arguments}
        return run_with_handler(self.model, (), keywords, handler).logits

    def _tokens(self, window: PlantedTokens) -> Tensor:
        return torch.from_numpy(window.tokens)[None].to(self.device)

    @torch.no_grad()
    def _measure(
        self,
        window: PlantedTokens,
        forward: Callable[[Tensor], Tensor],
        clock: SiteClock | None = None,
    ) -> _Measured:
        tokens = self._tokens(window)
        self._synchronize()
        begun = time.perf_counter()
        logits = forward(tokens)
        self._synchronize()
        elapsed = 1e3 * (time.perf_counter() - begun)
        loss, predicted = next_token_loss(logits[0], tokens[0], window.ordinary)
        return _Measured(
            loss=loss,
            retrieved=count_retrieved(predicted, window),
            end_to_end_ms=elapsed,
            attention_ms=clock.milliseconds() if clock else math.nan,
        )

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _row(
        self,
        name: str,
        length: int,
        asked: float | None,
        measured: Sequence[_Measured],
        *,
        density: float,
        attention_ms: float,
        dense_ms: float | None,
        dense_calls: Mapping[str, int] | None = None,
    ) -> EvaluationRow:
        loss = statistics.fmean(part.loss for part in measured)
        keys = sum(len(window.values) for window in self.windows[length])
        retrieved = sum(part.retrieved for part in measured)
        return EvaluationRow(
            method=name,
            length=length,
            asked_density=asked,
            density=density,
            loss=loss,
            perplexity=math.exp(loss),
            ratio=math.exp(loss - self._dense_loss[length]),
            retrieval=retrieved / keys if keys else None,
            attention_ms=attention_ms,
            end_to_end_ms=statistics.median(part.end_to_end_ms for part in measured),
            dense_end_to_end_ms=dense_ms,
            sequences=len(measured),
            keys=keys,
            dense_calls=dict(dense_calls or {}),
        )


def next_token_loss(
    logits: Tensor, tokens: Tensor, ordinary: np.ndarray
) -> tuple[float, np.ndarray]:
    """Return the mean loss on ordinary tokens, and what is predicted after every token.

    Args:
        logits: ``Float[t vocabulary]``.
        tokens: ``Int64[t]``.
        ordinary: ``Bool[t]``: which tokens count as something to predict.

    Returns:
        Nats per token, and ``Int64[t]``.

    Cost:
        ``Float32[2048 vocabulary]`` at a time.
    """
    counts = torch.from_numpy(ordinary[1:]).to(logits.device)
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    predicted: list[Tensor] = []
    for start in range(0, len(tokens), _LOSS_TOKENS):
        piece = logits[start : start + _LOSS_TOKENS].float()
        predicted.append(piece.argmax(-1))
        targets = tokens[start + 1 : start + 1 + len(piece)]
        losses = F.cross_entropy(piece[: len(targets)], targets, reduction="none")
        total += (losses * counts[start : start + len(targets)]).sum(dtype=torch.float64)
    mean = total.item() / max(int(counts.sum()), 1)
    return mean, torch.cat(predicted).cpu().numpy()


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
