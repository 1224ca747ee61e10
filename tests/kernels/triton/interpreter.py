"""Make the interpreter of older Triton versions work with newer NumPy."""

from __future__ import annotations

import os
from typing import Any


def patch_interpreter() -> None:
    """Let one-element arrays be loop bounds.

    Triton 3.6 converts them with ``int(array)``, which NumPy refuses from 2.4 on.
    """
    assert os.environ.get("TRITON_INTERPRET") == "1", "set it before Triton is imported"
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_convert(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_and_convert
