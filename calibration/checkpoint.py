"""Checkpoints of a calibration: written whole, read only when verified, never unpickled."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import tempfile
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from seer_compile.calibration.verified_file import (
    encode,
    parse_header,
    read_bytes,
    read_tensors,
    remove_stale,
    write_verified,
)
from seer_compile.errors import CheckpointWriteError, GateFileError, ResumeMismatchError

SCHEMA = 3
"""As that of gate files."""
# The newest may turn out to be unreadable later, so one more is kept.
KEPT = 2

_logger = logging.getLogger(__name__)
_NAME = re.compile(r"step-(\d{6,})\.safetensors")


class Checkpoint(NamedTuple):
    """One verified checkpoint."""

    path: Path
    step: int
    """Optimisation steps that are done."""
    state: dict[str, Any]
    """Plain data: identity, data cursor, description of the gates."""
    tensors: dict[str, Tensor]


def check_writable(directory: str | os.PathLike[str]) -> None:
    """Make the directory and a file in it, which goes again.

    Permissions alone do not tell: root has them all, on a read-only file system too.

    Raises:
        CheckpointWriteError: It cannot be written to.
    """
    folder = Path(directory)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder) as probe:
            probe.write(b"\0")
    except OSError as cause:
        raise CheckpointWriteError(
            f"no checkpoint could be written: {cause.strerror}",
            argument="checkpoint_dir",
            got=str(folder),
            expected="a folder that can be written to",
            hint="Nothing was trained yet.",
        ) from cause


def write_checkpoint(
    directory: str | os.PathLike[str],
    step: int,
    *,
    state: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> Path:
    """Write a checkpoint, verify it, and only then delete those before the previous one.

    Raises:
        CheckpointWriteError: It could not be written; earlier ones are intact.
    """
    folder = Path(directory)
    path = folder / f"step-{step:06d}.safetensors"
    data = encode(tensors, {"step": step, **state}, schema=SCHEMA)
    try:
        write_verified(path, data, check=lambda found: _decode(found, path))
        for old in _paths(folder)[:-KEPT]:
            old.unlink(missing_ok=True)
    except (OSError, GateFileError) as cause:
        raise CheckpointWriteError(
            f"step {step} could not be written to {str(folder)!r}: {cause}. "
            f"{_newest(folder)} needs no repair.",
            context={"needed_bytes": len(data), "free_bytes": _free_bytes(folder)},
        ) from cause
    return path


def read_latest(directory: str | os.PathLike[str]) -> Checkpoint | None:
    """Return the newest checkpoint that verifies, or None when the directory has none.

    Raises:
        GateFileError: There are checkpoints and none of them can be read.
    """
    folder = Path(directory)
    if not folder.is_dir():
        return None
    remove_stale(folder)
    failure: GateFileError | None = None
    for path in reversed(_paths(folder)):
        try:
            return _decode(read_bytes(path), path)
        except GateFileError as cause:
            _logger.warning("Skipped an unreadable checkpoint: %s", cause)
            failure = cause
    if failure is not None:
        raise failure
    return None


def check_identity(checkpoint: Checkpoint, identity: Mapping[str, Any]) -> None:
    """Raise unless a checkpoint belongs to the calibration that is described.

    Raises:
        ResumeMismatchError: Naming each field that differs.
    """
    theirs = checkpoint.state["identity"]
    # Through JSON, as the file went: tuples are lists there.
    ours = json.loads(json.dumps(dict(identity)))
    differing = [
        name for name in sorted(set(theirs) | set(ours)) if theirs.get(name) != ours.get(name)
    ]
    if differing:
        raise ResumeMismatchError(
            f"{str(checkpoint.path)!r} belongs to another calibration: "
            + "; ".join(_difference(name, theirs.get(name), ours.get(name)) for name in differing),
            hint="Use another checkpoint_dir, or the model, data and configuration of that run.",
        )


def _difference(name: str, theirs: Any, ours: Any) -> str:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        keys = [key for key in sorted({*theirs, *ours}) if theirs.get(key) != ours.get(key)]
        pairs = (f"{key} {_short(theirs.get(key))} -> {_short(ours.get(key))}" for key in keys[:5])
        return f"{name} ({', '.join(pairs)})"
    return f"{name} {_short(theirs)} -> {_short(ours)}"


def _short(value: Any) -> str:
    return textwrap.shorten(repr(value), 80, placeholder=" ...")


def _decode(data: bytes, path: Path) -> Checkpoint:
    parsed = parse_header(data, schema=SCHEMA, source=str(path))
    tensors = read_tensors(data, parsed, source=str(path))
    return Checkpoint(path, int(parsed.header["step"]), parsed.header, tensors)


def _paths(folder: Path) -> list[Path]:
    found = [entry for entry in folder.iterdir() if _NAME.fullmatch(entry.name)]
    return sorted(found, key=lambda entry: int(entry.stem.removeprefix("step-")))


def _newest(folder: Path) -> str:
    with contextlib.suppress(OSError):
        paths = _paths(folder)
        if paths:
            return f"The last checkpoint, {str(paths[-1])!r},"
    return "No earlier checkpoint existed; the model"


def _free_bytes(folder: Path) -> int:
    with contextlib.suppress(OSError):
        return shutil.disk_usage(folder).free
    return -1
