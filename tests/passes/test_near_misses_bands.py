"""Masks of positions: off by one, inverted, shifted, not monotone.

Each is left alone with the true reason, or understood exactly; see ``support.near_misses``.
"""

import torch
import torch.nn.functional as F

from seer_compile.types import SkipCode
from support.graphs import NEG, T, causal
from support.near_misses import NearMisses, attend, positions

near_miss = NearMisses()


@near_miss("causal(offset=-1)")
def strictly_causal(q, k, v):
    rows, columns = positions(q, k)
    return attend(q, k, v, columns < rows)


@near_miss("causal(offset=1)")
def one_token_ahead(q, k, v):
    rows, columns = positions(q, k)
    return attend(q, k, v, columns <= rows + 1)


@near_miss("causal + window(4)")
def window_of_four(q, k, v):
    rows, columns = positions(q, k)
    return attend(q, k, v, (columns <= rows) & (columns > rows - 4))


@near_miss("causal + window(5)")
def window_of_five(q, k, v):
    rows, columns = positions(q, k)
    return attend(q, k, v, (columns <= rows) & (rows - columns <= 4))


@near_miss("causal(offset=3) + window(7)")
def window_on_both_sides(q, k, v):
    rows, columns = positions(q, k)
    return attend(q, k, v, (rows - columns).abs() < 4)


@near_miss("keys from 1")
def anti_causal(q, k, v):
    return attend(q, k, v, ~causal(q, k))


@near_miss("keys from 0")
def causal_mask_transposed(q, k, v):
    return attend(q, k, v, causal(q, k).mT)


@near_miss("causal", keys=24)
def fused_flag_aligns_top_left(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@near_miss("causal(offset=8)", keys=24)
def triangle_aligned_bottom_right(q, k, v):
    mask = torch.ones(T, 24, dtype=torch.bool).tril(24 - T)
    return attend(q, k, v, mask)


@near_miss("causal(offset=-2)")
def triangle_sliced_with_an_offset(q, k, v):
    return attend(q, k, v, torch.ones(2 * T, 2 * T, dtype=torch.bool).tril()[1 : T + 1, 3 : T + 3])


@near_miss("causal(offset=-1)")
def upper_triangle_kept_from_the_main_diagonal(q, k, v):
    mask = torch.full((T, T), NEG).triu(0)
    return attend(q, k, v, mask)


@near_miss(SkipCode.OPAQUE_MASK)
def every_key_hidden(q, k, v):
    return attend(q, k, v, torch.zeros(T, T, dtype=torch.bool))


@near_miss("full")
def every_key_visible(q, k, v):
    return attend(q, k, v, torch.ones(1, 1, 1, 1, dtype=torch.bool))


@near_miss(SkipCode.OPAQUE_MASK)
def causal_mask_flipped(q, k, v):
    return attend(q, k, v, causal(q, k).flip(-1))


@near_miss(SkipCode.OPAQUE_MASK)
def causal_mask_rolled(q, k, v):
    return attend(q, k, v, causal(q, k).roll(1, -1))


@near_miss(SkipCode.OPAQUE_MASK)
def every_second_key(q, k, v):
    rows, columns = positions(q, k)
    return attend(q, k, v, (rows - columns) % 2 == 0)


@near_miss(SkipCode.OPAQUE_MASK)
def slope_of_two(q, k, v):
    rows, columns = positions(q, k)
    return attend(q, k, v, columns <= 2 * rows)


@near_miss(SkipCode.OPAQUE_MASK)
def causal_over_blocks(q, k, v):
    rows, columns = positions(q, k)
    return attend(q, k, v, columns // 4 <= rows // 4)


@near_miss("same document")
def chunks_of_four(q, k, v):
    rows, columns = positions(q, k)
    return attend(q, k, v, columns // 4 == rows // 4)


@near_miss(SkipCode.OPAQUE_MASK)
def prefix_visible_to_all(q, k, v):
    _, columns = positions(q, k)
    return attend(q, k, v, causal(q, k) | (columns < 4))


@near_miss(SkipCode.OPAQUE_MASK)
def positions_that_overflow(q, k, v):
    rows = (torch.arange(T)[:, None] + 120).to(torch.int8)
    return attend(q, k, v, torch.arange(T)[None] + 120 <= rows)


@near_miss(SkipCode.OPAQUE_MASK)
def positions_rounded_to_half(q, k, v):
    rows = (torch.arange(T, dtype=torch.float16) + 2047)[:, None]
    return attend(q, k, v, torch.arange(T, dtype=torch.float16)[None] + 2047 <= rows)


@near_miss(SkipCode.OPAQUE_MASK)
def one_element_of_the_triangle_differs(q, k, v):
    other = (torch.arange(T)[:, None] == 2) & (torch.arange(T)[None] == 9)
    return attend(q, k, v, causal(q, k) ^ other)


@near_miss(SkipCode.OPAQUE_MASK)
def causal_from_both_ends(q, k, v):
    rows, columns = positions(q, k)
    return attend(q, k, v, (columns <= rows) | (columns >= T - 2))


@near_miss(SkipCode.OPAQUE_MASK)
def distances_multiplied(q, k, v):
    rows, columns = positions(q, k)
    return attend(q, k, v, (rows - columns) * (rows - columns) <= 9)


@near_miss(SkipCode.OPAQUE_MASK)
def product_of_the_positions(q, k, v):
    rows, columns = positions(q, k)
    return attend(q, k, v, rows * columns <= 40)


@near_miss(SkipCode.OPAQUE_MASK)
def sum_of_the_positions(q, k, v):
    rows, columns = positions(q, k)
    return attend(q, k, v, rows + columns <= T)


@near_miss(SkipCode.OPAQUE_MASK)
def dilated_window(q, k, v):
    rows, columns = positions(q, k)
    distance = rows - columns
    return attend(q, k, v, (distance >= 0) & (distance < 8) & (distance % 2 == 0))


@near_miss(SkipCode.OPAQUE_MASK)
def causal_but_for_one_query(q, k, v):
    rows, columns = positions(q, k)
    return attend(q, k, v, (columns <= rows) | (rows == 3))


@near_miss(SkipCode.OPAQUE_MASK)
def causal_triangle_sorted(q, k, v):
    return attend(q, k, v, causal(q, k).float().sort(-1).values > 0)


@near_miss(SkipCode.OPAQUE_MASK)
def causal_triangle_rotated(q, k, v):
    return attend(q, k, v, causal(q, k).rot90())


@near_miss(SkipCode.OPAQUE_MASK)
def rows_of_the_triangle_in_another_order(q, k, v):
    order = torch.tensor([1, 0, *range(2, T)])
    return attend(q, k, v, causal(q, k)[order])


@near_miss(SkipCode.OPAQUE_MASK)
def positions_that_wrap_around(q, k, v):
    rows, columns = positions(q, k)
    return attend(q, k, v, columns <= (rows + 4) % T)


@near_miss(SkipCode.OPAQUE_MASK)
def positions_divided_as_numbers(q, k, v):
    rows, columns = positions(q, k)
    return attend(q, k, v, columns / 4 <= rows / 3)


@near_miss("causal(offset=-1) + window(14)")
def neither_oneself_nor_the_farthest(q, k, v):
    rows, columns = positions(q, k)
    return attend(q, k, v, (columns < rows) & (rows - columns < T - 1))


@near_miss(SkipCode.OPAQUE_MASK)
def all_but_oneself(q, k, v):
    rows, columns = positions(q, k)
    return attend(q, k, v, rows != columns)


@near_miss.parametrized()
def test_near_miss_is_left_alone_or_understood_exactly(name, dynamic):
    near_miss.judge(name, dynamic)
