"""Masks made of inputs: padding, documents, scores, noise.

Each is left alone with the true reason, or understood exactly; see ``support.near_misses``.
"""

import torch

from seer_compile.types import SkipCode
from support.graphs import NEG, B, H, T, causal
from support.near_misses import NearMisses, attend, positions

near_miss = NearMisses()


def flags(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(5)) > 0.4


@near_miss("key padding", extra=lambda: (flags(B, T),))
def padding_of_keys(q, k, v, mask):
    return attend(q, k, v, mask[:, None, None])


@near_miss("causal + key padding", extra=lambda: (flags(B, T),))
def padding_inverted_and_filled(q, k, v, mask):
    hidden = ~causal(q, k) | ~mask[:, None, None]
    return (q @ k.mT).masked_fill(hidden, -1e9).softmax(-1) @ v


@near_miss("key padding", extra=lambda: (flags(B, T + 5),))
def padding_sliced_with_an_offset(q, k, v, mask):
    return attend(q, k, v, mask[:, None, None, 5:])


@near_miss("key padding", extra=lambda: (flags(T, B),))
def padding_transposed(q, k, v, mask):
    return attend(q, k, v, mask.T[:, None, None])


@near_miss("key padding", extra=lambda: (torch.tensor([5, 9]),))
def padding_from_lengths(q, k, v, lengths):
    return attend(q, k, v, (torch.arange(T) < lengths[:, None])[:, None, None])


@near_miss("key padding", extra=lambda: (flags(T),))
def padding_shared_by_the_batch(q, k, v, mask):
    return attend(q, k, v, mask[None])


@near_miss(SkipCode.OPAQUE_MASK, extra=lambda: (flags(B, T),))
def padding_of_queries(q, k, v, mask):
    return attend(q, k, v, mask[:, None, :, None])


@near_miss(SkipCode.OPAQUE_MASK, extra=lambda: (flags(B, T),))
def padding_gathered_by_query(q, k, v, mask):
    rows, _ = positions(q, k)
    return attend(q, k, v, mask[torch.arange(B)[:, None, None, None], rows])


@near_miss(SkipCode.OPAQUE_MASK, extra=lambda: (flags(B, T),))
def causal_or_padding(q, k, v, mask):
    return attend(q, k, v, causal(q, k) | mask[:, None, None])


@near_miss(SkipCode.OPAQUE_MASK, extra=lambda: (flags(B, H, 1, T),))
def padding_per_head(q, k, v, mask):
    return attend(q, k, v, mask)


@near_miss(SkipCode.OPAQUE_MASK, extra=lambda: (flags(T, T),))
def arbitrary_mask(q, k, v, mask):
    return attend(q, k, v, mask)


@near_miss(SkipCode.OPAQUE_MASK, extra=lambda: (flags(T, T),))
def triangle_of_an_arbitrary_mask(q, k, v, mask):
    return attend(q, k, v, mask.tril())


@near_miss(SkipCode.OPAQUE_MASK, extra=lambda: (torch.ones(T, T).tril(),))
def triangle_given_by_the_user(q, k, v, triangle):
    return attend(q, k, v, triangle != 0)


@near_miss(SkipCode.OPAQUE_MASK, extra=lambda: (torch.arange(T),))
def positions_given_by_the_user(q, k, v, numbers):
    return attend(q, k, v, numbers[None, :] <= numbers[:, None])


@near_miss("same document", extra=lambda: (torch.arange(B * T).view(B, T) // 5,))
def documents(q, k, v, numbers):
    return attend(q, k, v, numbers[:, None, :, None] == numbers[:, None, None])


@near_miss(SkipCode.OPAQUE_MASK, extra=lambda: (torch.arange(B * T).view(B, T) // 5,))
def other_documents(q, k, v, numbers):
    return attend(q, k, v, numbers[:, None, :, None] != numbers[:, None, None])


@near_miss(SkipCode.OPAQUE_MASK, extra=lambda: (torch.arange(B * T).view(B, T) // 5,))
def documents_up_to_ones_own(q, k, v, numbers):
    return attend(q, k, v, numbers[:, None, None] <= numbers[:, None, :, None])


@near_miss(
    "same document",
    extra=lambda: (torch.arange(B * T).view(B, T) // 5, torch.arange(B * T).view(B, T) // 3),
)
def two_numberings_of_documents(q, k, v, first, second):
    same = [x[:, None, :, None] == x[:, None, None] for x in (first, second)]
    return attend(q, k, v, same[0] & same[1])


@near_miss(SkipCode.OPAQUE_MASK)
def mask_made_of_the_logits(q, k, v):
    logits = q @ k.mT
    return logits.masked_fill(logits < logits.mean(-1, keepdim=True), NEG).softmax(-1) @ v


@near_miss(SkipCode.OPAQUE_MASK)
def mask_made_of_the_queries(q, k, v):
    return attend(q, k, v, (q.sum(-1) > 0)[..., None] & (k.sum(-1) > 0)[..., None, :])


@near_miss(SkipCode.WEIGHTS_ESCAPE)
def largest_logits_kept(q, k, v):
    logits = q @ k.mT
    smallest = logits.topk(4).values[..., -1:]
    return logits.masked_fill(logits < smallest, NEG).softmax(-1) @ v


@near_miss(SkipCode.OPAQUE_MASK)
def logits_kept_where_they_are_positive(q, k, v):
    logits = q @ k.mT
    return torch.where(logits > 0, logits, NEG).softmax(-1) @ v


@near_miss(SkipCode.OPAQUE_MASK)
def mask_from_random_numbers(q, k, v):
    return attend(q, k, v, (torch.rand(T, T) > 0.5) | torch.eye(T, dtype=torch.bool))


@near_miss("key padding")
def padding_from_random_numbers(q, k, v):
    keys = torch.rand(B, T) > 0.3
    return attend(q, k, v, keys[:, None, None])


@near_miss(SkipCode.OPAQUE_MASK)
def random_padding_drawn_per_query(q, k, v):
    return attend(q, k, v, torch.rand(B, 1, T, 1).expand(B, 1, T, T) > 0.5)


@near_miss("same document")
def two_draws_of_random_documents(q, k, v):
    first, second = (torch.randint(0, 2, (B, T)) for _ in range(2))
    rows = first[:, None, :, None]
    return attend(q, k, v, (rows == second[:, None, None]) & (rows == first[:, None, None]))


@near_miss(SkipCode.OPAQUE_MASK, extra=lambda: (torch.randperm(T),))
def causal_in_an_order_given_at_run_time(q, k, v, order):
    return attend(q, k[:, :, order], v[:, :, order], order[None] <= torch.arange(T)[:, None])


@near_miss(SkipCode.OPAQUE_MASK, extra=lambda: (flags(B, T),))
def padding_of_the_neighbour(q, k, v, mask):
    return attend(q, k, v, mask.flip(0)[:, None, None] & mask.flip(1)[:, None, :, None])


@near_miss("key padding", extra=lambda: (flags(B, T),))
def padding_of_the_other_batch_item(q, k, v, mask):
    return attend(q, k, v, mask.flip(0)[:, None, None])


@near_miss("key padding", extra=lambda: (flags(B, T),))
def padding_in_reverse(q, k, v, mask):
    return attend(q, k, v, mask.flip(1)[:, None, None])


@near_miss(SkipCode.OPAQUE_MASK, extra=lambda: (flags(B, T),))
def either_of_two_paddings_by_query(q, k, v, mask):
    rows, _ = positions(q, k)
    return attend(q, k, v, torch.where(rows < 4, mask[:, None, None], ~mask[:, None, None]))


@near_miss(SkipCode.OPAQUE_MASK, extra=lambda: (flags(H, T),), heads=H)
def padding_of_heads_taken_for_a_batch(q, k, v, mask):
    return attend(q, k, v, mask[None, :, None])


@near_miss(SkipCode.OPAQUE_MASK, extra=lambda: (torch.tensor([3, 9]),))
def window_as_long_as_the_item_says(q, k, v, widths):
    rows, columns = positions(q, k)
    return attend(q, k, v, (rows - columns).abs() <= widths[:, None, None, None])


@near_miss(SkipCode.OPAQUE_MASK, extra=lambda: (torch.tensor([3, 9]),))
def offset_per_batch_item(q, k, v, offsets):
    rows, columns = positions(q, k)
    return attend(q, k, v, columns <= rows + offsets[:, None, None, None])


@near_miss.parametrized()
def test_near_miss_is_left_alone_or_understood_exactly(name, dynamic):
    near_miss.judge(name, dynamic)
