"""Sites that look single tokens up get small sub-blocks, and the others pay for them."""

import copy
import dataclasses
import gc
import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import seer_compile
from seer_compile.calibration import resolution
from seer_compile.calibration.resolution import LEAST_GAIN, Resolution, choose_resolutions
from seer_compile.calibration.resolution import cheapest_divergence as choose
from seer_compile.calibration.train import fit
from seer_compile.config import GateConfig
from seer_compile.errors import CalibrationDataError, GateMismatchError, RangeError
from seer_compile.gate import AttnGate
from seer_compile.gate_store import GateStore
from seer_compile.session import find_session
from seer_compile.types import SiteInputs, Visibility
from support.lookups import DIM, GATES, LOOKUP, NAMES, TRAINING, Lookups, data

USUAL, FINE, COARSE = (4, 4), (2, 2), (8, 8)


def sub_blocks(store):
    return {name: gate.config.sub_blocks for name, gate in store.items()}


def chosen_sizes():
    changed = choose_resolutions(Lookups(), GateStore(GATES), data()[:1])
    return {name: changed.get(name, USUAL) for name in NAMES}


@pytest.fixture(autouse=True)
def _any_size_is_worth_it(monkeypatch, request):
    # Calls as small as these are not worth a gate at all.
    if "would_be_slower" not in request.node.name:
        monkeypatch.setattr(resolution, "_is_worth_it", lambda *_: True)


class TestChoice:
    def test_the_site_that_looks_up_is_fine_and_others_pay(self):
        run, store = Lookups(), GateStore(GATES)
        changed = choose_resolutions(run, store, data()[:1])
        assert changed[LOOKUP] == FINE
        # Half of both is four times the pairs, twice a quarter: four others pay.
        assert changed == dict.fromkeys(NAMES, COARSE) | {LOOKUP: FINE}
        assert run.forwards == 1 + 3 * 5
        assert not store.names()

    def test_gates_in_use_are_left_alone(self):
        store = GateStore(GATES)
        gate = store.get_or_create(LOOKUP, heads=1, kv_heads=1, head_dim=DIM)
        with torch.no_grad():
            gate.query_weight.mul_(-3)
        before = {key: value.clone() for key, value in store.state_dict().items()}
        assert choose_resolutions(Lookups(), store, data()[:1])[LOOKUP] == FINE
        assert store.names() == (LOOKUP,)
        assert all(torch.equal(before[key], value) for key, value in store.state_dict().items())

    def test_sub_blocks_stay_within_blocks(self):
        store = GateStore(GATES.with_sub_blocks(1, 16))
        changed = choose_resolutions(Lookups(), store, data()[:1])
        assert set(changed.values()) <= {(1, 8), (2, 16)}

    def test_the_largest_batch_is_measured(self):
        class Lengths(Lookups):
            def __call__(self, batch, handler):
                def part(inputs):
                    if type(handler).__name__ != "_Sites":
                        measured.add(tokens)
                    parts = {
                        side: getattr(inputs, side)[..., :tokens, :]
                        for side in ("query", "key", "value")
                    }
                    return handler(dataclasses.replace(inputs, **parts))

                tokens = int(batch["tokens"])
                return super().__call__(batch, part) if tokens else None

        measured = set()
        batches = [
            {"seed": torch.tensor(0), "tokens": torch.tensor(tokens)}
            for tokens in (0, 64, 256, 128)
        ]
        choose_resolutions(Lengths(), GateStore(GATES), batches)
        assert measured == {256}

    def test_a_site_that_would_be_slower_than_dense_is_not_refined(self):
        # By the prices of this device so small a call is: nothing can be finer, and none pays.
        assert choose_resolutions(Lookups(), GateStore(GATES), data()[:1]) == {}
        wide = AttnGate(32, 8, 128, config=GateConfig())
        assert resolution._is_worth_it(wide, (32768, 32768))
        narrow = AttnGate(8, 8, 64, config=GateConfig(query_sub_block=1, key_sub_block=1))
        assert not resolution._is_worth_it(narrow, (32768, 32768))

    def test_outputs_that_are_not_finite_are_refused(self):
        def broken(batch, handler):
            return Lookups()(batch, handler) * float("nan")

        with pytest.raises(CalibrationDataError, match="not finite"):
            choose_resolutions(broken, GateStore(GATES), data())

    def test_no_batch_and_no_site_choose_nothing(self):
        assert choose_resolutions(Lookups(), GateStore(GATES), []) == {}
        assert choose_resolutions(lambda *_: None, GateStore(GATES), data()) == {}


def options(draws):
    """Return a site's resolutions: a divergence each for four times, as many, a quarter pairs."""
    pairs = (64.0, 16.0, 4.0)
    sizes = (FINE, USUAL, COARSE)
    return [Resolution(*parts) for parts in zip(sizes, pairs, draws, strict=True)]


DIVERGENCES = st.tuples(*[st.floats(0, 1)] * 3)


class TestPrices:
    @settings(max_examples=200, deadline=None)
    @given(st.lists(DIVERGENCES, min_size=1, max_size=6))
    def test_nothing_within_the_limit_is_better(self, draws):
        found = {str(place): options(draw) for place, draw in enumerate(draws)}
        chosen = choose(found, USUAL)
        kinds = tuple((FINE, USUAL, COARSE).index(option.sub_blocks) for option in chosen.values())
        # A coarser site counts as no better than the usual one.
        rows = [(part[0], part[1], max(part[2], part[1])) for part in draws]
        values = {
            other: sum(row[kind] for row, kind in zip(rows, other, strict=True))
            for other in itertools.product(range(3), repeat=len(rows))
            if sum((64, 16, 4)[kind] for kind in other) <= 16 * len(rows)
        }
        usual, best = (1,) * len(rows), min(values.values())
        if kinds == usual:
            assert best >= (1 - LEAST_GAIN) * values[usual] - 1e-9
            return
        assert values[kinds] == pytest.approx(best)
        assert values[kinds] < (1 - LEAST_GAIN) * values[usual]

    def test_little_gain_changes_nothing(self):
        site = options((0.99, 1.0, 1.0))
        assert set(choose(dict.fromkeys("abcdef", site), USUAL).values()) == {site[1]}

    def test_what_looks_better_when_coarse_is_chance(self):
        site = options((1.0, 1.0, 0.1))
        assert set(choose(dict.fromkeys("abcdef", site), USUAL).values()) == {site[1]}

    def test_sites_are_coarser_only_to_pay(self):
        found = {name: options((1.0, 1.0, 1.0)) for name in "abcdef"} | {
            "g": options((0.1, 1.0, 1.0))
        }
        sizes = [option.sub_blocks for option in choose(found, USUAL).values()]
        # Three more than the usual pairs, at three quarters each.
        assert sizes.count(FINE) == 1
        assert sizes.count(COARSE) == 4

    def test_a_single_site_has_nobody_to_pay_for_it(self):
        site = options((0.0, 1.0, 1.0))
        assert choose({"a": site}, USUAL) == {"a": site[1]}


class TestCalibration:
    def fit(self, store, config=TRAINING, run=None, **changes):
        return fit(run or Lookups(), store, data(), config, progress=False, density=0.2, **changes)

    def test_sites_are_trained_and_reported_at_their_own_resolution(self):
        store = GateStore(GATES)
        report = self.fit(store)
        assert sub_blocks(store) == chosen_sizes()
        assert {site.name: site.sub_blocks for site in report.sites} == chosen_sizes()
        assert " 2,2 " in str(report)
        assert json.loads(report.to_json())["sites"][2]["sub_blocks"] == list(FINE)

    @pytest.mark.parametrize(
        ("gates", "training"),
        [
            (dataclasses.replace(GATES, resolution="uniform"), TRAINING),
            (GATES, dataclasses.replace(TRAINING, sensitivity_batches=0)),
        ],
    )
    def test_uniform_gates_are_left_alone(self, gates, training):
        store = GateStore(gates)
        self.fit(store)
        store.config = gates
        self.fit(store, training)
        assert set(sub_blocks(store).values()) == {USUAL}

    def test_gates_that_no_batch_reaches_keep_theirs(self):
        store = GateStore(GATES)
        store.get_or_create("elsewhere", heads=1, kv_heads=1, head_dim=DIM)
        gate = store.at_sub_blocks("elsewhere", *FINE)
        gate.is_trained = True
        self.fit(store)
        assert store.get("elsewhere") is gate
        assert gate.config.sub_blocks == FINE
        gates = dict(store.items())
        gates.pop("elsewhere")
        assert {name: gate.config.sub_blocks for name, gate in gates.items()} == chosen_sizes()

    def test_sites_that_are_met_later_have_the_usual_ones(self):
        class Later(Lookups):
            def __call__(self, batch, handler):
                total = super().__call__(batch, handler)
                if int(batch["seed"]) == 2:
                    total = total + handler(self.site("later", 99, looks_up=True))
                return total

        store = GateStore(GATES)
        store.get_or_create("later", heads=1, kv_heads=1, head_dim=DIM, scale=DIM**-0.5)
        store.at_sub_blocks("later", *FINE)
        self.fit(store, run=Later())
        assert sub_blocks(store)["later"] == USUAL

    def test_going_on_keeps_what_was_chosen(self):
        store = GateStore(GATES)
        self.fit(store)
        run = Lookups()
        self.fit(store, dataclasses.replace(TRAINING, start="current"), run)
        assert sub_blocks(store) == chosen_sizes()
        again = Lookups()
        self.fit(store, run=again)
        assert again.forwards == run.forwards + 1 + 3 * 5

    def test_an_interrupted_run_goes_on_with_what_was_chosen(self, tmp_path):
        class Stopped(Exception):
            pass

        def until(steps):
            model, begun = Lookups(), []

            def run(batch, handler):
                if type(handler).__name__ == "GateTrainer":
                    begun.append(1)
                    if len(begun) > steps:
                        raise Stopped
                return model(batch, handler)

            return run, model

        with pytest.raises(Stopped):
            self.fit(GateStore(GATES), run=until(1)[0], checkpoint_dir=tmp_path)
        store, whole = GateStore(GATES), GateStore(GATES)
        run, model = until(9)
        self.fit(store, run=run, checkpoint_dir=tmp_path)
        expected = Lookups()
        self.fit(whole, run=expected)
        # One step and the choice less.
        assert model.forwards == expected.forwards - 1 - (1 + 3 * 5)
        assert sub_blocks(store) == sub_blocks(whole) == chosen_sizes()
        for (_, one), (_, other) in zip(store.items(), whole.items(), strict=True):
            assert torch.equal(one.query_weight, other.query_weight)
            assert torch.equal(one.budget, other.budget)

    def test_an_error_leaves_resolutions_as_they_were(self):
        store = GateStore(dataclasses.replace(GATES, resolution="uniform"))
        self.fit(store)
        store.config = GATES

        def run(batch, handler):
            if type(handler).__name__ == "GateTrainer":
                raise RuntimeError("stopped")
            return Lookups()(batch, handler)

        with pytest.raises(RuntimeError, match="stopped"):
            self.fit(store, run=run)
        assert set(sub_blocks(store).values()) == {USUAL}


class TestReplacing:
    def test_what_is_replaced_answers_densely_and_watchers_are_told(self):
        class Watcher:
            calls = 0

            def note(self):
                self.calls += 1

        store, watcher, gone = GateStore(GATES), Watcher(), Watcher()
        old = store.get_or_create("site", heads=1, kv_heads=1, head_dim=DIM)
        store.set_mode(True, untrained=True)
        store.watch(watcher.note)
        store.watch(gone.note)
        del gone
        assert store.at_sub_blocks("site", *USUAL) is old
        store.set_mode(True)
        assert watcher.calls == 0
        new = store.at_sub_blocks("site", *FINE)
        assert (int(old.mode), int(new.mode)) == (0, 1)
        assert new.config == GATES.with_sub_blocks(*FINE)
        assert torch.equal(new.query_weight, old.query_weight)
        store.set_mode(True)
        store.set_mode(True)
        assert watcher.calls == 1
        copied = copy.deepcopy(store)
        copied.at_sub_blocks("site", *COARSE)
        copied.set_mode(True)
        assert watcher.calls == 1
        with pytest.raises(RangeError):
            store.at_sub_blocks("site", 32, 4)
        with pytest.raises(KeyError):
            store.at_sub_blocks("nowhere", *FINE)

    @pytest.mark.parametrize("is_gone", [False, True])
    def test_a_model_that_was_restored_stays_so(self, is_gone):
        model, x = Attention(), torch.randn(1, 256, DIM)
        seer_compile.optimize(model, config=GATES, inner="eager", zero_shot=True)
        with torch.no_grad():
            model(x)
        # Somebody may hold both for longer than the model is optimized, or lives.
        store, session = model.seer_gates, find_session(model)
        assert session is not None
        seer_compile.restore(model)
        before = dict(model.__dict__)
        if is_gone:
            del model, before
            gc.collect()
        store.at_sub_blocks(store.names()[0], *FINE)
        store.set_mode(True)
        assert is_gone or model.__dict__ == before

    def test_a_model_that_was_called_follows_a_state_dict(self):
        model, x = Attention(), torch.randn(1, 256, DIM)
        seer_compile.optimize(model, config=GATES, inner="eager", zero_shot=True)
        with torch.no_grad():
            model(x)
        other = GateStore(GATES)
        for name, gate in model.seer_gates.items():
            other.get_or_create(name, heads=1, kv_heads=1, head_dim=DIM, scale=gate.scale)
            other.at_sub_blocks(name, *FINE)
        with torch.no_grad():
            for _, gate in other.items():
                gate.budget.fill_(0.3)
        other.write_metadata()
        model.seer_gates.load_state_dict(other.state_dict())
        model.seer_gates.set_mode(True, at_any_size=True)
        used = []
        with torch.no_grad():
            torch.testing.assert_close(model(x), _by_the_gates(model, x, used))
            assert not torch.allclose(model(x), Attention()(x), atol=1e-3)
        assert used == [FINE] * 6


class TestStorage:
    def store(self):
        store = GateStore(GATES)
        for name in NAMES:
            store.get_or_create(name, heads=1, kv_heads=1, head_dim=DIM)
            store.at_sub_blocks(name, *(FINE if name == LOOKUP else COARSE))
        store.at_sub_blocks(NAMES[0], *USUAL)
        store.write_metadata()
        return store

    def test_a_state_dict_brings_resolutions(self):
        store, other = self.store(), GateStore()
        other.load_state_dict(store.state_dict())
        assert sub_blocks(other) == sub_blocks(store)
        assert set(sub_blocks(other).values()) == {FINE, USUAL, COARSE}

    def test_gates_of_another_resolution_are_new_objects(self):
        store, other = self.store(), GateStore(GATES)
        for name, gate in store.items():
            other.get_or_create(name, heads=1, kv_heads=1, head_dim=DIM, scale=gate.scale)
        before = dict(other.items())
        other.rebuild(store.describe(), "cpu")
        for name, gate in other.items():
            assert (gate is before[name]) == (gate.config.sub_blocks == USUAL)

    def test_descriptions_from_before_have_one_resolution(self):
        description = self.store().describe()
        description["version"] = 1
        del description["config"]["resolution"]
        for entry in description["gates"]:
            del entry["sub_blocks"]
        store = GateStore()
        store.rebuild(description, "cpu")
        assert set(sub_blocks(store).values()) == {USUAL}
        assert store.config == dataclasses.replace(GATES, resolution="uniform")

    @pytest.mark.parametrize("sizes", [[3, 4], [4], "ab", [32, 4], [0, 4]])
    def test_sizes_that_fit_no_block_are_refused(self, sizes):
        description = self.store().describe()
        description["gates"][0]["sub_blocks"] = sizes
        store = GateStore()
        with pytest.raises((GateMismatchError, RangeError)):
            store.rebuild(description, "cpu")
        assert not store.names()


class Attention(nn.Module):
    """Six sites over one random projection each; small enough to compile in a test."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.projections = nn.ModuleList(nn.Linear(DIM, 3 * DIM) for _ in range(6))

    def forward(self, x):
        for projection in self.projections:
            query, key, value = projection(x)[:, None].chunk(3, -1)
            y = nn.functional.scaled_dot_product_attention(8 * query, key, value, is_causal=True)
            x = x + y[:, 0]
        return x


def test_a_compiled_model_answers_at_the_chosen_resolutions(tmp_path, monkeypatch):
    # Chosen by hand: what is to be seen is that compiled calls follow.
    def by_hand(run, store, batches, *, progress=False):
        sizes = (FINE, USUAL, COARSE) * 2
        return {
            name: size for name, size in zip(store.names(), sizes, strict=True) if size != USUAL
        }

    monkeypatch.setattr("seer_compile.calibration.train.choose_resolutions", by_hand)
    model, batches = Attention(), [torch.randn(1, 256, DIM) for _ in range(3)]
    seer_compile.optimize(model, config=GATES, inner="eager", zero_shot=True)
    with torch.no_grad():
        model(batches[0])
    seer_compile.calibrate(model, batches, config=TRAINING, density=0.3, progress=False)
    model.seer_gates.set_mode(True, at_any_size=True)
    assert [gate.config.sub_blocks for _, gate in model.seer_gates.items()] == [
        FINE,
        USUAL,
        COARSE,
    ] * 2
    seer_compile.save_gates(model, tmp_path / "gates.safetensors")
    other = Attention()
    seer_compile.optimize(other, gates=tmp_path / "gates.safetensors", inner="eager")
    other.seer_gates.set_mode(True, at_any_size=True)
    used = []
    with torch.no_grad():
        expected = _by_the_gates(model, batches[0], used)
        assert used == [FINE, USUAL, COARSE] * 2
        torch.testing.assert_close(model(batches[0]), expected)
        torch.testing.assert_close(other(batches[0]), expected)


def _by_the_gates(model, x, used):
    """Return the model's answer with every site answered by its gate, outside of any graph."""
    for projection, (_, gate) in zip(model.projections, model.seer_gates.items(), strict=True):
        query, key, value = nn.functional.linear(x, projection.weight, projection.bias)[
            :, None
        ].chunk(3, -1)
        used.append(gate.config.sub_blocks)
        inputs = SiteInputs(
            name="site",
            query=8 * query,
            key=key,
            value=value,
            scale=DIM**-0.5,
            visibility=Visibility(upper=0),
        )
        x = x + gate.attend(inputs)[:, 0]
    return x
