"""How an attention's answer lies in memory: as its query does.

    heads of the query further apart than its tokens  ->  out lies as a contiguous b h q v
    else, as in a view of b q h d                     ->  out lies as a contiguous b q h v

Flash attention, cuDNN and SDPA's kernel for the CPU lay their answer out like the query too, so a
dense answer is handed on as it is. The fakes and every implementation ask here: graphs hold views
that are legal for the strides that a fake promised, and only for those.
"""

from __future__ import annotations

import torch
from torch import Tensor


def is_heads_first(query: Tensor) -> bool:
    """Whether the heads of a query lie further apart than its tokens.

    With one head or one token both layouts of an answer are the same memory.

    Args:
        query: ``Float[b h q d]``; sizes and strides may be symbolic.
    """
    head, token = query.stride(1), query.stride(2)
    answer = head > token
    return _decided(head, token) if isinstance(answer, torch.SymBool) else answer


def _decided(head: int, token: int) -> bool:
    """Compare symbolic strides, by a guard only where what is known of the sizes leaves it open."""
    # Only where there is something symbolic: the module loads SymPy.
    from torch.fx.experimental.symbolic_shapes import guard_or_false, statically_known_true

    if statically_known_true(head <= token):
        return False
    # A length that the data decides may be one or none, so "further" is not known. "No closer" is,
    # and heads lie as close as tokens only where there is at most one token.
    return statically_known_true(head >= token) or guard_or_false(head > token)


def empty_like_query(query: Tensor, value: Tensor) -> Tensor:
    """Return an empty answer, ``[b h q v]``, that lies like its query.

    Args:
        query: ``Float[b h q d]``; also gives dtype and device.
        value: ``Float[b g k v]``.
    """
    batch, heads, q_len, _ = query.shape
    if is_heads_first(query):
        return query.new_empty(batch, heads, q_len, value.shape[-1])
    return query.new_empty(batch, q_len, heads, value.shape[-1]).transpose(1, 2)


def laid_like_query(out: Tensor, query: Tensor) -> Tensor:
    """Return equal values that lie like the query; the tensor itself where it does.

    Args:
        out: ``Float[b h q v]``, strides known.
        query: ``Float[b h q d]``.
    """
    _, heads, q_len, dim = out.shape
    is_first = is_heads_first(query)
    inner = (q_len * dim, dim, 1) if is_first else (dim, heads * dim, 1)
    strides = (heads * q_len * dim, *inner)
    if out.stride() == strides:
        return out
    in_order = out if is_first else out.transpose(1, 2)
    if out.numel() > 0 and in_order.is_contiguous():
        # The same memory: only strides of axes with one entry, which mean nothing, differ.
        return out.as_strided(out.shape, strides)
    return empty_like_query(query, out).copy_(out)
