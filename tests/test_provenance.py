"""Gates belong to the weights that they were calibrated on, also when these change afterwards."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch

import seer_compile
from seer_compile.calibration.storage import describe_gates, fingerprint
from seer_compile.config import CalibrationConfig
from seer_compile.errors import DenseFallbackWarning, GateMismatchError, StaleGatesWarning
from support.models import decoder, token_ids

QUICK = CalibrationConfig(steps=2, warmup_steps=1, holdout_batches=1, sensitivity_batches=0)
DATA = [token_ids(128, seed=seed) for seed in range(4)]


def calibrate(model, **config):
    config = CalibrationConfig(**config) if config else QUICK
    seer_compile.calibrate(model, DATA, config=config, density=0.6, progress=False)


@pytest.fixture
def model():
    """A calibrated decoder."""
    model = seer_compile.optimize(decoder(), inner="eager")
    calibrate(model)
    return model


def train_in_place(model):
    with torch.no_grad():
        model.layers[1].qkv.weight.add_(0.05)


def load_others(model):
    with pytest.warns(StaleGatesWarning, match="first .*'weight "):
        model.load_state_dict(decoder(seed=1).state_dict())


@pytest.mark.parametrize("change", [train_in_place, load_others])
def test_stale_gates_are_saved_for_the_model_that_they_were_calibrated_on(model, tmp_path, change):
    change(model)
    with pytest.warns(StaleGatesWarning, match="Calibrate again"):
        seer_compile.save_gates(model, tmp_path / "gates.safetensors")
    assert describe_gates(tmp_path / "gates.safetensors")["model"] == fingerprint(decoder())
    seer_compile.optimize(decoder(), gates=tmp_path / "gates.safetensors", inner="eager")
    twin = decoder()
    twin.load_state_dict(seer_compile.restore(model).state_dict())
    with pytest.raises(GateMismatchError, match="other values"):
        seer_compile.optimize(twin, gates=tmp_path / "gates.safetensors", inner="eager")


def test_loaded_gates_remember_the_model_as_well(model, tmp_path):
    seer_compile.save_gates(model, tmp_path / "gates.safetensors")
    other = seer_compile.optimize(decoder(), gates=tmp_path / "gates.safetensors", inner="eager")
    train_in_place(other)
    with pytest.warns(StaleGatesWarning):
        seer_compile.save_gates(other, tmp_path / "again.safetensors")


def copied(model):
    return copy.deepcopy(model)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copy_of", [copied, pickled])
def test_a_copy_remembers_for_itself(model, copy_of):
    twin = copy_of(model)
    assert not twin.seer_report().is_stale
    load_others(twin)
    assert twin.seer_report().is_stale
    assert "for other weights than these" in str(twin.seer_report())
    assert not model.seer_report().is_stale


def test_the_same_weights_in_any_form_are_no_reason_to_warn(model, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(decoder().state_dict())
        model.to(torch.bfloat16)
        seer_compile.save_gates(model, tmp_path / "gates.safetensors")


def test_calibrating_again_or_measuring_makes_gates_those_of_the_weights(model, tmp_path):
    for options in ({}, {"start": "current", "steps": 0, "holdout_batches": 1}):
        train_in_place(model)
        calibrate(model, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            seer_compile.save_gates(model, tmp_path / "gates.safetensors")
        assert describe_gates(tmp_path / "gates.safetensors")["model"] == fingerprint(model)


def test_a_calibration_that_fails_leaves_the_gates_stale(model):
    train_in_place(model)
    with pytest.raises(seer_compile.SeerError):
        seer_compile.calibrate(model, [], progress=False)
    assert model.seer_report().is_stale


def test_export_warns_of_stale_gates(model):
    train_in_place(model)
    with pytest.warns(StaleGatesWarning):
        seer_compile.export(model, (token_ids(100),))


def test_gates_that_learn_along_belong_to_the_weights_of_the_moment(model, tmp_path):
    model.seer_gates.requires_grad_(True)
    with seer_compile.distillation(model) as sites:
        model(token_ids(128))
    sites.loss().backward()
    model.seer_gates.requires_grad_(False)
    train_in_place(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        seer_compile.save_gates(model, tmp_path / "gates.safetensors")
    assert describe_gates(tmp_path / "gates.safetensors")["model"] == fingerprint(model)


def test_gates_that_were_never_trained_belong_to_any_weights(tmp_path):
    model = seer_compile.optimize(decoder(), example=token_ids(100), zero_shot=True, inner="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error", StaleGatesWarning)
        model.load_state_dict(decoder(seed=1).state_dict())
        seer_compile.save_gates(model, tmp_path / "gates.safetensors")


def test_a_call_compares_nothing(model, monkeypatch):
    from seer_compile.calibration import storage

    def compare(*_):
        raise AssertionError("a forward looked at weights")

    monkeypatch.setattr(storage, "fingerprint", compare)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DenseFallbackWarning)
        model(token_ids(100))
