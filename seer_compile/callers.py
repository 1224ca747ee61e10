"""Warnings that point to the line of the caller's, however deep in the package they arise."""

from __future__ import annotations

import sys
import warnings
from types import FrameType

# Between a call of the model and an operator lie frames of both.
_PACKAGES = frozenset({"seer_compile", "torch"})


def warn_caller(message: str | Warning, category: type[Warning] | None = None) -> None:
    """Issue a warning at the innermost line that is neither this package's nor PyTorch's.

    Where there is none, as in a thread of autograd's, it is issued where this was called.

    Args:
        message: Text, or a warning, which brings its category.
        category: Of a text.
    """
    warnings.warn(message, category, stacklevel=_level_of_caller())


def _level_of_caller() -> int:
    """Return the ``stacklevel`` for ``warn_caller``; its own is 1.

    ``skip_file_prefixes`` needs Python 3.12. Files would tell less, too: folders of the package are
    links in a checkout, and generated code has no file.
    """
    level, frame = 2, sys._getframe(2)
    while frame is not None:
        if not _is_passed_over(frame):
            return level
        level, frame = level + 1, frame.f_back
    return 2


def _is_passed_over(frame: FrameType) -> bool:
    name = frame.f_globals.get("__name__")
    # Without a name: the code of a graph, or a wrapper that PyTorch wrote around it.
    return not isinstance(name, str) or name.partition(".")[0] in _PACKAGES
