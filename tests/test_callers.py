"""Warnings point to the line that called the package, not to one inside of it or of PyTorch."""

from __future__ import annotations

import functools
import linecache
import warnings

import pytest
import torch

import seer_compile
from seer_compile import callers
from seer_compile.config import CalibrationConfig
from seer_compile.errors import DenseFallbackWarning, DensityNotReachedWarning, StaleGatesWarning
from seer_compile.kernels import counters, engines
from support.models import decoder, token_ids
from support.rewriting import answer_sparsely

QUICK = CalibrationConfig(steps=2, warmup_steps=1, holdout_batches=1)


@pytest.fixture(scope="module")
def calibrated():
    model = seer_compile.optimize(decoder(), inner="eager")
    seer_compile.calibrate(model, batches(), config=QUICK, progress=False)
    return model


def batches():
    return [token_ids(128, seed=seed) for seed in range(3)]


def lines_of(caught, category):
    """The source lines that warnings of a category point to; of other files, the files' names."""
    return [
        linecache.getline(item.filename, item.lineno).strip()
        if item.filename == __file__
        else item.filename
        for item in caught
        if item.category is category
    ]


# Ignored by text elsewhere, as short inputs reach no low density.
@pytest.mark.filterwarnings("always::seer_compile.errors.DensityNotReachedWarning")
def test_budgets_point_to_their_call(calibrated):
    with warnings.catch_warnings(record=True) as caught:
        seer_compile.set_budget(calibrated, density=0.01)
        calibrated.seer_gates.set_budget(density=0.01)
        seer_compile.calibrate(calibrated, batches(), config=QUICK, density=0.01, progress=False)
    assert lines_of(caught, DensityNotReachedWarning) == [
        "seer_compile.set_budget(calibrated, density=0.01)",
        "calibrated.seer_gates.set_budget(density=0.01)",
        "seer_compile.calibrate(calibrated, batches(), config=QUICK, density=0.01, progress=False)",
    ]


@torch.no_grad()
def test_dense_answers_and_stale_gates_point_to_their_call(calibrated, tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = seer_compile.optimize(decoder(), inner="eager")
        model(token_ids(70))
        torch.export.export(model, (token_ids(70),))
        calibrated.load_state_dict(decoder(seed=1).state_dict())
        seer_compile.save_gates(calibrated, tmp_path / "gates.safetensors")
    assert lines_of(caught, DenseFallbackWarning) == [
        "model(token_ids(70))",
        "torch.export.export(model, (token_ids(70),))",
    ]
    assert lines_of(caught, StaleGatesWarning) == [
        "calibrated.load_state_dict(decoder(seed=1).state_dict())",
        'seer_compile.save_gates(calibrated, tmp_path / "gates.safetensors")',
    ]


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_operators_point_to_the_call_of_the_model(inner, monkeypatch):
    """Between the two lie the dispatcher, generated code and autograd."""
    model = decoder(layers=1)
    seer_compile.optimize(model, zero_shot=True, inner=inner, example=token_ids(80))
    answer_sparsely(model.seer_gates)
    # In place of counting, which every operator does, and without a frame of this file.
    monkeypatch.setattr(counters, "record", functools.partial(engines._warn, "hopper"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with torch.no_grad():
            model(token_ids(90))
        model(token_ids(90)).sum().backward()
    assert lines_of(caught, engines.EngineFallbackWarning) == [
        "model(token_ids(90))",
        "model(token_ids(90)).sum().backward()",
    ]


def test_a_warning_without_a_caller_points_to_where_it_arises(monkeypatch):
    """A thread of autograd's has frames of PyTorch's and the package's only."""
    monkeypatch.setattr(callers, "_is_passed_over", lambda frame: True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        callers.warn_caller("text", UserWarning)
    assert lines_of(caught, UserWarning) == ['callers.warn_caller("text", UserWarning)']
