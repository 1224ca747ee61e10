"""Attention mass: the true softmax map of attention, pooled, without ever storing it.

Tokens are the rows and columns of :mod:`row_statistics`. This is the target that gates learn, and
the score of the oracle that selections are judged against.
"""

from __future__ import annotations

from torch import Tensor

from seer_compile.errors import RangeError
from seer_compile.kernels.triton.block_scores import column_rules, pooled_softmax_map
from seer_compile.kernels.triton.primitives import ceil_div, padded_dim
from seer_compile.kernels.triton.tuning import MapTiling, mass_tiling, shared_memory

_LARGEST_UNIT = 128


def _reduction(argument: str, got: str, choices: tuple[str, str]) -> bool:
    if got not in choices:
        raise RangeError(argument=argument, got=got, expected=f"one of {choices}")
    return got == choices[0]


def launch(
    query: Tensor,
    key: Tensor,
    scale: float,
    query_unit: int,
    key_unit: int,
    query_reduce: str,
    key_reduce: str,
    upper: int | None = None,
    lower: int | None = None,
    offset: Tensor | None = None,
    key_padding: Tensor | None = None,
    query_documents: Tensor | None = None,
    key_documents: Tensor | None = None,
    *,
    tiling: MapTiling | None = None,
) -> Tensor:
    """Pool the attention probabilities of unit pairs.

    Args:
        query: ``Float[b h q d]``.
        key: ``Float[b g k d]``.
        scale: Factor on the logits.
        query_unit: Query tokens per unit, 1 to 128.
        key_unit: Key tokens per unit, 1 to 128.
        query_reduce: ``mean`` over the queries of a unit that read anything, or ``max``.
        key_reduce: ``sum`` or ``max`` over the keys of a unit.
        upper: Largest visible ``j - i``.
        lower: Smallest visible ``j - i``.
        offset: ``Int[]``, added to both bounds.
        key_padding: ``Bool[b k]``.
        query_documents: ``Int[b q]``.
        key_documents: ``Int[b k]``.
        tiling: Overrides the tuning table.

    Returns:
        ``Float32[b h ceil(q/query_unit) ceil(k/key_unit)]``.

    Raises:
        RangeError: A unit or a reduction is not one of the above.

    Cost:
        The first product of attention, twice; four bytes per query besides the result.
    """
    for argument, unit in (("query_unit", query_unit), ("key_unit", key_unit)):
        if not 1 <= unit <= _LARGEST_UNIT:
            raise RangeError(argument=argument, got=unit, expected=f"1 to {_LARGEST_UNIT} tokens")
    is_mean = _reduction("query_reduce", query_reduce, ("mean", "max"))
    is_sum = _reduction("key_reduce", key_reduce, ("sum", "max"))
    q_len, k_len = query.shape[2], key.shape[2]
    return pooled_softmax_map(
        query,
        key,
        scale,
        1,
        query_unit,
        key_unit,
        ceil_div(q_len, query_unit),
        ceil_div(k_len, key_unit),
        q_len,
        k_len,
        1,
        is_sum,
        is_mean,
        upper,
        lower,
        offset,
        column_rules(1, key_padding, query_documents, key_documents),
        tiling or mass_tiling(padded_dim(query.shape[3]), query.dtype, shared_memory(query.device)),
    )
