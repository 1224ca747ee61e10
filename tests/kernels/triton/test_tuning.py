"""Tilings: they divide their blocks, share key tiles only where heads share them, and fit."""

from __future__ import annotations

import pytest
import torch

from seer_compile.errors import HeadConfigError

pytest.importorskip("triton")

from seer_compile.kernels.triton import tuning

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SIZES = (16, 32, 64, 128)


@pytest.mark.parametrize("limit", [tuning.HOPPER_SHARED, 166_912, 101_376])
@pytest.mark.parametrize("dim", [16, 64, 128, 256])
def test_attention_tiles_divide_their_blocks_and_fit_the_device(dim, limit):
    for dtype in DTYPES:
        for query_block in SIZES:
            for key_block in SIZES:
                for selections in (8, 2, 1):
                    layout = tuning.head_layout(8, 2, selections)
                    tiling = tuning.forward_tiling(
                        layout, query_block, key_block, dim, dtype, limit
                    )
                    assert query_block % tiling.rows == 0
                    assert key_block % tiling.keys == 0
                    assert 4 % tiling.heads == 0
                    assert tiling.heads == 1 or selections < 8
                    rows = tiling.rows * tiling.heads
                    tokens = rows + 2 * tiling.stages * tiling.keys
                    assert tokens * dim * dtype.itemsize <= limit
                backward = tuning.backward_tiling(query_block, key_block, dim, dtype, limit)
                assert query_block % backward.rows == 0
                assert key_block % backward.keys == 0


def test_tiles_never_mix_heads_of_different_key_heads_or_selections():
    layout = tuning.head_layout(12, 2, 3)
    tiling = tuning.forward_tiling(layout, 16, 16, 64, torch.float16)
    assert layout.per_key_head % tiling.heads == 0
    assert layout.per_selection % tiling.heads == 0


def test_heads_that_form_no_groups_are_refused_by_name():
    with pytest.raises(HeadConfigError, match="kv_heads=3"):
        tuning.head_layout(8, 3, 8)
    with pytest.raises(HeadConfigError, match="selection heads=0"):
        tuning.head_layout(8, 2, 0)
