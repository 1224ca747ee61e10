"""What the command line writes: tables on stdout, progress on stderr, JSON files."""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from seer_compile.errors import RangeError, SeerInputError
from seer_compile.evaluate import EvaluationRow
from seer_compile.table import render_table

_OUTPUTS = ("out", "report", "json", "draw")
_LIBRARIES = ("seer_compile", "torch", "triton", "transformers")


class Progress:
    """Lines on stderr, each with the seconds since the start."""

    def __init__(self) -> None:
        self._begun = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._begun

    def __call__(self, line: str) -> None:
        """Write one line."""
        sys.stderr.write(f"[{self.seconds:6.1f} s] {line}\n")
        sys.stderr.flush()


def write_out(text: str) -> None:
    """Write a result to stdout."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def versions(device: torch.device) -> dict[str, str]:
    """Return what ran where: versions by library, and the device's name."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    is_cuda = device.type == "cuda"
    found["device"] = torch.cuda.get_device_name(device) if is_cuda else _cpu_name()
    return found


def versions_line(found: Mapping[str, str]) -> str:
    """Return versions as one line."""
    return ", ".join(f"{name} {version}" for name, version in found.items())


def check_outputs(arguments: Mapping[str, Any]) -> None:
    """Try the places of results before hours are spent on them; makes folders that are missing.

    Args:
        arguments: Of a verb, by name; those that name files to write are looked at.

    Raises:
        SeerInputError: A file cannot be written.
    """
    for name in _OUTPUTS:
        path = arguments.get(name)
        if path is None:
            continue
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path.parent):
                is_writable = not path.exists() or (path.is_file() and os.access(path, os.W_OK))
        except OSError:
            is_writable = False
        if not is_writable:
            raise SeerInputError(
                argument=name, got=str(path), expected="a path that can be written"
            )


def check_number(name: str, value: int | None, least: int, most: int | None = None) -> None:
    """Raise a RangeError for an argument outside its range; None is none."""
    if value is not None and not least <= value <= (value if most is None else most):
        expected = f">= {least}" if most is None else f"{least} to {most}"
        raise RangeError(argument=name, got=value, expected=expected)


def write_json(path: Path | None, content: Mapping[str, Any]) -> None:
    """Write a result to a file, if one was asked for; a number that is not finite becomes null.

    Raises:
        SeerInputError: The file cannot be written.
    """
    if path is None:
        return
    text = json.dumps(_finite(content), indent=1, allow_nan=False)
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as cause:
        raise SeerInputError(
            argument="json", got=str(path), expected="a path that can be written"
        ) from cause


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


EVALUATION_HEADER = (
    "method",
    "tokens",
    "asked",
    "density",
    "perplexity",
    "ratio",
    "retrieval",
    "attention ms",
    "forward ms",
    "dense graph ms",
)


_DENSITY_SLACK = 0.25
"""Of the density asked for: other text alone moves what a budget keeps by some of it."""


def evaluation_cells(row: EvaluationRow) -> tuple[str, ...]:
    """Return one row of an evaluation as text, in the order of ``EVALUATION_HEADER``."""
    return (
        row.method,
        f"{row.length:,}",
        "" if row.asked_density is None else f"{row.asked_density:.3g}",
        f"{row.density:.3f}",
        f"{row.perplexity:.3f}",
        f"{row.ratio:.4f}",
        "" if row.retrieval is None else f"{row.retrieval:.3f}",
        f"{row.attention_ms:.2f}",
        f"{row.end_to_end_ms:.1f}",
        "" if row.dense_end_to_end_ms is None else f"{row.dense_end_to_end_ms:.1f}",
    )


def evaluation_text(rows: Sequence[EvaluationRow]) -> str:
    """Return an evaluation as a table, with notes on what needs one."""
    text = render_table(EVALUATION_HEADER, [evaluation_cells(row) for row in rows])
    notes = [
        f"{row.method} at {row.length:,} tokens, density {row.asked_density:.3g}: "
        f"{count} calls of a forward are answered densely in use ({path.removeprefix('dense:')})"
        for row in rows
        for path, count in row.dense_calls.items()
    ]
    notes += [note for row in rows if row.uses_gates and (note := _density_note(row))]
    return "\n".join([text, *notes])


def _density_note(row: EvaluationRow) -> str:
    """Return a sentence where gates keep another density than was asked for, else nothing."""
    asked = row.asked_density
    if asked is None or abs(row.density - asked) <= _DENSITY_SLACK * asked:
        return ""
    found = (
        f"{row.method} at {row.length:,} tokens: density {asked:.3g} was asked for and "
        f"{row.density:.3g} kept. "
    )
    if row.density > asked:
        return (
            found + "Every selection keeps the query's own block, the first and the best, and "
            "budgets are reckoned where a length was not measured"
        )
    return (
        found + "Budgets hold for lengths on which they were measured: "
        f"seer-compile calibrate --curve-lengths {row.length}"
    )


def _cpu_name() -> str:
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"
