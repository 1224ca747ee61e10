"""The methods an evaluation compares: how each answers the sites of a forward.

A method is a name, optionally with a selector behind it: ``oracle``, ``quest_top_p``,
``gate_fraction``. Methods with a matched density answer through a handler and run eagerly;
``gate`` is the optimized model itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

import seer_compile.kernels.ops  # noqa: F401  (registers the operators called below)
from seer_compile.calibration.baselines import BASELINES
from seer_compile.calibration.matching import attend, match_density
from seer_compile.errors import ModelStateError, SeerInputError
from seer_compile.gate_store import GateStore
from seer_compile.types import BlockSize, SiteInputs

GATE_METHODS = ("gate", "paper_gate")
MATCHED_SELECTORS = ("top_p", "fraction")


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """One column of a comparison."""

    name: str
    """As it was asked for, and as it is shown."""
    base: str
    """``dense``, ``gate``, ``paper_gate``, or a baseline."""
    selector: str | None
    """The selector of a matched density; None where the model's own budgets decide."""

    @property
    def uses_gates(self) -> bool:
        """Whether gates answer."""
        return self.base in GATE_METHODS


def method_names() -> tuple[str, ...]:
    """Return every name that :func:`parse_method` knows."""
    plain = ("dense", *GATE_METHODS, *BASELINES)
    return plain + tuple(f"{base}_{kind}" for base in plain[1:] for kind in MATCHED_SELECTORS)


def parse_method(name: str) -> Method:
    """Return the method of a name.

    Raises:
        SeerInputError: There is no such method.

    Example:
        >>> parse_method("quest_top_p")
        Method(name='quest_top_p', base='quest', selector='top_p')
    """
    if name not in method_names():
        known = ", ".join(("dense", *GATE_METHODS, *BASELINES))
        raise SeerInputError(
            argument="methods",
            got=name,
            expected=f"one of {known}; all but dense also with _top_p or _fraction behind",
        )
    for kind in MATCHED_SELECTORS:
        base = name.removesuffix(f"_{kind}")
        if base != name:
            return Method(name=name, base=base, selector=kind)
    selector = BASELINES[name].selector if name in BASELINES else None
    return Method(name=name, base=name, selector=selector)


class SiteClock:
    """Sums the time that regions of a forward take, on the device that does the work."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds = 0.0

    @contextmanager
    def region(self) -> Iterator[None]:
        """Add the time of a block of code."""
        if self._is_cuda:
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            events[0].record()
            yield
            events[1].record()
            self._events.append(events)
            return
        begun = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - begun

    def milliseconds(self) -> float:
        """Return the sum so far and start again from 0; waits for the device."""
        if self._is_cuda:
            torch.cuda.synchronize()
        total = 1e3 * self._seconds + sum(start.elapsed_time(end) for start, end in self._events)
        self._events, self._seconds = [], 0.0
        return total


@dataclass(kw_only=True, eq=False, slots=True)
class MatchedHandler:
    """Answers every site with a selection of one density, solved on the input at hand."""

    score: Callable[[SiteInputs], Tensor]
    """Block scores ``Float32[b s m n]``."""
    block_size: BlockSize
    selector: str
    density: float
    clock: SiteClock
    """Times the attention alone, without scoring and selecting."""
    kept: int = 0
    visible: int = 0

    def __call__(self, inputs: SiteInputs) -> Tensor:
        """Answer one site."""
        matched = match_density(
            self.score(inputs),
            inputs,
            self.block_size,
            selector=self.selector,
            density=self.density,
        )
        self.kept += matched.kept
        self.visible += matched.visible
        with self.clock.region():
            return attend(inputs, matched.selection, self.block_size)

    def forget(self) -> None:
        """Start counting and timing again."""
        self.kept = self.visible = 0
        self.clock.milliseconds()

    @property
    def measured_density(self) -> float:
        """Kept / visible blocks over every site answered."""
        return self.kept / max(self.visible, 1)


@dataclass(kw_only=True, eq=False, slots=True)
class GateTimer:
    """Answers every site as the optimized model would, one timed operator per site."""

    store: GateStore
    clock: SiteClock
    answered: dict[str, int] = field(default_factory=dict)

    def __call__(self, inputs: SiteInputs) -> Tensor:
        """Answer one site."""
        gate = self.store.get(inputs.name)
        if gate is None:
            raise ModelStateError(f"no gate of the site {inputs.name!r}")
        with self.clock.region():
            answer = gate.attend(inputs)
        self.answered[inputs.name] = self.answered.get(inputs.name, 0) + 1
        return answer


@dataclass(kw_only=True, eq=False, slots=True)
class DenseTimer:
    """Answers every site densely, timed."""

    clock: SiteClock

    def __call__(self, inputs: SiteInputs) -> Tensor:
        """Answer one site."""
        from seer_compile.kernels.dense import dense_attention

        with self.clock.region():
            return dense_attention(
                inputs.query,
                inputs.key,
                inputs.value,
                scale=inputs.scale,
                visibility=inputs.visibility,
                softcap=inputs.softcap,
                sinks=inputs.sinks,
            )


def scorer(
    method: Method, store: GateStore | None, block_size: BlockSize
) -> Callable[[SiteInputs], Tensor]:
    """Return what scores blocks for a method with a matched density.

    Raises:
        ModelStateError: The method needs gates and there are none.
    """
    if not method.uses_gates:
        score = BASELINES[method.base].score
        return lambda inputs: score(inputs, block_size)
    if store is None:
        raise ModelStateError(f"the method {method.name!r} needs gates")

    def gate_scores(inputs: SiteInputs) -> Tensor:
        gate = store.get(inputs.name)
        if gate is None:
            raise ModelStateError(f"no gate of the site {inputs.name!r}")
        return gate.block_scores(inputs)

    return gate_scores
