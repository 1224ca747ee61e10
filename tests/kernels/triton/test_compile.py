"""Every kernel compiles for a Hopper GPU, which need not be there, and fits it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

ROOT = Path(__file__).parents[3]
LARGEST_SHARED = 227.0
"""KiB of shared memory that one program may use on sm_90."""
LOCAL = (80, 0) if triton.__version__.startswith("3.6.") else (130, 4)
"""Accesses to local memory in the backward's kernels of keys, at head dim 128, and of queries. Both
gradients of keys leave no room for the mask of an edge tile; the loop over whole tiles reads three
words of addresses. Later compilers keep more there."""


def compiled(op, cache):
    """Return what the compiler made of the cases of one operator."""
    # In a process of its own: this one may run kernels under the interpreter, or on a real GPU.
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "benchmarks/kernels_compile.py", "--only", op]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    shared = [float(size) for size in re.findall(r"([\d.]+) KiB shared", result.stdout)]
    assert shared, result.stdout
    assert max(shared) <= LARGEST_SHARED, result.stdout
    return result.stdout


@pytest.mark.parametrize(
    "op",
    [
        "pool_blocks",
        pytest.param("pool_features", marks=pytest.mark.slow),
        pytest.param("pool_resident", marks=pytest.mark.slow),
        pytest.param("select_blocks", marks=pytest.mark.slow),
        pytest.param("block_scores", marks=pytest.mark.slow),
        pytest.param("attention_mass", marks=pytest.mark.slow),
        pytest.param("attention_forward", marks=pytest.mark.slow),
        pytest.param("attention_backward", marks=pytest.mark.slow),
    ],
)
def test_kernels_compile_for_hopper_and_fit_its_shared_memory(op, tmp_path):
    compiled(op, tmp_path)


@pytest.mark.slow
def test_the_hopper_backward_multiplies_without_waits(tmp_path):
    lines = [line for line in compiled("hopper_backward", tmp_path).splitlines() if "in " in line]
    assert len(lines) == 6
    for line in lines:
        products, groups, copies = map(
            int, re.findall(r"(\d+) products in (\d+) groups, (\d+) copies", line)[0]
        )
        # A product over 64 keys or 64 dims takes four instructions; serialised, each is a group.
        assert 4 * groups <= products, line
        assert copies >= 4, line
        local = int(re.findall(r"(\d+) local", line)[0])
        is_key_side = "key_gradient_kernel" in line and " 128," in line
        assert local <= LOCAL[0 if is_key_side else 1], line


@pytest.mark.slow
def test_the_hopper_engine_copies_in_bulk_multiplies_without_waits_and_spills_nothing(tmp_path):
    lines = [line for line in compiled("hopper_attention", tmp_path).splitlines() if "in " in line]
    assert len(lines) == 4
    for line in lines:
        products, groups, copies = map(
            int, re.findall(r"(\d+) products in (\d+) groups, (\d+) copies", line)[0]
        )
        # A product over 64 keys or 64 dims takes four instructions; serialised, each is a group.
        assert 4 * groups <= products, line
        assert copies >= 6, line
        local = int(re.findall(r"(\d+) local", line)[0])
        # Head dim 256 leaves no room for the mask of an edge tile; the loop over whole tiles has
        # no spill.
        assert local <= (80 if " 256," in line else 0), line


@pytest.mark.slow
def test_hopper_scores_multiply_without_waits_and_hardly_spill(tmp_path):
    lines = [line for line in compiled("hopper_scores", tmp_path).splitlines() if "in " in line]
    assert len(lines) == 6
    for line in lines:
        products, groups, copies = map(
            int, re.findall(r"(\d+) products in (\d+) groups, (\d+) copies", line)[0]
        )
        # Two products in each of three loops, in two groups of warps.
        assert groups == 12, line
        assert products >= 2 * groups, line
        assert copies >= 5, line
        local = int(re.findall(r"(\d+) local", line)[0])
        # What the loop over whole tiles does not use waits in local memory; gate dim 128 leaves no
        # room for the mask of an edge tile, 16 key blocks of a step little.
        assert local <= (300 if " 128," in line else 100 if "(4, 8)" in line else 40), line
