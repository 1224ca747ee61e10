"""At which clock and power does attention run for as long as it takes, and what does it reach then?

    python benchmarks/power.py --out benchmarks/results/power.jsonl

A GPU that draws all the power it may turns its clock down, and the same kernel then takes longer
than in the first tenth of a second. Dense attention by cuDNN and block-sparse attention at 10 % run
for some seconds each; clock and power are medians of the second half, read from the current device
by ``nvidia-smi``. ``tflops_per_ghz`` is what is left to the kernel. Sparse rows are compared with
float32 first.
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import torch
from kernels_speed import Bench
from measuring import (
    BACKENDS,
    Call,
    Row,
    add_common_options,
    context,
    elapsed_ms,
    table,
    write_rows,
)

from seer_compile.kernels import engines

LENGTH = 32768
DENSITY = 0.1
COLUMNS = ("what", "dim", "first_ms", "ms", "tflops", "sm_mhz", "watts", "tflops_per_ghz")
QUERY = ("nvidia-smi", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits")
Sample = tuple[float, float]


def sustained(call: Call, seconds: float, uuid: str) -> Row:
    """Return milliseconds per call at first and later on, and clock and power of then."""
    first = elapsed_ms(call, 8) / 8
    calls = max(1, int(seconds / 2 * 1e3 / first))
    is_over = threading.Event()
    elapsed_ms(call, calls)
    with ThreadPoolExecutor(1) as sampler:
        samples = sampler.submit(sample_until, is_over, uuid)
        try:
            later = elapsed_ms(call, calls) / calls
        finally:
            is_over.set()
    mhz, watts = medians(samples.result())
    return {"first_ms": first, "ms": later, "sm_mhz": mhz, "watts": watts}


def sample_until(is_over: threading.Event, uuid: str) -> list[Sample]:
    """Return clock and power of one GPU, read again and again until told to stop."""
    samples = []
    while not is_over.is_set():
        samples.append(clock_and_power(uuid))
    return samples


def medians(samples: list[Sample]) -> Sample:
    """Return clock and power without the last sample, which may have come after the last call."""
    if len(samples) < 2:
        raise SystemExit(
            f"nvidia-smi answered {len(samples)} times while the calls ran, and 2 are needed; "
            "give more --seconds"
        )
    mhz, watts = (statistics.median(column) for column in zip(*samples[:-1], strict=True))
    return mhz, watts


def clock_and_power(uuid: str) -> Sample:
    """Return megahertz and watts of one GPU now."""
    command = [*QUERY, f"--id={uuid}"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        mhz, watts = map(float, result.stdout.split(","))
    except FileNotFoundError:
        raise SystemExit("clock and power are read by nvidia-smi, which is not on PATH") from None
    except subprocess.CalledProcessError as error:
        said = (error.stdout + error.stderr).strip()
        raise SystemExit(f"{' '.join(command)} ended with {error.returncode}: {said}") from None
    except ValueError:
        said = result.stdout.strip()
        raise SystemExit(f"{' '.join(command)} gave no clock and power: {said!r}") from None
    return mhz, watts


def current_uuid() -> str:
    """Return the name nvidia-smi has for the current device.

    Its own order of GPUs heeds neither ``CUDA_VISIBLE_DEVICES`` nor the device that is current.
    """
    uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    return uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"


def cases(dims: tuple[int, ...]) -> Iterator[tuple[Row, Call, float]]:
    """Yield what is run, the call, and its floating-point operations."""
    for dim in dims:
        bench = Bench(LENGTH, dim)
        tensors = (bench.query, bench.key, bench.value)
        heads = bench.query.shape[1]
        yield (
            {"what": "dense by cuDNN", "dim": dim},
            lambda tensors=tensors, scale=bench.scale: BACKENDS["cudnn"](*tensors, scale),
            2 * dim * heads * LENGTH**2,
        )
        indices, counts = bench.select(DENSITY, 64, 64, bench.key.shape[1])
        arguments = (*tensors, indices, counts, bench.scale, 64, 64, 0)

        def sparse(arguments: tuple = arguments) -> torch.Tensor:
            return engines.forward(*arguments)[0]

        bench.check(sparse(), (indices, counts), (64, 64))
        kept = float(counts.double().sum()) * heads / counts.shape[1]
        row = {"what": "block-sparse, one selection per group", "dim": dim, "density": DENSITY}
        yield row, sparse, 4 * dim * 64 * 64 * kept


def measured(dims: tuple[int, ...], seconds: float) -> Iterator[Row]:
    """Yield the figures of every case."""
    uuid = current_uuid()
    # What cannot be read is said before anything runs for seconds.
    clock_and_power(uuid)
    for about, call, work in cases(dims):
        for _ in range(3):
            call()
        row = {"figure": "power", **about, "length": LENGTH, **sustained(call, seconds, uuid)}
        row["tflops"] = work / row["ms"] / 1e9
        row["tflops_per_ghz"] = row["tflops"] / row["sm_mhz"] * 1e3
        yield row


def main() -> None:
    """Run every case, write rows as they come, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="per case")
    parser.add_argument("--dims", type=int, nargs="+", default=[128, 64])
    add_common_options(parser)
    options = parser.parse_args()
    if options.device != "cuda":
        raise SystemExit("power is read from an NVIDIA GPU")
    rows = write_rows(
        options.out, measured(tuple(options.dims), options.seconds), context(options, "power.py")
    )
    print(table(rows, COLUMNS))


if __name__ == "__main__":
    main()
