"""Scales that are no constants; batch, heads and layouts that do not fit.

Each is left alone with the true reason, or understood exactly; see ``support.near_misses``.
"""

import torch
import torch.nn.functional as F

from seer_compile.types import SkipCode
from support.graphs import NEG, B, D, G, H, T, causal, repeat_kv
from support.near_misses import NOT_FOUND, NearMisses, attend

near_miss = NearMisses()


@near_miss(SkipCode.SCALE)
def scale_computed_from_data(q, k, v):
    return (q @ k.mT / q.norm()).softmax(-1) @ v


@near_miss(SkipCode.SCALE, extra=lambda: (torch.tensor(0.3),))
def scale_given_as_a_tensor(q, k, v, scale):
    return (q @ k.mT * scale).softmax(-1) @ v


@near_miss(SkipCode.SCALE, extra=lambda: (torch.rand(H, 1, 1),))
def scale_per_head(q, k, v, scale):
    return (q @ k.mT * scale).softmax(-1) @ v


@near_miss(SkipCode.SCALE)
def logits_multiplied_by_a_mask(q, k, v):
    mask = causal(q, k).float()
    return ((q @ k.mT) * mask - 1e4 * (1 - mask)).softmax(-1) @ v


@near_miss("full", kv_heads=G)
def heads_tiled_in_the_other_order(q, k, v):
    return attend(q, k.repeat(1, H // G, 1, 1), v.repeat(1, H // G, 1, 1), None)


@near_miss("full", kv_heads=G)
def heads_expanded_in_the_other_order(q, k, v):
    k, v = (x[:, None].expand(B, H // G, G, T, D).reshape(B, H, T, D) for x in (k, v))
    return attend(q, k, v, None)


@near_miss("full", kv_heads=G)
def only_keys_are_repeated(q, k, v):
    values = torch.cat([v, v * 2], 1)
    return attend(q, repeat_kv(k, H // G), values, None)


@near_miss("full", kv_heads=G)
def repeated_keys_are_changed_before_use(q, k, v):
    return attend(q, repeat_kv(k, H // G) * torch.rand(H, 1, 1), repeat_kv(v, H // G), None)


@near_miss(SkipCode.RANK)
def values_of_one_head(q, k, v):
    return (q @ k.mT).softmax(-1) @ v[:, :1]


@near_miss(SkipCode.RANK)
def keys_shared_by_the_batch(q, k, v):
    return (q @ k[:1].mT).softmax(-1) @ v


@near_miss(SkipCode.RANK)
def queries_shared_by_the_batch(q, k, v):
    return (q[:1] @ k.mT).softmax(-1) @ v


@near_miss(SkipCode.RANK)
def heads_summed_in_the_product(q, k, v):
    weights = torch.einsum("bhqd,bhkd->bqk", q, k).softmax(-1)
    return torch.einsum("bqk,bhkd->bhqd", weights, v)


@near_miss(SkipCode.AMBIGUOUS)
def values_read_along_the_queries(q, k, v):
    return torch.einsum("bhqk,bhqd->bhkd", (q @ k.mT).softmax(-1), v)


@near_miss(SkipCode.RANK)
def values_multiplied_per_query(q, k, v):
    values = v[:, :, None].expand(B, H, T, T, D)
    return torch.einsum("bhqk,bhqkd->bhqd", (q @ k.mT).softmax(-1), values)


@near_miss(NOT_FOUND)
def two_dimensions(q, k, v):
    return (q[0, 0] @ k[0, 0].mT).softmax(-1) @ v[0, 0]


@near_miss(NOT_FOUND)
def linear_attention(q, k, v):
    return q.softmax(-1) @ (k.softmax(-2).mT @ v)


@near_miss(NOT_FOUND)
def additive_attention(q, k, v):
    return (q[:, :, :, None] + k[:, :, None]).tanh().sum(-1).softmax(-1) @ v


@near_miss(NOT_FOUND)
def routing_of_tokens_to_experts(q, k, v):
    weights = F.linear(q, torch.ones(T, D)).softmax(-1)
    return weights @ v


@near_miss(NOT_FOUND)
def similarity_without_values(q, k, v):
    return (q @ k.mT).softmax(-1).sum(-1), v


@near_miss("full")
def dimensions_viewed_without_a_transposition(q, k, v):
    q, k, v = (x.transpose(1, 2).reshape(B, T, H * D).view(B, H, T, D) for x in (q, k, v))
    return (q @ k.mT).softmax(-1) @ v


@near_miss("causal")
def tokens_split_into_blocks_and_joined_again(q, k, v):
    q = q.unflatten(2, (T // 4, 4)).flatten(2, 3)
    logits = (q @ k.mT).view(B, H, T // 4, 4, T).view(B, H, T, T)
    return logits.masked_fill(~causal(q, k), NEG).softmax(-1) @ v


@near_miss("full")
def attention_over_blocks_as_one_more_batch_dimension(q, k, v):
    q, k, v = (x.view(B, H, T // 4, 4, D) for x in (q, k, v))
    return (q @ k.mT).softmax(-1) @ v


@near_miss(SkipCode.SCALE)
def logits_divided_by_their_spread(q, k, v):
    logits = q @ k.mT
    return (logits / logits.std(-1, keepdim=True)).softmax(-1) @ v


@near_miss("full", extra=lambda: (torch.rand(H, 1, 1),))
def scale_per_head_on_the_queries(q, k, v, scale):
    return ((q * scale) @ k.mT).softmax(-1) @ v


@near_miss("full")
def cosine_of_queries_and_keys(q, k, v):
    return (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * 10).softmax(-1) @ v


@near_miss(SkipCode.SCALE, extra=lambda: (torch.rand(H, 1, 1),))
def cosine_with_a_learned_scale_per_head(q, k, v, scale):
    return (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * scale.exp()).softmax(-1) @ v


@near_miss(["full", SkipCode.SCALE], extra=lambda: (torch.tensor(2.0),))
def scale_given_as_a_tensor_before_and_after_the_product(q, k, v, scale):
    return attend(q * scale, k, v, None), (q @ k.mT * scale).softmax(-1) @ v


@near_miss(SkipCode.RANK, extra=lambda: (torch.rand(H),))
def scale_per_head_within_the_product(q, k, v, scale):
    return torch.einsum("bhqd,bhkd,h->bhqk", q, k, scale).softmax(-1) @ v


@near_miss("full")
def scale_of_a_head_dim_known_from_its_shape(q, k, v):
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


@near_miss(SkipCode.RANK)
def heads_summed_with_the_values(q, k, v):
    return torch.einsum("bhqk,bhkd->bqd", (q @ k.mT).softmax(-1), v)


@near_miss("full")
def output_with_its_dim_before_its_tokens(q, k, v):
    return torch.einsum("bhqk,bhkd->bdhq", (q @ k.mT).softmax(-1), v)


@near_miss("full")
def attention_over_channels(q, k, v):
    return ((q.mT @ k).softmax(-1) @ v.mT).mT


@near_miss(SkipCode.RANK)
def same_weights_for_all_heads(q, k, v):
    weights = (q.mean(1) @ k.mean(1).mT).softmax(-1)
    return torch.einsum("bqk,bhkd->bhqd", weights, v)


@near_miss(SkipCode.RANK)
def values_with_one_more_axis(q, k, v):
    weights = (q @ k.mT).softmax(-1)
    return weights[:, :, None] @ v[:, :, None].expand(B, H, 3, T, D)


@near_miss("full")
def keys_gathered_by_index(q, k, v):
    order = torch.arange(T).flip(0)
    return (q @ k[:, :, order].mT).softmax(-1) @ v[:, :, order]


@near_miss("full")
def keys_gathered_and_values_not(q, k, v):
    return (q @ k[:, :, torch.arange(T).flip(0)].mT).softmax(-1) @ v


@near_miss("full")
def every_second_key_read(q, k, v):
    return (q @ k[:, :, ::2].mT).softmax(-1) @ v[:, :, ::2]


@near_miss("full", kv_heads=G)
def keys_of_groups_and_values_of_heads(q, k, v):
    return attend(q, repeat_kv(k, H // G), torch.cat([v, v + 1], 1), None)


@near_miss("full", kv_heads=G)
def groups_of_keys_and_values_in_other_orders(q, k, v):
    return attend(q, k.repeat_interleave(H // G, 1), v.repeat(1, H // G, 1, 1), None)


@near_miss("full", kv_heads=1)
def keys_of_one_head_expanded_to_all(q, k, v):
    return (q @ k.expand(B, H, T, D).mT).softmax(-1) @ v.expand(B, H, T, D)


@near_miss("full")
def keys_of_one_token_expanded(q, k, v):
    return (q @ k[:, :, :1].expand(B, H, T, D).mT).softmax(-1) @ v


@near_miss("full")
def keys_of_one_channel_expanded(q, k, v):
    return (q @ k[..., :1].expand(B, H, T, D).mT).softmax(-1) @ v


@near_miss("full")
def batch_and_heads_exchanged(q, k, v):
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    return (q @ k.mT).softmax(-1) @ v


@near_miss("full", heads=16)
def tokens_and_heads_exchanged(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return (q @ k.mT).softmax(-1) @ v


@near_miss("full", heads=16)
def fused_call_over_heads_as_tokens(q, k, v):
    return attend(*(x.transpose(1, 2) for x in (q, k, v)), None)


@near_miss(SkipCode.RANK, heads=16)
def weights_applied_to_heads_as_tokens(q, k, v):
    return (q @ k.mT).softmax(-1).transpose(1, 2) @ v


@near_miss.parametrized()
def test_near_miss_is_left_alone_or_understood_exactly(name, dynamic):
    near_miss.judge(name, dynamic)
