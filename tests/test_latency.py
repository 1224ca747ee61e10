"""Budgets in time: a share of dense attention's, by the prices of a device."""

import pytest
import torch

from seer_compile.budget_curve import BudgetCurve
from seer_compile.errors import NotConvergedError, RangeError, SeerInputError
from seer_compile.gate_store import GateStore
from seer_compile.kernels import cost_model as costs
from seer_compile.kernels.cost_model import CallSize, CostModel
from seer_compile.latency import density_for_time, relative_time

PRICES = CostModel(call=5, token=0.5, gate=2.0, kept=3.0, dense=2.0)
SIZE = CallSize(
    heads=8,
    kv_heads=2,
    head_dim=64,
    length=8192,
    gate_heads=8,
    query_sub_block=8,
    key_sub_block=8,
    gate_dim=64,
)
LENGTHS = (4096, 32768)


@pytest.fixture
def store(monkeypatch):
    monkeypatch.setitem(costs.TABLE, "cpu", PRICES)
    store = GateStore()
    for name, densities in (("sharp", (0.01, 0.03, 1.0)), ("spread", (0.02, 0.4, 1.0))):
        gate = store.get_or_create(name, heads=8, kv_heads=2, head_dim=64)
        gate.is_trained = True
        gate.curve = BudgetCurve(
            selector="top_p",
            lengths=LENGTHS,
            budgets=(0.1, 0.9, 1.0),
            densities=(densities,) * 2,
            captured_mass=((0.5, 0.9, 1.0),) * 2,
        )
    return store


def time_of(store, length):
    """Relative time of the budgets that the store holds."""
    shares = {}
    for name, gate in store.items():
        budget = float(gate.budget_at(length)[0])
        shares[name] = gate.curve.value_at("densities", length, budget)
    return relative_time(dict(store.items()), shares, length)


def test_time_is_the_sum_of_the_prices():
    pairs, products = 8 * 1024**2 * 64 / 1e9, 2 * 8 * 8192**2 * 64 / 1e9
    assert PRICES.dense_time(SIZE) == pytest.approx(2 * products)
    tokens = 8192 * 10 * 64 / 1e6
    expected = 5 + 0.5 * tokens + 2 * pairs + 3 * 0.2 * products
    assert PRICES.sparse_time(SIZE, 0.2) == pytest.approx(expected)


@pytest.mark.parametrize("latency", [0.3, 0.5, 0.9])
def test_the_asked_time_is_taken_at_every_measured_length(store, latency):
    store.set_budget(latency=latency)
    for length in LENGTHS:
        assert time_of(store, length) == pytest.approx(latency, rel=0.02)


def test_longer_inputs_may_keep_more_for_the_same_share_of_the_time(store):
    store.set_budget(latency=0.4)
    gate = store.get("spread")
    kept = [
        gate.curve.value_at("densities", length, float(gate.budget_at(length)[0]))
        for length in LENGTHS
    ]
    assert kept[1] > kept[0]


def test_all_of_the_time_is_dense_attention(store):
    store.set_budget(latency=1.0)
    assert all(bool((gate.budget == 1).all()) for _, gate in store.items())
    gates = dict(store.items())
    assert relative_time(gates, dict.fromkeys(gates, 1.0), 4096) == 1


def test_what_no_selection_reaches_is_refused_at_the_longest_length_only(store):
    with pytest.raises(NotConvergedError, match="32,768 tokens"):
        store.set_budget(latency=0.01)
    # At 128 tokens the call alone takes longer than dense attention; at 2,048 the least is kept.
    store.set_budget(latency=0.3)
    gate = store.get("spread")
    assert float(gate.budget_at(128)[0]) == 1
    assert float(gate.budget_at(2048)[0]) == pytest.approx(0.1)


def test_a_time_is_shared_by_an_allocation(store):
    store.set_budget(latency=0.4, allocation="equal_budget")
    sharp, spread = (float(gate.budget_at(4096)[0]) for _, gate in store.items())
    assert sharp == pytest.approx(spread, abs=0.01)
    with pytest.raises(RangeError):
        store.set_budget(latency=1.5)
    with pytest.raises(SeerInputError, match="exactly one"):
        store.set_budget(latency=0.5, density=0.1)


def test_density_for_a_time_is_the_largest_that_is_fast_enough():
    found = density_for_time(0.5, lambda d: 0.1 + d, must_reach=True, length=1)
    assert 0.1 + found <= 0.5
    assert found == pytest.approx(0.4, rel=1e-3)


def test_every_device_has_prices():
    assert {"cpu", "cuda"} <= set(costs.TABLE)
    assert all(min(prices) >= 0 and prices.dense > 0 for prices in costs.TABLE.values())
    assert costs.cost_model(torch.device("cpu")) is costs.TABLE["cpu"]
