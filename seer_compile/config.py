"""Configuration: gates, selectors, calibration. Frozen, keyword-only, checked on construction."""

# Annotations are a promise by the caller; the checks below are for those who break it.
# pyright: reportUnnecessaryIsInstance=false

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, ClassVar, Literal

from seer_compile.errors import DtypeError, RangeError
from seer_compile.types import POOL_KINDS, SHARINGS, BlockSize, PoolKind, Sharing


def _check(condition: bool, argument: str, got: object, expected: str) -> None:
    if not condition:
        raise RangeError(argument=argument, got=got, expected=expected)


def check_type(argument: str, got: object, *kinds: type) -> None:
    """Raise unless an argument is of one of some classes."""
    if not isinstance(got, kinds):
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise DtypeError(argument=argument, got=got, expected=expected)


def _check_fraction(argument: str, got: float) -> None:
    check_type(argument, got, Real)
    _check(math.isfinite(got) and 0.0 < got <= 1.0, argument, got, "a number in (0, 1]")


@dataclass(frozen=True, kw_only=True, slots=True)
class TopP:
    """Keep the fewest blocks whose scores reach a share of their row's sum."""

    name: ClassVar[str] = "top_p"
    mass: float = 0.95
    """Share of the row's score to keep, in (0, 1]. 1 keeps every visible block."""

    def __post_init__(self) -> None:
        _check_fraction("mass", self.mass)

    @property
    def budget(self) -> float:
        """The number handed to the operator."""
        return self.mass


@dataclass(frozen=True, kw_only=True, slots=True)
class Fraction:
    """Keep the same share of the visible blocks in every row, rounded up."""

    name: ClassVar[str] = "fraction"
    density: float = 0.1
    """Kept blocks / visible blocks, in (0, 1]."""

    def __post_init__(self) -> None:
        _check_fraction("density", self.density)

    @property
    def budget(self) -> float:
        """The number handed to the operator."""
        return self.density


@dataclass(frozen=True, kw_only=True, slots=True)
class TopK:
    """Keep the same number of blocks in every row."""

    name: ClassVar[str] = "top_k"
    blocks: int = 32

    def __post_init__(self) -> None:
        _check(isinstance(self.blocks, int) and self.blocks >= 1, "blocks", self.blocks, ">= 1")

    @property
    def budget(self) -> float:
        """The number handed to the operator."""
        return float(self.blocks)


@dataclass(frozen=True, kw_only=True, slots=True)
class Threshold:
    """Keep every block whose share of its row is at least ``ratio`` times the uniform share.

    The published threshold is absolute and so grows stricter with length; relative to
    ``1 / visible blocks`` it means the same at every length.
    """

    name: ClassVar[str] = "threshold"
    ratio: float = 1.0

    def __post_init__(self) -> None:
        check_type("ratio", self.ratio, Real)
        _check(math.isfinite(self.ratio) and self.ratio > 0, "ratio", self.ratio, "> 0")

    @property
    def budget(self) -> float:
        """The number handed to the operator."""
        return self.ratio


SUB_BLOCKS = (1, 2, 4, 8, 16, 32, 64)
RESOLUTIONS = ("by_site", "uniform")
Selector = TopP | Fraction | TopK | Threshold
SELECTORS: tuple[type[Selector], ...] = (TopP, Fraction, TopK, Threshold)


@dataclass(frozen=True, kw_only=True, slots=True)
class GateConfig:
    """Shape of the gates and how their scores become a selection.

    The defaults are the best measured for their time; :meth:`paper` is the published configuration.
    """

    query_pools: tuple[PoolKind, ...] = ("mean",)
    key_pools: tuple[PoolKind, ...] = POOL_KINDS
    query_sub_block: int = 2
    """Tokens of queries that are pooled together; divides the query block. A query that looks
    something up is found at 2 and diluted at 8; twice as many take half the time to score."""
    key_sub_block: int = 4
    """Tokens of keys that are pooled together; divides the key block."""
    gate_dim: int = 64
    block_size: BlockSize = field(default_factory=BlockSize)
    sharing: Sharing = "gate"
    """What the query heads of a key/value head have in common. ``gate``: they are projected
    together and scored once. ``selection``: each is scored, the largest score decides, which takes
    two to three times as long at four heads per group and ranks blocks a little better where few
    are kept; with many more heads per group, which were not measured, compare both. ``none``: each
    selects for itself. The first two let heads share key tiles in the attention kernel."""
    selector: Selector = field(default_factory=TopP)
    resolution: Literal["by_site", "uniform"] = "by_site"
    """``by_site``: calibration halves both sub-blocks at the sites where that helps the model's
    output most, and doubles them where it matters least, at no more sub-block pairs in all; see
    :mod:`seer_compile.calibration.resolution`. ``uniform``: all sites have these sub-blocks."""

    def __post_init__(self) -> None:
        check_type("block_size", self.block_size, BlockSize)
        check_type("selector", self.selector, *SELECTORS)
        for name in ("query_pools", "key_pools"):
            check_type(name, getattr(self, name), tuple)
            kinds = getattr(self, name)
            is_valid = bool(kinds) and set(kinds) <= set(POOL_KINDS)
            _check(
                is_valid and len(set(kinds)) == len(kinds),
                name,
                kinds,
                f"a non-empty tuple of distinct kinds out of {POOL_KINDS}",
            )
        for side in ("query", "key"):
            name, block = f"{side}_sub_block", getattr(self.block_size, side)
            tokens = getattr(self, name)
            _check(tokens in SUB_BLOCKS, name, tokens, f"one of {SUB_BLOCKS}")
            _check(block % tokens == 0, name, tokens, f"a divisor of block_size.{side}={block}")
        _check(self.sharing in SHARINGS, "sharing", self.sharing, f"one of {SHARINGS}")
        _check(self.gate_dim in (16, 32, 64, 128), "gate_dim", self.gate_dim, "16, 32, 64 or 128")
        _check(
            self.resolution in RESOLUTIONS, "resolution", self.resolution, f"one of {RESOLUTIONS}"
        )

    @property
    def sub_blocks(self) -> tuple[int, int]:
        """Tokens of queries and of keys that are pooled together."""
        return self.query_sub_block, self.key_sub_block

    @property
    def form(self) -> tuple[Any, ...]:
        """What a compiled graph or a weight's shape depends on: all but the default budget."""
        return (
            self.query_pools,
            self.key_pools,
            *self.sub_blocks,
            self.gate_dim,
            self.block_size,
            self.sharing,
            self.selector.name,
        )

    def with_sub_blocks(self, query: int, key: int) -> GateConfig:
        """Return the configuration at another resolution.

        Raises:
            RangeError: A size is unknown or does not divide the block.
        """
        return dataclasses.replace(self, query_sub_block=query, key_sub_block=key)

    @classmethod
    def paper(cls, *, density: float = 0.1) -> GateConfig:
        """Return the published pooling and selection: 64-token pooling, fixed share per row.

        Source:
            Gao et al., "SeerAttention", arXiv:2410.13276, section 3 (``Qavg_Kmaxminavg``).
        """
        return cls(
            query_pools=("mean",),
            key_pools=("max", "min", "mean"),
            query_sub_block=64,
            key_sub_block=64,
            gate_dim=128,
            sharing="none",
            selector=Fraction(density=density),
            resolution="uniform",
        )


STARTS = ("identity", "temperature", "statistics", "current")
SCHEDULES = ("cosine", "linear", "flat")
TARGETS = ("mass", "max", "value")


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationConfig:
    """How gates are trained. Steps count batches."""

    steps: int = 500
    """0 trains nothing: what the gates are at first is measured."""
    start: Literal["identity", "temperature", "statistics", "current"] = "identity"
    """Gates at the first step: ``identity`` ranks by means, ``temperature`` too and is as sure of
    itself as fits one batch best, ``statistics`` ranks by a convex fit to one batch, ``current``
    goes on with what the gates hold. A temperature that fits needs half the steps, and keeps many
    more blocks than asked for of inputs longer than budgets were measured at (docs/gates.md)."""
    learning_rate: float = 2e-4
    """Peak of a linear warm-up followed by a fall to ``final_learning_rate``. Gates begin as a
    ranking by means: what they unlearn of that at higher rates is missing on other text."""
    final_learning_rate: float = 1e-5
    warmup_steps: int = 20
    schedule: Literal["cosine", "linear", "flat"] = "cosine"
    """Of the fall; ``flat`` stays at the peak and falls in the last fifth of the steps."""
    average: float = 0.0
    """Decay per step of a moving average of the weights, which takes their place at the end; 0
    keeps the last ones."""
    start_share: float = 0.25
    """Share of the weights that training began with in those it ends with; with
    ``start="current"`` they are those of before. A quarter of the ranking by means ranks other text
    better than training alone: perplexity 1.0050 for 1.0065 at 5 % of the blocks (docs/gates.md;
    Wortsman et al., arXiv:2109.01903)."""
    shared_steps: int = 0
    """First steps after which gates of equal sizes are averaged over the sites, so that each site
    starts from what all have learned."""
    tie_keys: bool = False
    """Query heads of one key head project keys alike."""
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    """Largest gradient norm per gate."""
    loss: Literal["kl", "mse"] = "kl"
    target: Literal["mass", "max", "value"] = "mass"
    """``mass``: sum over the keys of a block, ours. ``max``: largest probability, the paper's.
    ``value``: the sum with each key weighted by the norm of its value: what outputs are made of."""
    sharpness: float = 1.0
    """Exponent of the target, whose rows then are shares again. Above 1 a gate spends itself on the
    blocks that matter most to a row: more of them are found, and less of the mass."""
    far_rows: float = 0.0
    """Weight, beyond 1, of a row in the loss, per share of its mass outside of the blocks that
    every selection keeps."""
    rows_per_step: int = 2048
    """Query sub-blocks per sequence that enter the loss; all when a sequence has fewer."""
    holdout_batches: int = 4
    """Batches kept out of training, on which the mass and density tables are made."""
    sensitivity_batches: int = 1
    """Held-out batches per length on which it is measured what the sparsity of each site costs the
    model's output: at most ten forwards per site and batch. 0 measures nothing of the output, and
    leaves all sites at the configured sub-blocks."""
    search_evaluations: int = 0
    """Forwards, per length and density, of a search for how sites share a density when all are
    sparse at once. 0 searches nothing; 40 are enough for ten sites."""
    seed: int = 0
    checkpoint_every: int = 50

    def __post_init__(self) -> None:
        check_type("seed", self.seed, int)
        _check(isinstance(self.steps, int) and self.steps >= 0, "steps", self.steps, ">= 0")
        for name, known in (("start", STARTS), ("schedule", SCHEDULES), ("target", TARGETS)):
            value = getattr(self, name)
            _check(value in known, name, value, f"one of {known}")
        for name in ("shared_steps", "far_rows", "search_evaluations"):
            _check(getattr(self, name) >= 0, name, getattr(self, name), ">= 0")
        _check(0 <= self.average < 1, "average", self.average, "in [0, 1)")
        _check(0 <= self.start_share < 1, "start_share", self.start_share, "in [0, 1)")
        for name in ("rows_per_step", "checkpoint_every", "holdout_batches"):
            value = getattr(self, name)
            _check(isinstance(value, int) and value >= 1, name, value, "an integer >= 1")
        _check(
            self.sensitivity_batches >= 0, "sensitivity_batches", self.sensitivity_batches, ">= 0"
        )
        _check(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, ">= 0")
        _check(self.learning_rate > 0, "learning_rate", self.learning_rate, "> 0")
        _check(
            0 <= self.final_learning_rate <= self.learning_rate,
            "final_learning_rate",
            self.final_learning_rate,
            "in [0, learning_rate]",
        )
        _check(self.weight_decay >= 0, "weight_decay", self.weight_decay, ">= 0")
        _check(self.sharpness > 0, "sharpness", self.sharpness, "> 0")
        _check(self.clip_norm > 0, "clip_norm", self.clip_norm, "> 0")
        _check(self.loss in ("kl", "mse"), "loss", self.loss, "'kl' or 'mse'")
