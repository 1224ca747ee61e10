"""Shares of sites are searched with all of them sparse, and kept with the gates."""

from types import SimpleNamespace

import pytest

from seer_compile.allocation import allocate, choose_allocation, with_mean
from seer_compile.calibration.budget import tabulate
from seer_compile.calibration.search import SparseSites, search_shares
from seer_compile.calibration.sensitivity import DenseOutput, OneSparseSite
from seer_compile.calibration.train import fit
from seer_compile.config import CalibrationConfig
from seer_compile.errors import ModelStateError, SeerInputError
from seer_compile.gate_store import GateStore
from seer_compile.shares import ShareTable
from support.calibrate_planted import GATES
from support.planted import PlantedModel, batches

SITES = ("layers.0.attn", "layers.1.attn")
DATA = batches(2, 300)


def run(batch, handler):
    """Two sites; the output of the first hardly enters."""
    first, second = PlantedModel().run(batch, handler)
    return SimpleNamespace(logits=0.05 * first + second)


@pytest.fixture(scope="module")
def store():
    store = GateStore(GATES)
    for name, table in tabulate(run, store, DATA).items():
        gate = store.get(name)
        gate.curve, gate.is_trained = table.gate, True
    return store


def divergence(store, shares):
    dense = DenseOutput(run(DATA[0], OneSparseSite(store, None, 1.0)))
    return dense.divergence(run(DATA[0], SparseSites(store, shares)))


def test_blocks_go_to_the_site_that_matters(store):
    tables = search_shares(run, store, DATA, evaluations=12, densities=(0.4,))
    light, heavy = (tables[name].at(300, 0.4) for name in SITES)
    assert light < 0.3
    assert heavy > 0.5
    assert (light + heavy) / 2 == pytest.approx(0.4, abs=1e-6)
    found = divergence(store, dict(zip(SITES, (light, heavy), strict=True)))
    assert found < 0.97 * divergence(store, dict.fromkeys(SITES, 0.4))


def test_so_many_forwards_are_made_as_asked_for(store):
    forwards = []

    def counted(batch, handler):
        forwards.append(batch)
        return run(batch, handler)

    search_shares(counted, store, DATA, evaluations=5, densities=(0.3, 0.5))
    assert len(forwards) <= len(DATA) + 2 * 5
    assert search_shares(counted, store, DATA, evaluations=0) == {}


def test_shares_are_the_default_and_travel_with_the_gates():
    store = GateStore(GATES)
    config = CalibrationConfig(steps=2, holdout_batches=1, search_evaluations=4)
    report = fit(run, store, batches(4, 300), config, density=0.4, progress=False)
    assert report.allocation == "searched"
    other = GateStore()
    other.load_state_dict(store.state_dict())
    for name, gate in other.items():
        assert gate.shares == store.get(name).shares is not None
        expected = gate.curve.budget_for(300, density=gate.shares.at(300, 0.4))
        store.set_budget(density=0.4)
        assert float(store.get(name).budget_at(300)[0]) == pytest.approx(expected, rel=0.05)
    store.set_budget(density=0.4, allocation="uniform")


class TestTable:
    TABLE = ShareTable(lengths=(1024, 4096), asked=(0.1, 0.4), shares=((0.05, 0.3), (0.2, 0.5)))

    def test_what_was_searched_is_given_back(self):
        assert self.TABLE.at(1024, 0.1) == pytest.approx(0.05)
        assert self.TABLE.at(4096, 0.4) == pytest.approx(0.5)
        assert ShareTable.from_json(self.TABLE.to_json()) == self.TABLE

    def test_between_and_beyond(self):
        assert self.TABLE.at(2048, 0.1) == pytest.approx((0.05 * 0.2) ** 0.5)
        assert self.TABLE.at(1024, 0.2) == pytest.approx((0.05 * 0.3) ** 0.5)
        assert self.TABLE.at(64, 0.05) == pytest.approx(0.025)
        assert self.TABLE.at(10**6, 1.0) == pytest.approx(1.0)

    @pytest.mark.parametrize(
        "change",
        [{"asked": (0.4, 0.1)}, {"lengths": ()}, {"shares": ((0.1, 0.2),)}, {"asked": "x"}],
    )
    def test_what_is_no_table_is_refused(self, change):
        with pytest.raises(SeerInputError):
            ShareTable.from_json(self.TABLE.to_json() | change)


class TestMean:
    def test_is_reached_within_bounds(self):
        found = with_mean({"a": 0.5, "b": 0.01, "c": 0.2}, 0.5)
        assert sum(found.values()) == pytest.approx(1.5)
        assert max(found.values()) <= 1
        floors = {"b": 0.1}
        found = with_mean({"a": 0.5, "b": 0.01, "c": 0.2}, 0.1, least=floors)
        assert sum(found.values()) == pytest.approx(0.3)
        assert found["b"] == pytest.approx(0.1)

    def test_a_fixed_site_stays_where_the_others_can_make_up_for_it(self):
        shares = {"a": 0.3, "b": 0.1, "c": 0.1}
        assert with_mean(shares, 0.2, fixed="a")["a"] == pytest.approx(0.3)
        assert with_mean({**shares, "a": 0.9}, 0.2, fixed="a")["a"] < 0.7
        assert sum(with_mean({**shares, "a": 0.9}, 0.2, fixed="a").values()) == pytest.approx(0.6)


def test_a_search_that_was_not_made_is_not_made_up(store):
    curves = {name: gate.curve for name, gate in store.items()}
    with pytest.raises(ModelStateError, match="search"):
        allocate(curves, 0.1, length=300, allocation="searched")
    some = ShareTable(lengths=(300,), asked=(0.1,), shares=((0.1,),))
    none = dict.fromkeys(SITES)
    assert choose_allocation(None, none, {SITES[0]: some, SITES[1]: None}) == "uniform"
    assert choose_allocation(None, none, dict.fromkeys(SITES, some)) == "searched"
