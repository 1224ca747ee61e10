"""How finely each site pools: small sub-blocks where they help the model, large ones elsewhere.

A query that looks one token up is diluted by the tokens it is pooled with, and so is the key it
looks for. Few sites of a model look things up: there half the sub-blocks find what the others lose,
and elsewhere twice as large ones lose nothing. All sites together have no more pairs of sub-blocks
to score than before; a pair can take longer, where a faster kernel does not take the smaller ones.

Letters of shapes: see :mod:`seer_compile.types`.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from seer_compile.calibration import distributed
from seer_compile.calibration.record import Run, dense_answer, gate_of
from seer_compile.calibration.sensitivity import (
    DenseOutput,
    OneSparseSite,
    finite_divergences,
)
from seer_compile.calibration.site_trainer import plain_numerics
from seer_compile.calibration.temperature import fit_temperature
from seer_compile.config import SUB_BLOCKS, GateConfig
from seer_compile.gate import AttnGate
from seer_compile.gate_store import GateStore
from seer_compile.kernels.cost_model import cost_model
from seer_compile.latency import call_size
from seer_compile.types import SiteInputs

DENSITY = 0.1
"""Kept / visible blocks of the site that is measured."""

LEAST_GAIN = 0.02
"""Share of the divergence, summed over sites, below which all keep the configured sub-blocks."""

_MOST_STATES = 4096

_Choices = tuple["_Choices", "Resolution"] | None
"""What was chosen for the last site, behind what was chosen for those before it."""

_logger = logging.getLogger(__name__)


class Resolution(NamedTuple):
    """Sub-block sizes that a site could have, and what they would cost."""

    sub_blocks: tuple[int, int]
    """Tokens of queries and of keys."""
    pairs: float
    """Pairs of sub-blocks that are scored, over all gate heads."""
    divergence: float
    """Of the model's output where this site alone is sparse, at ``DENSITY``."""


def choose_resolutions(
    run: Run, store: GateStore, batches: Iterable[object], *, progress: bool = False
) -> dict[str, tuple[int, int]]:
    """Find the sub-blocks that suit every site; the store's gates are left alone.

    Measured with untrained gates at the temperature that fits: what pooling dilutes, training does
    not bring back.

    Args:
        run: One forward of the frozen model with a handler; returns what the model returns.
        store: Says how gates are configured and seeded.
        batches: Held-out batches; the one with most pairs of tokens is measured.
        progress: Show a progress bar.

    Returns:
        Tokens of queries and of keys, for the sites that should have others than the store's; under
        ``torch.distributed`` what process 0 measured, and none where one reaches no site.

    Raises:
        CalibrationDataError: An output is not finite, or no tensor to compare is returned.

    Cost:
        One forward per batch, and three per site.
    """
    usual = store.config.sub_blocks
    # Gates that nothing but this holds: those of the model may be in use.
    scratch = {
        size: GateStore(store.config.with_sub_blocks(*size), seed=store.seed)
        for size in candidate_sub_blocks(store.config)
    }
    with torch.no_grad():
        with distributed.together():
            largest = _largest(run, scratch[usual], batches)
        if any(distributed.gather(largest is None)) or largest is None:
            return {}
        hidden = not progress or distributed.rank() != 0
        with distributed.together():
            found = _measure(run, scratch, usual, largest, hidden=hidden)
    best = cheapest_divergence(found, usual)
    changed = {name: part.sub_blocks for name, part in best.items() if part.sub_blocks != usual}
    # Of several processes the first one decides.
    changed = distributed.gather(changed)[0]
    for name, size in changed.items():
        _logger.info("%s pools %d query and %d key tokens", name, *size)
    return changed


def cheapest_divergence(
    found: Mapping[str, Sequence[Resolution]], usual: tuple[int, int]
) -> dict[str, Resolution]:
    """Choose a resolution per site: least divergence at no more pairs than the usual one has.

    Args:
        found: What each site could have, the usual resolution among it.
        usual: The sub-blocks that are configured.

    Returns:
        A resolution per site: the usual one everywhere unless divergence falls by ``LEAST_GAIN``.
        Larger sub-blocks that look better than the usual ones do so by chance, and count as equal:
        no site gets them but to pay for one with smaller ones.
    """
    before = {
        name: next(option for option in options if option.sub_blocks == usual)
        for name, options in found.items()
    }
    limit = sum(option.pairs for option in before.values())
    # By pairs that are used: what that many buy at best, as (divergence, departures, choices).
    best: dict[float, tuple[float, int, _Choices]] = {0.0: (0.0, 0, None)}
    for name, options in found.items():
        further: dict[float, tuple[float, int, _Choices]] = {}
        for (used, (divergence, departures, choices)), option in itertools.product(
            best.items(), options
        ):
            pairs = used + option.pairs
            is_coarser = option.pairs < before[name].pairs
            least = before[name].divergence if is_coarser else 0.0
            total = divergence + max(option.divergence, least)
            state = (total, departures + (option.sub_blocks != usual), (choices, option))
            if pairs <= limit and (pairs not in further or state[:2] < further[pairs][:2]):
                further[pairs] = state
        best = _worth_keeping(further)
    new, _, choices = min(best.values(), key=lambda state: state[:2])
    after: list[Resolution] = []
    while choices is not None:
        choices, option = choices
        after.insert(0, option)
    is_better = new < (1 - LEAST_GAIN) * sum(option.divergence for option in before.values())
    return dict(zip(found, after, strict=True)) if is_better else before


def _worth_keeping(
    states: Mapping[float, tuple[float, int, _Choices]],
) -> dict[float, tuple[float, int, _Choices]]:
    """Leave out what others buy more cheaply, and states between states where there are many."""
    kept: list[float] = []
    least = (math.inf, 0)
    for pairs, state in sorted(states.items(), key=lambda item: item[0]):
        if state[:2] < least:
            least = state[:2]
            kept.append(pairs)
    # The last one is the best.
    step = -(-len(kept) // _MOST_STATES)
    return {pairs: states[pairs] for pairs in [*kept[:-1:step], kept[-1]]}


class _Sites:
    """The site handler that answers densely and keeps the sizes of what it meets."""

    def __init__(self, store: GateStore) -> None:
        self.store = store
        self.lengths: dict[str, tuple[int, int]] = {}
        """Tokens of queries and keys by site."""

    def __call__(self, inputs: SiteInputs) -> Tensor:
        """Answer one site."""
        gate = gate_of(self.store, inputs)
        self.lengths[inputs.name] = inputs.query.shape[-2], inputs.key.shape[-2]
        return dense_answer(gate, inputs)


class _DenseBatch(NamedTuple):
    """A held-out batch, and what the model answers with all sites dense."""

    batch: object
    lengths: dict[str, tuple[int, int]]
    """Tokens of queries and keys by site."""
    dense: DenseOutput

    @property
    def pairs(self) -> int:
        """Pairs of tokens over all sites."""
        return sum(map(math.prod, self.lengths.values()))


class _OneSparseSite(OneSparseSite):
    """Answers one site by its gate as it is before training."""

    def __init__(self, store: GateStore, name: str) -> None:
        super().__init__(store, name, DENSITY)

    def __call__(self, inputs: SiteInputs) -> Tensor:
        """Answer one site."""
        if inputs.name == self.name:
            gate = gate_of(self.store, inputs)
            gate.reset()
            with plain_numerics(inputs.query.device):
                fit_temperature(gate, inputs, seed=inputs.name)
        return super().__call__(inputs)


def _largest(run: Run, store: GateStore, batches: Iterable[object]) -> _DenseBatch | None:
    """Return the batch whose sites have most pairs of tokens; None where none reaches a site."""
    largest: _DenseBatch | None = None
    for batch in batches:
        dense = _dense_batch(run, store, batch)
        if dense is not None and dense.pairs > (0 if largest is None else largest.pairs):
            largest = dense
    return largest


def _dense_batch(run: Run, store: GateStore, batch: object) -> _DenseBatch | None:
    """Answer a batch densely. A sample of the output is kept, and the output itself is freed."""
    sites = _Sites(store)
    output = run(batch, sites)
    return _DenseBatch(batch, sites.lengths, DenseOutput(output)) if sites.lengths else None


def _measure(
    run: Run,
    scratch: Mapping[tuple[int, int], GateStore],
    usual: tuple[int, int],
    largest: _DenseBatch,
    *,
    hidden: bool,
) -> dict[str, list[Resolution]]:
    found: dict[str, list[Resolution]] = {}
    for name in tqdm(largest.lengths, desc="Choosing resolutions", unit="site", disable=hidden):
        found[name] = []
        for size, store in scratch.items():
            handler = _OneSparseSite(store, name)
            # Handed on at once: two outputs of a long batch are not to be held at a time.
            (divergence,) = finite_divergences(
                handler, largest.dense, run(largest.batch, handler), (None,)
            )
            gate = store.get(name)
            assert gate is not None
            is_finer = math.prod(size) < math.prod(usual)
            if not is_finer or _is_worth_it(gate, largest.lengths[name]):
                tokens = zip(largest.lengths[name], size, strict=True)
                pairs = math.prod(-(-total // unit) for total, unit in tokens)
                found[name].append(Resolution(size, float(gate.gate_heads * pairs), divergence))
    return found


def _is_worth_it(gate: AttnGate, lengths: tuple[int, int]) -> bool:
    """Whether a call at ``DENSITY`` takes less time than dense attention, by known prices."""
    prices, size = cost_model(gate.query_weight.device), call_size(gate, min(lengths))
    return prices.sparse_time(size, DENSITY) < prices.dense_time(size)


def candidate_sub_blocks(config: GateConfig) -> list[tuple[int, int]]:
    """Return half, the same and twice the sub-blocks, as far as they fit into blocks."""
    blocks = (config.block_size.query, config.block_size.key)
    sizes: list[tuple[int, int]] = []
    for factor in (0.5, 1, 2):
        size = tuple(
            scaled
            if (scaled := int(tokens * factor)) in SUB_BLOCKS and block % scaled == 0
            else tokens
            for tokens, block in zip(config.sub_blocks, blocks, strict=True)
        )
        sizes.append((size[0], size[1]))
    return list(dict.fromkeys(sizes))
