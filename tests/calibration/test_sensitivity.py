"""Sites whose sparsity moves the model's output are told from sites whose does not."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from seer_compile.calibration.sensitivity import DenseOutput, measure_sensitivity
from seer_compile.errors import CalibrationDataError
from seer_compile.gate_store import GateStore
from support.calibrate_planted import GATES
from support.planted import FirstHalf, PlantedModel, batches

WEIGHTS = (1.0, 0.03)


def run(batch, handler, model=PlantedModel):
    """Two sites whose outputs enter with very different weights."""
    first, second = model().run(batch, handler)
    return SimpleNamespace(logits=WEIGHTS[0] * first + WEIGHTS[1] * second)


@pytest.fixture(scope="module")
def curves():
    return measure_sensitivity(run, GateStore(GATES), batches(3, 300), densities=(0.01, 0.3, 0.6))


def test_the_site_that_matters_is_the_sensitive_one(curves):
    heavy, light = curves["layers.0.attn"], curves["layers.1.attn"]
    assert heavy.lengths == light.lengths == (300,)
    for strong, weak in zip(heavy.divergences[0], light.divergences[0], strict=True):
        assert strong > 10 * weak > 0


def test_divergence_falls_with_density_to_nothing(curves):
    for curve in curves.values():
        first, middle, last = curve.divergences[0]
        assert min(first, middle) > last > 0
        assert curve.at(300, [1.0])[0] == 0


def test_so_many_batches_of_a_length_are_measured_as_asked_for():
    forwards = []

    def counted(batch, handler):
        forwards.append(int(batch["length"]))
        return run(batch, handler)

    data = [*batches(2, 300), *batches(2, 200)]
    found = measure_sensitivity(counted, GateStore(GATES), data, densities=(0.5,))
    assert [curve.lengths for curve in found.values()] == [(200, 300)] * 2
    assert (forwards.count(300), forwards.count(200)) == (2 + 2, 2 + 2)
    assert measure_sensitivity(counted, GateStore(GATES), data, per_length=0) == {}


def test_densities_are_those_measured(curves):
    for curve in curves.values():
        smallest, middle, large = curve.densities[0]
        assert smallest > 0.05  # diagonal, sink and the best block are always kept
        assert (middle, large) == (pytest.approx(0.3, abs=0.03), pytest.approx(0.6, abs=0.03))


def test_the_first_half_of_a_causal_sequence_is_measured_as_a_sequence_of_its_own():
    def on_half(batch, handler):
        return run(batch, handler, FirstHalf)

    data, store = batches(1, 1024), GateStore(GATES)
    found = measure_sensitivity(run, store, data, densities=(0.05, 0.2, 0.5))
    for name, curve in found.items():
        assert curve.lengths == (512, 1024)
        assert curve.densities[0][0] > curve.densities[1][0]
        for density, divergence in zip(curve.densities[0], curve.divergences[0], strict=True):
            alone = measure_sensitivity(on_half, store, data, densities=(density,))[name]
            assert alone.lengths == (512,)
            assert alone.densities[0] == pytest.approx([density])
            assert alone.divergences[0] == pytest.approx([divergence], rel=1e-5)


def test_halves_give_way_to_whole_sequences_of_their_length():
    store = GateStore(GATES)
    both = measure_sensitivity(run, store, batches(2, 1024, 512), densities=(0.3,))
    alone = measure_sensitivity(run, store, batches(1, 512, first=1), densities=(0.3,))
    for name, curve in both.items():
        assert curve.lengths == (512, 1024)
        assert curve.densities[0] == alone[name].densities[0]
        assert curve.divergences[0] == pytest.approx(alone[name].divergences[0])


def mixed_with_what_is_ahead(batch, handler):
    output = run(batch, handler)
    output.logits = output.logits[:, :, -1:]
    return output


def padded(batch, handler):
    return run({**batch, "real": torch.tensor(1000)}, handler)


@pytest.mark.parametrize("forward", [mixed_with_what_is_ahead, padded])
def test_a_half_is_measured_only_where_the_output_has_a_half(forward):
    found = measure_sensitivity(forward, GateStore(GATES), batches(1, 1024), densities=(0.3,))
    assert [curve.lengths for curve in found.values()] == [(1024,)] * 2


def test_divergence_is_that_of_an_independent_formula():
    torch.manual_seed(0)
    dense, sparse = torch.randn(2, 2, 50, 7)
    reference = nn.functional.kl_div(
        sparse.double().log_softmax(-1),
        dense.double().log_softmax(-1),
        log_target=True,
        reduction="sum",
    )
    found = DenseOutput(SimpleNamespace(logits=dense)).divergence({"logits": sparse})
    assert found == pytest.approx(reference.item() / 100, rel=1e-4)
    relative = (dense - sparse).double().square().sum() / dense.double().square().sum()
    found = DenseOutput((torch.tensor(3.0), dense)).divergence((torch.tensor(9.0), sparse))
    assert found == pytest.approx(relative.item(), rel=1e-5)


def test_large_outputs_are_compared_by_sample(monkeypatch):
    monkeypatch.setattr("seer_compile.calibration.sensitivity._HELD_BYTES", 4 * 7 * 10)
    monkeypatch.setattr("seer_compile.calibration.sensitivity._CHUNK_BYTES", 4 * 7 * 3)
    torch.manual_seed(0)
    dense, sparse = torch.randn(2, 1, 100, 7)
    sampled = SimpleNamespace(logits=dense[:, ::10]), SimpleNamespace(logits=sparse[:, ::10])
    whole = DenseOutput(SimpleNamespace(logits=dense)).divergence(SimpleNamespace(logits=sparse))
    assert whole == pytest.approx(DenseOutput(sampled[0]).divergence(sampled[1]), rel=1e-6)


def test_output_that_cannot_be_compared_is_refused():
    with pytest.raises(CalibrationDataError, match="no floating-point tensor"):
        DenseOutput((torch.zeros(3, dtype=torch.int64), "text"))


def test_output_that_is_not_finite_is_refused():
    def broken(batch, handler):
        output = run(batch, handler)
        output.logits[0, 0, 0, 0] = float("nan")
        return output

    with pytest.raises(CalibrationDataError, match="not finite"):
        measure_sensitivity(broken, GateStore(GATES), batches(1, 300), densities=(0.3,))
