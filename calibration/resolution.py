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
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from seer_compile.calibration import distributed
from seer_compile.calibration.record import Run, dense_answer, gate_of
from seer_compile.calibration.sensitivity import DenseOutput, OneSparseSite
from seer_compile.calibration.temperature import fit_temperature
from seer_compile.config import SUB_BLOCKS, GateConfig
from seer_compile.errors import CalibrationDataError
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
        batches: Held-out batches; the one with most pairs of sub-blocks is measured.
        progress: Show a progress bar.

    Returns:
        Tokens of queries and of keys, for the sites that should have others than the store's; under
        ``torch.distributed`` what process 0 measured.

    Raises:
        CalibrationDataError: An output is not finite, or no tensor to compare is returned.

    Cost:
        One forward per batch, and three per site.
    """
    usual = store.config.sub_blocks
    found: dict[str, list[Resolution]] = {}
    failure: CalibrationDataError | None = None
    with torch.no_grad():
        sites = _largest(run, store, batches)
        if sites is None:
            return {}
        try:
            hidden = not progress or distributed.rank() != 0
            found = _measure(run, store, sites, hidden=hidden)
        except CalibrationDataError as error:
            failure = error
    best = cheapest_divergence(found, usual)
    changed = {name: part.sub_blocks for name, part in best.items() if part.sub_blocks != usual}
    # Of several processes the first one decides, on what it measured or could not.
    told = {"changed": changed, "failed": failure is not None}
    told = distributed.broadcast_json(told, sites.device)
    if told["failed"]:
        raise failure or CalibrationDataError("process 0 could not measure its held-out batch")
    changed = {name: (int(query), int(key)) for name, (query, key) in told["changed"].items()}
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

    def __init__(self, store: GateStore, batch: object) -> None:
        self.store, self.batch = store, batch
        self.lengths: dict[str, tuple[int, int]] = {}
        """Tokens of queries and keys by site."""
        self.output: Any = None
        """Of the model, with all sites dense."""

    def __call__(self, inputs: SiteInputs) -> Tensor:
        """Answer one site."""
        gate = gate_of(self.store, inputs)
        self.lengths[inputs.name] = inputs.query.shape[-2], inputs.key.shape[-2]
        return dense_answer(gate, inputs)

    @property
    def device(self) -> torch.device:
        """Where the gates are."""
        return next(gate for _, gate in self.store.items()).query_weight.device

    @property
    def pairs(self) -> float:
        """Pairs of tokens over all sites."""
        return float(sum(map(math.prod, self.lengths.values())))


class _OneSparseSite(OneSparseSite):
    """Answers one site by its gate as it is before training."""

    def __init__(self, store: GateStore, name: str) -> None:
        super().__init__(store, name, DENSITY)

    def __call__(self, inputs: SiteInputs) -> Tensor:
        """Answer one site."""
        if inputs.name == self.name:
            gate = gate_of(self.store, inputs)
            gate.reset()
            with (
                torch.inference_mode(False),
                torch.autocast(inputs.query.device.type, enabled=False),
            ):
                fit_temperature(gate, inputs, seed=inputs.name)
        return super().__call__(inputs)


def _largest(run: Run, store: GateStore, batches: Iterable[object]) -> _Sites | None:
    """Return the batch whose sites have most pairs, answered densely; None where none has any."""
    largest: _Sites | None = None
    for batch in batches:
        sites = _Sites(GateStore(store.config, seed=store.seed), batch)
        output = run(batch, sites)
        if sites.pairs > (0 if largest is None else largest.pairs):
            largest, sites.output = sites, output
    return largest


def _measure(
    run: Run, store: GateStore, sites: _Sites, *, hidden: bool
) -> dict[str, list[Resolution]]:
    dense = DenseOutput(sites.output)
    sites.output = None
    # Gates that nothing but this holds: those of the model may be in use.
    scratch = {
        size: GateStore(store.config.with_sub_blocks(*size), seed=store.seed)
        for size in _candidates(store.config)
    }
    found: dict[str, list[Resolution]] = {}
    for name in tqdm(sites.lengths, desc="Choosing resolutions", unit="site", disable=hidden):
        found[name] = []
        for size, gates in scratch.items():
            divergence = dense.divergence(run(sites.batch, _OneSparseSite(gates, name)))
            if not math.isfinite(divergence):
                raise CalibrationDataError(
                    "the model's output on a held-out batch is not finite",
                    context={"sparse site": name, "density": DENSITY},
                )
            gate = gates.get(name)
            assert gate is not None
            is_finer = math.prod(size) < math.prod(store.config.sub_blocks)
            if not is_finer or _is_worth_it(gate, sites.lengths[name]):
                pairs = [-(-n // unit) for n, unit in zip(sites.lengths[name], size, strict=True)]
                pairs.append(gate.gate_heads)
                found[name].append(Resolution(size, float(math.prod(pairs)), divergence))
    return found


def _is_worth_it(gate: AttnGate, lengths: tuple[int, int]) -> bool:
    """Whether a call at ``DENSITY`` takes less time than dense attention, by known prices."""
    prices, size = cost_model(gate.query_weight.device), call_size(gate, min(lengths))
    return prices.sparse_time(size, DENSITY) < prices.dense_time(size)


def _candidates(config: GateConfig) -> list[tuple[int, int]]:
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
