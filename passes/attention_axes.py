"""From the operands of an attention to the canonical axes: batch, heads, tokens, dim.

The letters of the logits that are neither query nor key are batch or heads. Three dimensions may
hide both in one; five may split either; keys may be repeated over the inner part of the heads. This
module finds the partition under which query, key and value all take the canonical form, preferring
keys and values before their repetition, and writes down the layout calls that get there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from seer_compile.passes.axes import AxisBook, Layout, Letters
from seer_compile.passes.canonical_steps import steps_from_canonical, steps_to_canonical
from seer_compile.passes.fx_utils import fake_value, is_known
from seer_compile.passes.peel_layouts import Peeled
from seer_compile.types import LayoutStep, Operand


@dataclass(frozen=True, slots=True)
class Products:
    """The two products of an attention: their operands, ways back, and letters."""

    query: list[Peeled]
    key: list[Peeled]
    value: list[Peeled]
    batch: tuple[Letters, ...]
    """One entry per dimension of the logits that is neither query nor key."""
    query_tokens: Letters
    key_tokens: Letters
    head_dim: Letters
    value_dim: Letters
    output: Layout


@dataclass(frozen=True, slots=True)
class Arrangement:
    """Operands in canonical form."""

    query: Operand
    key: Operand
    value: Operand
    output_steps: tuple[LayoutStep, ...]
    batch: Letters
    heads: Letters
    kv_heads: Letters
    factor: float
    """What the graph multiplied query and key by before their product, left out here."""


@dataclass(frozen=True, slots=True)
class _Candidate:
    operand: Operand
    factor: float


def heads_among_rows(products: Products, book: AxisBook, masked: Letters) -> Products:
    """Tell heads from tokens where rows are both: multi-query attention by one product.

    Rows that read the same keys may be parted in any way; it is the mask that tells the tokens.

    Args:
        products: The two products.
        book: Their letters.
        masked: Letters along which a mask differs.
    """
    rows, differing = book.resolve(products.query_tokens), set(book.resolve(masked))
    tokens = tuple(letter for letter in rows if letter in differing)
    heads = tuple(letter for letter in rows if letter not in differing)
    if len(rows) != 2 or not tokens or not heads or not isinstance(book.size(heads), int):
        return products

    def repeated(states: list[Peeled]) -> list[Peeled]:
        return [replace(state, repeated=state.repeated | set(heads)) for state in states]

    return replace(
        products,
        query_tokens=tokens,
        batch=(*products.batch, heads),
        key=repeated(products.key),
        value=repeated(products.value),
    )


def arrange(
    products: Products,
    book: AxisBook,
    dtype: torch.dtype,
    masked: Letters = (),
    per_head: Letters = (),
) -> Arrangement | None:
    """Return the operands and the output in canonical axes; None where no partition fits.

    Args:
        products: The two products.
        book: Their letters.
        dtype: Of the output. Operands of it are preferred: those widened for the products alone
            are read before.
        masked: Letters along which a mask differs; a mask is more likely one of batch items.
        per_head: Letters along which sinks differ; where these are all, there is no batch.
    """
    flat = book.resolve([letter for dimension in products.batch for letter in dimension])
    # A mask of merged batch and heads says nothing about either.
    by_item = set(book.resolve(masked)) if len(products.batch) > 1 else set[str]()
    counts = _partitions(products, book, len(flat))
    fixed = set(book.resolve(per_head))
    if fixed and fixed == set(flat):
        counts = [0]
    for batch_count in sorted(counts, key=lambda count: bool(by_item & set(flat[count:]))):
        # Only a fixed number of heads may be unmerged from the batch.
        is_cut = len(products.batch) == 1 and batch_count < len(flat)
        if is_cut and not isinstance(book.size(flat[batch_count:]), int):
            continue
        found = _arrange(products, book, dtype, flat[:batch_count], flat[batch_count:])
        if found is not None:
            return found
    return None


def _partitions(products: Products, book: AxisBook, count: int) -> list[int]:
    """Return how many leading letters may be the batch, most likely first."""
    lengths = [len(book.resolve(dimension)) for dimension in products.batch]
    if len(lengths) == 1:
        return [*range(1, count), count]
    repeated = {letter for state in products.key for letter in book.resolve(list(state.repeated))}
    last = set(book.resolve(products.batch[-1]))
    # Five dimensions are batch x groups x repeats where keys repeat over the whole last one,
    # unless their number changes: then the dimension before is one more batch.
    single = {letter for letter in last if is_known(book.sizes[letter] == 1)}
    is_grouped = len(lengths) > 2 and last <= repeated | single
    return [sum(lengths[:-2]), sum(lengths[:-1])] if is_grouped else [sum(lengths[:-1])]


def _arrange(
    products: Products, book: AxisBook, dtype: torch.dtype, batch: Letters, heads: Letters
) -> Arrangement | None:
    query_tokens, key_tokens = (
        book.resolve(products.query_tokens),
        book.resolve(products.key_tokens),
    )
    dims, value_dims = book.resolve(products.head_dim), book.resolve(products.value_dim)
    read = partial(_by_repetition, book, dtype, batch, heads)
    queries = read(products.query, query_tokens, dims)
    keys = read(products.key, key_tokens, dims)
    # Attention has no factor for values: those behind a multiplication do not count.
    unscaled = [state for state in products.value if state.factor == 1]
    values = read(unscaled, key_tokens, value_dims)
    common = sorted(keys.keys() & values.keys())
    groups = (batch, heads, query_tokens, value_dims)
    steps = steps_from_canonical(products.output, groups, book)
    if len(heads) not in queries or not common or steps is None:
        return None
    kept = common[0]
    query, key, value = queries[len(heads)], keys[kept], values[kept]
    return Arrangement(
        query=query.operand,
        key=key.operand,
        value=value.operand,
        output_steps=steps,
        batch=batch,
        heads=heads,
        kv_heads=heads[:kept],
        factor=query.factor * key.factor,
    )


def _by_repetition(
    book: AxisBook,
    dtype: torch.dtype,
    batch: Letters,
    heads: Letters,
    states: Sequence[Peeled],
    tokens: Letters,
    dims: Letters,
) -> dict[int, _Candidate]:
    """Return the simplest operand for each number of leading head letters that it still has."""
    # The first of equals is the one nearest to the product.
    states = sorted(states, key=lambda state: fake_value(state.node).dtype != dtype)
    found: dict[int, _Candidate] = {}
    for state in states:
        repeated = set(book.resolve(list(state.repeated)))
        kept = len(heads) - len(repeated)
        if kept < 0 or repeated != set(heads[kept:]):
            continue
        steps = steps_to_canonical(state.layout, (batch, heads[:kept], tokens, dims), book)
        if steps is None or (kept in found and not _is_simpler(state, steps, found[kept])):
            continue
        found[kept] = _Candidate(Operand(node=state.node, steps=steps), state.factor)
    return found


def _is_simpler(state: Peeled, steps: tuple[LayoutStep, ...], other: _Candidate) -> bool:
    dtypes = {fake_value(node).dtype for node in (state.node, other.operand.node)}
    return len(dtypes) == 1 and len(steps) < len(other.operand.steps)
