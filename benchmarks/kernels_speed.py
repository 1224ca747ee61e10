"""How fast are the kernels, beside the dense attention of the same PyTorch in the same run.

    python benchmarks/kernels_speed.py --figures forward gate backward mass --out results.jsonl

bf16, batch 1, 32 query heads, 8 key heads, head dim 128, causal, unless the row says otherwise;
random selections that keep a share of the causal blocks, the diagonal and the first block among
them. Medians of ``triton.testing.do_bench``. TFLOP/s count the kept blocks. Each sparse result is
compared with float64 on some rows before it is timed.

``--compile`` launches nothing: it compiles the same kernels for a GPU that need not be there, into
Triton's cache.
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import torch
import torch.nn.functional as F
import triton
from op_checks import check_call
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.testing import do_bench

from seer_compile.kernels.budgets import only
from seer_compile.kernels.triton import (
    attention_backward,
    attention_forward,
    attention_mass,
    select_blocks,
    tuning,
)
from seer_compile.types import Visibility

Row = dict[str, Any]
DEVICE = "cuda"
"""``cpu`` while compiling for an absent GPU."""


class Bench:
    """One set of tensors, and how to time on it."""

    def __init__(
        self, length: int, dim: int = 128, heads: int = 32, kv_heads: int = 8, batch: int = 1
    ) -> None:
        if DEVICE == "cpu":
            length = 1024
        generator = torch.Generator(DEVICE).manual_seed(0)

        def draw(count: int) -> Tensor:
            shape = (batch, count, length, dim)
            return torch.randn(shape, generator=generator, device=DEVICE, dtype=torch.bfloat16)

        self.query, self.key, self.value = draw(heads), draw(kv_heads), draw(kv_heads)
        self.scale = dim**-0.5
        self.shape = {"length": length, "dim": dim, "heads": heads, "kv_heads": kv_heads}
        self.shape["batch"] = batch
        self.generator = generator
        self.is_real = DEVICE != "cpu"

    def select(
        self, density: float, query_block: int, key_block: int, selections: int
    ) -> tuple[Tensor, Tensor]:
        """Keep a share of the causal blocks of every row at random."""
        batch, _, length, _ = self.query.shape
        shape = (batch, selections, -(-length // query_block), -(-length // key_block))
        scores = torch.rand(shape, generator=self.generator, device=DEVICE)
        budget = torch.full((selections,), density, device=DEVICE)
        return select_blocks.launch(
            scores, only(budget), "fraction", query_block, key_block, length, length, upper=0
        )

    def check(self, out: Tensor, selection: tuple[Tensor, Tensor], blocks: tuple[int, int]) -> None:
        """Compare some rows with float64 attention to the selected blocks."""
        if self.is_real:
            tensors = (self.query, self.key, self.value)
            check_call(out, *tensors, selection, self.scale, blocks, Visibility(upper=0))


def timed(function: Callable[[], Any], work: float = 0.0) -> Row:
    """Return milliseconds (median, 20th and 80th percentile) and TFLOP/s."""
    if DEVICE == "cpu":
        function()
        return {}
    low, median, high = do_bench(function, warmup=30, rep=150, quantiles=[0.2, 0.5, 0.8])
    row = {"ms": round(median, 4), "p20": round(low, 4), "p80": round(high, 4)}
    if work:
        row["tflops"] = round(work / median / 1e9, 1)
    return row


def checked(
    bench: Bench,
    run: Callable[[], tuple[Tensor, Tensor]],
    selection: tuple[Tensor, Tensor],
    blocks: tuple[int, int],
) -> Row:
    """Time sparse attention whose rows are right; return the error where it does not run."""
    heads, dim = bench.query.shape[1], bench.query.shape[3]
    _, counts = selection
    try:
        bench.check(run()[0], selection, blocks)
        kept = float(counts.double().sum()) * heads / counts.shape[1]
        return timed(run, 4 * dim * blocks[0] * blocks[1] * kept)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error)[:80]}"}


def dense(bench: Bench, backend: SDPBackend) -> Callable[[], Tensor]:
    """Return dense causal attention by one backend."""

    def run() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(
                bench.query, bench.key, bench.value, is_causal=True, enable_gqa=True
            )

    return run


def peers(bench: Bench) -> Iterator[Row]:
    """Time dense attention; ``peers.py`` has those of block-sparse attention."""
    if DEVICE == "cpu":
        return
    batch, heads, length, dim = bench.query.shape
    work = 2 * batch * heads * length * length * dim
    for name, backend in (
        ("SDPA flash", SDPBackend.FLASH_ATTENTION),
        ("SDPA cuDNN", SDPBackend.CUDNN_ATTENTION),
    ):
        try:
            yield {"what": name, **bench.shape, **timed(dense(bench, backend), work)}
        except RuntimeError as error:
            yield {"what": name, **bench.shape, "error": str(error)[:80]}


def forward_row(bench: Bench, density: float, variant: Row) -> Row:
    """Time the forward with one density and variant (blocks, selections, tiling)."""
    heads = bench.query.shape[1]
    query_block, key_block = variant.get("blocks", (64, 64))
    selections = variant.get("selections", heads)
    label = {
        "what": "forward", "density": density, "blocks": [query_block, key_block],
        "selections": selections, **bench.shape, "tiling": str(variant.get("tiling", "table")),
    }  # fmt: skip
    indices, counts = bench.select(density, query_block, key_block, selections)
    tensors = (bench.query, bench.key, bench.value, indices, counts, bench.scale)

    def run() -> tuple[Tensor, Tensor]:
        return attention_forward.launch(
            *tensors, query_block, key_block, upper=0, tiling=variant.get("tiling")
        )

    return {**label, **checked(bench, run, (indices, counts), (query_block, key_block))}


def forward_rows(bench: Bench, densities: tuple[float, ...], variants: list[Row]) -> Iterator[Row]:
    """Time the forward for densities and variants."""
    for density in densities:
        for variant in variants:
            yield forward_row(bench, density, variant)


def forward(quick: bool) -> Iterator[Row]:
    """Time the forward at three lengths, and variants at one."""
    tiling = tuning.Tiling
    plain = [{"blocks": (64, 64)}]
    bench = Bench(32768)
    yield from peers(bench)
    variants = [
        *plain,
        {"tiling": tiling(64, 64, 1, 4, 2)},
        {"tiling": tiling(64, 64, 1, 4, 4)},
        {"tiling": tiling(64, 64, 1, 8, 3)},
        {"blocks": (128, 64)},
        {"blocks": (128, 64), "tiling": tiling(128, 64, 1, 4, 2)},
        {"blocks": (128, 64), "tiling": tiling(128, 64, 1, 8, 2)},
        {"blocks": (128, 64), "tiling": tiling(128, 64, 1, 8, 4)},
        {"blocks": (128, 128)},
        {"blocks": (128, 128), "tiling": tiling(128, 128, 1, 8, 2)},
        {"selections": 8},
        {"selections": 8, "tiling": tiling(64, 64, 2, 8, 2)},
        {"selections": 8, "tiling": tiling(64, 64, 4, 8, 2)},
    ]
    yield from forward_rows(bench, (0.1,), variants)
    if quick:
        return
    yield from forward_rows(bench, (0.5, 0.3, 0.05), plain)
    yield from forward_rows(Bench(8192), (0.1,), plain)
    yield from forward_rows(Bench(32768, dim=64), (0.1,), plain)
    yield from forward_rows(Bench(32768, dim=256, heads=16, kv_heads=4), (0.1,), plain)
    bench = Bench(131072)
    yield from forward_rows(bench, (0.1, 0.05), plain)


def gate(quick: bool) -> Iterator[Row]:
    """Time pooling, scores and selection, and the whole."""
    from gate_speed import gate_rows

    yield from gate_rows(quick, Bench, timed)


def backward(quick: bool) -> Iterator[Row]:
    """Time the backward beside flash's."""
    del quick
    bench = Bench(32768)
    _, heads, _, dim = bench.query.shape
    indices, counts = bench.select(0.1, 64, 64, heads)
    tensors = (bench.query, bench.key, bench.value)
    rest = (indices, counts, bench.scale, 64, 64)
    out, lse = attention_forward.launch(*tensors, *rest, upper=0)
    grad_out = torch.randn_like(out)
    tiling = tuning.BackwardTiling
    for choice in (None, tiling(64, 64, 4, 2, 4, 2), tiling(64, 64, 8, 2, 8, 3)):

        def run(choice=choice) -> tuple[Tensor, ...]:
            return attention_backward.launch(
                grad_out, *tensors, out, lse, *rest, upper=0, tiling=choice
            )

        work = 14 * dim * 64 * 64 * float(counts.double().sum())
        label = {"what": "backward", "density": 0.1, **bench.shape, "tiling": str(choice)}
        yield {**label, **timed(run, work)}
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    if DEVICE == "cpu":
        return
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        result = F.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)

    def flash() -> None:
        torch.autograd.grad(result, leaves, grad_out, retain_graph=True)

    yield {"what": "backward SDPA flash", **bench.shape, **timed(flash)}


def mass(quick: bool) -> Iterator[Row]:
    """Time attention mass."""
    del quick
    bench = Bench(32768)
    tiling = tuning.MapTiling
    for choice in (None, tiling(128, 64, 8, 3), tiling(64, 128, 4, 2), tiling(128, 128, 8, 3)):
        for units in ((64, 64), (8, 64)):

            def run(choice=choice, units=units) -> Tensor:
                return attention_mass.launch(
                    bench.query, bench.key, bench.scale, *units, "mean", "sum", 0, tiling=choice
                )

            label = {"what": "attention mass", "units": list(units), "tiling": str(choice)}
            try:
                yield {**label, **bench.shape, **timed(run)}
            except Exception as error:
                yield {**label, "error": f"{type(error).__name__}: {str(error)[:80]}"}


FIGURES = {"forward": forward, "gate": gate, "backward": backward, "mass": mass}


def machine(figures: list[str], commit: str) -> Row:
    """Return what a number depends on besides the code."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "gpu": torch.cuda.get_device_name(), "driver": driver, "torch": torch.__version__,
        "triton": triton.__version__, "commit": commit,
        "command": "python benchmarks/kernels_speed.py --figures " + " ".join(figures),
    }  # fmt: skip


def compile_figures(figures: list[str], quick: bool) -> None:
    """Compile every kernel of some figures for sm_90 and print its resources."""
    from kernels_compile import offline_compilation

    global DEVICE  # noqa: PLW0603
    DEVICE = "cpu"
    for figure in figures:
        with offline_compilation() as compiled:
            rows = FIGURES[figure](quick)
            for row in rows:
                for kernel in compiled:
                    print(kernel.describe(), row, flush=True)
                compiled.clear()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--figures", nargs="*", choices=sorted(FIGURES), default=list(FIGURES))
    parser.add_argument("--quick", action="store_true", help="32,768 tokens only")
    parser.add_argument("--compile", action="store_true", help="compile only")
    parser.add_argument("--commit", default="", help="recorded with each row")
    parser.add_argument("--out", type=Path, help="append rows as JSON lines")
    arguments = parser.parse_args()
    if arguments.compile:
        compile_figures(arguments.figures, arguments.quick)
        return
    context = machine(arguments.figures, arguments.commit)
    for figure in arguments.figures:
        for row in FIGURES[figure](arguments.quick):
            print(json.dumps(row), flush=True)
            if arguments.out:
                with arguments.out.open("a") as file:
                    file.write(json.dumps({"figure": figure, **row, **context}) + "\n")
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
