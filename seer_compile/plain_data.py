"""Measured numbers as plain data for files, and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from seer_compile.errors import SeerInputError

Row = tuple[float, ...]
Table = tuple[Row, ...]


class PlainData:
    """What a frozen dataclass with slots needs to be written to a file."""

    __slots__ = ()

    def to_json(self) -> dict[str, Any]:
        """Return plain data for a file."""
        return {name: getattr(self, name) for name in self.__slots__}


def row_of(values: Sequence[Any]) -> Row:
    """Return a row of numbers that was read from a file."""
    return tuple(float(value) for value in values)


def table_of(rows: Sequence[Sequence[Any]]) -> Table:
    """Return rows of numbers that were read from a file."""
    return tuple(row_of(row) for row in rows)


def lengths_of(values: Sequence[Any]) -> tuple[int, ...]:
    """Return sequence lengths that were read from a file."""
    return tuple(int(value) for value in values)


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Name what could not be read.

    Raises:
        SeerInputError: A part is missing, or is not what it should be.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError) as cause:
        raise SeerInputError(f"not {what}: {cause}") from cause
