"""The benchmark of power reads the GPU that runs, and says what keeps it from that."""

import sys
import types
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import power

UUID = "01234567-89ab-cdef-0123-456789abcdef"


@pytest.fixture
def answer(tmp_path, monkeypatch):
    """Return a function that puts a script in the place of nvidia-smi."""
    monkeypatch.setenv("PATH", str(tmp_path))

    def install(script):
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)

    return install


@pytest.mark.parametrize("given", [UUID, f"GPU-{UUID}"])
def test_the_current_device_is_asked_for_by_its_uuid(answer, monkeypatch, given):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    properties = {3: types.SimpleNamespace(uuid=given)}
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties.__getitem__)
    answer(f'for word in "$@"; do [ "$word" = --id=GPU-{UUID} ] && echo "1755, 698.50"; done; :')
    assert power.clock_and_power(power.current_uuid()) == (1755.0, 698.5)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo No devices were found >&2; exit 6", "ended with 6: No devices were found"),
        ("echo '1755, [N/A]'", "gave no clock and power: '1755, \\[N/A\\]'"),
        ("echo '1755, 600'; echo '345, 70'", "gave no clock and power"),
        (":", "gave no clock and power: ''"),
        (None, "not on PATH"),
    ],
)
def test_what_nvidia_smi_lacks_is_said(answer, script, message):
    if script is not None:
        answer(script)
    with pytest.raises(SystemExit, match=message):
        power.clock_and_power(f"GPU-{UUID}")


def test_a_failure_while_calls_run_reaches_the_caller(answer, monkeypatch):
    answer("exit 9")
    monkeypatch.setattr(power, "elapsed_ms", lambda call, calls: 1.0)
    with pytest.raises(SystemExit, match="ended with 9"):
        power.sustained(lambda: None, 0.01, f"GPU-{UUID}")


def test_samples_are_counted_without_the_last():
    assert power.medians([(1000.0, 500.0), (1200.0, 700.0), (10.0, 10.0)]) == (1100.0, 600.0)
    for samples in ([], [(1000.0, 500.0)]):
        with pytest.raises(SystemExit, match="--seconds"):
            power.medians(samples)
