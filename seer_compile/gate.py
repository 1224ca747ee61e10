"""The learnable gate of one site: pooled queries and keys to block scores.

Letters of shapes: see :mod:`seer_compile.types`. L is the number of lengths in the budget table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import seer_compile.kernels.ops  # noqa: F401  (registers the operators called below)
from seer_compile.budget_curve import BudgetCurve
from seer_compile.config import GateConfig
from seer_compile.errors import HeadConfigError, RangeError, ShapeError
from seer_compile.gate_scores import block_log_mass, visible_units
from seer_compile.kernels.budgets import budget_at
from seer_compile.sensitivity import SensitivityCurve
from seer_compile.shares import ShareTable
from seer_compile.types import BlockSelection, PoolKind, SiteInputs, Visibility

BUDGET_LENGTHS: tuple[int, ...] = tuple(2**power for power in range(7, 21))
"""Key lengths of every gate's budget table, in tokens.

One grid for all gates: the table's shape and the lengths are constants of a compiled graph, so
calibrating or loading other gates fills the table in place and compiles nothing again.
"""


class AttnGate(nn.Module):
    """Scores key blocks for query blocks from pooled queries and keys.

    Each sub-block of tokens is pooled, projected per head, and compared by a dot product; the
    softmax over visible key blocks of the best match among their sub-blocks predicts the share of
    attention mass that a block carries. A new gate is the identity on the means: its logits
    are mean-pooled query times mean-pooled key times the attention's own scale.

    Weights stay float32 and ``mode`` stays on the CPU wherever the model is moved or cast.

    Args:
        heads: Query heads.
        kv_heads: Key/value heads; divides ``heads``.
        head_dim: Channels per head.
        config: Shape of the gate and its selector.
        scale: Factor on the logits of the site; ``1 / sqrt(head_dim)`` when None.
        seed: Of the random projection that is used where ``gate_dim`` differs from ``head_dim``.
        device: Where weights and budgets live; the CPU when None.

    Raises:
        HeadConfigError: ``kv_heads`` does not divide ``heads``.
        RangeError: ``head_dim`` is not in 1..256.
    """

    query_weight: nn.Parameter
    """``Float32[h Pq*d e]``."""
    key_weight: nn.Parameter
    """``Float32[a Pk*d e]``, a the ``gate_heads``."""
    budget: Tensor
    """``Float64[s L]``: the selector's budget at each of ``budget_lengths``.

    A trained gate puts nearly all mass into few blocks; top-p moves through the rest at shares such
    as ``1 - 1e-9``, which float32 cannot hold.
    """
    mode: Tensor
    """``Int8[]`` on the CPU: how calls are answered; see
    :data:`seer_compile.kernels.gated_attention.MODE_AUTO`."""

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        config: GateConfig,
        scale: float | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if heads < 1 or kv_heads < 1 or heads % kv_heads:
            raise HeadConfigError(
                argument="kv_heads", got=kv_heads, expected=f"a divisor of heads={heads}"
            )
        if not 1 <= head_dim <= 256:
            raise RangeError(argument="head_dim", got=head_dim, expected="1 to 256")
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.config = config
        self.scale = 1 / math.sqrt(head_dim) if scale is None else float(scale)
        self.seed = seed
        self.curve: BudgetCurve | None = None
        self.sensitivity: SensitivityCurve | None = None
        self.shares: ShareTable | None = None
        self.is_trained = False
        weights = self._initial_weights()
        self.query_weight, self.key_weight = (
            nn.Parameter(weight.to(device or "cpu")) for weight in weights
        )
        table = torch.full(
            (self.selection_heads, len(BUDGET_LENGTHS)),
            config.selector.budget,
            dtype=torch.float64,
            device=device or "cpu",
        )
        self.register_buffer("budget", table)
        self.register_buffer("mode", torch.zeros((), dtype=torch.int8, device="cpu"))

    @property
    def selection_heads(self) -> int:
        """Selections per batch item: one per query head, or one per group where shared."""
        return self.heads if self.config.sharing == "none" else self.kv_heads

    @property
    def groups(self) -> int:
        """Consecutive query heads that share one selection."""
        return self.heads // self.selection_heads

    @property
    def gate_heads(self) -> int:
        """Heads that are scored: query heads, or groups of them where the gate is shared."""
        return self.kv_heads if self.config.sharing == "gate" else self.heads

    @property
    def budget_lengths(self) -> tuple[int, ...]:
        """Key lengths, in tokens, of the columns of ``budget``."""
        return BUDGET_LENGTHS

    @property
    def keeps_every_block(self) -> bool:
        """Whether the budget covers every visible block at any length; reads the device."""
        has_full = self.config.selector.name in ("top_p", "fraction") and not self.budget.is_meta
        return has_full and bool((self.budget >= 1).all())

    def extra_repr(self) -> str:
        """Return the sizes that tell gates apart."""
        return (
            f"heads={self.heads}, kv_heads={self.kv_heads}, head_dim={self.head_dim}, "
            f"gate_dim={self.config.gate_dim}, sub_blocks={self.config.sub_blocks}, "
            f"trained={self.is_trained}"
        )

    def reset(self) -> None:
        """Return the weights to their untrained values, in place, and forget the curve."""
        with torch.no_grad():
            for parameter, value in zip(self.parameters(), self._initial_weights(), strict=True):
                parameter.copy_(value)
            self.budget.fill_(self.config.selector.budget)
        self.curve, self.sensitivity, self.shares, self.is_trained = None, None, None, False

    def features(
        self, query: Tensor, key: Tensor, key_padding: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Pool and project.

        Args:
            query: ``Float[b h q d]``.
            key: ``Float[b g k d]``.
            key_padding: ``Bool[b k]``, True where a key may be read.

        Returns:
            ``Float32[b a r e]`` and ``Float32[b a c e]``, a the gate heads; differentiable in the
            weights only.
        """
        return (
            self.project_query(self.pool_query(query)),
            self.project_key(self.pool_key(key, key_padding)),
        )

    def pool_query(self, query: Tensor) -> Tensor:
        """Return ``Float32[b h r Pq*d]``; nothing is differentiated through pooling."""
        pooled = torch.ops.seer_compile.pool_blocks.v1(
            query.detach(), self.config.query_sub_block, ",".join(self.config.query_pools), None
        )
        return pooled.float()

    def pool_key(self, key: Tensor, key_padding: Tensor | None = None) -> Tensor:
        """Return ``Float32[b g c Pk*d]`` over the keys that are not padding."""
        pooled = torch.ops.seer_compile.pool_blocks.v1(
            key.detach(), self.config.key_sub_block, ",".join(self.config.key_pools), key_padding
        )
        return pooled.float()

    def project_query(self, pooled: Tensor) -> Tensor:
        """Return ``Float32[b a r e]`` from ``Float32[b h r Pq*d]``."""
        groups = self.heads // self.gate_heads
        pooled = pooled.unflatten(1, (-1, groups))
        weight = self.query_weight.unflatten(0, (-1, groups))
        return torch.einsum("baurp,aupe->bare", pooled, weight)

    def project_key(self, pooled: Tensor) -> Tensor:
        """Return ``Float32[b a c e]``, one per gate head, from ``Float32[b g c Pk*d]``."""
        weight = self.key_weight.unflatten(0, (self.kv_heads, -1))
        return torch.einsum("bgcp,gupe->bguce", pooled, weight).flatten(1, 2)

    def row_log_mass(
        self,
        query: Tensor,
        key: Tensor,
        scale: float,
        visibility: Visibility,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Predict the log of the mass that each key block carries for single query sub-blocks.

        Args:
            query: ``Float[b h q d]``.
            key: ``Float[b g k d]``.
            scale: Factor on the logits.
            visibility: What each query may read.
            rows: ``Int64[R]``, indices of query sub-blocks; all when None.

        Returns:
            ``Float32[b a R n]``, differentiable in the weights. Rows that see anything sum to 1
            after ``exp``; hidden blocks are at most ``HIDDEN_LOGIT`` plus a few units.
        """
        visible = visible_units(
            visibility,
            units=(self.config.query_sub_block, self.config.key_sub_block),
            lengths=(query.shape[-2], key.shape[-2]),
            device=query.device,
            rows=rows,
        )
        query_features, key_features = self.features(query, key, visibility.key_padding)
        if rows is not None:
            query_features = query_features[:, :, rows]
        per_block = self.config.block_size.key // self.config.key_sub_block
        return block_log_mass(query_features, key_features, scale, visible, per_block)

    def block_scores(self, inputs: SiteInputs) -> Tensor:
        """Return ``Float32[b s m n]``: the share of mass of each block for its neediest sub-row.

        Raises:
            ShapeError: The tensors do not have the heads or the head dim of this gate.
        """
        self._check(inputs)
        query_features, key_features = self.features(
            inputs.query, inputs.key, inputs.visibility.key_padding
        )
        return torch.ops.seer_compile.block_scores.v1(
            query_features.detach(),
            key_features.detach(),
            inputs.scale,
            self.config.query_sub_block,
            self.config.key_sub_block,
            *self._block_arguments(inputs),
            self.gate_heads // self.selection_heads,
            *inputs.visibility.as_arguments().values(),
        )

    def select(self, inputs: SiteInputs, budget: Tensor | None = None) -> BlockSelection:
        """Select the key blocks that each query block reads.

        Args:
            inputs: Operands of the site.
            budget: ``Float[s]``; the gate's own table at this key length when None.
        """
        if budget is None:
            budget = self.budget_at(inputs.key.shape[-2])
        return self.select_from(self.block_scores(inputs), inputs, budget)

    def select_from(self, scores: Tensor, inputs: SiteInputs, budget: Tensor) -> BlockSelection:
        """Select from block scores ``Float32[b s m n]`` that are at hand."""
        indices, counts = torch.ops.seer_compile.select_blocks.v1(
            scores,
            budget,
            self.config.selector.name,
            *self._block_arguments(inputs),
            *inputs.visibility.as_arguments().values(),
        )
        return BlockSelection(indices, counts)

    def attend(self, inputs: SiteInputs) -> Tensor:
        """Answer the site by one operator: ``Float[b h q v]``, dense while ``mode`` is 0."""
        self._check(inputs)
        return torch.ops.seer_compile.gated_attention.v1(
            inputs.query,
            inputs.key,
            inputs.value,
            self.query_weight,
            self.key_weight,
            self.budget,
            self.mode,
            inputs.scale,
            *self.constants().values(),
            inputs.name,
            *inputs.last_arguments(),
        )[0]

    def constants(self) -> dict[str, Any]:
        """Return what a graph bakes in: arguments of ``gated_attention`` in their order."""
        return {
            "query_pools": ",".join(self.config.query_pools),
            "key_pools": ",".join(self.config.key_pools),
            "query_sub_block": self.config.query_sub_block,
            "key_sub_block": self.config.key_sub_block,
            "query_block": self.config.block_size.query,
            "key_block": self.config.block_size.key,
            "sharing": self.config.sharing,
            "selector": self.config.selector.name,
            "budget_lengths": list(BUDGET_LENGTHS),
        }

    def budget_at(self, k_len: int) -> Tensor:
        """Return ``Float64[s]``: the table at a key length, linear in log2(length), clamped."""
        return budget_at(self.budget, list(BUDGET_LENGTHS), k_len)

    def _check(self, inputs: SiteInputs) -> None:
        expected = (self.heads, self.kv_heads, self.head_dim)
        got = (inputs.query.shape[1], inputs.key.shape[1], inputs.query.shape[-1])
        if got != expected:
            raise ShapeError(
                argument="(heads, kv_heads, head_dim)",
                got=tuple(got),
                expected=f"{expected}, the sizes of this gate",
                context={"site": inputs.name},
            )

    def _block_arguments(self, inputs: SiteInputs) -> tuple[int, int, int, int]:
        size = self.config.block_size
        return size.query, size.key, inputs.query.shape[-2], inputs.key.shape[-2]

    def _initial_weights(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator(device="cpu").manual_seed(self.seed)
        query_side, key_side = _projections(self.head_dim, self.config.gate_dim, generator)
        # Of heads that are projected together each counts its share.
        query = _identity(self.config.query_pools, query_side) * (self.gate_heads / self.heads)
        key = _identity(self.config.key_pools, key_side)
        return (
            query.expand(self.heads, -1, -1).clone(),
            key.expand(self.gate_heads, -1, -1).clone(),
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AttnGate:
        mode = self.mode

        def move(tensor: Tensor) -> Tensor:
            if tensor is mode:
                return tensor
            probe = fn(tensor.detach().new_empty(0))
            # Casting would round the weights; the gate computes in float32 beside any model.
            return fn(tensor) if probe.dtype == tensor.dtype else tensor.to(probe.device)

        return super()._apply(move, recurse)

    def _load_from_state_dict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        # Compiled graphs hold the parameter objects: values are copied in, never swapped.
        local_metadata = {**local_metadata, "assign_to_params_buffers": False}
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def _projections(head_dim: int, gate_dim: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return ``Float32[d e]`` twice: the dot product of projections is that of the inputs.

    Below the head dim it holds in expectation. Above, the channels beyond it are random on the
    key side and zero on the query side: they add nothing at first and yet have a gradient.
    """
    if gate_dim < head_dim:
        noise = torch.randn(
            head_dim, gate_dim, generator=generator, dtype=torch.float64, device="cpu"
        )
        basis = torch.linalg.qr(noise)[0] * math.sqrt(head_dim / gate_dim)
        return basis.float(), basis.float()
    query = torch.eye(head_dim, gate_dim, dtype=torch.float32, device="cpu")
    key = query.clone()
    spare = (head_dim, gate_dim - head_dim)
    key[:, head_dim:] = torch.randn(spare, generator=generator, dtype=torch.float32, device="cpu")
    key[:, head_dim:] /= math.sqrt(head_dim)
    return query, key


def _identity(kinds: tuple[PoolKind, ...], projection: Tensor) -> Tensor:
    """Stack a projection for each pool kind: the mean alone counts, or the extremes evenly."""
    shares = {"mean": 1.0} if "mean" in kinds else dict.fromkeys(kinds, 1 / len(kinds))
    return torch.cat([projection * shares.get(kind, 0.0) for kind in kinds])
