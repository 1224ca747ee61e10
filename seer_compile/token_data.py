"""Token files, and the windows of them that gates are calibrated on and measured with."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from seer_compile.errors import CalibrationDataError, RangeError, SeerInputError
from seer_compile.retrieval import PlantedTokens, plant_copies, plant_keys

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def read_token_file(path: str | os.PathLike[str], *, vocabulary: int | None = None) -> np.ndarray:
    """Read a stream of token ids stored as little-endian unsigned 16-bit integers.

    Args:
        path: The file, of any length.
        vocabulary: Number of ids the model knows; checked when given.

    Returns:
        ``UInt16[t]``, mapped from the file and not copied.

    Raises:
        SeerInputError: There is no such file, it is empty or of an odd number of bytes, or it
            holds an id that the model does not know.
    """
    path = Path(path)
    if not path.is_file():
        raise SeerInputError(argument="tokens", got=str(path), expected="an existing file")
    size = path.stat().st_size
    if size == 0 or size % 2:
        raise SeerInputError(
            argument="tokens", got=f"{size} bytes", expected="16-bit token ids, at least one"
        )
    tokens = np.memmap(path, dtype="<u2", mode="r")
    if vocabulary is not None and int(tokens.max()) >= vocabulary:
        raise SeerInputError(
            argument="tokens",
            got=f"id {int(tokens.max())}",
            expected=f"ids below {vocabulary}",
            hint="The file was made with another tokenizer than the model's.",
        )
    return tokens


def window_starts(total: int, length: int, count: int) -> list[int]:
    """Spread windows evenly over a stream; they overlap only where there is no room for them.

    Raises:
        CalibrationDataError: The stream is shorter than one window.
        RangeError: ``count`` or ``length`` is below 1.
    """
    for name, value in (("count", count), ("length", length)):
        if value < 1:
            raise RangeError(argument=name, got=value, expected=">= 1")
    if total < length:
        raise CalibrationDataError(
            argument="tokens", got=f"{total} tokens", expected=f"at least {length} for one window"
        )
    if count == 1:
        return [0]
    return [(total - length) * index // (count - 1) for index in range(count)]


def planted_windows(
    tokens: np.ndarray,
    tokenizer: Tokenizer | None,
    *,
    length: int,
    sequences: int,
    keys: int,
    seed: int = 0,
) -> list[PlantedTokens]:
    """Cut windows for evaluation and plant keys in them.

    Args:
        tokens: ``Int[t]``.
        tokenizer: Encodes the keys; may be None when ``keys`` is 0.
        length: Tokens per window.
        sequences: Number of windows.
        keys: Keys per window.
        seed: Of the keys and their places.
    """
    if keys and tokenizer is None:
        raise SeerInputError(argument="tokenizer", got=None, expected="the model's tokenizer")
    windows: list[PlantedTokens] = []
    for index, start in enumerate(window_starts(len(tokens), length, sequences)):
        window = np.asarray(tokens[start : start + length], dtype=np.int64)
        if tokenizer is None:
            everything = np.ones(length, dtype=bool)
            windows.append(PlantedTokens(tokens=window, ordinary=everything, values=()))
        else:
            # Windows of one evaluation differ in their keys, and so do windows of two seeds.
            windows.append(plant_keys(window, tokenizer, keys=keys, seed=seed * 100_003 + index))
    return windows


# Windows of each length that share no token with others: more than calibration holds out.
_KEPT_APART = 8


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CalibrationWindows:
    """Batches of one window each, in a fixed random order; can be iterated again and again.

    Lengths take turns, so that a gate meets all of them. The text is cut several times, each time
    at other places: a gate sees tokens pooled with other neighbours and learns less by heart. The
    first windows of each length, which calibration may hold out, share no token with any other.
    """

    tokens: np.ndarray
    """``Int[t]``."""
    lengths: tuple[int, ...]
    """Tokens per window."""
    seed: int = 0
    count: int | None = None
    """Windows per length; those of all cuts when None."""
    cuts: int = 16
    """Times the text is cut into windows side by side."""
    copies: float = 0.0
    """Random spans planted twice, per 1,024 tokens; see
    :func:`seer_compile.retrieval.plant_copies`."""
    model_arguments: tuple[tuple[str, Any], ...] = (("use_cache", False),)
    """Further keyword arguments of the model, the same in every batch."""

    def __post_init__(self) -> None:
        if self.cuts < 1:
            raise RangeError(argument="cuts", got=self.cuts, expected=">= 1")
        if not 0 <= self.copies <= 16:
            raise RangeError(argument="copies", got=self.copies, expected="0 to 16")
        for length in self.lengths:
            window_starts(len(self.tokens), length, 1)

    def __len__(self) -> int:
        """Return the number of batches."""
        return sum(len(starts) for starts in self._starts())

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield keyword arguments of the model: ``input_ids Int64[1 t]`` and the fixed ones."""
        orders = self._starts()
        for turn in range(max(len(order) for order in orders)):
            for length, order in zip(self.lengths, orders, strict=True):
                if turn < len(order):
                    yield {"input_ids": self._window(order[turn], length), **self._fixed()}

    def _starts(self) -> list[list[int]]:
        """Return the starts of each length's windows: those kept apart, then all others."""
        everywhere = [self._cuts_of(length) for length in self.lengths]
        apart: list[tuple[int, int]] = []
        firsts: list[list[int]] = []
        for length, starts in zip(self.lengths, everywhere, strict=True):
            room = len(self.tokens) // length
            alone = [start for start in starts[:room] if not _overlaps(start, length, apart)]
            first = (alone or starts)[: min(_KEPT_APART, max(1, room // 4))]
            apart += [(start, start + length) for start in first]
            firsts.append(first)
        return [
            [*first, *(start for start in starts if not _overlaps(start, length, apart))][
                : self.count
            ]
            for length, first, starts in zip(self.lengths, firsts, everywhere, strict=True)
        ]

    def _cuts_of(self, length: int) -> list[int]:
        generator = np.random.default_rng((self.seed, length))
        shifts = [0, *(1 + generator.permutation(length - 1)[: self.cuts - 1])]
        starts: list[int] = []
        for shift in map(int, shifts):
            places = generator.permutation((len(self.tokens) - shift) // length)
            starts += [int(place) * length + shift for place in places]
        return starts

    def _window(self, start: int, length: int) -> Tensor:
        window = np.asarray(self.tokens[start : start + length], dtype=np.int64)
        if self.copies:
            generator = np.random.default_rng((self.seed, length, start))
            copies = round(self.copies * length / 1024)
            window = plant_copies(window, copies=copies, generator=generator)
        return torch.from_numpy(window)[None]

    def _fixed(self) -> dict[str, Any]:
        return dict(self.model_arguments)


def _overlaps(start: int, length: int, spans: Iterable[tuple[int, int]]) -> bool:
    return any(start < last and first < start + length for first, last in spans)


def as_batches(
    windows: Iterable[PlantedTokens], model_arguments: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return windows as keyword arguments of the model.

    Budgets that are measured on such windows hold for text with keys planted in it: every line
    draws attention to its block, so that the same budget keeps more blocks than in plain text.
    """
    return [
        {"input_ids": torch.from_numpy(window.tokens)[None], **model_arguments}
        for window in windows
    ]
