"""How finely each site pools: small sub-blocks where they help the model, large ones elsewhere.

A query that looks one token up is diluted by the tokens it is pooled with, and so is the key it
looks for. Few sites of a model look things up: there half the sub-blocks find what the others lose,
and elsewhere twice as large ones lose nothing. Scoring costs what it did, as all sites together
have no more pairs of sub-blocks than before.

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
from seer_compile.calibration.sensitivity import DenseOutput, OneSparseSite
from seer_compile.calibration.temperature import fit_temperature
from seer_compile.config import SUB_BLOCKS, GateConfig
from seer_compile.errors import CalibrationDataError
from seer_compile.gate_store import GateStore
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
    """Give every site the sub-blocks that suit it, and return those that are not the store's.

    Measured with untrained gates at the temperature that fits: what pooling dilutes, training does
    not bring back. The weights of the sites' gates are reset.

    Args:
        run: One forward of the frozen model with a handler; returns what the model returns.
        store: Gates of the sites; those that are missing are created.
        batches: Held-out batches; the first one is measured.
        progress: Show a progress bar.

    Returns:
        Tokens of queries and of keys by site; under ``torch.distributed`` what process 0 measured.

    Raises:
        CalibrationDataError: An output is not finite, or no tensor to compare is returned.

    Cost:
        One forward, and three per site.
    """
    chosen: dict[str, tuple[int, int]] = {}
    hidden = not progress or distributed.rank() != 0
    with torch.no_grad():
        for batch in itertools.islice(batches, 1):
            found = _measure(run, store, batch, hidden=hidden)
            best = cheapest_divergence(found, store.config.sub_blocks)
            chosen = {name: resolution.sub_blocks for name, resolution in best.items()}
    gates = dict(store.items())
    if not gates:
        return {}
    device = next(iter(gates.values())).query_weight.device
    chosen = {
        name: (int(query), int(key))
        for name, (query, key) in distributed.broadcast_json(chosen, device).items()
    }
    changed = {name: size for name, size in chosen.items() if size != store.config.sub_blocks}
    for name, size in changed.items():
        if name in gates:
            gates[name].config = store.config.with_sub_blocks(*size)
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
    kept: dict[float, tuple[float, int, _Choices]] = {}
    least = (math.inf, 0)
    for pairs, state in sorted(states.items()):
        if state[:2] < least:
            least, kept[pairs] = state[:2], state
    step = -(-len(kept) // _MOST_STATES)
    return dict(list(kept.items())[::step])


class _Sites:
    """The site handler that answers densely and keeps the sizes of what it meets."""

    def __init__(self, store: GateStore) -> None:
        self.store = store
        self.lengths: dict[str, tuple[int, int]] = {}
        """Tokens of queries and keys by site."""

    def __call__(self, inputs: SiteInputs) -> Tensor:
        """Answer one site."""
        gate = gate_of(self.store, inputs)
        if inputs.name not in self.lengths:
            gate.reset()
            self.lengths[inputs.name] = inputs.query.shape[-2], inputs.key.shape[-2]
        return dense_answer(gate, inputs)


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


def _measure(
    run: Run, store: GateStore, batch: object, *, hidden: bool
) -> dict[str, list[Resolution]]:
    sites = _Sites(store)
    output = run(batch, sites)
    if not sites.lengths:
        return {}
    dense = DenseOutput(output)
    sizes = _candidates(store.config)
    found: dict[str, list[Resolution]] = {}
    for name in tqdm(sites.lengths, desc="Choosing resolutions", unit="site", disable=hidden):
        gate = store.get(name)
        assert gate is not None
        found[name] = []
        for size in sizes:
            gate.config = store.config.with_sub_blocks(*size)
            output = run(batch, _OneSparseSite(store, name))
            divergence = dense.divergence(output)
            if not math.isfinite(divergence):
                raise CalibrationDataError(
                    "the model's output on a held-out batch is not finite",
                    context={"sparse site": name, "density": DENSITY},
                )
            units = [-(-n // unit) for n, unit in zip(sites.lengths[name], size, strict=True)]
            pairs = float(gate.gate_heads * math.prod(units))
            found[name].append(Resolution(size, pairs, divergence))
        gate.config = store.config
        gate.reset()
    return found


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
