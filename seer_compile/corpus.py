"""Text that every machine has: the source files of Python's own standard library.

The bundled model is trained on most of these files; a share of them, chosen by a hash of their
path, stays out of training on every version of Python and serves to measure with.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from seer_compile.errors import CalibrationDataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

HELD_OUT_SHARE = 0.1
"""Share of the files, by count, that training never sees."""

END_OF_FILE = "<|end|>"
"""Special token between two files."""

# Tables of code points and installed packages: not the prose of programmers.
_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "encodings"})
_LARGEST_FILE = 300_000


def is_held_out(relative_path: str) -> bool:
    """Return whether a file stays out of training.

    Args:
        relative_path: Path below the standard library, with forward slashes, such as
            ``json/decoder.py``.

    Example:
        >>> is_held_out("argparse.py")
        False
    """
    digest = hashlib.sha256(relative_path.encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


def standard_library_files(*, held_out: bool, root: Path | None = None) -> list[Path]:
    """List source files of the standard library in an order that looks random and never changes.

    Args:
        held_out: True for the files kept out of training, False for the others.
        root: Folder to search; the running interpreter's standard library when None.

    Raises:
        CalibrationDataError: The folder holds no source files.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    chosen: list[tuple[str, Path]] = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if _SKIPPED_FOLDERS & set(relative.parts) or path.stat().st_size > _LARGEST_FILE:
            continue
        if is_held_out(relative.as_posix()) == held_out:
            order = hashlib.sha256(f"order {relative.as_posix()}".encode()).hexdigest()
            chosen.append((order, path))
    if not chosen:
        raise CalibrationDataError(
            argument="root",
            got=str(root),
            expected="a folder with Python source files",
            hint="This Python ships its standard library without sources; pass another root.",
        )
    return [path for _, path in sorted(chosen)]


def encode_files(
    paths: Iterable[Path], tokenizer: Tokenizer, *, max_tokens: int | None = None
) -> np.ndarray:
    """Encode files one after the other into one stream of tokens.

    Args:
        paths: Text files. Those that are not UTF-8 are left out.
        tokenizer: Where it has the token ``<|end|>``, that token follows each file.
        max_tokens: Stop once this many tokens are there, and cut to exactly that many.

    Returns:
        ``Int64[t]``.
    """
    end = tokenizer.token_to_id(END_OF_FILE)
    pieces: list[np.ndarray] = []
    total = 0
    for batch in _batches(paths, size=64 if max_tokens is None else 4):
        for encoding in tokenizer.encode_batch(batch, add_special_tokens=False):
            piece = encoding.ids if end is None else [*encoding.ids, end]
            pieces.append(np.asarray(piece, dtype=np.int64))
            total += len(piece)
        if max_tokens is not None and total >= max_tokens:
            break
    stream = np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)
    return stream[:max_tokens]


def read_texts(paths: Iterable[Path]) -> Iterable[str]:
    """Yield the content of each file that is UTF-8 text."""
    for path in paths:
        try:
            yield path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


def _batches(paths: Iterable[Path], *, size: int) -> Iterable[list[str]]:
    batch: list[str] = []
    for text in read_texts(paths):
        batch.append(text)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
