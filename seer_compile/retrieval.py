"""Planted keys: does a model still find one line among thousands of tokens?

Lines such as ``KEY_abcdef = 12345`` are written over a text twice: once in its first half, once in
its second. At the second occurrence the value can only come from the first, however far away; a
key counts as retrieved when every token of its value is the most likely one, given the text before
it. The perplexity of ordinary text hardly notices when this ability is lost.
"""

from __future__ import annotations

import random
import string
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from seer_compile.errors import CalibrationDataError, RangeError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

LETTERS = 6
DIGITS = 5
_SHORTEST_COPY, _LONGEST_COPY = 8, 24


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class KeyLine:
    """One encoded line and where its value stands."""

    tokens: np.ndarray
    """``Int64[l]``: the line with the newlines around it."""
    value: slice
    """The tokens of the line that spell the digits."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PlantedTokens:
    """A text with keys planted in it."""

    tokens: np.ndarray
    """``Int64[t]``."""
    ordinary: np.ndarray
    """``Bool[t]``: False on every token of a planted line."""
    values: tuple[slice, ...]
    """For each key, the tokens of its value at the second occurrence."""


def draw_key_line(tokenizer: Tokenizer, generator: random.Random) -> KeyLine:
    """Encode one line with a random name and a random value."""
    name = "".join(generator.choices(string.ascii_lowercase, k=LETTERS))
    value = "".join(generator.choices(string.digits, k=DIGITS))
    prefix = f"\nKEY_{name} = "
    encoding = tokenizer.encode(f"{prefix}{value}\n", add_special_tokens=False)
    first, last = len(prefix), len(prefix) + DIGITS
    inside = [i for i, (start, end) in enumerate(encoding.offsets) if start < last and end > first]
    return KeyLine(
        tokens=np.asarray(encoding.ids, dtype=np.int64), value=slice(inside[0], inside[-1] + 1)
    )


def plant_keys(tokens: np.ndarray, tokenizer: Tokenizer, *, keys: int, seed: int) -> PlantedTokens:
    """Write keys over a text: first occurrences in its first half, second ones in its second.

    Each half is cut into as many equal slots as there are keys; every slot takes one line at a
    random place, and the order of the second occurrences is random, so that distances spread
    around half the length of the text.

    Args:
        tokens: ``Int[t]``; not changed.
        tokenizer: The tokenizer that made them.
        keys: Number of keys; 0 leaves the text as it is.
        seed: The same seed plants the same keys at the same places.

    Raises:
        RangeError: ``keys`` is negative.
        CalibrationDataError: The text is too short for so many keys.
    """
    if keys < 0:
        raise RangeError(argument="keys", got=keys, expected=">= 0")
    planted = np.array(tokens, dtype=np.int64)
    ordinary = np.ones(len(planted), dtype=bool)
    generator = random.Random(seed)
    lines = [draw_key_line(tokenizer, generator) for _ in range(keys)]
    longest = max((len(line.tokens) for line in lines), default=0)
    slot = len(planted) // (2 * keys) if keys else 0
    # One token stays in front of the first line: a prediction needs something to follow.
    if keys and slot <= longest:
        raise CalibrationDataError(
            argument="keys",
            got=keys,
            expected=f"at most {len(planted) // (2 * (longest + 1))} keys in {len(planted)} tokens",
        )
    second_order = generator.sample(range(keys), keys)
    values: dict[int, slice] = {}
    for half, order in enumerate((list(range(keys)), second_order)):
        for place, key in enumerate(order):
            line = lines[key]
            start = (half * keys + place) * slot + generator.randint(1, slot - len(line.tokens))
            span = slice(start, start + len(line.tokens))
            planted[span] = line.tokens
            ordinary[span] = False
            values[key] = slice(start + line.value.start, start + line.value.stop)
    return PlantedTokens(
        tokens=planted, ordinary=ordinary, values=tuple(values[key] for key in range(keys))
    )


def plant_copies(tokens: np.ndarray, *, copies: int, generator: np.random.Generator) -> np.ndarray:
    """Write random spans over a text, each of them twice, at any distance.

    The second occurrence can be predicted from the first alone, so that a text without repetitions
    of its own shows how a model looks things up. A span is 8 to 24 tokens of the text, as they
    stand there or in random order.

    Args:
        tokens: ``Int[t]``; not changed.
        copies: Number of spans; fewer where the text has no room for two of each.
        generator: Of the spans and their places.

    Returns:
        ``Int64[t]``.
    """
    planted = np.array(tokens, dtype=np.int64)
    copies = min(copies, len(planted) // (2 * (_LONGEST_COPY + 1)))
    if copies < 1:
        return planted
    slot = len(planted) // (2 * copies)
    order = generator.permutation(2 * copies)
    for place in range(copies):
        length = int(generator.integers(_SHORTEST_COPY, _LONGEST_COPY + 1))
        start = int(generator.integers(0, len(planted) - length + 1))
        span = np.array(tokens[start : start + length], dtype=np.int64)
        if place % 2:
            span = np.asarray(tokens)[generator.integers(0, len(planted), length)].astype(np.int64)
        for where in order[2 * place : 2 * place + 2]:
            first = int(where) * slot + int(generator.integers(0, slot - length + 1))
            planted[first : first + length] = span
    return planted


def count_retrieved(predicted: np.ndarray, planted: PlantedTokens) -> int:
    """Count the keys whose value is predicted in full.

    Args:
        predicted: ``Int[t]``: at position ``i`` the most likely token to follow token ``i``.
        planted: The text that was read.
    """
    return sum(
        bool(np.array_equal(predicted[v.start - 1 : v.stop - 1], planted.tokens[v]))
        for v in planted.values
    )
