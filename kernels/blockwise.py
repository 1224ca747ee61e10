"""Block-sparse attention on the CPU: gathers the selected blocks only, forward and backward.

    out[i] = sum_j p[i, j] value[j],  p = softmax over the readable keys j of the selected blocks

A batch of rows (see :mod:`.block_rows`) gathers its key and value tiles, multiplies them by its
queries as one batched product, and walks long lists in steps with the running softmax of
FlashAttention, in base 2. Logits are held transposed, ``[rows, keys, lanes]``: the tile of every
block is then contiguous, and masks, which only tiles on the edge of what is visible need, are
written tile by tile.

A softcap bounds the logits by ``softcap * tanh(logits / softcap)`` before the mask; its derivative,
``1 - tanh^2``, multiplies their gradient.

Numerics: float32 inside (float64 for float64). What is not finite in a value row spoils exactly
the queries that may read that row.

Source:
    Dao, "FlashAttention-2", arXiv:2307.08691.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from seer_compile.kernels.block_rows import BlockRows, Step
from seer_compile.result_layout import empty_like_query
from seer_compile.types import Visibility

LOG2_E = math.log2(math.e)


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    counts: Tensor,
    scale: float,
    query_block: int,
    key_block: int,
    visibility: Visibility,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ``out [b h q v]`` and ``lse [b h q]``; see ``ops.block_sparse_attention``."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    result = empty_like_query(query, value)
    if result.numel() == 0 or key.shape[2] == 0:
        return result.zero_(), torch.full(query.shape[:3], -torch.inf, dtype=dtype)
    rows = BlockRows(
        (query.shape, key.shape), indices, counts, (query_block, key_block), visibility
    )
    queries, keys = rows.query_tiles(query, dtype), rows.key_tiles(key, dtype)
    values, spoilt = _finite(rows.key_tiles(value, dtype))
    out = queries.new_zeros(*queries.shape[:2], value.shape[-1])
    lse = queries.new_full(queries.shape[:2], -torch.inf)
    state, workspace = None, _Workspace(queries)
    for step in rows.steps(query.shape[-1] + value.shape[-1]):
        logits = _masked_logits(queries[step.rows], keys, step, (scale, softcap), workspace)
        largest = logits.amax(1)
        if state is not None:
            largest = torch.maximum(largest, state[0])
        # A lane without a readable key so far has maximum -inf, and -inf - -inf is NaN.
        base = largest.masked_fill(largest == -torch.inf, 0.0)
        weights = logits.sub_(base[:, None]).exp2_()
        total = weights.sum(1)
        part = _product(weights, values, spoilt, step, workspace)
        if state is not None:
            rescale = (state[0] - base).exp2_()
            total.addcmul_(state[1], rescale)
            part.addcmul_(state[2], rescale[:, :, None])
        state = None if step.is_last else (largest, total, part)
        if step.is_last:
            out[step.rows] = part.div_(total.masked_fill(total == 0, 1.0)[:, :, None])
            lse[step.rows] = total.log_().add_(base, alpha=1 / LOG2_E)
    result.copy_(rows.query_tokens(out))
    return result, rows.query_tokens(lse[..., None]).squeeze(-1).contiguous()


class _Workspace:
    """Memory of the large intermediates, kept from step to step: fresh pages are slow."""

    def __init__(self, like: Tensor) -> None:
        self._like, self._buffers = like, {}

    def take(self, name: str, *shape: int) -> Tensor:
        """Return an uninitialised tensor in the memory that this name had before."""
        numel = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < numel:
            buffer = self._buffers[name] = self._like.new_empty(numel)
        return buffer[:numel].view(shape)

    def gather(self, name: str, tiles: Tensor, step: Step) -> Tensor:
        """Return ``[R, keys, d]``: the tiles of a step, those of a row after each other."""
        target = self.take(name, len(step.tiles), *tiles.shape[1:])
        torch.index_select(tiles, 0, step.tiles, out=target)
        return target.view(len(step.rows), -1, tiles.shape[-1])


def _masked_logits(
    queries: Tensor,
    keys: Tensor,
    step: Step,
    scaling: tuple[float, float | None],
    workspace: _Workspace,
) -> Tensor:
    """Return ``[R, keys, lanes]`` times log2(e), -inf where a lane may not read a key.

    ``scaling`` is the scale of the logits, and their softcap.
    """
    gathered = workspace.gather("keys", keys, step)
    target = workspace.take("logits", len(step.rows), gathered.shape[1], queries.shape[1])
    scale, softcap = scaling
    turned, factor = queries.transpose(1, 2), scale * LOG2_E if softcap is None else scale / softcap
    logits = torch.baddbmm(target, gathered, turned, beta=0, alpha=factor, out=target)
    if softcap is not None:
        logits.tanh_().mul_(softcap * LOG2_E)
    return _fill_edges(logits, step, -torch.inf)


def _slope(logits: Tensor, softcap: float, workspace: _Workspace) -> Tensor:
    """Return the derivative of the softcap, ``1 - tanh^2``; 0 where a logit is hidden."""
    target = workspace.take("slopes", *logits.shape)
    torch.mul(logits, 1 / (softcap * LOG2_E), out=target)
    return target.square_().neg_().add_(1).clamp_(min=0)


def _fill_edges(weights: Tensor, step: Step, fill: float) -> Tensor:
    """Overwrite, in place, what the mask of the edge tiles hides."""
    if len(step.edge) == 0:
        return weights
    num_keys, num_queries = step.mask.shape[1], step.mask.shape[3]
    tiles = weights.view(len(step.tiles), num_keys, -1, num_queries)
    tiles[step.edge] = tiles[step.edge].masked_fill_(~step.mask, fill)
    return weights


def _finite(tiles: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return tiles with zeros for what is not finite, and the original where that changed any."""
    # A finite sum has finite terms, and costs a tenth of looking at them.
    if tiles.sum().isfinite():
        return tiles, None
    finite = tiles.isfinite()
    return (tiles, None) if finite.all() else (tiles.where(finite, 0.0), tiles)


def _product(
    weights: Tensor, values: Tensor, spoilt: Tensor | None, step: Step, workspace: _Workspace
) -> Tensor:
    """Return ``weights^T @ values`` of the gathered tiles, ``[R, lanes, v]``."""
    gathered = workspace.gather("values", values, step)
    result = torch.bmm(weights.transpose(1, 2), gathered)
    if spoilt is None:
        return result
    reads = _fill_edges(torch.ones_like(weights), step, 0.0)
    original = spoilt.index_select(0, step.tiles).reshape(gathered.shape)
    return _spoil(result, reads.transpose(1, 2), original)


def _spoil(result: Tensor, reads: Tensor, operand: Tensor) -> Tensor:
    """Add to a product what its finite operand left out: NaN and infinities that are read."""
    nan = torch.bmm(reads, operand.isnan().to(reads.dtype)) > 0
    for sign in (torch.inf, -torch.inf):
        hit = torch.bmm(reads, (operand == sign).to(reads.dtype)) > 0
        result = torch.where(hit, result + sign, result)
    return result.masked_fill(nan, torch.nan)


def attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    indices: Tensor,
    counts: Tensor,
    scale: float,
    query_block: int,
    key_block: int,
    visibility: Visibility,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value, contiguous; see ``ops``."""
    if out.numel() == 0 or key.numel() == 0:
        return tuple(
            torch.zeros(tensor.shape, dtype=tensor.dtype) for tensor in (query, key, value)
        )  # type: ignore[return-value]
    rows = BlockRows(
        (query.shape, key.shape), indices, counts, (query_block, key_block), visibility
    )
    dtype = torch.promote_types(query.dtype, torch.float32)
    reads = (lse != -torch.inf)[..., None]
    # Lanes that read nothing take no part: their gradient may hold anything, NaN too.
    grads, spoilt = _finite(rows.query_tiles(grad_out.where(reads, 0.0), dtype))
    queries, keys = rows.query_tiles(query.where(reads, 0.0), dtype), rows.key_tiles(key, dtype)
    finite_queries, finite_keys = _finite(queries)[0], _finite(keys)[0]
    values = _finite(rows.key_tiles(value, dtype))[0]
    delta = (grad_out.to(dtype) * out).sum(-1, keepdim=True).where(reads, 0.0)
    delta = rows.query_tiles(delta, dtype).squeeze(-1)
    shift = lse.masked_fill(lse == -torch.inf, torch.inf)[..., None] * LOG2_E
    shift = rows.query_tiles(shift, dtype).squeeze(-1)
    grad_query, workspace = torch.zeros_like(queries), _Workspace(queries)
    grad_key, grad_value = torch.zeros_like(keys), torch.zeros_like(values)
    for step in rows.steps(query.shape[-1] + value.shape[-1]):
        weights = _masked_logits(queries[step.rows], keys, step, (scale, softcap), workspace)
        slope = None if softcap is None else _slope(weights, softcap, workspace)
        weights.sub_(shift[step.rows, None]).exp2_()
        grad = grads[step.rows]
        part = torch.bmm(weights, grad)
        if spoilt is not None:
            lanes = _fill_edges(torch.ones_like(weights), step, 0.0)
            part = _spoil(part, lanes, spoilt[step.rows])
        grad_value.index_add_(0, step.tiles, part.view(-1, *values.shape[1:]))
        gathered = workspace.gather("values", values, step)
        grad_weights = workspace.take("gradients", *weights.shape)
        torch.bmm(gathered, grad.transpose(1, 2), out=grad_weights)
        grad_weights.sub_(delta[step.rows, None])
        if slope is not None:
            grad_weights.mul_(slope)
        grad_logits = _fill_edges(weights.mul_(grad_weights), step, 0.0)
        gathered = workspace.gather("keys", finite_keys, step)
        grad_query[step.rows] += torch.bmm(grad_logits.transpose(1, 2), gathered)
        part = torch.bmm(grad_logits, finite_queries[step.rows])
        grad_key.index_add_(0, step.tiles, part.view(-1, *keys.shape[1:]))
    return (
        rows.query_tokens(grad_query.mul_(scale)).to(query.dtype).contiguous(),
        rows.key_tokens(grad_key.mul_(scale)).to(key.dtype).contiguous(),
        rows.key_tokens(grad_value).to(value.dtype).contiguous(),
    )
