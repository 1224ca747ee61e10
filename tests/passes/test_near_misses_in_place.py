"""Tensors that change in place between, before or after their uses.

Each is left alone with the true reason, or understood exactly; see ``support.near_misses``.
"""

import torch

from seer_compile.types import SkipCode
from support.graphs import NEG, B, G, H, T, causal, repeat_kv
from support.near_misses import NearMisses, attend, positions

near_miss = NearMisses()


@near_miss(SkipCode.MUTATION)
def query_changed_between_its_use_and_the_output(q, k, v):
    q = q + 0
    logits = q @ k.mT
    q.mul_(2.0)
    return logits.softmax(-1) @ v, q


@near_miss("full")
def query_changed_before_its_use(q, k, v):
    q = q + 0
    q.mul_(2.0)
    return (q @ k.mT).softmax(-1) @ v


@near_miss("full")
def value_changed_between_the_products(q, k, v):
    v = v + 0
    weights = (q @ k.mT).softmax(-1)
    v.mul_(2.0)
    return weights @ v


@near_miss(SkipCode.MUTATION)
def key_changed_through_a_view(q, k, v):
    k = k + 0
    logits = q @ k.mT
    k[:, :, 0].zero_()
    return logits.softmax(-1) @ v


@near_miss("full", kv_heads=G)
def repeated_key_changed_through_a_view(q, k, v):
    keys = repeat_kv(k, H // G)
    keys[:, 0].zero_()
    return attend(q, keys, repeat_kv(v, H // G), None)


@near_miss("full", kv_heads=G)
def interleaved_key_changed_through_a_view(q, k, v):
    keys = k.repeat_interleave(H // G, 1)
    keys[:, 0].zero_()
    return attend(q, keys, v.repeat_interleave(H // G, 1), None)


@near_miss("full", kv_heads=G)
def key_changed_after_it_was_repeated(q, k, v):
    k = k + 0
    keys = k.repeat_interleave(H // G, 1)
    k.zero_()
    return attend(q, keys, v.repeat_interleave(H // G, 1), None), k


@near_miss("full")
def key_written_piece_by_piece(q, k, v):
    keys = torch.empty_like(k)
    keys[..., :4].copy_(k[..., 4:])
    keys[..., 4:].copy_(k[..., :4])
    return (q @ keys.mT).softmax(-1) @ v


@near_miss("full")
def copy_changed_after_it_was_read(q, k, v):
    keys = k.contiguous().clone()
    logits = q @ keys.clone().mT
    keys.zero_()
    return logits.softmax(-1) @ v, keys


@near_miss(SkipCode.MUTATION)
def logits_changed_through_a_view(q, k, v):
    logits = q @ k.mT
    logits[..., 0].fill_(-1e9)
    return logits.softmax(-1) @ v


@near_miss(SkipCode.MUTATION)
def logits_changed_through_a_view_before_a_cast(q, k, v):
    logits = q @ k.mT
    logits[..., 0].fill_(-1e9)
    return logits.to(torch.float64).softmax(-1).to(torch.float32) @ v


@near_miss(SkipCode.MUTATION)
def weights_changed_through_a_view(q, k, v):
    weights = (q @ k.mT).softmax(-1)
    weights[..., 0].zero_()
    return weights @ v


@near_miss("causal")
def logits_filled_in_place(q, k, v):
    logits = q @ k.mT
    logits.mul_(0.5).masked_fill_(~causal(q, k), NEG)
    return logits.softmax(-1) @ v


@near_miss("causal")
def mask_added_in_place(q, k, v):
    logits = q @ k.mT
    logits += torch.full((T, T), NEG).triu_(1)
    return logits.softmax(-1) @ v


@near_miss(SkipCode.OPAQUE_MASK)
def mask_changed_through_a_view(q, k, v):
    mask = causal(q, k)
    mask[:, 0].fill_(True)
    return attend(q, k, v, mask & (torch.arange(T) >= 0))


@near_miss(SkipCode.OPAQUE_MASK, extra=lambda: (torch.tensor(3),))
def offset_counted_on_in_place_between_definition_and_mask(q, k, v, offset):
    rows, columns = positions(q, k)
    view = offset.view(1)
    view.add_(1)
    return attend(q, k, v, columns <= rows + offset)


@near_miss(SkipCode.MUTATION)
def mask_itself_changed_through_a_view(q, k, v):
    mask = causal(q, k)
    mask[:, 3].fill_(True)
    return attend(q, k, v, mask)


@near_miss("causal(offset=offset_1)", extra=lambda: (torch.tensor(-3),))
def offset_counted_on_in_place_after_the_mask(q, k, v, offset):
    rows, columns = positions(q, k)
    mask = columns <= rows + offset
    offset.add_(T)
    return attend(q, k, v, mask), offset


@near_miss(SkipCode.OPAQUE_MASK)
def mask_changed_by_an_index(q, k, v):
    mask = causal(q, k)
    mask[torch.tensor([2, 5]), torch.tensor([9, 11])] = True
    return attend(q, k, v, mask)


@near_miss("keys from 1")
def mask_written_as_an_output(q, k, v):
    mask = causal(q, k)
    torch.logical_not(mask, out=mask)
    return attend(q, k, v, mask)


@near_miss(SkipCode.OPAQUE_MASK)
def mask_filled_by_a_condition_in_place(q, k, v):
    mask = causal(q, k)
    mask.masked_fill_(torch.arange(T) == 11, True)
    return attend(q, k, v, mask)


@near_miss(["full", "full"])
def query_is_the_output_of_another_that_changes(q, k, v):
    first = attend(q, k, v, None)
    first.mul_(2.0)
    return (first @ k.mT).softmax(-1) @ v, first


@near_miss(SkipCode.MUTATION)
def value_changed_after_the_fused_call_reads_its_view(q, k, v):
    k = k + 0
    logits = q @ k.mT
    k.copy_(v)
    return logits.softmax(-1) @ v, k


@near_miss(SkipCode.MUTATION)
def weights_filled_at_random(q, k, v):
    weights = (q @ k.mT).softmax(-1)
    weights[0].uniform_()
    return weights @ v


@near_miss("full")
def input_changed_after_its_use(q, k, v):
    out = attend(q, k, v, None)
    k.zero_()
    return out


@near_miss("key padding", extra=lambda: (torch.arange(B * T).view(B, T) % 5 > 0,))
def padding_changed_after_its_use(q, k, v, mask):
    visible = mask[:, None, None]
    out = attend(q, k, v, visible)
    mask.logical_not_()
    return out


@near_miss("causal + key padding", extra=lambda: (torch.arange(B * T).view(B, T) % 5 > 0,))
def padding_changed_between_a_copy_and_its_use(q, k, v, mask):
    both = mask[:, None, None] & causal(q, k)
    mask.logical_not_()
    return attend(q, k, v, both), mask


@near_miss.parametrized()
def test_near_miss_is_left_alone_or_understood_exactly(name, dynamic):
    near_miss.judge(name, dynamic)
