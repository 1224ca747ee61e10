"""Programs in a process of their own: what crashes there takes nothing along."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap


def run_apart(code: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a process of its own."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ},
        timeout=240,
        check=False,
    )
