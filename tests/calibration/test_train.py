"""Training: gates learn, nothing else changes, and no interruption shows in the result."""

import dataclasses
import logging
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from seer_compile.calibration import checkpoint as checkpoints
from seer_compile.calibration import site_trainer, train
from seer_compile.calibration.budget import tabulate
from seer_compile.calibration.record import BatchStream, split_batch
from seer_compile.calibration.train import fit
from seer_compile.config import CalibrationConfig, GateConfig
from seer_compile.errors import (
    CalibrationDataError,
    CheckpointWriteError,
    GateFileError,
    NonFiniteLossError,
    NotConvergedError,
    RangeError,
    ResumeMismatchError,
    SeerInputError,
    SeerWarning,
)
from seer_compile.gate_store import GateStore
from seer_compile.types import SiteInputs
from support.calibrate_planted import GATES, calibrate
from support.planted import PlantedModel, batches

SHORT = CalibrationConfig(
    steps=6, warmup_steps=2, learning_rate=1e-2, holdout_batches=1, checkpoint_every=2
)
TESTS = Path(__file__).resolve().parent.parent


def run_fit(data=None, *, store=None, config=SHORT, model=None, **options):
    """Calibrate a planted model; ``model`` is the module, ``fingerprint`` what identifies it."""
    store = store or GateStore(GATES)
    run = (model or PlantedModel()).run
    data = batches(8, 160) if data is None else data
    identity = options.pop("fingerprint", None)
    return store, fit(run, store, data, config, model=identity, progress=False, **options)


def state_of(store):
    return {key: value.clone() for key, value in store.state_dict().items()}


def assert_equal_states(one, other):
    assert set(one) == set(other)
    for key, value in one.items():
        assert torch.equal(value, other[key]), key


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def one_thread():
    """Compute on one thread: several wait for each other, busily, on a machine that is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_gates_learn_a_planted_pattern_and_beat_zero_shot_and_control():
    model, data = PlantedModel(), batches(42)
    frozen = [weight.detach().clone() for weight in model.parameters()]
    zero_shot = tabulate(model.run, GateStore(GATES), data[:2])
    config = CalibrationConfig(
        steps=70, warmup_steps=7, learning_rate=1e-2, holdout_batches=2, seed=1
    )
    start = time.process_time()
    store, report = run_fit(data, config=config, model=model, density=0.25, allocation="uniform")
    # Of the processor, not of the wall: other work on the machine must not decide.
    assert time.process_time() - start < 8
    for site in report.sites:
        untrained = zero_shot[site.name].gate.mass_at_density(384, 0.25)
        assert site.density == pytest.approx(0.25, abs=0.02)
        assert site.captured_mass > 0.9
        assert site.captured_mass > untrained + 0.3
        assert site.captured_mass > site.control_mass + 0.3
        assert site.captured_mass <= site.oracle_mass + 1e-3
        assert 0.85 < site.closed_gap <= 1.001
    assert report.losses[-1] < 0.3 * report.losses[0]
    assert store.is_calibrated
    assert all(int(gate.mode) == 1 for _, gate in store.items())
    for weight, before in zip(model.parameters(), frozen, strict=True):
        assert torch.equal(weight, before)
        assert weight.grad is None


def test_paper_configuration_trains_on_the_published_map():
    gates = dataclasses.replace(GateConfig.paper(density=0.5), gate_dim=32)
    config = dataclasses.replace(SHORT, steps=20, target="max", loss="mse")
    _, report = run_fit(batches(6, 500), store=GateStore(gates), config=config, density=0.5)
    assert report.losses[-1] < report.losses[0]
    assert report.sites[0].curve.selector == "fraction"


def test_same_seed_gives_the_same_bits_and_another_seed_other_bits():
    config = dataclasses.replace(SHORT, rows_per_step=8)
    first, report = run_fit(config=config)
    second, again = run_fit(config=config)
    assert_equal_states(state_of(first), state_of(second))
    assert report.to_json() == again.to_json()
    third, _ = run_fit(config=dataclasses.replace(config, seed=5))
    name = first.names()[0]
    assert not torch.equal(first.get(name).key_weight, third.get(name).key_weight)


def test_training_starts_afresh_whatever_the_store_held():
    store, _ = run_fit()
    first = state_of(store)
    run_fit(store=store)
    assert_equal_states(state_of(store), first)


def test_global_generators_are_left_alone():
    torch.manual_seed(3)
    random.seed(3)
    before = (torch.get_rng_state(), random.getstate())
    run_fit(config=dataclasses.replace(SHORT, rows_per_step=4))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()


def test_mixed_lengths_train_together_and_each_gets_a_curve():
    data = batches(8, 96, 400, 1)
    config = dataclasses.replace(SHORT, holdout_batches=2)
    store, report = run_fit(data, config=config)
    assert all(math.isfinite(loss) for loss in report.losses)
    assert report.sites[0].curve.lengths == (96, 400)
    budgets = store.get(report.sites[0].name).budget[0]
    assert budgets.unique().numel() > 1


def test_longer_lengths_can_be_measured_without_training_on_them():
    _, report = run_fit(batches(8, 96), curve_data=batches(1, 640, first=90))
    assert report.sites[0].curve.lengths == (96, 640)
    assert report.sites[0].length == 640


def test_padding_is_trained_around():
    data = [{**batch, "real": torch.tensor(100)} for batch in batches(8, 160)]
    _, report = run_fit(data)
    assert all(math.isfinite(loss) for loss in report.losses)


@pytest.mark.parametrize(
    ("targets", "value"), [({"mass": 0.9}, 0.9), ({}, 0.95)], ids=["given", "default"]
)
def test_mass_targets_are_met_on_held_out_data(targets, value):
    _, report = run_fit(batches(10), config=dataclasses.replace(SHORT, steps=30), **targets)
    for site in report.sites:
        assert site.captured_mass >= value - 5e-3
        assert site.density < 0.5


def test_error_target_is_met_on_held_out_data():
    _, report = run_fit(batches(6, 200), max_error=0.2)
    for site in report.sites:
        assert site.curve.value_at("errors", site.length, site.budget) <= 0.21


def test_equal_marginal_allocation_keeps_the_average():
    _, report = run_fit(batches(6, 300), density=0.4, allocation="equal_marginal")
    assert report.density == pytest.approx(0.4, abs=0.03)
    assert report.allocation == "equal_marginal"


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"density": 0.1, "mass": 0.9}, SeerInputError),
        ({"density": 1.5}, RangeError),
        ({"data": []}, CalibrationDataError),
        ({"data": batches(1)}, CalibrationDataError),
        ({"allocation": "greedy", "density": 0.5}, RangeError),
        ({"allocation": "searched", "density": 0.5}, SeerInputError),
        ({"allocation": "uniform", "mass": 0.5}, SeerInputError),
        ({"allocation": "uniform"}, SeerInputError),
        (
            {
                "allocation": "sensitivity",
                "density": 0.5,
                "config": dataclasses.replace(SHORT, sensitivity_batches=0),
            },
            SeerInputError,
        ),
        ({"curve_data": 5}, CalibrationDataError),
        ({"curve_data": [3]}, CalibrationDataError),
    ],
)
def test_impossible_requests_leave_the_store_as_it_was_and_train_nothing(
    options, error, monkeypatch
):
    store, _ = run_fit()
    before = state_of(store)
    monkeypatch.setattr(train, "_train", lambda *_, **__: pytest.fail("it trains"))
    with pytest.raises(error):
        run_fit(store=store, **options)
    assert_equal_states(state_of(store), before)


def test_a_target_out_of_reach_costs_no_training():
    store = GateStore(GATES)
    with pytest.raises(NotConvergedError, match=r"gates are trained and keep 0\.95"):
        run_fit(store=store, latency=0.01)
    expected, _ = run_fit()
    assert_equal_states(state_of(store), state_of(expected))
    assert all(gate.is_trained and gate.curve is not None for _, gate in store.items())


def test_non_finite_loss_names_site_step_and_sample_and_updates_nothing(tmp_path):
    data = batches(8, 160)
    data[3] = {**data[3], "poison": torch.tensor(1)}
    store, _ = run_fit()
    before = state_of(store)
    with pytest.raises(NonFiniteLossError) as caught:
        run_fit(data, store=store, checkpoint_dir=tmp_path)
    text = str(caught.value)
    assert "site=layers.1.attn" in text
    assert "step=2" in text
    assert "sample=training batch 2" in text
    assert "the key holds NaN or infinity" in text
    assert_equal_states(state_of(store), before)
    last = checkpoints.read_latest(tmp_path)
    assert last is not None
    assert last.step == 2
    assert all(tensor.isfinite().all() for tensor in last.tensors.values())


def test_data_that_reaches_no_site_is_refused():
    with pytest.raises(CalibrationDataError, match="no attention site"):
        fit(lambda batch, handler: None, GateStore(GATES), batches(4), SHORT, progress=False)


def test_iterator_that_ends_early_ends_the_training_and_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        _, report = run_fit(iter(batches(5, 96)))
    assert report.steps == 4
    assert "ended after 4 of 6 steps" in caplog.text


def test_gates_that_the_data_does_not_reach_stay_untrained():
    store = GateStore(GATES)
    other = store.get_or_create("elsewhere", heads=2, kv_heads=1, head_dim=8)
    _, report = run_fit(store=store, density=0.5)
    assert [site.name for site in report.sites] == ["layers.0.attn", "layers.1.attn"]
    assert not other.is_trained
    assert int(other.mode) == 0


def test_failure_forgets_what_new_gates_learned():
    data = batches(8, 160)
    data[5] = {**data[5], "poison": torch.tensor(0)}
    store = GateStore(GATES)
    with pytest.raises(NonFiniteLossError):
        run_fit(data, store=store)
    fresh = GateStore(GATES)
    for name, gate in store.items():
        twin = fresh.get_or_create(name, heads=2, kv_heads=1, head_dim=gate.head_dim)
        assert torch.equal(gate.query_weight, twin.query_weight)
        assert not gate.is_trained


def take(stream, number):
    return [next(stream) for _ in range(number)]


class TestDataStream:
    def test_batches_become_arguments(self):
        tokens = torch.arange(4)
        assert split_batch({"input_ids": tokens}) == ((), {"input_ids": tokens})
        assert split_batch((tokens, 2)) == ((tokens, 2), {})
        assert split_batch(tokens)[0][0].shape == (1, 4)
        assert split_batch(torch.ones(4))[0][0].shape == (4,)
        moved = split_batch({"x": [tokens]}, device="meta")[1]
        assert moved["x"][0].is_meta
        with pytest.raises(CalibrationDataError, match="str"):
            split_batch("text")

    def test_held_out_batches_never_come_back(self):
        data = batches(10)
        stream = BatchStream(data, holdout=2)
        held = [int(batch["seed"]) for batch in stream.holdout]
        seen = [int(batch["seed"]) for batch in take(stream, 20)]
        assert held == [0, 1]
        assert seen == [*range(2, 10), *range(2, 10), *range(2, 6)]

    def test_data_in_another_order_each_time_says_that_it_leaks(self):
        class Shuffled:
            def __init__(self):
                self.turn = 0

            def __iter__(self):
                self.turn += 1
                return iter(batches(4)[:: 1 if self.turn == 1 else -1])

        stream = BatchStream(Shuffled(), holdout=1)
        with pytest.warns(SeerWarning, match="fixed order") as caught:
            take(stream, 9)
        assert len(caught) == 1

    def test_what_is_no_batch_is_refused_where_it_comes(self):
        stream = BatchStream([*batches(3), None, *batches(2)], holdout=1)
        with pytest.raises(CalibrationDataError, match="NoneType"):
            take(stream, 9)
        assert stream.position == 2
        with pytest.raises(CalibrationDataError, match="data='int'"):
            BatchStream(3, holdout=1)

    @pytest.mark.parametrize(("count", "held"), [(2, 1), (4, 1), (8, 2), (15, 3), (16, 4)])
    def test_small_data_holds_out_a_quarter(self, count, held):
        assert len(BatchStream(batches(count), holdout=4).holdout) == held

    def test_seek_returns_to_a_cursor_and_refuses_other_data(self):
        data = batches(10)
        stream = BatchStream(data, holdout=2)
        take(stream, 11)
        again = BatchStream(data, holdout=2)
        again.seek(stream.cursor)
        assert int(next(again)["seed"]) == int(next(stream)["seed"])
        other = BatchStream([*data[:5], *reversed(data[5:])], holdout=2)
        with pytest.raises(ResumeMismatchError, match="not those"):
            other.seek(stream.cursor)


class TestResume:
    def interrupt_at(self, step, monkeypatch):
        """Raise in the middle of a step, after one of its two sites was updated."""
        update = site_trainer.GateTrainer._update

        def failing(trainer, gate, inputs: SiteInputs):
            if trainer.step == step and inputs.name == "layers.1.attn":
                raise KeyboardInterrupt
            return update(trainer, gate, inputs)

        monkeypatch.setattr(site_trainer.GateTrainer, "_update", failing)

    @pytest.mark.parametrize("step", [0, 1, 2, 3, 5])
    def test_resumed_run_equals_the_uninterrupted_one(self, tmp_path, monkeypatch, step):
        config = dataclasses.replace(SHORT, rows_per_step=6)
        data = batches(8, 160, 96)
        expected, report = run_fit(data, config=config, checkpoint_dir=tmp_path / "whole")
        self.interrupt_at(step, monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            run_fit(data, config=config, checkpoint_dir=tmp_path / "parts")
        monkeypatch.undo()
        store, resumed = run_fit(data, config=config, checkpoint_dir=tmp_path / "parts")
        assert_equal_states(state_of(store), state_of(expected))
        assert resumed == report
        assert bytes_of(tmp_path / "parts") == bytes_of(tmp_path / "whole")

    def test_a_fused_optimizer_goes_on_with_the_same_bits(self, tmp_path, monkeypatch):
        """On a GPU the optimizer is fused and keeps its step count beside the moments."""
        plain = torch.optim.AdamW
        with monkeypatch.context() as fusing:
            fusing.setattr(
                torch.optim,
                "AdamW",
                lambda *args, **options: plain(*args, **options | {"fused": True}),
            )
            expected, report = run_fit(checkpoint_dir=tmp_path / "whole")
            with monkeypatch.context() as patch:
                self.interrupt_at(3, patch)
                with pytest.raises(KeyboardInterrupt):
                    run_fit(checkpoint_dir=tmp_path / "parts")
            store, resumed = run_fit(checkpoint_dir=tmp_path / "parts")
        assert_equal_states(state_of(store), state_of(expected))
        assert resumed == report

    def test_finished_run_is_not_trained_again(self, tmp_path, monkeypatch):
        store, report = run_fit(checkpoint_dir=tmp_path)
        self.interrupt_at(0, monkeypatch)
        again, resumed = run_fit(checkpoint_dir=tmp_path)
        assert_equal_states(state_of(store), state_of(again))
        assert resumed == report

    @pytest.mark.parametrize(
        ("change", "field"),
        [
            ({"config": dataclasses.replace(SHORT, learning_rate=0.02)}, "learning_rate"),
            ({"config": dataclasses.replace(SHORT, steps=7)}, "steps"),
            ({"data": batches(8, 160, first=1)}, "data"),
            (
                {
                    "store": GateStore(
                        dataclasses.replace(GATES, query_sub_block=4, key_sub_block=4)
                    )
                },
                "sub_block",
            ),
            ({"fingerprint": {"architecture": "B"}}, "architecture"),
        ],
        ids=["rate", "steps", "data", "gates", "model"],
    )
    def test_another_calibration_is_refused_by_name(self, tmp_path, change, field):
        options = {"checkpoint_dir": tmp_path, "fingerprint": {"architecture": "A"}}
        run_fit(**options)
        before = bytes_of(tmp_path)
        with pytest.raises(ResumeMismatchError, match=field):
            run_fit(**{**options, **change})
        assert bytes_of(tmp_path) == before

    def test_changed_training_batches_are_refused(self, tmp_path):
        run_fit(checkpoint_dir=tmp_path)
        data = batches(8, 160)
        data[3] = batches(1, 160, first=77)[0]
        with pytest.raises(ResumeMismatchError, match="training batches"):
            run_fit(data, checkpoint_dir=tmp_path)

    def test_damaged_checkpoint_is_passed_over_for_the_one_before(self, tmp_path, caplog):
        expected, _ = run_fit(checkpoint_dir=tmp_path)
        newest = tmp_path / "step-000006.safetensors"
        data = bytearray(newest.read_bytes())
        data[-5] ^= 4
        newest.write_bytes(data)
        with caplog.at_level(logging.WARNING):
            store, _ = run_fit(checkpoint_dir=tmp_path)
        assert "unreadable checkpoint" in caplog.text
        assert_equal_states(state_of(store), state_of(expected))

    def test_only_damaged_checkpoints_raise(self, tmp_path):
        run_fit(checkpoint_dir=tmp_path)
        for path in tmp_path.iterdir():
            path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(GateFileError):
            run_fit(checkpoint_dir=tmp_path)

    def test_previous_checkpoint_outlives_a_failed_write(self, tmp_path, monkeypatch):
        replace, written = os.replace, []

        def full(source, target):
            written.append(target)
            if len(written) == 3:
                raise OSError(28, "No space left on device")
            replace(source, target)

        monkeypatch.setattr(os, "replace", full)
        with pytest.raises(CheckpointWriteError, match=r"(?s)step 6.*step-000004"):
            run_fit(checkpoint_dir=tmp_path)
        monkeypatch.undo()
        last = checkpoints.read_latest(tmp_path)
        assert last is not None
        assert last.step == 4
        assert sorted(bytes_of(tmp_path)) == ["step-000002.safetensors", "step-000004.safetensors"]

    @pytest.mark.parametrize("place", ["file", "file/below", "/proc/checkpoints"])
    def test_a_folder_that_cannot_be_written_is_refused_before_anything_runs(self, tmp_path, place):
        (tmp_path / "file").write_text("")

        def run(*_):
            raise AssertionError("the model ran")

        with pytest.raises(CheckpointWriteError, match=r"checkpoint_dir=.*folder that can be"):
            fit(
                run,
                GateStore(GATES),
                batches(8, 160),
                SHORT,
                checkpoint_dir=tmp_path / place,
                progress=False,
            )

    def test_a_folder_is_tried_without_a_trace(self, tmp_path):
        checkpoints.check_writable(tmp_path / "new")
        assert not bytes_of(tmp_path / "new")

    def test_two_checkpoints_are_kept(self, tmp_path):
        run_fit(checkpoint_dir=tmp_path)
        assert sorted(bytes_of(tmp_path)) == ["step-000004.safetensors", "step-000006.safetensors"]


class TestSignals:
    def test_interrupt_finishes_the_step_saves_and_restores_the_handlers(self, tmp_path):
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        model, calls = PlantedModel(), []

        def run(batch, handler):
            calls.append(batch)
            if len(calls) == 5:
                signal.raise_signal(signal.SIGINT)
            return model.run(batch, handler)

        config = dataclasses.replace(SHORT, checkpoint_every=100)
        with pytest.raises(KeyboardInterrupt):
            fit(
                run,
                GateStore(GATES),
                batches(8, 160),
                config,
                checkpoint_dir=tmp_path,
                progress=False,
            )
        last = checkpoints.read_latest(tmp_path)
        assert last is not None
        assert last.step == 4
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers

    def test_without_checkpoints_signals_are_not_touched(self):
        model, seen = PlantedModel(), []

        def run(batch, handler):
            seen.append(signal.getsignal(signal.SIGTERM))
            return model.run(batch, handler)

        before = signal.getsignal(signal.SIGTERM)
        fit(run, GateStore(GATES), batches(4, 96), SHORT, progress=False)
        assert set(seen) == {before}

    def test_training_in_a_thread_works(self, tmp_path):
        results = []
        thread = threading.Thread(
            target=lambda: results.append(run_fit(checkpoint_dir=tmp_path)[1].steps)
        )
        thread.start()
        thread.join()
        assert results == [6]


def spawn(out, folder):
    out.mkdir(exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "support.calibrate_planted", str(out), str(folder)],
        env=environment,
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    process.stderr.readline()
    return process


@pytest.mark.slow
@pytest.mark.parametrize(("number", "kills"), [(signal.SIGKILL, 2), (signal.SIGTERM, 1)])
def test_process_killed_at_random_moments_ends_with_the_same_bytes(tmp_path, number, kills):
    (tmp_path / "whole").mkdir()
    start_time = time.perf_counter()
    calibrate(tmp_path / "whole", tmp_path / "checkpoints-whole")
    duration = time.perf_counter() - start_time
    draw = random.Random(number)
    for _ in range(kills):
        process = spawn(tmp_path / "parts", tmp_path / "checkpoints")
        time.sleep(draw.uniform(0, duration))
        process.send_signal(number)
        process.communicate()
    process = spawn(tmp_path / "parts", tmp_path / "checkpoints")
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()
    assert bytes_of(tmp_path / "parts") == bytes_of(tmp_path / "whole")
    assert bytes_of(tmp_path / "checkpoints") == bytes_of(tmp_path / "checkpoints-whole")


class TestStart:
    def test_no_steps_measure_the_gates_as_they_are(self):
        store, report = run_fit()
        before = state_of(store)
        again = dataclasses.replace(SHORT, steps=0, start="current")
        _, measured = run_fit(store=store, config=again)
        for name, gate in store.items():
            assert gate.curve == dict(zip(store.names(), report.sites, strict=True))[name].curve
        assert_equal_states(before, state_of(store))
        assert measured.steps == 0

    def test_gates_go_on_from_what_they_hold(self):
        store, first = run_fit()
        _, more = run_fit(store=store, config=dataclasses.replace(SHORT, start="current"))
        assert more.losses[0] < 0.98 * first.losses[0]
        _, anew = run_fit(store=store)
        assert anew.losses == first.losses

    def test_unknown_start_is_refused(self):
        with pytest.raises(RangeError, match="start"):
            CalibrationConfig(start="anywhere")
