"""Packages of AOTInductor."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.export import ExportedProgram


def package(program: ExportedProgram, path: Path) -> str:
    """Compile a program into a package; return where it is."""
    # The packager leaves the platform in this setting, for good.
    with torch._inductor.config.patch({"aot_inductor.metadata": {}}):
        return torch._inductor.aoti_compile_and_package(program, package_path=str(path))
