"""A short run of the kernel fuzzer on the GPU; ``benchmarks/fuzz_kernels.py`` is the long one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("op", "cases"),
    [
        ("attention", 16),
        ("attention_mass", 16),
        ("block_scores", 32),
        ("hopper_scores", 30),
        ("pool_blocks", 32),
        ("pool_features", 32),
        ("select_blocks", 32),
    ],
)
def test_random_configurations_match_float64_on_the_gpu(op, cases):
    """Every profile of the fuzzer at least once."""
    if op.startswith("hopper") and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("no Hopper GPU")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "benchmarks/fuzz_kernels.py", "--ops", op, "--cases", str(cases)]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.slow
def test_every_tiling_of_the_hopper_engine_matches_float64_on_the_gpu():
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("no Hopper GPU")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "benchmarks/engines.py", "--only", "check", "--cases", "4"]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]


@pytest.mark.gpu
def test_the_operator_answers_by_the_engine_that_was_chosen():
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("no Hopper GPU")
    from seer_compile.kernels import engines, ops
    from seer_compile.types import BlockSelection, BlockSize, Visibility

    tokens = torch.randn(1, 4, 256, 64, device="cuda", dtype=torch.bfloat16)
    indices = torch.arange(4, dtype=torch.int32, device="cuda").expand(1, 4, 4, 4).contiguous()
    counts = torch.full((1, 4, 4), 4, dtype=torch.int32, device="cuda")
    results = {}
    engines.reset()
    for name in ("portable", "hopper"):
        with engines.attention_engine(name):
            results[name], _ = ops.block_sparse_attention(
                tokens, tokens, tokens, BlockSelection(indices, counts),
                block_size=BlockSize(), visibility=Visibility(upper=0),
            )  # fmt: skip
    assert engines.answers() == {"portable": 1, "hopper": 1}
    # Each rounds its probabilities and its result to bfloat16, 2^-9 at most.
    torch.testing.assert_close(results["hopper"], results["portable"], rtol=2**-7, atol=2**-7)


@pytest.mark.gpu
def test_weights_that_stay_on_the_chip_give_the_features_of_pooling_tile_by_tile_on_the_gpu():
    from seer_compile.kernels.triton import pool_features, pool_resident, tuning

    for dim, length in ((128, 65_536), (128, 65_573), (64, 70_001)):
        # What lies behind the last token must not be read.
        memory = torch.full((1, length + 512, 8, dim), float("nan"), device="cuda").bfloat16()
        tokens = memory[:, :length].normal_().transpose(1, 2)
        weight = torch.randn(8, 3 * dim, 64, device="cuda") * dim**-0.5
        arguments = (tokens, weight, 4, "mean,max,min")
        if not pool_resident.takes(*arguments, groups=1):
            pytest.skip("weights stay on the chip of Hopper alone")
        tiling = tuning.pool_tiling(-(-length // 4), 4)
        by_tiles = pool_features.launch(*arguments, tiling=tiling)
        resident = pool_features.launch(*arguments)
        assert torch.equal(resident, pool_resident.launch(*arguments))
        assert bool(resident.isfinite().all())
        torch.testing.assert_close(resident, by_tiles, rtol=2**-7, atol=2**-9)
