"""A short run of the kernel fuzzer on the GPU; ``benchmarks/fuzz_kernels.py`` is the long one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize(
    "op", ["attention", "block_scores", "attention_mass", "pool_blocks", "select_blocks"]
)
def test_random_configurations_match_float64_on_the_gpu(op):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "benchmarks/fuzz_kernels.py", "--ops", op, "--cases", "32"]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
