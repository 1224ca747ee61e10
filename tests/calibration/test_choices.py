"""Choices of training: where gates start, what they learn, how rates fall and weights are kept."""

import dataclasses

import pytest
import torch

from seer_compile.calibration import site_trainer
from seer_compile.calibration.schedule import learning_rate
from seer_compile.calibration.statistics_start import fit_to_statistics
from seer_compile.calibration.targets import (
    attention_mass,
    far_row_weights,
    gate_target,
)
from seer_compile.calibration.train import fit
from seer_compile.config import CalibrationConfig, GateConfig
from seer_compile.errors import RangeError
from seer_compile.gate import AttnGate
from seer_compile.gate_store import GateStore
from seer_compile.types import BlockSize, SiteInputs, Visibility
from support import inputs
from support.calibrate_planted import GATES
from support.planted import PlantedModel, batches

SHORT = CalibrationConfig(
    steps=6, warmup_steps=2, learning_rate=1e-2, holdout_batches=1, checkpoint_every=2
)


def site(**kwargs):
    kwargs = {"heads": 4, "kv_heads": 2, "q_len": 200, "head_dim": 16, "sharpness": 2.0} | kwargs
    tensors = inputs.attention_inputs(**kwargs)
    return SiteInputs(
        name="site",
        query=tensors.query,
        key=tensors.key,
        value=tensors.value,
        scale=tensors.scale,
        visibility=Visibility(upper=0),
    )


def run_fit(config=SHORT, data=None, store=None, **options):
    store = store or GateStore(GATES)
    data = data or batches(8, 160)
    return store, fit(PlantedModel().run, store, data, config, progress=False, **options)


def weights_of(store):
    return [part.detach().clone() for _, gate in store.items() for part in gate.parameters()]


class TestStatistics:
    @pytest.mark.parametrize("gate_dim", [16, 32, 64])
    def test_predicts_a_planted_pattern_better_than_means_without_training(self, gate_dim):
        config = dataclasses.replace(GATES, gate_dim=gate_dim)
        losses = {}
        for start in ("identity", "statistics"):
            nothing = dataclasses.replace(
                SHORT, steps=1, start=start, learning_rate=1e-9, final_learning_rate=0.0
            )
            _, report = run_fit(nothing, batches(8, 384), GateStore(config))
            losses[start] = report.losses[0]
        assert losses["statistics"] < 0.9 * losses["identity"]

    def test_captures_more_mass_than_means(self):
        captured = {}
        for start in ("identity", "statistics"):
            config = dataclasses.replace(SHORT, steps=0, start=start)
            _, report = run_fit(config, batches(8, 384), density=0.4)
            captured[start] = report.captured_mass
        assert captured["statistics"] > captured["identity"] + 0.02

    def test_depends_on_the_data_alone(self):
        config = dataclasses.replace(SHORT, steps=0, start="statistics")
        one, other = (weights_of(run_fit(config)[0]) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

    def test_is_not_worse_where_means_are_all_there_is(self):
        item = site()
        gate = AttnGate(4, 2, 16, config=GateConfig(query_pools=("mean",), key_pools=("mean",)))
        before = loss(gate, item)
        fit_to_statistics(gate, item)
        assert loss(gate, item) <= before + 1e-3

    def test_a_site_of_one_sub_block_stays_as_it_is(self):
        gate = AttnGate(4, 2, 16, config=GateConfig(query_sub_block=8, key_sub_block=8))
        assert not fit_to_statistics(gate, site(q_len=8))


def loss(gate, item):
    target, counts = gate_target(item, gate.config, kind="mass")
    log_mass = gate.row_log_mass(item.query, item.key, item.scale, item.visibility)
    return -(target * log_mass).sum(-1)[counts].mean().item()


class TestTargets:
    def test_value_target_is_the_mass_weighted_by_norms(self):
        item = site()
        value = item.value * torch.linspace(0.2, 3, item.value.shape[2])[:, None]
        item = SiteInputs(
            name=item.name,
            query=item.query,
            key=item.key,
            value=value,
            scale=item.scale,
            visibility=item.visibility,
        )
        # One key per unit: the mass of every single pair.
        pairs = attention_mass(item, query_unit=1, key_unit=1).double()
        norms = value.norm(dim=-1).repeat_interleave(2, 1).double()
        weighted = pairs * norms[:, :, None]
        weighted = weighted / weighted.sum(-1, keepdim=True)
        found = attention_mass(item, query_unit=1, key_unit=1, kind="value")
        torch.testing.assert_close(found.double(), weighted, atol=1e-4, rtol=1e-3)

    def test_rows_that_look_far_count_more(self):
        item, config = (
            site(),
            GateConfig(query_sub_block=8, key_sub_block=8, block_size=BlockSize(query=16, key=16)),
        )
        target, _ = gate_target(item, config, kind="mass")
        weights = far_row_weights(target, item, config, None, more=3.0)
        assert weights.shape == target.shape[:3]
        own = torch.arange(target.shape[2]) // 2
        for row in (0, 1, 5, 24):
            near = target[0, 1, row, own[row]] + (target[0, 1, row, 0] if own[row] else 0)
            assert weights[0, 1, row] == pytest.approx(1 + 3 * (1 - float(near)), abs=1e-5)
        rows = torch.tensor([3, 9])
        some = far_row_weights(target[:, :, rows], item, config, rows, more=3.0)
        torch.testing.assert_close(some, weights[:, :, rows])
        assert weights[0, :, 0].max() == pytest.approx(1.0)


class TestWeights:
    def test_average_follows_and_takes_the_place_of_the_weights(self):
        config = dataclasses.replace(SHORT, start_share=0.0)
        averaged, _ = run_fit(dataclasses.replace(config, average=0.5))
        last, _ = run_fit(config)
        start, _ = run_fit(dataclasses.replace(SHORT, steps=0))
        parts = zip(*map(weights_of, (averaged, last, start)), strict=True)
        for mean, end, begin in parts:
            assert not torch.equal(mean, end)
            assert (mean - begin).norm() < (end - begin).norm()

    def test_a_share_of_the_start_stays_in_the_weights(self):
        mixed, _ = run_fit(dataclasses.replace(SHORT, start_share=0.25))
        last, _ = run_fit(dataclasses.replace(SHORT, start_share=0.0))
        start, _ = run_fit(dataclasses.replace(SHORT, steps=0))
        for weight, end, begin in zip(*map(weights_of, (mixed, last, start)), strict=True):
            torch.testing.assert_close(weight, 0.25 * begin + 0.75 * end)
            assert not torch.equal(end, begin)

    @pytest.mark.parametrize("change", [{"average": 0.5}, {"start_share": 0.5}])
    def test_what_takes_the_place_of_weights_survives_an_interruption(
        self, tmp_path, monkeypatch, change
    ):
        config = dataclasses.replace(SHORT, **change)
        whole, _ = run_fit(config)
        update = site_trainer.GateTrainer.end

        def stop(self):
            if self.step == 4:
                raise KeyboardInterrupt
            return update(self)

        monkeypatch.setattr(site_trainer.GateTrainer, "end", stop)
        with pytest.raises(KeyboardInterrupt):
            run_fit(config, checkpoint_dir=tmp_path)
        monkeypatch.undo()
        resumed, _ = run_fit(config, checkpoint_dir=tmp_path)
        for one, other in zip(weights_of(whole), weights_of(resumed), strict=True):
            assert torch.equal(one, other)

    def test_gates_are_equal_while_they_are_shared_and_part_afterwards(self):
        for steps, is_shared in ((6, True), (3, False)):
            store, _ = run_fit(dataclasses.replace(SHORT, shared_steps=steps))
            first, second = (gate for _, gate in store.items())
            assert torch.equal(first.query_weight, second.query_weight) == is_shared

    def test_tied_heads_project_keys_alike(self):
        store, _ = run_fit(dataclasses.replace(SHORT, tie_keys=True))
        for _, gate in store.items():
            key = gate.key_weight.unflatten(0, (gate.kv_heads, -1))
            torch.testing.assert_close(key, key[:, :1].expand_as(key))
            assert not torch.equal(gate.query_weight[0], gate.query_weight[1])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "flat"])
def test_rates_fall_to_the_last_one(schedule):
    config = CalibrationConfig(
        steps=101, warmup_steps=0, learning_rate=1.0, final_learning_rate=0.1, schedule=schedule
    )
    rates = [learning_rate(step, config) for step in range(101)]
    assert rates[0] == 1.0
    assert rates[-1] == pytest.approx(0.1)
    assert rates == sorted(rates, reverse=True)
    middle = {"cosine": 0.55, "linear": 0.55, "flat": 1.0}[schedule]
    assert rates[50] == pytest.approx(middle)


@pytest.mark.parametrize(
    "change",
    [
        {"schedule": "steep"},
        {"target": "mean"},
        {"average": 1.0},
        {"start_share": 1.0},
        {"start_share": -0.1},
        {"shared_steps": -1},
        {"far_rows": -0.5},
        {"steps": -1},
    ],
)
def test_choices_out_of_range_are_refused(change):
    with pytest.raises(RangeError):
        CalibrationConfig(**change)
