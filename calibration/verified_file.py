"""Safetensors files that are written whole or not at all, and read only when every digest holds.

Safetensors alone does not notice a flipped bit. The file carries one metadata entry, ``seer``: JSON
with the caller's header, the type, shape and sha256 of each tensor, and a digest over all of it.
Nothing is ever unpickled, and no memory is mapped.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import platform
import re
import stat
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from seer_compile.errors import (
    GateFileCorruptedError,
    GateFileError,
    GateFileSchemaError,
    GateFileTruncatedError,
    UnsafeGateFileError,
)

METADATA_KEY = "seer"
MAX_FILE_BYTES = 16 * 2**30
MAX_HEADER_BYTES = 64 * 2**20

_PICKLE_SUFFIXES = {".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle"}
# Zip archives (torch.save since 1.6) and pickle protocols 2 to 5.
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_counter = itertools.count()


class VerifiedHeader(NamedTuple):
    """What a file says about itself, its own digest already checked."""

    header: dict[str, Any]
    """What the writer passed."""
    tensors: dict[str, dict[str, Any]]
    """Type, shape and sha256 of each tensor."""


def encode(tensors: Mapping[str, Tensor], header: Mapping[str, Any], *, schema: int) -> bytes:
    """Return the bytes of a file; the same input gives the same bytes.

    Args:
        tensors: What to store; copied to the CPU.
        header: JSON-serialisable data.
        schema: Version of the header's layout.
    """
    host = {
        name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()
    }
    content = {
        "schema": schema,
        "header": dict(header),
        "tensors": {name: _describe(tensor) for name, tensor in sorted(host.items())},
    }
    content["digest"] = _digest(content)
    return safetensors.torch.save(host, {METADATA_KEY: _canonical(content)})


def read_bytes(path: str | os.PathLike[str], *, limit: int = MAX_FILE_BYTES) -> bytes:
    """Read a file that may be a safetensors file: regular, of sane size, no pickle.

    Raises:
        UnsafeGateFileError: A pickle or zip archive, or no regular file.
        GateFileTruncatedError: Too short to hold its own header.
        GateFileError: It cannot be read, or is above the limit.
    """
    place = Path(path)
    if place.suffix.lower() in _PICKLE_SUFFIXES:
        raise _unsafe(place)
    try:
        # Without O_NONBLOCK, opening a named pipe would wait for a writer.
        descriptor = os.open(place, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except OSError as cause:
        raise GateFileError(f"{str(place)!r} cannot be read: {cause.strerror}") from cause
    try:
        data = _read_regular(descriptor, str(place), limit)
    except OSError as cause:
        if isinstance(cause, GateFileError):
            raise
        raise GateFileError(f"{str(place)!r} cannot be read: {cause.strerror}") from cause
    finally:
        os.close(descriptor)
    if data.startswith(_PICKLE_STARTS):
        raise _unsafe(place)
    return data


def parse_header(data: bytes, *, schema: int, source: str) -> VerifiedHeader:
    """Check size, structure, schema and the header's digest; tensors are not touched.

    Args:
        data: The whole file.
        schema: The only schema that is understood.
        source: Name of the file in errors.

    Raises:
        GateFileTruncatedError: The file ends too early or is no safetensors file of ours.
        GateFileSchemaError: Another schema.
        GateFileCorruptedError: The header does not match its digest.
    """
    content = _content(data, source)
    if content.get("schema") != schema:
        raise GateFileSchemaError(
            f"{source!r} has schema {content.get('schema')!r}; this version reads {schema}",
            hint="Use the version of seer_compile that wrote the file, or calibrate again.",
        )
    if set(content) != {"schema", "header", "tensors", "digest"}:
        raise GateFileSchemaError(f"{source!r} has metadata fields {sorted(content)}")
    stored = content.pop("digest")
    computed = _digest(content)
    if stored != computed:
        raise _corrupted(source, "the header", str(stored), computed, len(data))
    return VerifiedHeader(content["header"], content["tensors"])


def read_tensors(data: bytes, header: VerifiedHeader, *, source: str) -> dict[str, Tensor]:
    """Return every tensor in fresh memory, after comparing each with its digest.

    Raises:
        GateFileTruncatedError: The file ends too early.
        GateFileCorruptedError: A tensor is missing, added, renamed or changed.
    """
    try:
        tensors = safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as cause:
        raise _truncated(source, str(cause)) from cause
    if set(tensors) != set(header.tensors):
        odd = sorted(set(tensors) ^ set(header.tensors))
        raise GateFileCorruptedError(
            f"{source!r}: {len(odd)} tensors are missing or were added, first {odd[:3]}. "
            "Nothing was loaded."
        )
    for name, tensor in tensors.items():
        found, expected = _describe(tensor), header.tensors[name]
        if found != expected:
            raise _corrupted(
                source,
                f"tensor {name!r}",
                str(expected.get("sha256")),
                found["sha256"],
                len(data),
            )
    return tensors


def write_verified(
    path: str | os.PathLike[str], data: bytes, *, check: Callable[[bytes], object]
) -> None:
    """Put a file in place whole: temporary file, fsync, read back, check, rename, fsync.

    Whatever happens, the path holds either what it held before or all of ``data``. A symbolic link
    at the path is replaced, not followed.

    Args:
        path: Where the file goes; its directory is created.
        data: The bytes.
        check: Called with the bytes read back; raises when they are not good.

    Raises:
        OSError: The disk is full, read-only, or lost data. The temporary file is removed.
    """
    place = Path(path)
    place.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(place.parent)
    temporary = place.parent / f".{place.name}.{_host()}-{os.getpid()}-{next(_counter)}.tmp"
    try:
        with _created(temporary) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        written = temporary.read_bytes()
        if written != data:
            raise OSError(f"{str(temporary)!r} reads back differently than it was written")
        check(written)
        temporary.chmod(_mode_of(place))
        os.replace(temporary, place)
        _sync_directory(place.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def remove_stale(directory: Path) -> None:
    """Delete temporary files that processes of this machine left behind when they died."""
    pattern = re.compile(rf"\..*\.{_host()}-(\d+)-\d+\.tmp")
    for entry in directory.iterdir():
        found = pattern.fullmatch(entry.name)
        if found and not _is_alive(int(found.group(1))):
            with contextlib.suppress(OSError):
                entry.unlink(missing_ok=True)


def _read_regular(descriptor: int, source: str, limit: int) -> bytes:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise UnsafeGateFileError(f"{source!r} is not a regular file")
    if status.st_size > limit:
        raise GateFileError(f"{source!r} has {status.st_size:,} bytes; at most {limit:,} are read")
    with os.fdopen(descriptor, "rb", closefd=False) as file:
        return file.read()


def _content(data: bytes, source: str) -> dict[str, Any]:
    if len(data) < 8:
        raise _truncated(source, f"{len(data)} bytes")
    (header_bytes,) = struct.unpack("<Q", data[:8])
    if header_bytes > min(MAX_HEADER_BYTES, len(data) - 8):
        raise _truncated(source, f"a header of {header_bytes:,} bytes in {len(data):,}")
    try:
        metadata = json.loads(data[8 : 8 + header_bytes])["__metadata__"]
        content = json.loads(metadata[METADATA_KEY])
    except (ValueError, KeyError, TypeError, RecursionError) as cause:
        raise _truncated(source, f"no readable metadata ({type(cause).__name__})") from cause
    if not isinstance(content, dict):
        raise _truncated(source, "no readable metadata")
    return content


def _describe(tensor: Tensor) -> dict[str, Any]:
    raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "sha256": hashlib.sha256(raw).hexdigest(),
    }


def _canonical(content: Mapping[str, Any]) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical(content).encode()).hexdigest()


def _corrupted(
    source: str, part: str, stored: str, computed: str, size: int
) -> GateFileCorruptedError:
    return GateFileCorruptedError(
        f"{source!r}: {part} does not match its sha256 (stored {stored[:8]}..., computed "
        f"{computed[:8]}...). Nothing was loaded.",
        hint=f"The file ({size:,} bytes) was changed or damaged after it was written. "
        "Restore it or calibrate again.",
    )


def _truncated(source: str, detail: str) -> GateFileTruncatedError:
    return GateFileTruncatedError(
        f"{source!r} is no complete file of gates: {detail}. Nothing was loaded."
    )


def _unsafe(place: Path) -> UnsafeGateFileError:
    return UnsafeGateFileError(
        f"{str(place)!r} is a pickle file or named like one; seer_compile never unpickles.",
        hint="If you trust its source, convert it to safetensors in a separate process.",
    )


@contextlib.contextmanager
def _created(path: Path) -> Iterator[Any]:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        yield file


def _mode_of(place: Path) -> int:
    return stat.S_IMODE(place.stat().st_mode) if place.is_file() else 0o644


def _sync_directory(directory: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _host() -> str:
    return f"{zlib.crc32(platform.node().encode()):08x}"


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
