"""What would it cost to add the gradient of queries by atomics, in one kernel with those of keys?

    python benchmarks/tile_atomics.py --out benchmarks/results/backward_speed.jsonl

Nothing but the additions: every kept pair of 64 x 64 tokens adds one tile of 64 x head dim float32
to a tile of its head, as one kernel per key tile would. 32,768 tokens, 32 heads of 128, 10 % of the
causal pairs. The sum is compared with the number of additions.
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import torch
import triton
import triton.language as tl
from measuring import Row, add_common_options, context, eager_ms, table, write_rows

BLOCKS, HEADS, DIM, PER_TILE = 512, 32, 128, 26


@triton.jit
def _add_tiles(out_ptr, targets_ptr, per_program, ROWS: tl.constexpr, DIM: tl.constexpr):
    program = tl.program_id(0)
    places = tl.arange(0, ROWS)[:, None] * DIM + tl.arange(0, DIM)[None, :]
    ones = tl.full([ROWS, DIM], 1.0, tl.float32)
    for step in range(per_program):
        target = tl.load(targets_ptr + program * per_program + step).to(tl.int64)
        tl.atomic_add(out_ptr + target * ROWS * DIM + places, ones, sem="relaxed")


def measured(warps: int) -> Row:
    """Return the milliseconds of all additions, and their bytes per second."""
    tiles = BLOCKS * HEADS
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (tiles, PER_TILE)
    targets = torch.randint(0, BLOCKS, shape, generator=generator, device="cuda", dtype=torch.int32)
    targets += torch.arange(tiles, device="cuda", dtype=torch.int32)[:, None] // BLOCKS * BLOCKS
    out = torch.zeros(tiles * 64 * DIM, device="cuda")

    def add() -> None:
        _add_tiles[(tiles,)](out, targets, PER_TILE, ROWS=64, DIM=DIM, num_warps=warps)

    add()
    if float(out.double().sum()) != targets.numel() * 64 * DIM:
        raise SystemExit("additions are lost")
    ms = eager_ms(add, "cuda")
    gigabytes = targets.numel() * 64 * DIM * 4 / 1e9
    row = {"figure": "tile atomics", "warps": warps, "tiles": targets.numel(), "gb": gigabytes}
    return {**row, "ms": ms, "tb_per_s": gigabytes / ms}


def main() -> None:
    """Measure with four and with eight warps."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_common_options(parser)
    options = parser.parse_args()
    if options.device != "cuda":
        raise SystemExit("atomics are timed on an NVIDIA GPU")
    rows = (measured(warps) for warps in (4, 8))
    rows = write_rows(options.out, rows, context(options, "tile_atomics.py"))
    print(table(rows, ("warps", "tiles", "gb", "ms", "tb_per_s")))


if __name__ == "__main__":
    main()
