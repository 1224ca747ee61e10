"""Every error and warning of the package, rooted at :class:`SeerError`.

Each class carries a stable code and inherits the builtin that a caller would expect. The text is
built from fields: which argument, what it was, what is accepted, and what to do.
"""

from __future__ import annotations

from functools import partial
from typing import Any


class SeerError(Exception):
    """Root of all errors.

    Args:
        message: What is wrong, when the fields alone do not say it.
        argument: Name of the argument at fault.
        got: The value received.
        expected: What is accepted.
        hint: What to do about it.
        context: Site, node, device, versions: anything that helps to find the place.
    """

    code = "SEER-000"

    def __init__(
        self,
        message: str = "",
        *,
        argument: str | None = None,
        got: Any = None,
        expected: str | None = None,
        hint: str | None = None,
        context: dict[str, Any] | None = None,
    ) -> None:
        self.message = message
        self.argument = argument
        self.got = got
        self.expected = expected
        self.hint = hint
        self.context = dict(context or {})
        super().__init__(self._text(message))

    def __reduce__(self) -> tuple[Any, ...]:
        """Rebuild from fields: the default would hand the finished text over as the message."""
        fields = ("argument", "got", "expected", "hint", "context")
        return partial(type(self), **{name: getattr(self, name) for name in fields}), (
            self.message,
        )

    def _text(self, message: str) -> str:
        sentences = [message] if message else []
        if self.argument is not None:
            sentences.append(f"{self.argument}={self.got!r}")
        if self.expected is not None:
            sentences.append(f"expected {self.expected}")
        first = "; ".join(sentences)
        lines = [f"[{self.code}] {first}"]
        if self.context:
            lines.append("  " + ", ".join(f"{key}={value}" for key, value in self.context.items()))
        if self.hint:
            lines.append(f"  {self.hint}")
        return "\n".join(lines)


class SeerInputError(SeerError, ValueError):
    """An argument has the wrong value."""

    code = "SEER-100"


class ShapeError(SeerInputError):
    """A tensor has the wrong shape."""

    code = "SEER-101"


class DtypeError(SeerInputError, TypeError):
    """A tensor or argument has the wrong type."""

    code = "SEER-102"


class DeviceError(SeerInputError):
    """Tensors are on the wrong or on different devices."""

    code = "SEER-103"


class HeadConfigError(SeerInputError):
    """Query and key heads do not form groups."""

    code = "SEER-104"


class SelectionError(SeerInputError):
    """A block selection does not fit the tensors."""

    code = "SEER-106"


class RangeError(SeerInputError):
    """A number is outside its range (density, mass, threshold, block size, scale)."""

    code = "SEER-107"


class SeerUnsupportedError(SeerError, NotImplementedError):
    """The request is understood and not available."""

    code = "SEER-200"


class FeatureUnsupportedError(SeerUnsupportedError):
    """A feature of the model or of the call is not available."""

    code = "SEER-201"


class HardwareUnsupportedError(SeerUnsupportedError):
    """The device cannot run this, or its resources do not suffice."""

    code = "SEER-203"


class VersionUnsupportedError(SeerUnsupportedError):
    """A dependency is too old or too new."""

    code = "SEER-204"


class InterpreterUnsupportedError(SeerUnsupportedError):
    """The Triton interpreter computes this wrongly."""

    code = "SEER-205"


class SeerCompileError(SeerError, RuntimeError):
    """The graph could not be compiled as asked."""

    code = "SEER-300"


class NothingOptimizedError(SeerCompileError):
    """No site of the model can be sparse."""

    code = "SEER-301"


class SiteRejectedError(SeerCompileError):
    """In strict mode: a site stays dense."""

    code = "SEER-302"


class PassError(SeerCompileError):
    """A pass failed or left the graph in a state that its postcondition forbids."""

    code = "SEER-303"


class ModelStateError(SeerCompileError):
    """The model is not in the state that the call needs: not optimized, already optimized."""

    code = "SEER-304"


class ExportError(SeerCompileError):
    """The model could not be exported."""

    code = "SEER-305"


class EngineMismatchError(SeerError, RuntimeError):
    """An engine answered otherwise than the default kernels."""

    code = "SEER-400"


class GateFileError(SeerError, OSError, ValueError):
    """A gate file could not be used."""

    code = "SEER-500"


class GateFileCorruptedError(GateFileError):
    """Content and digest of a gate file differ."""

    code = "SEER-501"


class GateFileTruncatedError(GateFileError):
    """A gate file ends too early, or is no gate file."""

    code = "SEER-502"


class UnsafeGateFileError(GateFileError):
    """The file could run code when read, and is not read."""

    code = "SEER-503"


class GateFileSchemaError(GateFileError):
    """The file was written under a schema that this version does not know."""

    code = "SEER-504"


class GateMismatchError(GateFileError):
    """The gates belong to another model."""

    code = "SEER-505"


class NonFiniteGateError(GateFileError):
    """Gate weights hold NaN or infinity."""

    code = "SEER-506"


class CalibrationError(SeerError, RuntimeError):
    """Calibration could not go on."""

    code = "SEER-600"


class NonFiniteLossError(CalibrationError):
    """A gate loss is NaN or infinite."""

    code = "SEER-601"


class ResumeMismatchError(CalibrationError):
    """A checkpoint belongs to another calibration."""

    code = "SEER-602"


class CheckpointWriteError(CalibrationError):
    """A checkpoint could not be written; the previous one is intact."""

    code = "SEER-603"


class CalibrationDataError(CalibrationError):
    """The calibration data is empty or not what the model takes."""

    code = "SEER-604"


class NotConvergedError(CalibrationError):
    """The target could not be reached."""

    code = "SEER-605"


class SeerWarning(UserWarning):
    """Root of all warnings."""


class DensityNotReachedWarning(SeerWarning):
    """What every selection keeps is more than the density that was asked for.

    Args:
        message: The text.
        asked: Kept / visible blocks asked for, mean over the sites.
        reached: What is kept instead, by key tokens: the measured lengths above the asked density.
    """

    def __init__(
        self, message: str, *, asked: float | None = None, reached: dict[int, float] | None = None
    ) -> None:
        self.asked = asked
        self.reached = dict(reached or {})
        super().__init__(message)


class StaleGatesWarning(SeerWarning):
    """The model is no longer the one that its gates were calibrated on."""


class DenseFallbackWarning(SeerWarning):
    """Something that could be sparse runs dense; the text says why."""
