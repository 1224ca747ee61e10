"""Graphs that look like attention, or like a mask, and are not quite.

Each must be left alone with the true reason, or understood exactly; ``check_all`` runs whatever was
proved against the real masks and the real output. Shapes: b=2, h=4, t=16, d=8.
"""

import pytest
import torch
import torch.nn.functional as F

from seer_compile.types import SkipCode
from support.graphs import NEG, B, D, G, H, T, causal, draw, qkv, repeat_kv, trace
from support.mask_oracle import check_all, inspect_graph

NOT_FOUND = None
CASES = {}


def case(expected, **options):
    """Register a function of q, k, v; ``expected`` is the verdict, None for not found."""

    def register(function):
        assert function.__name__ not in CASES
        CASES[function.__name__] = (function, expected, options)
        return function

    return register


def attend(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def positions(q, k):
    rows = torch.arange(q.shape[-2])[:, None]
    return rows, torch.arange(k.shape[-2])[None, :]


# --- the dataflow around the softmax ---------------------------------------------------------


@case(SkipCode.AMBIGUOUS)
def softmax_over_queries(q, k, v):
    return (q @ k.mT).softmax(-2) @ v


@case(SkipCode.AMBIGUOUS)
def softmax_over_heads(q, k, v):
    return (q @ k.mT).softmax(1) @ v


@case("full")
def products_transposed_and_softmax_over_their_keys(q, k, v):
    return (k @ q.mT).softmax(-2).mT @ v


@case(SkipCode.AMBIGUOUS)
def weights_transposed_before_the_values(q, k, v):
    return (q @ k.mT).softmax(-1).mT @ v


@case(SkipCode.WEIGHTS_ESCAPE)
def weights_returned(q, k, v):
    weights = (q @ k.mT).softmax(-1)
    return weights @ v, weights


@case(SkipCode.WEIGHTS_ESCAPE)
def weights_averaged_over_heads(q, k, v):
    weights = (q @ k.mT).softmax(-1)
    return weights @ v, weights.mean(1)


@case(SkipCode.WEIGHTS_ESCAPE)
def weights_returned_after_a_cast(q, k, v):
    weights = (q @ k.mT).softmax(-1).to(torch.float64).to(torch.float32)
    return weights @ v, weights.sum()


@case(SkipCode.WEIGHTS_ESCAPE)
def logits_returned(q, k, v):
    logits = q @ k.mT
    return logits.softmax(-1) @ v, logits


@case(SkipCode.WEIGHTS_ESCAPE)
def masked_logits_summed(q, k, v):
    logits = (q @ k.mT).masked_fill(~causal(q, k), -1e9)
    return logits.softmax(-1) @ v, logits.sum()


@case(SkipCode.AMBIGUOUS)
def weights_read_by_two_products(q, k, v):
    weights = (q @ k.mT).softmax(-1)
    return weights @ v, weights @ k


@case(SkipCode.AMBIGUOUS)
def weights_multiplied_by_a_head_mask(q, k, v):
    return ((q @ k.mT).softmax(-1) * torch.arange(H).view(1, H, 1, 1)) @ v


@case(SkipCode.AMBIGUOUS)
def weights_masked_after_the_softmax(q, k, v):
    return (q @ k.mT).softmax(-1).masked_fill(~causal(q, k), 0.0) @ v


@case(SkipCode.AMBIGUOUS)
def weights_with_a_constant_added(q, k, v):
    return ((q @ k.mT).softmax(-1) + 0.1) @ v


@case(SkipCode.AMBIGUOUS)
def weights_cut_before_the_values(q, k, v):
    return (q @ k.mT).softmax(-1)[..., : T // 2] @ v[..., : T // 2, :]


@case(SkipCode.AMBIGUOUS)
def softmax_of_a_softmax(q, k, v):
    return (q @ k.mT).softmax(-1).softmax(-1) @ v


@case(NOT_FOUND)
def logarithm_of_softmax(q, k, v):
    return F.log_softmax(q @ k.mT, -1).exp() @ v


@case(NOT_FOUND)
def sigmoid_in_place_of_softmax(q, k, v):
    return (q @ k.mT).sigmoid() @ v


@case(SkipCode.AMBIGUOUS)
def logits_through_a_nonlinearity(q, k, v):
    return (q @ k.mT).relu().softmax(-1) @ v


@case(SkipCode.SOFTCAP)
def logits_bounded_by_tanh(q, k, v):
    return (((q @ k.mT) / 30.0).tanh() * 30.0).softmax(-1) @ v


@case(SkipCode.SINK_LOGIT)
def sink_logit_beside_the_keys(q, k, v):
    logits = torch.cat([q @ k.mT, torch.zeros(B, H, T, 1)], -1)
    return logits.softmax(-1)[..., :-1] @ v


@case(SkipCode.AMBIGUOUS)
def logits_of_two_products_added(q, k, v):
    return (q @ k.mT + q @ v.mT).softmax(-1) @ v


@case(SkipCode.AMBIGUOUS)
def one_of_two_products_chosen(q, k, v):
    return torch.where(causal(q, k), q @ k.mT, q @ v.mT).softmax(-1) @ v


@case(SkipCode.AMBIGUOUS)
def logits_subtracted_from_a_mask(q, k, v):
    return (torch.zeros(T, T) - q @ k.mT).softmax(-1) @ v


@case("full")
def negative_scale(q, k, v):
    return (q @ k.mT * -0.5).softmax(-1) @ v


@case(SkipCode.AMBIGUOUS)
def logits_limited_from_below(q, k, v):
    return (q @ k.mT).clamp(min=-2.0).softmax(-1) @ v


@case(SkipCode.AMBIGUOUS)
def logits_limited_on_both_sides(q, k, v):
    return (q @ k.mT).clamp(-5e4, 5e4).softmax(-1) @ v


@case(SkipCode.AMBIGUOUS)
def floor_shrunk_by_a_later_scale(q, k, v):
    logits = (q @ k.mT).masked_fill(~causal(q, k), NEG).clamp(min=-1e5)
    return (logits * 1e-5).softmax(-1) @ v


@case(SkipCode.AMBIGUOUS)
def largest_logit_of_all_subtracted(q, k, v):
    logits = q @ k.mT
    return (logits - logits.max()).softmax(-1) @ v


@case(SkipCode.AMBIGUOUS)
def maximum_along_another_axis_than_the_softmax(q, k, v):
    logits = k @ q.mT
    return (logits - logits.amax(-1, keepdim=True)).softmax(-2).mT @ v


@case(SkipCode.AMBIGUOUS)
def logits_rounded(q, k, v):
    return torch.div(q @ k.mT, 4, rounding_mode="floor").softmax(-1) @ v


@case(SkipCode.AMBIGUOUS)
def logits_shifted_by_a_slice(q, k, v):
    return F.pad(q @ k.mT, (1, 0))[..., :-1].softmax(-1) @ v


@case(SkipCode.DROPOUT)
def dropout_in_training(q, k, v):
    return F.dropout((q @ k.mT).softmax(-1), 0.1, training=True) @ v


@case(SkipCode.DROPOUT)
def dropout_of_the_fused_call(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, dropout_p=0.1)


# --- scales ----------------------------------------------------------------------------------


@case(SkipCode.SCALE)
def scale_computed_from_data(q, k, v):
    return (q @ k.mT / q.norm()).softmax(-1) @ v


@case(SkipCode.SCALE, extra=lambda: (torch.tensor(0.3),))
def scale_given_as_a_tensor(q, k, v, scale):
    return (q @ k.mT * scale).softmax(-1) @ v


@case(SkipCode.SCALE, extra=lambda: (torch.rand(H, 1, 1),))
def scale_per_head(q, k, v, scale):
    return (q @ k.mT * scale).softmax(-1) @ v


@case(SkipCode.SCALE)
def logits_multiplied_by_a_mask(q, k, v):
    mask = causal(q, k).float()
    return ((q @ k.mT) * mask - 1e4 * (1 - mask)).softmax(-1) @ v


# --- heads and layouts -----------------------------------------------------------------------


@case("full", kv_heads=G)
def heads_tiled_in_the_other_order(q, k, v):
    return attend(q, k.repeat(1, H // G, 1, 1), v.repeat(1, H // G, 1, 1), None)


@case("full", kv_heads=G)
def heads_expanded_in_the_other_order(q, k, v):
    k, v = (x[:, None].expand(B, H // G, G, T, D).reshape(B, H, T, D) for x in (k, v))
    return attend(q, k, v, None)


@case("full", kv_heads=G)
def only_keys_are_repeated(q, k, v):
    values = torch.cat([v, v * 2], 1)
    return attend(q, repeat_kv(k, H // G), values, None)


@case("full", kv_heads=G)
def repeated_keys_are_changed_before_use(q, k, v):
    return attend(q, repeat_kv(k, H // G) * torch.rand(H, 1, 1), repeat_kv(v, H // G), None)


@case(SkipCode.RANK)
def values_of_one_head(q, k, v):
    return (q @ k.mT).softmax(-1) @ v[:, :1]


@case(SkipCode.RANK)
def keys_shared_by_the_batch(q, k, v):
    return (q @ k[:1].mT).softmax(-1) @ v


@case(SkipCode.RANK)
def queries_shared_by_the_batch(q, k, v):
    return (q[:1] @ k.mT).softmax(-1) @ v


@case(SkipCode.RANK)
def heads_summed_in_the_product(q, k, v):
    weights = torch.einsum("bhqd,bhkd->bqk", q, k).softmax(-1)
    return torch.einsum("bqk,bhkd->bhqd", weights, v)


@case(SkipCode.AMBIGUOUS)
def values_read_along_the_queries(q, k, v):
    return torch.einsum("bhqk,bhqd->bhkd", (q @ k.mT).softmax(-1), v)


@case(SkipCode.RANK)
def values_multiplied_per_query(q, k, v):
    values = v[:, :, None].expand(B, H, T, T, D)
    return torch.einsum("bhqk,bhqkd->bhqd", (q @ k.mT).softmax(-1), values)


@case(NOT_FOUND)
def two_dimensions(q, k, v):
    return (q[0, 0] @ k[0, 0].mT).softmax(-1) @ v[0, 0]


@case(NOT_FOUND)
def linear_attention(q, k, v):
    return q.softmax(-1) @ (k.softmax(-2).mT @ v)


@case(NOT_FOUND)
def additive_attention(q, k, v):
    return (q[:, :, :, None] + k[:, :, None]).tanh().sum(-1).softmax(-1) @ v


@case(NOT_FOUND)
def routing_of_tokens_to_experts(q, k, v):
    weights = F.linear(q, torch.ones(T, D)).softmax(-1)
    return weights @ v


@case(NOT_FOUND)
def similarity_without_values(q, k, v):
    return (q @ k.mT).softmax(-1).sum(-1), v


@case("full")
def dimensions_viewed_without_a_transposition(q, k, v):
    q, k, v = (x.transpose(1, 2).reshape(B, T, H * D).view(B, H, T, D) for x in (q, k, v))
    return (q @ k.mT).softmax(-1) @ v


@case("causal")
def tokens_split_into_blocks_and_joined_again(q, k, v):
    q = q.unflatten(2, (T // 4, 4)).flatten(2, 3)
    logits = (q @ k.mT).view(B, H, T // 4, 4, T).view(B, H, T, T)
    return logits.masked_fill(~causal(q, k), NEG).softmax(-1) @ v


@case("full")
def attention_over_blocks_as_one_more_batch_dimension(q, k, v):
    q, k, v = (x.view(B, H, T // 4, 4, D) for x in (q, k, v))
    return (q @ k.mT).softmax(-1) @ v


# --- in-place changes ------------------------------------------------------------------------


@case(SkipCode.MUTATION)
def query_changed_between_its_use_and_the_output(q, k, v):
    q = q + 0
    logits = q @ k.mT
    q.mul_(2.0)
    return logits.softmax(-1) @ v, q


@case("full")
def query_changed_before_its_use(q, k, v):
    q = q + 0
    q.mul_(2.0)
    return (q @ k.mT).softmax(-1) @ v


@case("full")
def value_changed_between_the_products(q, k, v):
    v = v + 0
    weights = (q @ k.mT).softmax(-1)
    v.mul_(2.0)
    return weights @ v


@case(SkipCode.MUTATION)
def key_changed_through_a_view(q, k, v):
    k = k + 0
    logits = q @ k.mT
    k[:, :, 0].zero_()
    return logits.softmax(-1) @ v


@case("full", kv_heads=G)
def repeated_key_changed_through_a_view(q, k, v):
    keys = repeat_kv(k, H // G)
    keys[:, 0].zero_()
    return attend(q, keys, repeat_kv(v, H // G), None)


@case("full", kv_heads=G)
def interleaved_key_changed_through_a_view(q, k, v):
    keys = k.repeat_interleave(H // G, 1)
    keys[:, 0].zero_()
    return attend(q, keys, v.repeat_interleave(H // G, 1), None)


@case("full", kv_heads=G)
def key_changed_after_it_was_repeated(q, k, v):
    k = k + 0
    keys = k.repeat_interleave(H // G, 1)
    k.zero_()
    return attend(q, keys, v.repeat_interleave(H // G, 1), None), k


@case("full")
def key_written_piece_by_piece(q, k, v):
    keys = torch.empty_like(k)
    keys[..., :4].copy_(k[..., 4:])
    keys[..., 4:].copy_(k[..., :4])
    return (q @ keys.mT).softmax(-1) @ v


@case("full")
def copy_changed_after_it_was_read(q, k, v):
    keys = k.contiguous().clone()
    logits = q @ keys.clone().mT
    keys.zero_()
    return logits.softmax(-1) @ v, keys


@case(SkipCode.MUTATION)
def logits_changed_through_a_view(q, k, v):
    logits = q @ k.mT
    logits[..., 0].fill_(-1e9)
    return logits.softmax(-1) @ v


@case(SkipCode.MUTATION)
def logits_changed_through_a_view_before_a_cast(q, k, v):
    logits = q @ k.mT
    logits[..., 0].fill_(-1e9)
    return logits.to(torch.float64).softmax(-1).to(torch.float32) @ v


@case(SkipCode.MUTATION)
def weights_changed_through_a_view(q, k, v):
    weights = (q @ k.mT).softmax(-1)
    weights[..., 0].zero_()
    return weights @ v


@case("causal")
def logits_filled_in_place(q, k, v):
    logits = q @ k.mT
    logits.mul_(0.5).masked_fill_(~causal(q, k), NEG)
    return logits.softmax(-1) @ v


@case("causal")
def mask_added_in_place(q, k, v):
    logits = q @ k.mT
    logits += torch.full((T, T), NEG).triu_(1)
    return logits.softmax(-1) @ v


@case(SkipCode.OPAQUE_MASK)
def mask_changed_through_a_view(q, k, v):
    mask = causal(q, k)
    mask[:, 0].fill_(True)
    return attend(q, k, v, mask & (torch.arange(T) >= 0))


@case(SkipCode.OPAQUE_MASK, extra=lambda: (torch.tensor(3),))
def offset_counted_on_in_place_between_definition_and_mask(q, k, v, offset):
    rows, columns = positions(q, k)
    view = offset.view(1)
    view.add_(1)
    return attend(q, k, v, columns <= rows + offset)


@case(SkipCode.MUTATION)
def mask_itself_changed_through_a_view(q, k, v):
    mask = causal(q, k)
    mask[:, 3].fill_(True)
    return attend(q, k, v, mask)


@case("causal(offset=offset_1)", extra=lambda: (torch.tensor(-3),))
def offset_counted_on_in_place_after_the_mask(q, k, v, offset):
    rows, columns = positions(q, k)
    mask = columns <= rows + offset
    offset.add_(T)
    return attend(q, k, v, mask), offset


# --- masks: off by one, inverted, shifted ----------------------------------------------------


@case("causal(offset=-1)")
def strictly_causal(q, k, v):
    rows, columns = positions(q, k)
    return attend(q, k, v, columns < rows)


@case("causal(offset=1)")
def one_token_ahead(q, k, v):
    rows, columns = positions(q, k)
    return attend(q, k, v, columns <= rows + 1)


@case("causal + window(4)")
def window_of_four(q, k, v):
    rows, columns = positions(q, k)
    return attend(q, k, v, (columns <= rows) & (columns > rows - 4))


@case("causal + window(5)")
def window_of_five(q, k, v):
    rows, columns = positions(q, k)
    return attend(q, k, v, (columns <= rows) & (rows - columns <= 4))


@case("causal(offset=3) + window(7)")
def window_on_both_sides(q, k, v):
    rows, columns = positions(q, k)
    return attend(q, k, v, (rows - columns).abs() < 4)


@case("keys from 1")
def anti_causal(q, k, v):
    return attend(q, k, v, ~causal(q, k))


@case("keys from 0")
def causal_mask_transposed(q, k, v):
    return attend(q, k, v, causal(q, k).mT)


@case("causal", keys=24)
def fused_flag_aligns_top_left(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@case("causal(offset=8)", keys=24)
def triangle_aligned_bottom_right(q, k, v):
    mask = torch.ones(T, 24, dtype=torch.bool).tril(24 - T)
    return attend(q, k, v, mask)


@case("causal(offset=-2)")
def triangle_sliced_with_an_offset(q, k, v):
    return attend(q, k, v, torch.ones(2 * T, 2 * T, dtype=torch.bool).tril()[1 : T + 1, 3 : T + 3])


@case("causal(offset=-1)")
def upper_triangle_kept_from_the_main_diagonal(q, k, v):
    mask = torch.full((T, T), NEG).triu(0)
    return attend(q, k, v, mask)


@case(SkipCode.OPAQUE_MASK)
def every_key_hidden(q, k, v):
    return attend(q, k, v, torch.zeros(T, T, dtype=torch.bool))


@case("full")
def every_key_visible(q, k, v):
    return attend(q, k, v, torch.ones(1, 1, 1, 1, dtype=torch.bool))


@case(SkipCode.OPAQUE_MASK)
def causal_mask_flipped(q, k, v):
    return attend(q, k, v, causal(q, k).flip(-1))


@case(SkipCode.OPAQUE_MASK)
def causal_mask_rolled(q, k, v):
    return attend(q, k, v, causal(q, k).roll(1, -1))


@case(SkipCode.OPAQUE_MASK)
def every_second_key(q, k, v):
    rows, columns = positions(q, k)
    return attend(q, k, v, (rows - columns) % 2 == 0)


@case(SkipCode.OPAQUE_MASK)
def slope_of_two(q, k, v):
    rows, columns = positions(q, k)
    return attend(q, k, v, columns <= 2 * rows)


@case(SkipCode.OPAQUE_MASK)
def causal_over_blocks(q, k, v):
    rows, columns = positions(q, k)
    return attend(q, k, v, columns // 4 <= rows // 4)


@case("same document")
def chunks_of_four(q, k, v):
    rows, columns = positions(q, k)
    return attend(q, k, v, columns // 4 == rows // 4)


@case(SkipCode.OPAQUE_MASK)
def prefix_visible_to_all(q, k, v):
    _, columns = positions(q, k)
    return attend(q, k, v, causal(q, k) | (columns < 4))


@case(SkipCode.OPAQUE_MASK)
def positions_that_overflow(q, k, v):
    rows = (torch.arange(T)[:, None] + 120).to(torch.int8)
    return attend(q, k, v, torch.arange(T)[None] + 120 <= rows)


@case(SkipCode.OPAQUE_MASK)
def positions_rounded_to_half(q, k, v):
    rows = (torch.arange(T, dtype=torch.float16) + 2047)[:, None]
    return attend(q, k, v, torch.arange(T, dtype=torch.float16)[None] + 2047 <= rows)


@case(SkipCode.OPAQUE_MASK)
def one_element_of_the_triangle_differs(q, k, v):
    other = (torch.arange(T)[:, None] == 2) & (torch.arange(T)[None] == 9)
    return attend(q, k, v, causal(q, k) ^ other)


# --- masks: data -----------------------------------------------------------------------------


def flags(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(5)) > 0.4


@case("key padding", extra=lambda: (flags(B, T),))
def padding_of_keys(q, k, v, mask):
    return attend(q, k, v, mask[:, None, None])


@case("causal + key padding", extra=lambda: (flags(B, T),))
def padding_inverted_and_filled(q, k, v, mask):
    hidden = ~causal(q, k) | ~mask[:, None, None]
    return (q @ k.mT).masked_fill(hidden, -1e9).softmax(-1) @ v


@case("key padding", extra=lambda: (flags(B, T + 5),))
def padding_sliced_with_an_offset(q, k, v, mask):
    return attend(q, k, v, mask[:, None, None, 5:])


@case("key padding", extra=lambda: (flags(T, B),))
def padding_transposed(q, k, v, mask):
    return attend(q, k, v, mask.T[:, None, None])


@case("key padding", extra=lambda: (torch.tensor([5, 9]),))
def padding_from_lengths(q, k, v, lengths):
    return attend(q, k, v, (torch.arange(T) < lengths[:, None])[:, None, None])


@case("key padding", extra=lambda: (flags(T),))
def padding_shared_by_the_batch(q, k, v, mask):
    return attend(q, k, v, mask[None])


@case(SkipCode.OPAQUE_MASK, extra=lambda: (flags(B, T),))
def padding_of_queries(q, k, v, mask):
    return attend(q, k, v, mask[:, None, :, None])


@case(SkipCode.OPAQUE_MASK, extra=lambda: (flags(B, T),))
def padding_gathered_by_query(q, k, v, mask):
    rows, _ = positions(q, k)
    return attend(q, k, v, mask[torch.arange(B)[:, None, None, None], rows])


@case(SkipCode.OPAQUE_MASK, extra=lambda: (flags(B, T),))
def causal_or_padding(q, k, v, mask):
    return attend(q, k, v, causal(q, k) | mask[:, None, None])


@case(SkipCode.OPAQUE_MASK, extra=lambda: (flags(B, H, 1, T),))
def padding_per_head(q, k, v, mask):
    return attend(q, k, v, mask)


@case(SkipCode.OPAQUE_MASK, extra=lambda: (flags(T, T),))
def arbitrary_mask(q, k, v, mask):
    return attend(q, k, v, mask)


@case(SkipCode.OPAQUE_MASK, extra=lambda: (flags(T, T),))
def triangle_of_an_arbitrary_mask(q, k, v, mask):
    return attend(q, k, v, mask.tril())


@case(SkipCode.OPAQUE_MASK, extra=lambda: (torch.ones(T, T).tril(),))
def triangle_given_by_the_user(q, k, v, triangle):
    return attend(q, k, v, triangle != 0)


@case(SkipCode.OPAQUE_MASK, extra=lambda: (torch.arange(T),))
def positions_given_by_the_user(q, k, v, numbers):
    return attend(q, k, v, numbers[None, :] <= numbers[:, None])


@case("same document", extra=lambda: (torch.arange(B * T).view(B, T) // 5,))
def documents(q, k, v, numbers):
    return attend(q, k, v, numbers[:, None, :, None] == numbers[:, None, None])


@case(SkipCode.OPAQUE_MASK, extra=lambda: (torch.arange(B * T).view(B, T) // 5,))
def other_documents(q, k, v, numbers):
    return attend(q, k, v, numbers[:, None, :, None] != numbers[:, None, None])


@case(SkipCode.OPAQUE_MASK, extra=lambda: (torch.arange(B * T).view(B, T) // 5,))
def documents_up_to_ones_own(q, k, v, numbers):
    return attend(q, k, v, numbers[:, None, None] <= numbers[:, None, :, None])


@case(
    SkipCode.OPAQUE_MASK,
    extra=lambda: (torch.arange(B * T).view(B, T) // 5, torch.arange(B * T).view(B, T) // 3),
)
def two_numberings_of_documents(q, k, v, first, second):
    same = [x[:, None, :, None] == x[:, None, None] for x in (first, second)]
    return attend(q, k, v, same[0] & same[1])


@case(SkipCode.OPAQUE_MASK)
def mask_made_of_the_logits(q, k, v):
    logits = q @ k.mT
    return logits.masked_fill(logits < logits.mean(-1, keepdim=True), NEG).softmax(-1) @ v


@case(SkipCode.OPAQUE_MASK)
def mask_made_of_the_queries(q, k, v):
    return attend(q, k, v, (q.sum(-1) > 0)[..., None] & (k.sum(-1) > 0)[..., None, :])


# --- masks: numbers on the logits ------------------------------------------------------------


@case(SkipCode.FLOAT_BIAS)
def bias_by_distance(q, k, v):
    rows, columns = positions(q, k)
    return attend(q, k, v, (columns - rows).float() * 0.1)


@case(SkipCode.FLOAT_BIAS, extra=lambda: (draw(H, T, T),))
def bias_learned(q, k, v, bias):
    return (q @ k.mT + bias).softmax(-1) @ v


@case(SkipCode.FLOAT_BIAS, extra=lambda: (draw(H, T, T),))
def bias_beside_a_mask(q, k, v, bias):
    return (q @ k.mT + bias).masked_fill(~causal(q, k), NEG).softmax(-1) @ v


@case(SkipCode.FLOAT_BIAS)
def penalty_that_does_not_hide(q, k, v):
    return attend(q, k, v, torch.where(causal(q, k), 0.0, -100.0))


@case(SkipCode.FLOAT_BIAS)
def hiding_number_shrunk_by_a_later_scale(q, k, v):
    return ((q @ k.mT + torch.where(causal(q, k), 0.0, -1e4)) * 1e-3).softmax(-1) @ v


@case(SkipCode.FLOAT_BIAS)
def hidden_logits_set_to_zero(q, k, v):
    return (q @ k.mT).masked_fill(~causal(q, k), 0.0).softmax(-1) @ v


@case(SkipCode.FLOAT_BIAS)
def boolean_mask_added_as_a_number(q, k, v):
    return (q @ k.mT + causal(q, k)).softmax(-1) @ v


@case(SkipCode.FLOAT_BIAS, extra=lambda: (torch.ones(B, T, dtype=torch.long),))
def integer_mask_turned_into_numbers(q, k, v, mask):
    return attend(q, k, v, (1.0 - mask[:, None, None]) * -1e4)


@case("key padding", extra=lambda: (torch.ones(B, T, dtype=torch.long),))
def integer_mask_compared_first(q, k, v, mask):
    return attend(q, k, v, (mask[:, None, None] == 0).float() * -1e4)


@case(SkipCode.FLOAT_BIAS)
def infinity_times_zero(q, k, v):
    return attend(q, k, v, (1.0 - causal(q, k).float()) * NEG)


@case("causal")
def two_masks_added(q, k, v):
    first = torch.where(causal(q, k), 0.0, -1e5)
    return attend(q, k, v, first + torch.full((T, T), NEG).triu(3))


@pytest.mark.parametrize(
    "dynamic",
    [pytest.param(False, id="static"), pytest.param(True, id="dynamic", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("name", CASES)
def test_near_miss_is_left_alone_or_understood_exactly(name, dynamic):
    function, expected, options = CASES[name]
    inputs = qkv(keys=options.get("keys"), kv_heads=options.get("kv_heads"))
    inputs = (*inputs, *options.get("extra", tuple)())
    inspected = inspect_graph(trace(function, *inputs, dynamic=dynamic))
    assert inspected.verdicts == ([] if expected is NOT_FOUND else [expected])
    check_all(inspected)


def test_there_are_at_least_a_hundred_near_misses():
    assert len(CASES) >= 100
