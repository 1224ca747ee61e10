"""Measure what sparse attention costs and buys: perplexity, retrieval, density and time.

Every method answers the same windows with the same keys planted in them, and each layer's
selection acts on what the already sparse layers below it computed, as in use.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seer_compile.allocation import Allocation
from seer_compile.budget_curve import check_fraction
from seer_compile.errors import ModelStateError, SeerInputError
from seer_compile.evaluation_methods import Method
from seer_compile.gate_store import GateStore
from seer_compile.method_runner import Call, MethodRunner, Outcome
from seer_compile.retrieval import PlantedTokens, count_retrieved
from seer_compile.types import BlockSize

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

    @property
    def uses_gates(self) -> bool:
        """Whether gates selected: they alone have a dense graph to be compared with."""
        return self.dense_end_to_end_ms is not None

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


class _Answer(NamedTuple):
    """What a forward over one window showed."""

    loss: float
    retrieved: int


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
        self.allocation: Allocation | None = allocation
        self._arguments = dict(model_arguments or {})
        self._notify = notify
        self._dense_loss: dict[int, float] = {}
        self._runner = MethodRunner[PlantedTokens, _Answer](
            model, self._call, self._score, block_size=block_size or BlockSize()
        )

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
        windows = self.windows[length]
        if method.base == "dense":
            found = self._runner.dense(windows, length)
            self._dense_loss[length] = statistics.fmean(answer.loss for answer in found.scores)
            return self._row("dense", length, None, found)
        if density is None:
            raise SeerInputError(argument="density", got=None, expected="a number in (0, 1]")
        check_fraction("density", density)
        if length not in self._dense_loss:
            raise ModelStateError("measure dense first: every row is compared with it")
        if method.selector is None:
            found = self._runner.gates(windows, length, method, density, store, self.allocation)
        else:
            found = self._runner.matched(windows, length, method, density, store)
        return self._row(method.name, length, density, found)

    def _call(self, window: PlantedTokens) -> Call:
        return Call((), {"input_ids": self._tokens(window), **self._arguments})

    def _tokens(self, window: PlantedTokens) -> Tensor:
        return torch.from_numpy(window.tokens)[None].to(self._runner.device)

    def _score(self, output: Any, window: PlantedTokens) -> _Answer:
        tokens = self._tokens(window)[0]
        loss, predicted = next_token_loss(output.logits[0], tokens, window.ordinary)
        return _Answer(loss, count_retrieved(predicted, window))

    def _row(
        self, name: str, length: int, asked: float | None, found: Outcome[_Answer]
    ) -> EvaluationRow:
        loss = statistics.fmean(answer.loss for answer in found.scores)
        keys = sum(len(window.values) for window in self.windows[length])
        retrieved = sum(answer.retrieved for answer in found.scores)
        return EvaluationRow(
            method=name,
            length=length,
            asked_density=asked,
            density=found.density,
            loss=loss,
            perplexity=math.exp(loss),
            ratio=math.exp(loss - self._dense_loss[length]),
            retrieval=retrieved / keys if keys else None,
            attention_ms=found.attention_ms,
            end_to_end_ms=found.end_to_end_ms,
            dense_end_to_end_ms=found.dense_end_to_end_ms,
            sequences=len(found.scores),
            keys=keys,
            dense_calls=dict(found.dense_calls),
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
