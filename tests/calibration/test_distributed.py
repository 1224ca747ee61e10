"""Processes that calibrate together end together: with equal gates, or with an error each."""

import dataclasses
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from seer_compile.calibration.storage import describe_gates, load_gates
from seer_compile.calibration.train import fit
from seer_compile.gate_store import GateStore
from support.calibrate_planted import GATES, TRAINING
from support.lookups import LOOKUP, NAMES
from support.planted import PlantedModel, batches

TESTS = Path(__file__).parents[1]
pytestmark = pytest.mark.slow
meetings = itertools.count()


def calibrate(out, *options, world=2):
    """Run the processes; return the error of each, None where it wrote gates."""
    out.mkdir(exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    meeting = out / f"meeting-{next(meetings)}"
    command = [sys.executable, "-m", "support.calibrate_together", str(out), str(meeting)]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(world), *options], env=environment, stderr=subprocess.PIPE
        )
        for rank in range(world)
    ]
    errors = []
    for rank, process in enumerate(processes):
        _, printed = process.communicate(timeout=120)
        assert process.returncode == 0, printed.decode()
        told = out / f"rank-{rank}.txt"
        errors.append(told.read_text() if told.exists() else None)
    return errors


def weights(path):
    """Return the weights and budgets of a gate file, by name; not what describes them."""
    store = GateStore(GATES)
    load_gates(store, path, model=describe_gates(path)["model"])
    state = store.state_dict()
    return {key: value for key, value in state.items() if key != "metadata"}


def assert_equal(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_processes_end_with_equal_gates_trained_on_all_shares(tmp_path):
    assert calibrate(tmp_path) == [None, None]
    files = [tmp_path / f"rank-{rank}.safetensors" for rank in range(2)]
    assert [describe_gates(file)["model"] for file in files] == [{"steps": 3}] * 2
    assert_equal(*map(weights, files))
    alone = GateStore(GATES)
    config = dataclasses.replace(TRAINING, steps=3)
    fit(PlantedModel().run, alone, batches(6, 160), config, density=0.4, progress=False)
    name = alone.names()[0]
    other = GateStore(GATES)
    load_gates(other, files[0], model={"steps": 3})
    assert not torch.equal(other.get(name).key_weight, alone.get(name).key_weight)


def test_processes_go_on_from_a_checkpoint_with_the_same_bits(tmp_path):
    assert calibrate(tmp_path / "parts", "--batches", "4") == [None, None]
    assert calibrate(tmp_path / "parts") == [None, None]
    assert calibrate(tmp_path / "whole") == [None, None]
    for rank in range(2):
        part, whole = (tmp_path / name / f"rank-{rank}.safetensors" for name in ("parts", "whole"))
        assert describe_gates(part)["model"] == describe_gates(whole)["model"] == {"steps": 3}
        assert_equal(weights(part), weights(whole))


def test_processes_choose_the_same_resolutions(tmp_path):
    assert calibrate(tmp_path, "--model", "lookups") == [None, None]
    stores = [
        describe_gates(tmp_path / f"rank-{rank}.safetensors")["store"]["gates"] for rank in range(2)
    ]
    sizes = [{gate["name"]: tuple(gate["sub_blocks"]) for gate in gates} for gates in stores]
    assert sizes[0] == sizes[1] == dict.fromkeys(NAMES, (8, 8)) | {LOOKUP: (2, 2)}


@pytest.mark.parametrize("lost", range(2))
@pytest.mark.parametrize("model", ["planted", "lookups"])
def test_a_process_that_reaches_no_site_stops_all(lost, model, tmp_path):
    errors = calibrate(tmp_path, "--lost", str(lost), "--model", model)
    assert "reached no attention site" in errors[lost]
    assert f"process {lost} stopped: " in errors[1 - lost]
    assert "reached no attention site" in errors[1 - lost]


def test_too_little_data_in_one_process_stops_all(tmp_path):
    # Process 1 has two batches less.
    errors = calibrate(tmp_path, "--batches", "3")
    assert errors[1].startswith("CalibrationDataError")
    assert "process 1 stopped: " in errors[0]


def test_processes_that_see_different_checkpoints_do_not_start(tmp_path):
    assert calibrate(tmp_path, "--batches", "4") == [None, None]
    (tmp_path / "checkpoints").rename(tmp_path / "checkpoints-0")
    errors = calibrate(tmp_path, "--checkpoints", "checkpoints-{rank}")
    for error in errors:
        assert error.startswith("ResumeMismatchError")
        assert "steps 1, none" in error
