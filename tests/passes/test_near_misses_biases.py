"""Numbers on the logits that hide nothing, or not what they seem to.

Each is left alone with the true reason, or understood exactly; see ``support.near_misses``.
"""

import torch

from seer_compile.types import SkipCode
from support.graphs import NEG, B, H, T, causal, draw
from support.near_misses import NearMisses, attend, positions

near_miss = NearMisses()


@near_miss(SkipCode.FLOAT_BIAS)
def bias_by_distance(q, k, v):
    rows, columns = positions(q, k)
    return attend(q, k, v, (columns - rows).float() * 0.1)


@near_miss(SkipCode.FLOAT_BIAS, extra=lambda: (draw(H, T, T),))
def bias_learned(q, k, v, bias):
    return (q @ k.mT + bias).softmax(-1) @ v


@near_miss(SkipCode.FLOAT_BIAS, extra=lambda: (draw(H, T, T),))
def bias_beside_a_mask(q, k, v, bias):
    return (q @ k.mT + bias).masked_fill(~causal(q, k), NEG).softmax(-1) @ v


@near_miss(SkipCode.FLOAT_BIAS)
def penalty_that_does_not_hide(q, k, v):
    return attend(q, k, v, torch.where(causal(q, k), 0.0, -100.0))


@near_miss(SkipCode.FLOAT_BIAS)
def hiding_number_shrunk_by_a_later_scale(q, k, v):
    return ((q @ k.mT + torch.where(causal(q, k), 0.0, -1e4)) * 1e-3).softmax(-1) @ v


@near_miss(SkipCode.FLOAT_BIAS)
def hidden_logits_set_to_zero(q, k, v):
    return (q @ k.mT).masked_fill(~causal(q, k), 0.0).softmax(-1) @ v


@near_miss(SkipCode.FLOAT_BIAS)
def boolean_mask_added_as_a_number(q, k, v):
    return (q @ k.mT + causal(q, k)).softmax(-1) @ v


@near_miss(SkipCode.FLOAT_BIAS, extra=lambda: (torch.ones(B, T, dtype=torch.long),))
def integer_mask_turned_into_numbers(q, k, v, mask):
    return attend(q, k, v, (1.0 - mask[:, None, None]) * -1e4)


@near_miss("key padding", extra=lambda: (torch.ones(B, T, dtype=torch.long),))
def integer_mask_compared_first(q, k, v, mask):
    return attend(q, k, v, (mask[:, None, None] == 0).float() * -1e4)


@near_miss(SkipCode.FLOAT_BIAS)
def infinity_times_zero(q, k, v):
    return attend(q, k, v, (1.0 - causal(q, k).float()) * NEG)


@near_miss("causal")
def two_masks_added(q, k, v):
    first = torch.where(causal(q, k), 0.0, -1e5)
    return attend(q, k, v, first + torch.full((T, T), NEG).triu(3))


@near_miss(SkipCode.FLOAT_BIAS)
def hidden_keys_after_a_change_of_sign(q, k, v):
    return ((q @ k.mT).masked_fill(~causal(q, k), -1e9) * -0.5).softmax(-1) @ v


@near_miss(SkipCode.FLOAT_BIAS)
def hidden_keys_multiplied_by_nothing(q, k, v):
    return ((q @ k.mT).masked_fill(~causal(q, k), -1e9) * 0.0).softmax(-1) @ v


@near_miss(SkipCode.FLOAT_BIAS)
def keys_preferred_by_a_large_number(q, k, v):
    return (q @ k.mT).masked_fill(causal(q, k), 1e9).softmax(-1) @ v


@near_miss(SkipCode.FLOAT_BIAS)
def keys_preferred_by_infinity(q, k, v):
    return (q @ k.mT).masked_fill(torch.eye(T, dtype=torch.bool), float("inf")).softmax(-1) @ v


@near_miss(SkipCode.FLOAT_BIAS)
def keys_filled_with_nan(q, k, v):
    return (q @ k.mT).masked_fill(~causal(q, k), float("nan")).softmax(-1) @ v


@near_miss(SkipCode.FLOAT_BIAS)
def mask_added_and_taken_away(q, k, v):
    mask = torch.where(causal(q, k), 0.0, -1e9)
    return (q @ k.mT + mask - mask).softmax(-1) @ v


@near_miss(SkipCode.FLOAT_BIAS)
def mask_subtracted(q, k, v):
    return (q @ k.mT - torch.where(causal(q, k), 0.0, -1e9)).softmax(-1) @ v


@near_miss("causal")
def positive_mask_subtracted(q, k, v):
    return (q @ k.mT - torch.where(causal(q, k), 0.0, 1e9)).softmax(-1) @ v


@near_miss(SkipCode.FLOAT_BIAS)
def noise_on_the_logits(q, k, v):
    return (q @ k.mT + torch.rand(T, T)).softmax(-1) @ v


@near_miss(SkipCode.FLOAT_BIAS)
def linear_biases_per_head(q, k, v):
    rows, columns = positions(q, k)
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])[:, None, None]
    return attend(q, k, v, torch.where(causal(q, k), slopes * (columns - rows), NEG))


@near_miss(SkipCode.FLOAT_BIAS)
def bias_of_the_keys(q, k, v):
    return (q @ k.mT + k.sum(-1)[..., None, :]).softmax(-1) @ v


@near_miss(SkipCode.FLOAT_BIAS)
def bias_of_the_queries(q, k, v):
    return (q @ k.mT + q.sum(-1)[..., None]).softmax(-1) @ v


@near_miss(SkipCode.FLOAT_BIAS, extra=lambda: (draw(B, H, T, T),))
def bias_beneath_the_product(q, k, v, bias):
    bias, q, k, v = (x.flatten(0, 1) for x in (bias, q, k, v))
    return torch.baddbmm(bias, q, k.mT).softmax(-1) @ v


@near_miss(SkipCode.FLOAT_BIAS)
def mask_shrunk_beneath_the_product(q, k, v):
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    mask = torch.where(causal(q, k), 0.0, -1e4).expand(B * H, T, T)
    return torch.baddbmm(mask, q, k.mT, beta=1e-3).softmax(-1) @ v


@near_miss(SkipCode.FLOAT_BIAS)
def causal_triangle_multiplied_into_the_logits(q, k, v):
    return (q @ k.mT + torch.ones(T, T).tril() * -1e9 * 1e-9).softmax(-1) @ v


@near_miss(SkipCode.FLOAT_BIAS)
def different_biases_inside_the_mask(q, k, v):
    rows, columns = positions(q, k)
    bias = torch.where(columns <= rows, 0.0, -1e9)
    return attend(q, k, v, torch.where(rows - columns > 4, -1.0, bias))


@near_miss.parametrized()
def test_near_miss_is_left_alone_or_understood_exactly(name, dynamic):
    near_miss.judge(name, dynamic)
