"""What the scripts on operators and models share: clocks, breakdowns, records, tables.

Times of a GPU are taken three ways, because they answer different questions: ``eager_ms`` is what a
caller waits who calls in a loop, ``device_ms`` what the GPU alone needs (calls replayed in a CUDA
graph), ``host_us`` what the calling thread needs before it may go on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from seer_compile.kernels import by_device, gated_attention
from seer_compile.kernels.recorded_calls import playing

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, Any]
Call = Callable[[], Any]


def dense_flash(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attend causally by PyTorch's flash attention."""
    operator = torch.ops.aten._scaled_dot_product_flash_attention.default
    return operator(query, key, value, 0.0, True, scale=scale)[0]


def dense_cudnn(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attend causally by cuDNN."""
    operator = torch.ops.aten._scaled_dot_product_cudnn_attention.default
    return operator(query, key, value, None, False, 0.0, True, scale=scale)[0]


def dense_default(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attend causally by whatever SDPA chooses."""
    return F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, enable_gqa=True
    )


BACKENDS: dict[str, Callable[..., Tensor]] = {
    "flash": dense_flash,
    "cudnn": dense_cudnn,
    "default": dense_default,
}


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--device``, ``--out`` and ``--commit``."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, choices=("cuda", "cpu"))
    parser.add_argument("--out", type=Path, help="append the rows here as JSON lines")
    parser.add_argument("--commit", default="", help="recorded with each row; asks git when empty")


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def wall_ms(call: Call, device: str, *, repeats: int = 3, warm_up: int = 1) -> float:
    """Return the median time of a long call, from an idle device to an idle device."""
    return walls_ms([call], device, repeats=repeats, warm_up=warm_up)[0]


def walls_ms(calls: Sequence[Call], device: str, *, repeats: int, warm_up: int) -> list[float]:
    """Return :func:`wall_ms` of some calls made in turn, so that a slow spell hits all of them."""
    times: list[list[float]] = [[] for _ in calls]
    for attempt in range(warm_up + repeats):
        for place, call in enumerate(calls):
            synchronize(device)
            begun = time.perf_counter()
            call()
            synchronize(device)
            if attempt >= warm_up:
                times[place].append(time.perf_counter() - begun)
    return [statistics.median(spans) * 1e3 for spans in times]


def eager_ms(call: Call, device: str, *, budget_ms: float = 150.0) -> float:
    """Return the median time of a call in a loop; on a GPU with its second-level cache flushed."""
    if device == "cpu":
        return wall_ms(call, device)
    from triton.testing import do_bench

    return float(do_bench(call, warmup=30, rep=budget_ms, return_mode="median"))


def device_ms(call: Call, device: str, *, budget_ms: float = 60.0) -> float:
    """Return what the GPU needs per call: many calls in one CUDA graph, best of five replays.

    Host time does not count, and gaps between kernels are those of a graph.
    """
    return devices_ms([call], device, budget_ms=budget_ms)[0]


def devices_ms(
    calls: Sequence[Call], device: str, *, rounds: int = 5, budget_ms: float = 60.0
) -> list[float]:
    """Return :func:`device_ms` of some calls whose graphs are replayed in turn.

    All graphs hold as many calls: the start of a replay counts alike for each.
    """
    if device == "cpu":
        return walls_ms(calls, device, repeats=9, warm_up=1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        once = min(_warm_ms(call) for call in calls)
        repeats = max(1, min(200, int(budget_ms / 6 / max(once, 1e-3))))
        graphs = [_graph_of(call, repeats, stream) for call in calls]
        times = [[elapsed_ms(graph.replay) for graph in graphs] for _ in range(rounds)]
    torch.cuda.current_stream().wait_stream(stream)
    return [min(spans) / repeats for spans in zip(*times, strict=True)]


def _warm_ms(call: Call) -> float:
    for _ in range(3):
        call()
    return elapsed_ms(call)


def _graph_of(call: Call, repeats: int, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    """Return a graph of some calls in a row, replayed once."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(repeats):
            call()
    graph.replay()
    return graph


def elapsed_ms(call: Call, calls: int = 1) -> float:
    """Return the milliseconds that the GPU takes for some calls in a row, gaps and all."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def host_us(call: Call, device: str, *, calls: int = 200) -> float:
    """Return the microseconds until a call comes back, the median of five bursts.

    Meant for calls that are short on the device: its queue must not fill up.
    """
    bursts = []
    for _ in range(6):
        synchronize(device)
        begun = time.perf_counter()
        for _ in range(calls):
            call()
        bursts.append((time.perf_counter() - begun) / calls * 1e6)
    synchronize(device)
    return statistics.median(bursts[1:])


def peak_bytes(call: Call, device: str) -> int:
    """Return the largest number of bytes allocated while a call runs, in all; 0 on the CPU."""
    if device == "cpu":
        call()
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def breakdown(call: Call, device: str) -> dict[str, float]:
    """Return milliseconds on the device per part of one call.

    ``attention`` is sparse attention, or dense where no site is sparse; ``selection`` and ``gate``
    (all else that sites do) what decides over it; ``rest`` is every other kernel.
    """
    from torch.profiler import ProfilerActivity, profile

    sites = _site_parts(call, device)
    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    synchronize(device)
    with profile(activities=activities) as profiler:
        call()
        synchronize(device)
    events = list(profiler.events() or [])
    if device == "cuda":
        everything = sum(event.self_device_time_total for event in events if _is_kernel(event))
    else:
        everything = sum(event.self_cpu_time_total for event in events)
    dense = [event for event in events if event.name.startswith("aten::_scaled_dot_product")]
    attention = sites["attention"] or sum(_time(event, device) for event in dense) / 1e3
    whole = sites["whole"] or attention
    parts = {
        "attention": attention,
        "selection": sites["selection"],
        "gate": whole - attention - sites["selection"],
        "rest": everything / 1e3 - whole,
    }
    return {name: round(ms, 4) for name, ms in parts.items()}


_PARTS = {
    "attention": (by_device, "block_sparse_attention"),
    "selection": (by_device, "select_blocks"),
    "whole": (gated_attention, "forward"),
}


def _site_parts(call: Call, device: str) -> dict[str, float]:
    """Return the milliseconds that sites spend in each of their parts."""
    spans: dict[str, list[tuple[Any, Any]]] = {name: [] for name in _PARTS}
    with contextlib.ExitStack() as patches:
        # A call that is played has no parts.
        patches.enter_context(playing(enabled=False))
        for name, (module, function) in _PARTS.items():
            timed = _timed(getattr(module, function), spans[name], device)
            patches.enter_context(mock.patch.object(module, function, timed))
        synchronize(device)
        if device == "cuda":
            # The device waits, so that gaps between launches do not count.
            torch.cuda._sleep(20_000_000)
        call()
        synchronize(device)
    if device == "cuda":
        return {name: sum(a.elapsed_time(b) for a, b in pairs) for name, pairs in spans.items()}
    return {name: sum(b - a for a, b in pairs) * 1e3 for name, pairs in spans.items()}


def _timed(part: Call, spans: list[tuple[Any, Any]], device: str) -> Call:
    def mark() -> Any:
        if device != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def timed(*args: Any, **options: Any) -> Any:
        begun = mark()
        result = part(*args, **options)
        spans.append((begun, mark()))
        return result

    return timed


def _is_kernel(event: Any) -> bool:
    return event.device_type == torch.autograd.DeviceType.CUDA


def _time(event: Any, device: str) -> float:
    return event.device_time_total if device == "cuda" else event.cpu_time_total


def context(options: argparse.Namespace, script: str) -> Row:
    """Return what a number depends on besides the code."""
    row: Row = {"torch": torch.__version__}
    if options.device == "cuda":
        import triton

        row |= {"gpu": torch.cuda.get_device_name(), "triton": triton.__version__}
        row["cudnn"] = torch.backends.cudnn.version()
        row["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    else:
        row |= {"machine": platform.machine(), "threads": torch.get_num_threads()}
    row["commit"] = options.commit or _output(
        "git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"
    )
    arguments = [word for word in sys.argv[1:] if word]
    row["command"] = shlex.join(["python", f"benchmarks/{script}", *arguments])
    return row


def _output(*command: str) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return result.stdout.strip().splitlines()[0] if result.stdout.strip() else ""


def write_rows(path: Path | None, rows: Iterable[Row], common: Row) -> list[Row]:
    """Append rows to a file of JSON lines as they come, so that a run cut short keeps its first.

    Returns:
        The rows.
    """
    written = []
    for row in rows:
        written.append(row)
        if path is None:
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps({**row, **common}) + "\n")
    return written


def table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Return rows as aligned text; what a row lacks stays empty."""
    cells = [list(columns), *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(row[place]) for row in cells) for place in range(len(columns))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in cells
    )


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def goal(name: str, value: float, limit: float, *, at_least: bool = False) -> Row:
    """Return whether a figure reaches what is asked of it."""
    reached = value >= limit if at_least else value <= limit
    sign = ">=" if at_least else "<="
    return {
        "goal": f"{name} {sign} {limit:g}",
        "seen": round(value, 4),
        "reached": "yes" if reached else "NO",
    }
