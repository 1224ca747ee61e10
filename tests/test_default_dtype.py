"""``torch.set_default_dtype`` is the user's: no number and no dtype of ours follows it."""

from __future__ import annotations

import math

import pytest
import torch

import seer_compile
from seer_compile.calibration.baselines import BASELINES
from seer_compile.config import CalibrationConfig, GateConfig
from seer_compile.task_evaluation import TaskEvaluator
from support.models import decoder, token_ids
from support.state import default_dtype

QUICK = {"steps": 3, "warmup_steps": 1, "holdout_batches": 1, "checkpoint_every": 3}
DTYPES = [torch.float64, torch.bfloat16]


def calibrated(model, gates, training):
    seer_compile.optimize(model, config=gates, inner="eager")
    data = [token_ids(256, seed=seed) for seed in range(4)]
    config = CalibrationConfig(**QUICK | training)
    seer_compile.calibrate(model, data, config=config, density=0.6, progress=False)
    model.seer_gates.set_mode(True, at_any_size=True)
    with torch.no_grad():
        return model(data[0]), model.seer_gates.state_dict()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("gates", "training"),
    [
        (GateConfig(), {}),
        (GateConfig(), {"start": "statistics"}),
        (GateConfig.paper(density=0.6), {"loss": "mse", "target": "max", "far_rows": 0.5}),
    ],
    ids=["default", "statistics", "paper"],
)
def test_calibration_gives_the_same_bits(dtype, gates, training):
    first, second = decoder(), decoder()
    expected, state = calibrated(first, gates, training)
    with default_dtype(dtype):
        got, other = calibrated(second, gates, training)
    assert got.dtype is torch.float32
    assert torch.equal(got, expected)
    assert state.keys() == other.keys()
    assert all(torch.equal(value, other[key]) for key, value in state.items())


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_baseline_gives_the_same_numbers(dtype):
    def total(output, _):
        return float(output.double().abs().sum())

    evaluator = TaskEvaluator(decoder(), [(token_ids(256), None)], total)
    for name in BASELINES:
        expected = evaluator.run(name, 0.6)
        with default_dtype(dtype):
            got = evaluator.run(name, 0.6)
        assert (got.score, got.density) == (expected.score, expected.density), name
        assert math.isfinite(got.score)
