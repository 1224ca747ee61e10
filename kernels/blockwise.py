"""Block-sparse attention on the CPU: gathers the selected blocks only, forward and backward.

    out[i] = sum_j p[i, j] value[j],  p = softmax over the readable keys j of the selected blocks

A row is one query block of the heads that share both a key head and a selection (*lanes*: heads x
queries). Rows are sorted by their number of blocks, so that a batch of rows pads little; a batch
gathers its key and value tiles, multiplies them by its queries as one batched product, and walks
long lists in steps with the running softmax of FlashAttention. Logits are held transposed,
``[rows, keys, lanes]``: the tile of every block is then contiguous, and masks, which only tiles
on the edge of what is visible need, are written tile by tile.

Numerics: float32 inside (float64 for float64). What is not finite in a value row spoils exactly
the queries that may read that row.

Source:
    Dao, "FlashAttention-2", arXiv:2307.08691.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from seer_compile.errors import SelectionError
from seer_compile.kernels.geometry import Band, document_range, units_with_key
from seer_compile.types import Visibility

_BATCH_ELEMENTS = 1 << 21
"""Gathered keys, values and logits of one batch of rows: 8 MB of float32."""
_STEP_KEYS = 4096
"""Most keys of a row in one step."""


class _Step(NamedTuple):
    """A batch of rows and a stretch of their lists."""

    rows: Tensor
    """``Int64[R]``."""
    tiles: Tensor
    """``Int64[R * c]``: key tiles, row by row; tile 0 past the count."""
    edge: Tensor
    """``Int64[E]``: places in ``tiles`` that need a mask."""
    mask: Tensor
    """``Bool[E keys 1 queries]``: what the queries of the row may read of the edge tile."""
    is_first: bool
    is_last: bool


class _Rows:
    """The rows of one call, their lists, and the steps that walk them."""

    def __init__(
        self,
        shapes: tuple[torch.Size, torch.Size],
        indices: Tensor,
        counts: Tensor,
        blocks: tuple[int, int],
        visibility: Visibility,
    ) -> None:
        (self.batch, self.heads, self.q_len, _), (_, self.kv_heads, self.k_len, _) = shapes
        self.query_block, self.key_block = blocks
        self.num_rows, self.num_columns = -(-self.q_len // blocks[0]), -(-self.k_len // blocks[1])
        selections = indices.shape[1]
        self.streams = max(selections, self.kv_heads)
        self.lanes = self.heads // max(self.streams, 1)
        self.band, self.visibility = Band.of(visibility), visibility
        stream = torch.arange(self.streams)
        of_selection = stream // max(self.streams // max(selections, 1), 1)
        self.indices = indices[:, of_selection].flatten(0, 2).long()
        self.counts = counts[:, of_selection].flatten().long()
        self._check()
        item, head, row = torch.meshgrid(
            torch.arange(self.batch), stream, torch.arange(self.num_rows), indexing="ij"
        )
        of_key = head // max(self.streams // max(self.kv_heads, 1), 1)
        self.item, self.row = item.flatten(), row.flatten()
        self.first_tile = (item * self.kv_heads + of_key).flatten() * self.num_columns
        self.padded = self._padded_blocks()

    def _check(self) -> None:
        capacity = self.indices.shape[1]
        if not 0 <= int(self.counts.min()) <= int(self.counts.max()) <= capacity:
            raise SelectionError(
                argument="counts",
                got=(int(self.counts.min()), int(self.counts.max())),
                expected=f"in [0, {capacity}], the capacity of indices",
            )
        used = torch.arange(capacity) < self.counts[:, None]
        kept = self.indices.masked_fill(~used, 0)
        if used.any() and not 0 <= int(kept.min()) <= int(kept.max()) < self.num_columns:
            raise SelectionError(
                argument="indices",
                got=(int(kept.min()), int(kept.max())),
                expected=f"in [0, {self.num_columns}), the key blocks",
            )
        self.indices = kept

    def _padded_blocks(self) -> Tensor | None:
        padding = self.visibility.key_padding
        return None if padding is None else units_with_key(~padding, self.key_block)

    def query_tiles(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """Return ``[rows, lanes, d]`` from ``[b h q d]``; zeros past the end."""
        short = self.num_rows * self.query_block - self.q_len
        tiles = F.pad(tokens.to(dtype), (0, 0, 0, short))
        tiles = tiles.reshape(
            self.batch, self.streams, self.lanes, self.num_rows, self.query_block, -1
        )
        return tiles.transpose(2, 3).reshape(-1, self.lanes * self.query_block, tokens.shape[-1])

    def query_tokens(self, tiles: Tensor) -> Tensor:
        """Return ``[b h q d]``, a view, from ``[rows, lanes, d]``."""
        shape = (self.batch, self.streams, self.num_rows, self.lanes, self.query_block)
        tokens = tiles.reshape(*shape, tiles.shape[-1]).transpose(2, 3)
        return tokens.reshape(self.batch, self.heads, -1, tiles.shape[-1])[:, :, : self.q_len]

    def key_tiles(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """Return ``[tiles, keys, d]`` from ``[b g k d]``; zeros past the end."""
        short = self.num_columns * self.key_block - self.k_len
        tiles = F.pad(tokens.to(dtype), (0, 0, 0, short))
        return tiles.reshape(-1, self.key_block, tokens.shape[-1])

    def key_tokens(self, tiles: Tensor) -> Tensor:
        """Return ``[b g k d]``, a view, from ``[tiles, keys, d]``."""
        tokens = tiles.reshape(self.batch, self.kv_heads, -1, tiles.shape[-1])
        return tokens[:, :, : self.k_len]

    def steps(self, width: int) -> Iterator[_Step]:
        """Yield batches of rows with about equally many blocks; ``width`` is d plus v.

        The steps of one batch follow each other. Rows without a block are not visited.
        """
        lengths = _padded_counts(self.counts)
        order = lengths.argsort(descending=True, stable=True)
        sizes, numbers = lengths[order].unique_consecutive(return_counts=True)
        most = max(1, _STEP_KEYS // self.key_block)
        start = 0
        for size, number in zip(sizes.tolist(), numbers.tolist(), strict=True):
            slots = min(size, most)
            elements = slots * self.key_block * (width + self.lanes * self.query_block)
            together = max(1, _BATCH_ELEMENTS // max(elements, 1))
            for rows in order[start : start + number].split(together) if size else ():
                for begin in range(0, size, slots):
                    yield self._step(rows, begin, min(begin + slots, size), size)
            start += number

    def _step(self, rows: Tensor, begin: int, end: int, longest: int) -> _Step:
        places = torch.arange(begin, end)
        columns = self.indices[rows[:, None], places.clamp(max=self.indices.shape[1] - 1)]
        used = places < self.counts[rows, None]
        edge = (~(self._is_interior(rows, columns) & used)).flatten().nonzero()[:, 0]
        tiles = (self.first_tile[rows, None] + columns).flatten()
        mask = self._mask(rows, columns, used, edge)
        return _Step(rows, tiles, edge, mask, begin == 0, end == longest)

    def _is_interior(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return ``Bool[R c]``: every query of the row may read every key of the block."""
        first_query = self.row[rows, None] * self.query_block
        first_key = columns * self.key_block
        last_query, last_key = first_query + self.query_block - 1, first_key + self.key_block - 1
        interior = (last_key - first_query <= self.band.upper) & (last_key < self.k_len)
        interior &= (first_key - last_query >= self.band.lower) & (last_query < self.q_len)
        item = self.item[rows, None]
        if self.padded is not None:
            interior &= ~self.padded[item, columns]
        if self.visibility.query_documents is not None:
            interior &= self._is_one_document(item, rows, columns)
        return interior

    def _is_one_document(self, item: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        query_ids, key_ids = self.visibility.query_documents, self.visibility.key_documents
        if query_ids is None or key_ids is None:
            return torch.ones_like(columns, dtype=torch.bool)
        low_q, high_q = document_range(query_ids, self.query_block)
        low_k, high_k = document_range(key_ids, self.key_block)
        row = self.row[rows, None]
        low, high = low_q[item, row], high_k[item, columns]
        return (low == high_q[item, row]) & (low == high) & (low_k[item, columns] == high)

    def _mask(self, rows: Tensor, columns: Tensor, used: Tensor, edge: Tensor) -> Tensor:
        """Return ``Bool[E keys 1 queries]`` for the edge tiles."""
        place = edge // columns.shape[1]
        row, item = self.row[rows][place], self.item[rows][place]
        query = row[:, None] * self.query_block + torch.arange(self.query_block)
        key = columns.flatten()[edge, None] * self.key_block + torch.arange(self.key_block)
        readable = used.flatten()[edge, None] & (key < self.k_len)
        key = key.clamp(max=self.k_len - 1)
        if self.visibility.key_padding is not None:
            readable &= self.visibility.key_padding[item[:, None], key]
        distance = key[:, :, None] - query[:, None, :]
        mask = (distance <= self.band.upper) & (distance >= self.band.lower)
        mask &= readable[:, :, None] & (query < self.q_len)[:, None]
        query_ids, key_ids = self.visibility.query_documents, self.visibility.key_documents
        if query_ids is not None and key_ids is not None:
            query = query.clamp(max=self.q_len - 1)
            ids = key_ids[item[:, None], key][:, :, None]
            mask &= ids == query_ids[item[:, None], query][:, None]
        return mask[:, :, None]


def _padded_counts(counts: Tensor) -> Tensor:
    """Round list lengths up to few sizes, by an eighth at most.

    The size depends on the row alone, and so do the shapes and the rounding of its products:
    a row gives the same bits whatever else is in the call.
    """
    step = 2 ** (counts.clamp(min=1).double().log2().floor().long() - 3).clamp(min=0)
    return (counts + step - 1) // step * step


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
) -> tuple[Tensor, Tensor]:
    """Return ``out [b h q v]`` and ``lse [b h q]``; see ``ops.block_sparse_attention``."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    batch, heads, q_len, _ = query.shape
    result = query.new_empty(batch, q_len, heads, value.shape[-1]).transpose(1, 2)
    if result.numel() == 0 or key.shape[2] == 0:
        return result.zero_(), torch.full(query.shape[:3], -torch.inf, dtype=dtype)
    rows = _Rows((query.shape, key.shape), indices, counts, (query_block, key_block), visibility)
    queries, keys = rows.query_tiles(query, dtype), rows.key_tiles(key, dtype)
    values, spoilt = _finite(rows.key_tiles(value, dtype))
    out = queries.new_zeros(*queries.shape[:2], value.shape[-1])
    lse = queries.new_full(queries.shape[:2], -torch.inf)
    state = None
    for step in rows.steps(query.shape[-1] + value.shape[-1]):
        logits = _masked_logits(queries[step.rows], keys, step, scale)
        largest = logits.amax(1)
        if state is not None:
            largest = torch.maximum(largest, state[0])
        # A lane without a readable key so far has maximum -inf, and -inf - -inf is NaN.
        base = largest.masked_fill(largest == -torch.inf, 0.0)
        weights = logits.sub_(base[:, None]).exp_()
        total = weights.sum(1)
        part = _product(weights, values, spoilt, step)
        if state is not None:
            rescale = (state[0] - base).exp_()
            total.addcmul_(state[1], rescale)
            part.addcmul_(state[2], rescale[:, :, None])
        state = None if step.is_last else (largest, total, part)
        if step.is_last:
            out[step.rows] = part / total.masked_fill(total == 0, 1.0)[:, :, None]
            lse[step.rows] = total.log_().add_(base)
    result.copy_(rows.query_tokens(out))
    return result, rows.query_tokens(lse[..., None]).squeeze(-1).contiguous()


def _masked_logits(queries: Tensor, keys: Tensor, step: _Step, scale: float) -> Tensor:
    """Return ``[R, keys, lanes]``, -inf where a lane may not read a key."""
    gathered = keys.index_select(0, step.tiles).reshape(len(step.rows), -1, keys.shape[-1])
    target = queries.new_empty(len(step.rows), gathered.shape[1], queries.shape[1])
    logits = torch.baddbmm(
        target, gathered, queries.transpose(1, 2), beta=0, alpha=scale, out=target
    )
    return _fill_edges(logits, step, -torch.inf)


def _fill_edges(weights: Tensor, step: _Step, fill: float) -> Tensor:
    """Overwrite, in place, what the mask of the edge tiles hides."""
    if len(step.edge) == 0:
        return weights
    num_keys, num_queries = step.mask.shape[1], step.mask.shape[3]
    tiles = weights.view(len(step.tiles), num_keys, -1, num_queries)
    tiles[step.edge] = tiles[step.edge].masked_fill_(~step.mask, fill)
    return weights


def _finite(tiles: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return tiles with zeros for what is not finite, and the original where that changed any."""
    finite = tiles.isfinite()
    return (tiles, None) if finite.all() else (tiles.where(finite, 0.0), tiles)


def _product(weights: Tensor, values: Tensor, spoilt: Tensor | None, step: _Step) -> Tensor:
    """Return ``weights^T @ values`` of the gathered tiles, ``[R, lanes, v]``."""
    gathered = values.index_select(0, step.tiles).reshape(len(step.rows), -1, values.shape[-1])
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value, contiguous; see ``ops``."""
    if out.numel() == 0 or key.numel() == 0:
        return tuple(
            torch.zeros(tensor.shape, dtype=tensor.dtype) for tensor in (query, key, value)
        )  # type: ignore[return-value]
    rows = _Rows((query.shape, key.shape), indices, counts, (query_block, key_block), visibility)
    dtype = torch.promote_types(query.dtype, torch.float32)
    reads = (lse != -torch.inf)[..., None]
    # Lanes that read nothing take no part: their gradient may hold anything, NaN too.
    grads, spoilt = _finite(rows.query_tiles(grad_out.where(reads, 0.0), dtype))
    queries, keys = rows.query_tiles(query.where(reads, 0.0), dtype), rows.key_tiles(key, dtype)
    finite_queries, finite_keys = _finite(queries)[0], _finite(keys)[0]
    values = _finite(rows.key_tiles(value, dtype))[0]
    delta = (grad_out.to(dtype) * out).sum(-1, keepdim=True).where(reads, 0.0)
    delta = rows.query_tiles(delta, dtype).squeeze(-1)
    shift = rows.query_tiles(lse[..., None].masked_fill(~reads, torch.inf), dtype).squeeze(-1)
    grad_query = torch.zeros_like(queries)
    grad_key, grad_value = torch.zeros_like(keys), torch.zeros_like(values)
    for step in rows.steps(query.shape[-1] + value.shape[-1]):
        weights = _masked_logits(queries[step.rows], keys, step, scale)
        weights.sub_(shift[step.rows, None]).exp_()
        grad = grads[step.rows]
        part = torch.bmm(weights, grad)
        if spoilt is not None:
            lanes = _fill_edges(torch.ones_like(weights), step, 0.0)
            part = _spoil(part, lanes, spoilt[step.rows])
        grad_value.index_add_(0, step.tiles, part.view(-1, *values.shape[1:]))
        gathered = values.index_select(0, step.tiles).reshape(len(step.rows), -1, values.shape[-1])
        grad_weights = torch.bmm(gathered, grad.transpose(1, 2)).sub_(delta[step.rows, None])
        grad_logits = _fill_edges(weights.mul_(grad_weights), step, 0.0)
        gathered = finite_keys.index_select(0, step.tiles).reshape(*weights.shape[:2], -1)
        grad_query[step.rows] += torch.bmm(grad_logits.transpose(1, 2), gathered)
        part = torch.bmm(grad_logits, finite_queries[step.rows])
        grad_key.index_add_(0, step.tiles, part.view(-1, *keys.shape[1:]))
    return (
        rows.query_tokens(grad_query.mul_(scale)).to(query.dtype).contiguous(),
        rows.key_tokens(grad_key.mul_(scale)).to(key.dtype).contiguous(),
        rows.key_tokens(grad_value).to(value.dtype).contiguous(),
    )
