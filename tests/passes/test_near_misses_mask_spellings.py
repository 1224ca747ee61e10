"""Masks that say a known thing in another spelling, and those that only look like it."""

from __future__ import annotations

import torch

from seer_compile.types import SkipCode
from support.graphs import NEG, B, D, H, T
from support.near_misses import NearMisses, attend, positions

near_miss = NearMisses()


def numbers():
    return torch.arange(B * T).view(B, T) // 5


def triangle():
    return torch.ones(T, T, dtype=torch.bool).tril()


@near_miss("same document", extra=lambda: (numbers(),))
def hidden_where_documents_differ(q, k, v, number):
    logits = q @ k.mT
    differ = number[:, None, :, None] != number[:, None, None]
    return logits.masked_fill(differ, NEG).softmax(-1) @ v


@near_miss("causal + same document", extra=lambda: (numbers(),))
def hidden_but_for_earlier_tokens_of_the_document(q, k, v, number):
    seen = (number[:, :, None] == number[:, None]) & triangle()
    bias = torch.zeros_like(seen, dtype=q.dtype).masked_fill(~seen, NEG)
    return attend(q, k, v, bias[:, None])


@near_miss("same document", extra=lambda: (numbers(),))
def not_another_document(q, k, v, number):
    return attend(q, k, v, ~(number[:, None, :, None] != number[:, None, None]))


@near_miss(SkipCode.OPAQUE_MASK, extra=lambda: (numbers(),))
def hidden_where_documents_agree(q, k, v, number):
    logits = q @ k.mT
    same = number[:, None, :, None] == number[:, None, None]
    return logits.masked_fill(same, NEG).softmax(-1) @ v


@near_miss(SkipCode.OPAQUE_MASK, extra=lambda: (numbers(),))
def causal_in_the_document_and_all_of_the_others(q, k, v, number):
    differ = number[:, None, :, None] != number[:, None, None]
    return attend(q, k, v, differ | triangle())


@near_miss("full", extra=lambda: (numbers(),))
def the_document_or_another(q, k, v, number):
    same = number[:, None, :, None] == number[:, None, None]
    return attend(q, k, v, same | ~same)


@near_miss("causal(offset=5)", keys=T + 5)
def zeros_beside_a_triangle(q, k, v):
    future = torch.full((q.shape[2], q.shape[2]), NEG).triu(1)
    return attend(q, k, v, torch.hstack([torch.zeros(q.shape[2], 5), future]))


@near_miss("causal(offset=5)", keys=T + 5)
def ones_beside_a_triangle(q, k, v):
    past = torch.ones(T, 5, dtype=torch.bool)
    return attend(q, k, v, torch.cat([past, triangle()], dim=-1))


@near_miss(SkipCode.OPAQUE_MASK, keys=T + 5)
def a_triangle_beside_ones(q, k, v):
    later = torch.ones(T, 5, dtype=torch.bool)
    return attend(q, k, v, torch.cat([triangle(), later], dim=-1))


@near_miss(SkipCode.OPAQUE_MASK, keys=T + 5)
def ones_beside_a_smaller_triangle(q, k, v):
    past = torch.ones(T, 5, dtype=torch.bool)
    return attend(q, k, v, torch.cat([past, triangle().tril(-1) | (positions(q, q)[0] == 0)], -1))


@near_miss("causal")
def triangles_one_below_the_other(q, k, v):
    return attend(q, k, v, torch.cat([triangle()[:7], triangle()[7:]], dim=0))


@near_miss(SkipCode.OPAQUE_MASK)
def triangles_that_begin_anew(q, k, v):
    return attend(q, k, v, torch.cat([triangle()[:7], triangle()[: T - 7]], dim=0))


@near_miss("key padding", keys=T + 5, extra=lambda: (torch.arange(B * T).view(B, T) % 3 > 0,))
def ones_beside_padding(q, k, v, mask):
    whole = torch.cat([torch.ones(B, 5, dtype=torch.bool), mask], dim=-1)
    return attend(q, k, v, whole[:, None, None])


@near_miss("causal")
def rows_of_a_triangle_by_position(q, k, v):
    wide = torch.ones(2 * T, 2 * T, dtype=torch.bool).tril()
    return attend(q, k, v, wide.index_select(0, torch.arange(q.shape[2]))[:, : k.shape[2]])


@near_miss("causal(offset=3)", keys=T + 3)
def later_rows_of_a_triangle_by_position(q, k, v):
    wide = torch.ones(2 * T, 2 * T, dtype=torch.bool).tril()
    return attend(q, k, v, wide.index_select(0, torch.arange(q.shape[2]) + 3)[:, : k.shape[2]])


@near_miss(SkipCode.OPAQUE_MASK, extra=lambda: (torch.randperm(T),))
def rows_of_a_triangle_in_an_order_given_at_run_time(q, k, v, order):
    return attend(q, k, v, triangle().index_select(0, order))


@near_miss(SkipCode.OPAQUE_MASK)
def every_other_row_of_a_triangle(q, k, v):
    wide = torch.ones(2 * T, T, dtype=torch.bool).tril()
    return attend(q, k, v, wide.index_select(0, 2 * torch.arange(T)))


def rows_as_heads_and_tokens(q, k, v, mask, *, tokens_first):
    """Multi-query attention by one product: the rows are queries of all heads."""
    heads, tokens, dim = H, q.shape[2], D
    rows = q.transpose(1, 2) if tokens_first else q
    shape = (tokens, heads) if tokens_first else (heads, tokens)
    logits = torch.bmm(rows.reshape(B, heads * tokens, dim), k[:, 0].mT).view(B, *shape, tokens)
    weights = logits.masked_fill(mask, NEG).softmax(-1).view(B, heads * tokens, tokens)
    out = torch.bmm(weights, v[:, 0]).view(B, *shape, dim)
    return out.transpose(1, 2) if tokens_first else out


@near_miss("causal")
def rows_of_tokens_and_heads(q, k, v):
    return rows_as_heads_and_tokens(q, k, v, ~triangle()[:, None], tokens_first=True)


@near_miss("causal")
def rows_of_heads_and_tokens(q, k, v):
    return rows_as_heads_and_tokens(q, k, v, ~triangle(), tokens_first=False)


@near_miss(SkipCode.OPAQUE_MASK)
def rows_with_a_window_per_head(q, k, v):
    rows, columns = positions(q, k)
    widths = 4 * (1 + torch.arange(q.shape[1]))[:, None, None]
    return rows_as_heads_and_tokens(q, k, v, rows - columns > widths, tokens_first=False)


@near_miss(SkipCode.OPAQUE_MASK)
def rows_of_which_the_mask_tells_heads_only(q, k, v):
    first = (torch.arange(T) < 4)[None, None] & (torch.arange(q.shape[1]) > 1)[:, None, None]
    return rows_as_heads_and_tokens(q, k, v, first, tokens_first=False)


@near_miss.parametrized()
def test_near_miss_is_left_alone_or_understood_exactly(name, dynamic):
    near_miss.judge(name, dynamic)
