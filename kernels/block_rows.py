"""The rows of a block-sparse call and the order in which they are walked, on the CPU.

A row is one query block of the heads that share both a key head and a selection (*lanes*: heads x
queries). Rows with equally long lists form a batch; a batch is walked in steps of so many blocks
that what is gathered stays in cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from seer_compile.errors import SelectionError
from seer_compile.kernels.geometry import UNBOUNDED, Band, document_range, units_with_key
from seer_compile.types import Visibility

_BATCH_ELEMENTS = 1 << 21
"""Gathered keys, values and logits of one batch of rows: 8 MB of float32."""
_STEP_KEYS = 4096
"""Most keys of a row in one step."""


class Step(NamedTuple):
    """A batch of rows and a stretch of their lists."""

    rows: Tensor
    """``Int64[R]``."""
    tiles: Tensor
    """``Int64[R * c]``: key tiles, row by row; tile 0 past the count."""
    edge: Tensor
    """``Int64[E]``: places in ``tiles`` that need a mask."""
    mask: Tensor
    """``Bool[E keys 1 queries]``: what the queries of the row may read of the edge tile."""
    is_last: bool


class BlockRows:
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
        inside = [torch.arange(size, dtype=torch.int16) for size in blocks]
        self.distance = inside[1][:, None] - inside[0]

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
        tiles = _padded(tokens.to(dtype), short)
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
        tiles = _padded(tokens.to(dtype), short)
        return tiles.reshape(-1, self.key_block, tokens.shape[-1])

    def key_tokens(self, tiles: Tensor) -> Tensor:
        """Return ``[b g k d]``, a view, from ``[tiles, keys, d]``."""
        tokens = tiles.reshape(self.batch, self.kv_heads, -1, tiles.shape[-1])
        return tokens[:, :, : self.k_len]

    def steps(self, width: int) -> Iterator[Step]:
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

    def _step(self, rows: Tensor, begin: int, end: int, longest: int) -> Step:
        places = torch.arange(begin, end)
        columns = self.indices[rows[:, None], places.clamp(max=self.indices.shape[1] - 1)]
        used = places < self.counts[rows, None]
        edge = (~(self._is_interior(rows, columns) & used)).flatten().nonzero()[:, 0]
        tiles = (self.first_tile[rows, None] + columns).flatten()
        mask = self._mask(rows, columns, used, edge)
        return Step(rows, tiles, edge, mask, end == longest)

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
        first_query = row[:, None] * self.query_block
        first_key = columns.flatten()[edge, None] * self.key_block
        query = first_query + torch.arange(self.query_block)
        key = first_key + torch.arange(self.key_block)
        readable = used.flatten()[edge, None] & (key < self.k_len)
        key = key.clamp(max=self.k_len - 1)
        if self.visibility.key_padding is not None:
            readable &= self.visibility.key_padding[item[:, None], key]
        # Within a tile distances are small and the same for all: the band moves instead.
        shift = (first_key - first_query)[:, :, None]
        span = self.query_block + self.key_block
        upper = (self.band.upper - shift).clamp(-span, span).to(torch.int16)
        lower = (self.band.lower - shift).clamp(-span, span).to(torch.int16)
        mask = self.distance <= upper
        if self.band.lower > -UNBOUNDED // 2:
            mask &= self.distance >= lower
        if not readable.all():
            mask &= readable[:, :, None]
        if self.q_len % self.query_block:
            mask &= (query < self.q_len)[:, None]
        query_ids, key_ids = self.visibility.query_documents, self.visibility.key_documents
        if query_ids is not None and key_ids is not None:
            query = query.clamp(max=self.q_len - 1)
            ids = key_ids[item[:, None], key][:, :, None]
            mask &= ids == query_ids[item[:, None], query][:, None]
        return mask[:, :, None]


def _padded(tokens: Tensor, short: int) -> Tensor:
    return F.pad(tokens, (0, 0, 0, short)) if short else tokens


def _padded_counts(counts: Tensor) -> Tensor:
    """Round list lengths up to few sizes, by an eighth at most.

    The size depends on the row alone, and so do the shapes and the rounding of its products:
    a row gives the same bits whatever else is in the call.
    """
    step = 2 ** (counts.clamp(min=1).double().log2().floor().long() - 3).clamp(min=0)
    return (counts + step - 1) // step * step
