"""Measure what sparse attention costs on any task: a metric of the user's, density and time."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from seer_compile.allocation import Allocation
from seer_compile.budget_curve import check_fraction
from seer_compile.calibration.record import split_batch
from seer_compile.errors import SeerInputError
from seer_compile.evaluation_methods import Method, parse_method
from seer_compile.gate_store import GateStore
from seer_compile.method_runner import Call, MethodRunner, Outcome
from seer_compile.types import BlockSize

Example = tuple[Any, Any]
"""The arguments of one forward, as for calibration, and what the output is compared with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskRow:
    """One method at one density, over all examples."""

    method: str
    asked_density: float | None
    """Kept / visible blocks asked for; None for dense."""
    density: float
    """Kept / visible blocks measured, over all sites that are sparse; 1 for dense."""
    score: float
    """Mean of the metric over the examples."""
    attention_ms: float
    """All sites of one forward; see :class:`seer_compile.method_runner.Outcome`."""
    end_to_end_ms: float
    dense_end_to_end_ms: float | None
    examples: int
    dense_calls: Mapping[str, int]
    """For gates: calls of one forward that are answered densely in use, by reason."""

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


class TaskEvaluator:
    """Runs methods over examples of any task.

    Args:
        model: Any module, in evaluation mode.
        examples: Pairs of a batch, as :func:`seer_compile.calibrate` takes them, and a target. All
            batches of one shape, or times say little.
        metric: Called with the model's output and the target; returns a number.
        block_size: Tokens per block of the matched methods; gates bring their own.
        allocation: How the gates of the sites share a density; matched methods give every site
            the asked one. May be changed between runs.

    Example:
        ::

            evaluator = TaskEvaluator(model, examples, accuracy)
            dense = evaluator.run("dense")
            oracle = evaluator.run("oracle", 0.1)
    """

    def __init__(
        self,
        model: nn.Module,
        examples: Sequence[Example],
        metric: Callable[[Any, Any], float],
        *,
        block_size: BlockSize | None = None,
        allocation: Allocation | None = None,
    ) -> None:
        if not examples:
            raise SeerInputError(argument="examples", got=examples, expected="at least one")
        self.model, self.examples = model, examples
        self.allocation: Allocation | None = allocation
        self._runner = MethodRunner[Example, float](
            model, self._call, _scored_by(metric), block_size=block_size or BlockSize()
        )

    def run(
        self, method: Method | str, density: float | None = None, store: GateStore | None = None
    ) -> TaskRow:
        """Measure one method at one density.

        Dense answers are those of the model as it was before :func:`seer_compile.optimize`.

        Args:
            method: What answers the sites; ``dense``, ``gate``, ``oracle`` and so on, see
                :func:`seer_compile.evaluation_methods.method_names`.
            density: Kept / visible blocks; not read for dense.
            store: The gates of the optimized model, for methods that use them.

        Raises:
            SeerInputError: No density is given, or there is no such method.
            ModelStateError: Gates are missing, or the forward reaches no site.
        """
        method = parse_method(method) if isinstance(method, str) else method
        if method.base == "dense":
            return self._row(method, None, self._runner.dense(self.examples, None))
        if density is None:
            raise SeerInputError(argument="density", got=None, expected="a number in (0, 1]")
        check_fraction("density", density)
        if method.selector is None:
            found = self._runner.gates(self.examples, None, method, density, store, self.allocation)
        else:
            found = self._runner.matched(self.examples, None, method, density, store)
        return self._row(method, density, found)

    def _call(self, example: Example) -> Call:
        return Call(*split_batch(example[0], device=self._runner.device))

    def _row(self, method: Method, asked: float | None, found: Outcome[float]) -> TaskRow:
        return TaskRow(
            method=method.name,
            asked_density=asked,
            density=found.density,
            score=statistics.fmean(found.scores),
            attention_ms=found.attention_ms,
            end_to_end_ms=found.end_to_end_ms,
            dense_end_to_end_ms=found.dense_end_to_end_ms,
            examples=len(found.scores),
            dense_calls=found.dense_calls,
        )


def _scored_by(metric: Callable[[Any, Any], float]) -> Callable[[Any, Example], float]:
    def score(output: Any, example: Example) -> float:
        return float(metric(output, example[1]))

    return score
