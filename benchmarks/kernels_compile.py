"""Compile the Triton kernels for a GPU that need not be there, and read what the compiler made.

    python benchmarks/kernels_compile.py --capability 90 [--sass DIR] [--only attention_forward]

prints registers, spills and shared memory of each kernel in each configuration listed in
``CASES``. The same machinery fills Triton's cache ahead of a run (:func:`offline_compilation`):
a launch inside it compiles and does not run.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction


class _AbsentDevice:
    """What Triton asks of a driver while it compiles."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        del device
        return 0


@dataclass(frozen=True)
class Compiled:
    """One kernel as the compiler left it."""

    name: str
    warps: int
    shared: int
    """Bytes of shared memory per program."""
    cubin: bytes

    def tool(self, tool: str, *flags: str) -> str:
        """Return what a CUDA binary tool says about the kernel."""
        path = Path(triton.__file__).parent / "backends/nvidia/bin" / tool
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.cubin)
            file.flush()
            command = [str(path), *flags, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def describe(self) -> str:
        """Return one line for a table."""
        return (
            f"{self.name:22} {self.warps:2} warps {self.registers:3} registers"
            f" {self.stack:4} B stack {self.shared / 1024:6.1f} KiB shared"
            f" {self.local_memory:4} local {self.products}"
        )

    @property
    def registers(self) -> int:
        """Registers per thread."""
        return int(re.findall(r"REG:(\d+)", self.tool("cuobjdump", "-res-usage"))[-1])

    @property
    def stack(self) -> int:
        """Bytes of stack per thread: what the compiler spilt, or indexed at run time."""
        return int(re.findall(r"STACK:(\d+)", self.tool("cuobjdump", "-res-usage"))[-1])

    @property
    def products(self) -> str:
        """How many asynchronous matrix products there are, and in how many groups.

        As many groups as products: the assembler serialised them.
        """
        all_products = re.findall(r"\bHGMMA\b[^;]*", self.sass)
        if not all_products:
            return ""
        groups = sum("gsb0" in product for product in all_products)
        copies = len(re.findall(r"\bUTMALDG\b", self.sass))
        return f"{len(all_products)} products in {groups} groups, {copies} copies"

    @property
    def local_memory(self) -> int:
        """Instructions that read or write local memory, as spills do."""
        return len(re.findall(r"\b(?:LDL|STL)\b", self.sass))

    @cached_property
    def sass(self) -> str:
        """The machine code."""
        return self.tool("cuobjdump", "--dump-sass")


@contextmanager
def offline_compilation(capability: int = 90) -> Iterator[list[Compiled]]:
    """Turn each launch of a Triton kernel into its compilation; yield what was compiled."""
    compiled: list[Compiled] = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        del grid, warmup
        kernel = run(self, *args, grid=(1,), warmup=True, **kwargs)
        if kernel is not None:
            kernel = kernel.result() if hasattr(kernel, "result") else kernel
            data = kernel.metadata
            compiled.append(Compiled(kernel.name, data.num_warps, data.shared, kernel.asm["cubin"]))
        return kernel

    driver = triton.runtime.driver
    previous = driver._active
    driver.set_active(_AbsentDevice(capability))
    JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        JITFunction.run = run
        driver._active = previous


def _selection(batch, heads, q_len, k_len, query_block, key_block):
    shape = (batch, heads, -(-q_len // query_block), -(-k_len // key_block))
    return torch.zeros(shape, dtype=torch.int32), torch.zeros(shape[:3], dtype=torch.int32)


def attention_forward(dtype, dim, query_block, key_block, selections, softcap=None, **visibility):
    from seer_compile.kernels.triton.attention_forward import launch

    query = torch.zeros(1, 8, 256, dim, dtype=dtype)
    key = torch.zeros(1, 2, 256, dim, dtype=dtype)
    indices, counts = _selection(1, selections, 256, 256, query_block, key_block)
    arguments = (query, key, key, indices, counts, 0.1, query_block, key_block)
    launch(*arguments, **{"upper": 0, **visibility}, softcap=softcap)


def hopper_attention(dtype, dim, query_block, key_block, selections, **visibility):
    from seer_compile.kernels.triton.hopper_attention import launch

    query = torch.zeros(1, 8, 256, dim, dtype=dtype)
    key = torch.zeros(1, 2, 256, dim, dtype=dtype)
    indices, counts = _selection(1, selections, 256, 256, query_block, key_block)
    arguments = (query, key, key, indices, counts, 0.1, query_block, key_block)
    launch(*arguments, **{"upper": 0, **visibility})


def attention_backward(dtype, dim, query_block, key_block, selections, softcap=None):
    from seer_compile.kernels.triton.attention_backward import launch

    query = torch.zeros(1, 8, 256, dim, dtype=dtype)
    key = torch.zeros(1, 2, 256, dim, dtype=dtype)
    lse = torch.zeros(1, 8, 256)
    indices, counts = _selection(1, selections, 256, 256, query_block, key_block)
    tensors = (query, query, key, key, query, lse, indices, counts)
    launch(*tensors, 0.1, query_block, key_block, upper=0, softcap=softcap)


def hopper_backward(dtype, dim, query_block, key_block, selections):
    from seer_compile.kernels.triton.hopper_backward import launch

    query = torch.zeros(1, 8, 256, dim, dtype=dtype)
    key = torch.zeros(1, 2, 256, dim, dtype=dtype)
    lse = torch.zeros(1, 8, 256)
    indices, counts = _selection(1, selections, 256, 256, query_block, key_block)
    tensors = (query, query, key, key, query, lse, indices, counts)
    launch(*tensors, 0.1, query_block, key_block, upper=0)


def pool_blocks(dtype, dim, size, kinds):
    from seer_compile.kernels.triton.pool_blocks import launch

    launch(torch.zeros(1, 8, 256, dim, dtype=dtype), size, kinds)


def pool_features(dtype, dim, size, kinds, groups):
    from seer_compile.kernels.triton.pool_features import launch

    weight = torch.zeros(2 * groups, len(kinds.split(",")) * dim, 64)
    tokens = torch.zeros(1, 2 * groups, 1024, dim, dtype=dtype)
    launch(tokens, weight, size, kinds, None, groups)


def pool_resident(dtype, dim, size):
    from seer_compile.kernels.triton.pool_resident import launch

    tokens = torch.zeros(1, 2, 65536, dim, dtype=dtype)
    launch(tokens, torch.zeros(2, 3 * dim, 64), size, "mean,max,min")


def block_scores(dtype, dim, sub_blocks, block, groups):
    from seer_compile.kernels.triton.block_scores import launch

    features = [torch.zeros(1, 8, 2048 // tokens, dim, dtype=dtype) for tokens in sub_blocks]
    launch(*features, 0.1, *sub_blocks, block, block, 2048, 2048, groups, upper=0)


def hopper_scores(dtype, dim, sub_blocks, block, groups):
    from seer_compile.kernels.triton.hopper_scores import launch

    features = [torch.zeros(1, 8, 2048 // tokens, dim, dtype=dtype) for tokens in sub_blocks]
    launch(*features, 0.1, *sub_blocks, block, block, 2048, 2048, groups, upper=0)


def select_blocks(blocks, selector):
    from seer_compile.kernels.budgets import only
    from seer_compile.kernels.triton.select_blocks import launch

    scores = torch.zeros(1, 1, 2, blocks)
    launch(scores, only(torch.ones(1)), selector, 64, 64, 128, 64 * blocks, upper=0)


def attention_mass(dtype, dim, query_unit, key_unit):
    from seer_compile.kernels.triton.attention_mass import launch

    query = torch.zeros(1, 8, 256, dim, dtype=dtype)
    launch(query, query[:, :2], 0.1, query_unit, key_unit, "mean", "sum", upper=0)


_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32
CASES = {
    "attention_forward": (
        attention_forward,
        [
            (_BF16, 128, 64, 64, 8),
            (_BF16, 128, 64, 64, 2),
            (_BF16, 256, 128, 128, 8),
            (_BF16, 80, 32, 16, 8),
            (_FP32, 256, 128, 128, 8),
            (_BF16, 256, 64, 64, 8, 50.0),
        ],
    ),
    "hopper_attention": (
        hopper_attention,
        [
            (_BF16, 128, 64, 64, 2),
            (_BF16, 128, 64, 64, 8),
            (_FP16, 64, 128, 128, 8),
            (_BF16, 256, 64, 64, 2),
        ],
    ),
    "attention_backward": (
        attention_backward,
        [
            (_BF16, 128, 64, 64, 8),
            (_BF16, 256, 128, 128, 8),
            (_FP32, 64, 64, 64, 8),
            (_BF16, 256, 64, 64, 8, 50.0),
        ],
    ),
    "hopper_backward": (
        hopper_backward,
        [(_BF16, 128, 64, 64, 2), (_BF16, 128, 64, 64, 8), (_FP16, 64, 128, 128, 8)],
    ),
    "pool_blocks": (pool_blocks, [(_BF16, 128, 8, "mean,max,min")]),
    "pool_features": (
        pool_features,
        [(_BF16, 128, 2, "mean", 4), (_BF16, 128, 4, "mean,max,min", 1)],
    ),
    "pool_resident": (pool_resident, [(_BF16, 128, 4), (_BF16, 64, 4)]),
    "block_scores": (
        block_scores,
        [
            (_BF16, 64, (2, 4), 64, 1),
            (_BF16, 64, (2, 4), 64, 4),
            (_BF16, 128, (64, 64), 64, 4),
            (_FP32, 64, (8, 8), 64, 1),
        ],
    ),
    "hopper_scores": (
        hopper_scores,
        [
            (_BF16, 64, (2, 4), 64, 1),
            (_BF16, 64, (2, 4), 64, 4),
            (_FP16, 128, (4, 8), 64, 1),
            (_BF16, 64, (1, 2), 64, 1),
            (_BF16, 64, (4, 8), 64, 1),
            (_BF16, 32, (2, 4), 64, 1),
        ],
    ),
    "select_blocks": (select_blocks, [(512, "top_p"), (16384, "fraction")]),
    "attention_mass": (attention_mass, [(_BF16, 128, 8, 64), (_BF16, 256, 128, 128)]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--capability", type=int, default=90)
    parser.add_argument("--only", choices=sorted(CASES), nargs="*")
    parser.add_argument("--sass", type=Path, help="write the machine code of each kernel here")
    arguments = parser.parse_args()
    for name in arguments.only or CASES:
        function, cases = CASES[name]
        for number, case in enumerate(cases):
            with offline_compilation(arguments.capability) as compiled:
                function(*case)
            for kernel in compiled:
                print(kernel.describe(), case, flush=True)
                if arguments.sass:
                    arguments.sass.mkdir(parents=True, exist_ok=True)
                    (arguments.sass / f"{kernel.name}_{number}.sass").write_text(kernel.sass)


if __name__ == "__main__":
    main()
