"""Writes what was measured into the tables of ``kernels/``, one line per entry."""

from __future__ import annotations

import math
import re
from pathlib import Path

KERNELS = Path(__file__).resolve().parents[1] / "kernels"
FASTER = 0.98
"""Of the other's time: what is not clearly faster is not preferred."""


def floor_of(work: float) -> float:
    """Return a little less: a table's three digits must not leave out the call that gained."""
    return 0.99 * work


def above(work: float) -> float:
    """Return a little more, so that a bound below which calls gain takes in the last that did."""
    return 1.01 * work


def digits(value: float) -> str:
    """Return three digits of a number as a literal of a float, as the formatter would have it."""
    if math.isinf(value):
        return 'float("inf")'
    text = f"{value:.3g}".replace("e+", "e")
    return text if "." in text or "e" in text else f"{text}.0"


def write_entry(path: Path, dictionary: str, key: str, entry: str) -> None:
    """Replace one entry of a dictionary in a file, or add it after the others.

    Args:
        path: Of the module that holds the table.
        dictionary: Its name in there; annotated, opened and closed on lines of their own.
        key: The key as it stands in the source.
        entry: The value as it stands in the source.
    """
    text = path.read_text()
    table = re.search(rf"^{dictionary}: [^\n]* = {{\n(.*?)^}}\n", text, re.MULTILINE | re.DOTALL)
    if table is None:
        raise SystemExit(f"{path} holds no table {dictionary!r}")
    line = f"    {key}: {entry},\n"
    lines = re.sub(rf"^    {re.escape(key)}: .*\n", lambda _: line, table[1], flags=re.MULTILINE)
    if line not in lines:
        lines += line
    path.write_text(text[: table.start(1)] + lines + text[table.end(1) :])
