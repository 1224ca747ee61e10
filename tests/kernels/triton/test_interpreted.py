"""The Triton kernels on the CPU, in processes of their own.

Triton decides when it is imported whether its kernels run under the interpreter, so the tests of
``interpreted_*.py`` need a process whose environment says so, and this one must not.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[2]


SUITES = ("attention", "maps", "selection", "hopper", "hopper_backward", "hopper_scores")


@pytest.mark.parametrize("name", SUITES)
def test_kernels_pass_under_the_interpreter(name, pytestconfig):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", str(FOLDER / f"interpreted_{name}.py")]
    # Plugins that are turned off here stay off there.
    command += [f"-p{plugin}" for plugin in pytestconfig.getoption("plugins")]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
