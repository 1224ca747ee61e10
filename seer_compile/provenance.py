"""Where the gates of a model come from, and whether the model is still the one they belong to.

Nothing is watched while the model runs: weights are compared where gates are saved, exported or
reported, and where a state dict was loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from seer_compile.callers import warn_caller
from seer_compile.errors import StaleGatesWarning

_DIFFERENCES_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """The calibration that the gates in a store come from, by this process or by a file's."""

    calibration: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Its summary; empty where there was none."""
    model: Mapping[str, Any] | None = None
    """Fingerprint of the model that it ran on; None where gates follow whatever the model is, as
    they were never trained or learn along."""

    def differences(self, model: nn.Module) -> list[str]:
        """Return what of a model is other than it was when the gates were calibrated."""
        from seer_compile.calibration import storage

        if self.model is None:
            return []
        return storage.fingerprint_differences(self.model, storage.fingerprint(model))


def warn_if_stale(provenance: Provenance, model: nn.Module) -> bool:
    """Whether the model is another one than the gates were calibrated on.

    Warns:
        StaleGatesWarning: It is.
    """
    found = provenance.differences(model)
    if found:
        text = (
            f"{type(model).__name__} is no longer the model that its gates were calibrated on: "
            f"{len(found)} differences, first {found[:_DIFFERENCES_SHOWN]}. Calibrate again."
        )
        warn_caller(text, StaleGatesWarning)
    return bool(found)


def look_after_loading(model: nn.Module, incompatible_keys: Any) -> None:
    """Load-state-dict hook: other weights make the gates stale."""
    from seer_compile.session import find_session

    del incompatible_keys
    session = find_session(model)
    if session is not None:
        warn_if_stale(session.provenance, session.model)
