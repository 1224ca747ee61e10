"""Graphs whose dataflow around the softmax is not quite that of attention.

Each is left alone with the true reason, or understood exactly; see ``support.near_misses``.
"""

import torch
import torch.nn.functional as F

from seer_compile.types import SkipCode
from support.graphs import NEG, B, D, H, T, causal
from support.near_misses import NOT_FOUND, NearMisses, attend

near_miss = NearMisses()


@near_miss(SkipCode.AMBIGUOUS)
def softmax_over_queries(q, k, v):
    return (q @ k.mT).softmax(-2) @ v


@near_miss(SkipCode.AMBIGUOUS)
def softmax_over_heads(q, k, v):
    return (q @ k.mT).softmax(1) @ v


@near_miss("full")
def products_transposed_and_softmax_over_their_keys(q, k, v):
    return (k @ q.mT).softmax(-2).mT @ v


@near_miss(SkipCode.AMBIGUOUS)
def weights_transposed_before_the_values(q, k, v):
    return (q @ k.mT).softmax(-1).mT @ v


@near_miss(SkipCode.WEIGHTS_ESCAPE)
def weights_returned(q, k, v):
    weights = (q @ k.mT).softmax(-1)
    return weights @ v, weights


@near_miss(SkipCode.WEIGHTS_ESCAPE)
def weights_averaged_over_heads(q, k, v):
    weights = (q @ k.mT).softmax(-1)
    return weights @ v, weights.mean(1)


@near_miss(SkipCode.WEIGHTS_ESCAPE)
def weights_returned_after_a_cast(q, k, v):
    weights = (q @ k.mT).softmax(-1).to(torch.float64).to(torch.float32)
    return weights @ v, weights.sum()


@near_miss(SkipCode.WEIGHTS_ESCAPE)
def logits_returned(q, k, v):
    logits = q @ k.mT
    return logits.softmax(-1) @ v, logits


@near_miss(SkipCode.WEIGHTS_ESCAPE)
def masked_logits_summed(q, k, v):
    logits = (q @ k.mT).masked_fill(~causal(q, k), -1e9)
    return logits.softmax(-1) @ v, logits.sum()


@near_miss(SkipCode.AMBIGUOUS)
def weights_read_by_two_products(q, k, v):
    weights = (q @ k.mT).softmax(-1)
    return weights @ v, weights @ k


@near_miss(SkipCode.AMBIGUOUS)
def weights_multiplied_by_a_head_mask(q, k, v):
    return ((q @ k.mT).softmax(-1) * torch.arange(H).view(1, H, 1, 1)) @ v


@near_miss(SkipCode.AMBIGUOUS)
def weights_masked_after_the_softmax(q, k, v):
    return (q @ k.mT).softmax(-1).masked_fill(~causal(q, k), 0.0) @ v


@near_miss(SkipCode.AMBIGUOUS)
def weights_with_a_constant_added(q, k, v):
    return ((q @ k.mT).softmax(-1) + 0.1) @ v


@near_miss(SkipCode.AMBIGUOUS)
def weights_cut_before_the_values(q, k, v):
    return (q @ k.mT).softmax(-1)[..., : T // 2] @ v[..., : T // 2, :]


@near_miss(SkipCode.AMBIGUOUS)
def softmax_of_a_softmax(q, k, v):
    return (q @ k.mT).softmax(-1).softmax(-1) @ v


@near_miss(NOT_FOUND)
def logarithm_of_softmax(q, k, v):
    return F.log_softmax(q @ k.mT, -1).exp() @ v


@near_miss(NOT_FOUND)
def sigmoid_in_place_of_softmax(q, k, v):
    return (q @ k.mT).sigmoid() @ v


@near_miss(SkipCode.AMBIGUOUS)
def logits_through_a_nonlinearity(q, k, v):
    return (q @ k.mT).relu().softmax(-1) @ v


@near_miss(SkipCode.AMBIGUOUS)
def logits_of_two_products_added(q, k, v):
    return (q @ k.mT + q @ v.mT).softmax(-1) @ v


@near_miss(SkipCode.AMBIGUOUS)
def one_of_two_products_chosen(q, k, v):
    return torch.where(causal(q, k), q @ k.mT, q @ v.mT).softmax(-1) @ v


@near_miss(SkipCode.AMBIGUOUS)
def logits_subtracted_from_a_mask(q, k, v):
    return (torch.zeros(T, T) - q @ k.mT).softmax(-1) @ v


@near_miss("full")
def negative_scale(q, k, v):
    return (q @ k.mT * -0.5).softmax(-1) @ v


@near_miss(SkipCode.AMBIGUOUS)
def logits_limited_from_below(q, k, v):
    return (q @ k.mT).clamp(min=-2.0).softmax(-1) @ v


@near_miss(SkipCode.AMBIGUOUS)
def logits_limited_on_both_sides(q, k, v):
    return (q @ k.mT).clamp(-5e4, 5e4).softmax(-1) @ v


@near_miss(SkipCode.AMBIGUOUS)
def floor_shrunk_by_a_later_scale(q, k, v):
    logits = (q @ k.mT).masked_fill(~causal(q, k), NEG).clamp(min=-1e5)
    return (logits * 1e-5).softmax(-1) @ v


@near_miss(SkipCode.AMBIGUOUS)
def largest_logit_of_all_subtracted(q, k, v):
    logits = q @ k.mT
    return (logits - logits.max()).softmax(-1) @ v


@near_miss(SkipCode.AMBIGUOUS)
def maximum_along_another_axis_than_the_softmax(q, k, v):
    logits = k @ q.mT
    return (logits - logits.amax(-1, keepdim=True)).softmax(-2).mT @ v


@near_miss(SkipCode.AMBIGUOUS)
def logits_rounded(q, k, v):
    return torch.div(q @ k.mT, 4, rounding_mode="floor").softmax(-1) @ v


@near_miss(SkipCode.AMBIGUOUS)
def logits_shifted_by_a_slice(q, k, v):
    return F.pad(q @ k.mT, (1, 0))[..., :-1].softmax(-1) @ v


@near_miss(SkipCode.DROPOUT)
def dropout_in_training(q, k, v):
    return F.dropout((q @ k.mT).softmax(-1), 0.1, training=True) @ v


@near_miss(SkipCode.DROPOUT)
def dropout_of_the_fused_call(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, dropout_p=0.1)


@near_miss(NOT_FOUND)
def weights_renormalised(q, k, v):
    weights = (q @ k.mT).softmax(-1).square()
    return (weights / weights.sum(-1, keepdim=True)) @ v


@near_miss(SkipCode.WEIGHTS_ESCAPE)
def weights_divided_by_their_sum_over_queries(q, k, v):
    weights = (q @ k.mT).softmax(-1)
    return (weights / weights.sum(-2, keepdim=True)) @ v


@near_miss(SkipCode.AMBIGUOUS)
def weights_subtracted_from_one(q, k, v):
    return (1 - (q @ k.mT).softmax(-1)) @ v


@near_miss([SkipCode.AMBIGUOUS] * 2)
def difference_of_two_softmaxes(q, k, v):
    first, second = (q @ k.mT).softmax(-1), (q.flip(-1) @ k.mT).softmax(-1)
    return (first - 0.3 * second) @ v


@near_miss(SkipCode.AMBIGUOUS)
def weights_rounded_to_integers(q, k, v):
    return (q @ k.mT * 8).softmax(-1).to(torch.int32).to(torch.float32) @ v


@near_miss(SkipCode.AMBIGUOUS)
def logits_rounded_to_integers(q, k, v):
    return (q @ k.mT).to(torch.int64).to(torch.float32).softmax(-1) @ v


@near_miss(SkipCode.AMBIGUOUS)
def logits_made_boolean(q, k, v):
    return (q @ k.mT).to(torch.bool).to(torch.float32).softmax(-1) @ v


@near_miss(SkipCode.AMBIGUOUS)
def bits_of_the_logits_read_as_integers(q, k, v):
    return (q @ k.mT).view(torch.int32).to(torch.float32).mul(1e-9).softmax(-1) @ v


@near_miss(SkipCode.AMBIGUOUS)
def bits_of_the_weights_read_as_integers(q, k, v):
    return (q @ k.mT).softmax(-1).view(torch.int32).to(torch.float32) @ v


@near_miss("full")
def queries_and_keys_made_of_bits(q, k, v):
    q, k = ((x.abs() * 1e5).int().add(0x3F800000).view(torch.float32) for x in (q, k))
    q, k, v = (x.reshape(B * H, T, D) for x in (q, k, v))
    return torch.bmm(torch.bmm(q, k.mT).softmax(-1), v)


@near_miss(NOT_FOUND)
def weights_rolled_along_the_keys(q, k, v):
    return (q @ k.mT).softmax(-1).roll(1, -1) @ v


@near_miss(NOT_FOUND)
def weights_of_another_batch_item(q, k, v):
    return (q @ k.mT).softmax(-1).flip(0) @ v


@near_miss(NOT_FOUND)
def weights_summed_along_the_keys(q, k, v):
    return (q @ k.mT).softmax(-1).cumsum(-1) @ v


@near_miss(SkipCode.WEIGHTS_ESCAPE)
def weights_below_a_threshold_dropped(q, k, v):
    weights = (q @ k.mT).softmax(-1)
    return torch.where(weights > 0.1, weights, 0.0) @ v


@near_miss(SkipCode.AMBIGUOUS)
def weights_multiplied_by_an_infinite_number_of_nothing(q, k, v):
    return ((q @ k.mT).softmax(-1) * 0.0) @ v


@near_miss(SkipCode.AMBIGUOUS)
def rows_of_nan_replaced_by_another_number(q, k, v):
    weights = (q @ k.mT).masked_fill(torch.arange(T)[:, None] < 3, NEG).softmax(-1)
    return weights.nan_to_num(nan=0.5) @ v


@near_miss(SkipCode.RANK)
def softmax_over_heads_and_keys_together(q, k, v):
    logits = (q @ k.mT).transpose(1, 2).reshape(B, T, H * T)
    weights = logits.softmax(-1).view(B, T, H, T).transpose(1, 2)
    return weights @ v


@near_miss("full")
def softmax_between_two_permutations(q, k, v):
    logits = (q @ k.mT).permute(0, 2, 1, 3)
    return logits.softmax(-1).permute(0, 2, 1, 3) @ v


@near_miss("full")
def softmax_over_an_axis_that_was_moved(q, k, v):
    logits = (q @ k.mT).permute(3, 0, 1, 2)
    return logits.softmax(0).permute(1, 2, 3, 0) @ v


@near_miss(SkipCode.RANK)
def heads_mixed_before_the_softmax(q, k, v):
    mix = torch.eye(H).roll(1, 0)
    return torch.einsum("bhqk,hg->bgqk", q @ k.mT, mix).softmax(-1) @ v


@near_miss(SkipCode.AMBIGUOUS)
def heads_mixed_after_the_softmax(q, k, v):
    mix = torch.eye(H).roll(1, 0)
    return torch.einsum("bhqk,hg->bgqk", (q @ k.mT).softmax(-1), mix) @ v


@near_miss(SkipCode.RANK)
def heads_mixed_by_a_linear_layer(q, k, v):
    logits = (q @ k.mT).permute(0, 2, 3, 1) @ torch.eye(H).roll(1, 0)
    return logits.permute(0, 3, 1, 2).softmax(-1) @ v


@near_miss(SkipCode.AMBIGUOUS)
def heads_mixed_by_a_convolution(q, k, v):
    logits = F.conv2d(q @ k.mT, torch.ones(H, H, 1, 1))
    return logits.softmax(-1) @ v


@near_miss(SkipCode.AMBIGUOUS)
def relative_positions_on_the_logits(q, k, v):
    table = torch.ones(T, T, D)
    return (q @ k.mT + torch.einsum("bhqd,qkd->bhqk", q, table)).softmax(-1) @ v


@near_miss(SkipCode.AMBIGUOUS)
def relative_positions_on_the_values(q, k, v):
    weights = (q @ k.mT).softmax(-1)
    return weights @ v + torch.einsum("bhqk,qkd->bhqd", weights, torch.ones(T, T, D))


@near_miss(SkipCode.WEIGHTS_ESCAPE)
def logarithm_of_the_sum_of_the_logits_returned(q, k, v):
    logits = q @ k.mT
    return logits.softmax(-1) @ v, logits.logsumexp(-1)


@near_miss(SkipCode.WEIGHTS_ESCAPE)
def halves_of_the_keys_joined_by_their_sums(q, k, v):
    logits = q @ k[:, :, : T // 2].mT
    share = logits.logsumexp(-1, keepdim=True).sigmoid()
    return share * (logits.softmax(-1) @ v[:, :, : T // 2])


@near_miss(SkipCode.AMBIGUOUS)
def logits_of_two_sets_of_keys_joined(q, k, v):
    logits = torch.cat([q @ k.mT, q @ v.mT], -1)
    return logits.softmax(-1) @ torch.cat([v, k], 2)


@near_miss("full")
def keys_of_two_sets_joined(q, k, v):
    return (q @ torch.cat([k, v], 2).mT).softmax(-1) @ torch.cat([v, k], 2)


@near_miss(SkipCode.AMBIGUOUS)
def gumbel_softmax(q, k, v):
    return F.gumbel_softmax(q @ k.mT, hard=True) @ v


@near_miss(SkipCode.AMBIGUOUS)
def softmax_of_the_negative_logits(q, k, v):
    return F.softmin(q @ k.mT, -1) @ v


@near_miss("full")
def query_is_key_and_value(q, k, v):
    return (q @ q.mT).softmax(-1) @ q


@near_miss("full")
def output_changed_in_place(q, k, v):
    return attend(q, k, v, None).mul_(2.0).add_(q)


@near_miss("full")
def output_of_one_is_the_mask_of_nothing(q, k, v):
    first = attend(q, k, v, None)
    return first, first.transpose(1, 2).reshape(B, T, H * D).relu()


@near_miss(SkipCode.AMBIGUOUS)
def maximum_taken_with_its_index(q, k, v):
    logits = q @ k.mT
    return (logits - logits.max(-1, keepdim=True).indices).softmax(-1) @ v


@near_miss(SkipCode.AMBIGUOUS)
def maximum_of_other_logits_subtracted(q, k, v):
    logits = q @ k.mT
    return (logits - (logits * 2).amax(-1, keepdim=True)).softmax(-1) @ v


@near_miss(SkipCode.DROPOUT)
def dropout_in_training_then_none(q, k, v):
    weights = F.dropout((q @ k.mT).softmax(-1), 0.3, training=True)
    return F.dropout(weights, 0.0, training=True) @ v


@near_miss(SkipCode.DROPOUT)
def dropout_of_logits(q, k, v):
    return F.dropout(q @ k.mT, 0.1, training=True).softmax(-1) @ v


@near_miss(NOT_FOUND)
def dropout_of_whole_heads(q, k, v):
    return F.dropout2d((q @ k.mT).softmax(-1), 0.5, training=True) @ v


@near_miss(SkipCode.AMBIGUOUS)
def logits_shifted_below_the_floor(q, k, v):
    return (q @ k.mT - 1e5).clamp(min=-2e4).softmax(-1) @ v


@near_miss(SkipCode.AMBIGUOUS)
def logits_shifted_below_the_mask(q, k, v):
    return (q @ k.mT - 1e5).masked_fill(~causal(q, k), -1e4).softmax(-1) @ v


@near_miss("full")
def logits_shifted_by_a_little(q, k, v):
    return (q @ k.mT - 1.5).softmax(-1) @ v


@near_miss.parametrized()
def test_near_miss_is_left_alone_or_understood_exactly(name, dynamic):
    near_miss.judge(name, dynamic)
