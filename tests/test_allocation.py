"""Sites share an average density: whoever needs blocks most gets them."""

import itertools
import math

import numpy as np
import pytest
import torch

from seer_compile.allocation import ALLOCATIONS, allocate, choose_allocation
from seer_compile.budget_curve import BudgetCurve
from seer_compile.errors import (
    DensityNotReachedWarning,
    ModelStateError,
    RangeError,
    SeerInputError,
)
from seer_compile.gate_store import GateStore
from seer_compile.sensitivity import SensitivityCurve
from seer_compile.shares import ShareTable


def curve(masses, densities=(0.02, 0.2, 1.0), budgets=(0.5, 0.9, 1.0)):
    return BudgetCurve(
        selector="top_p",
        lengths=(2048,),
        budgets=budgets,
        densities=(densities,),
        captured_mass=(masses,),
    )


def sensitivity(divergences, densities=(0.02, 0.05, 0.1, 0.2, 0.5), lengths=(2048,)):
    return SensitivityCurve(
        lengths=lengths,
        densities=(densities,) * len(lengths),
        divergences=(tuple(divergences),) * len(lengths),
    )


def curves_of_two_lengths(*names):
    """Return curves of sites whose least density halves as the length doubles."""
    return {
        name: BudgetCurve(
            selector="top_p",
            lengths=(4096, 8192),
            budgets=(0.5, 0.9, 1.0),
            densities=((0.09, 0.4, 1.0), (0.045, 0.3, 1.0)),
            captured_mass=((0.6, 0.92, 1.0), (0.55, 0.9, 1.0)),
        )
        for name in names
    }


CURVES = {
    "easy": curve((0.97, 0.99, 1.0)),
    "hard": curve((0.2, 0.6, 1.0)),
    "convex": curve((0.1, 0.12, 1.0)),
}
SENSITIVITIES = {
    "easy": sensitivity((1e-6, 1e-7, 0.0, 0.0, 0.0)),
    "hard": sensitivity((0.9, 0.4, 0.15, 0.05, 0.01)),
    "convex": sensitivity((0.05, 0.03, 0.02, 0.01, 0.001)),
}

NOT_SEARCHED = [allocation for allocation in ALLOCATIONS if allocation != "searched"]


def captured(shares):
    return sum(CURVES[name].mass_at_density(2048, d) for name, d in shares.items())


def divergence(shares):
    return sum(float(SENSITIVITIES[name].at(2048, [d])[0]) for name, d in shares.items())


@pytest.mark.parametrize("density", [0.06, 0.1, 0.3, 0.7, 1.0])
@pytest.mark.parametrize(
    "allocation", [a for a in ALLOCATIONS if a not in ("equal_budget", "searched")]
)
def test_the_average_is_kept(allocation, density):
    shares = allocate(
        CURVES, density, length=2048, allocation=allocation, sensitivities=SENSITIVITIES
    )
    assert sum(shares.values()) / 3 == pytest.approx(density)
    assert all(0 < share <= 1 + 1e-12 for share in shares.values())


@pytest.mark.parametrize("allocation", NOT_SEARCHED)
@pytest.mark.parametrize("names", [["hard"], ["easy", "hard"], [*CURVES]])
def test_every_site_gets_all_blocks_where_all_are_asked_for(allocation, names):
    curves, known = ({n: part[n] for n in names} for part in (CURVES, SENSITIVITIES))
    shares = allocate(curves, 1.0, length=2048, allocation=allocation, sensitivities=known)
    # A share that rounding left below 1 buys a budget below 1 where the curve is flat.
    assert shares == dict.fromkeys(names, 1.0)


@pytest.mark.parametrize("allocation", ["sensitivity", "equal_marginal"])
def test_blocks_that_a_budget_cannot_give_go_to_sites_that_can_use_them(allocation):
    # Nearly all mass of the sharp site sits in few blocks: its last budgets are 1 - 1e-14 and 1.
    tail = {"densities": (0.02, 0.1, 1.0), "budgets": (0.9, 1 - 1e-14, 1.0)}
    curves = {"sharp": curve((0.9, 0.99, 1.0), **tail), "hard": curve((0.5, 0.7, 1.0))}
    sensitivities = {
        "sharp": sensitivity((0.5, 0.4, 0.3, 0.2, 0.1)),
        "hard": sensitivity((0.5, 0.3, 0.1, 0.01, 0.001)),
    }
    shares = allocate(curves, 0.25, length=2048, allocation=allocation, sensitivities=sensitivities)
    assert curves["sharp"].reachable_density(2048) == 0.1
    assert curves["hard"].reachable_density(2048) == 1.0
    assert shares["sharp"] <= 0.1 + 1e-12
    assert sum(shares.values()) / 2 == pytest.approx(0.25)


class TestEqualMarginal:
    @pytest.mark.parametrize("density", [0.06, 0.1, 0.3, 0.7, 1.0])
    def test_no_less_is_captured_than_by_equal_shares(self, density):
        shared = allocate(CURVES, density, length=2048, allocation="equal_marginal")
        assert captured(shared) >= captured(dict.fromkeys(CURVES, density)) - 1e-9

    def test_it_is_the_best_of_a_fine_search(self):
        pair = {name: CURVES[name] for name in ("easy", "hard")}
        shared = allocate(pair, 0.15, length=2048, allocation="equal_marginal")
        best = max(
            captured({"easy": easy, "hard": hard})
            for easy, hard in itertools.product(torch.linspace(0.05, 0.3, 126).tolist(), repeat=2)
            if easy + hard <= 0.3 + 1e-9
        )
        assert captured(shared) >= best - 1e-6


class TestSensitivity:
    @pytest.mark.parametrize("density", [0.03, 0.1, 0.2, 0.4])
    def test_the_output_suffers_no_more_than_by_equal_shares(self, density):
        shared = allocate(
            CURVES, density, length=2048, allocation="sensitivity", sensitivities=SENSITIVITIES
        )
        assert divergence(shared) <= divergence(dict.fromkeys(CURVES, density)) + 1e-12

    def test_it_is_the_best_of_a_fine_search(self):
        shared = allocate(CURVES, 0.1, length=2048, sensitivities=SENSITIVITIES)
        grid = np.geomspace(0.02, 0.26, 60)
        best = min(
            divergence(dict(zip(CURVES, shares, strict=True)))
            for shares in itertools.product(grid, repeat=3)
            if sum(shares) <= 0.3 + 1e-9
        )
        assert divergence(shared) <= best * 1.02
        assert shared["easy"] < shared["convex"] < shared["hard"]

    def test_a_site_that_moves_nothing_gets_what_every_selection_keeps(self):
        shared = allocate(CURVES, 0.1, length=2048, sensitivities=SENSITIVITIES)
        assert shared["easy"] < 0.05

    def test_lengths_in_between_lie_in_between(self):
        both = SensitivityCurve(
            lengths=(1024, 4096),
            densities=((0.1, 0.5), (0.1, 0.5)),
            divergences=((0.4, 0.1), (0.1, 0.025)),
        )
        (low,), (middle,), (high,) = (both.at(length, [0.2]) for length in (4096, 2048, 1024))
        assert middle == pytest.approx((low * high) ** 0.5, rel=1e-6)
        assert both.at(64, [0.1])[0] == pytest.approx(0.4)
        assert both.at(10**6, [0.5])[0] == pytest.approx(0.025)
        assert both.at(2048, [1.0])[0] == 0

    def test_more_blocks_never_count_as_worse(self):
        noisy = sensitivity((0.3, 0.1, 0.2, 0.05, 0.06))
        found = noisy.at(2048, np.geomspace(0.02, 1, 50))
        assert (np.diff(found) <= 0).all()

    @pytest.mark.parametrize(
        "changes",
        [
            {"lengths": ()},
            {"lengths": (4096, 1024), "densities": ((0.1,),) * 2, "divergences": ((0.1,),) * 2},
            {"divergences": ((0.1, 0.2),)},
            {"divergences": ((float("nan"),),)},
            {"divergences": ((-0.1,),)},
        ],
    )
    def test_what_is_no_curve_is_refused(self, changes):
        good = {"lengths": (1024,), "densities": ((0.1,),), "divergences": ((0.2,),)}
        assert SensitivityCurve.from_json(SensitivityCurve(**good).to_json()).lengths == (1024,)
        with pytest.raises(SeerInputError):
            SensitivityCurve(**(good | changes))
        with pytest.raises(SeerInputError):
            SensitivityCurve.from_json(good | {"densities": "x"})


def test_equal_budget_gives_the_asked_mean_with_one_budget():
    budgets, masses = (0.5, 0.99, 1 - 1e-12, 1.0), (0.5, 0.99, 0.99999, 1.0)
    curves = {
        "sharp": curve(masses, (0.01, 0.03, 0.05, 1.0), budgets),
        "spread": curve(masses, (0.1, 0.4, 0.7, 1.0), budgets),
    }
    shares = allocate(curves, 0.15, length=1024, allocation="equal_budget")
    assert sum(shares.values()) / 2 == pytest.approx(0.15, rel=0.02)
    found = [curve.budget_for(1024, density=shares[name]) for name, curve in curves.items()]
    assert found[0] == pytest.approx(found[1], abs=1e-3)


def test_below_measured_lengths_a_share_is_fewer_blocks():
    """Half as many tokens: what cost nothing at a tenth of 8,192 is a fifth of 4,096."""
    curves = curves_of_two_lengths("cliff", "slope")
    at_8192 = {"cliff": (0.3, 0.2, 1e-6, 1e-7), "slope": (0.02, 0.018, 0.015, 0.01)}
    known = {
        name: SensitivityCurve(
            lengths=(8192,), densities=((0.045, 0.08, 0.1, 0.3),), divergences=(row,)
        )
        for name, row in at_8192.items()
    }
    longer = allocate(curves, 0.12, length=8192, sensitivities=known)
    shorter = allocate(curves, 0.2, length=4096, sensitivities=known)
    assert 0.08 < longer["cliff"] < 0.1
    expected = longer["cliff"] ** (math.log(0.09) / math.log(0.045))
    assert expected > 1.5 * longer["cliff"]
    assert shorter["cliff"] == pytest.approx(expected, rel=0.05)


def test_searched_shares_are_those_of_as_many_blocks_below_searched_lengths():
    curves = curves_of_two_lengths("needy", "other")
    tables = {
        name: ShareTable(lengths=(8192,), asked=(0.05, 0.1, 0.4), shares=(row,))
        for name, row in (("needy", (0.051, 0.15, 0.5)), ("other", (0.049, 0.05, 0.3)))
    }
    power = math.log(0.09) / math.log(0.045)
    expected = {"needy": 0.15**power, "other": 0.05**power}
    shares = allocate(curves, 0.1**power, length=4096, tables=tables)
    assert shares["needy"] / shares["other"] == pytest.approx(
        expected["needy"] / expected["other"], rel=0.02
    )
    assert sum(shares.values()) / 2 == pytest.approx(0.1**power)


def test_a_token_less_than_was_measured_does_not_change_shares():
    """What every selection keeps differs between the data of curves and of sensitivities."""
    curves = {name: curve((0.5, 0.9, 1.0), densities=(0.03, 0.3, 1.0)) for name in ("one", "other")}
    known = {
        name: sensitivity(row, densities=(0.05, 0.08, 0.1, 0.2, 0.5))
        for name, row in (("one", (0.9, 0.4, 0.15, 0.05, 0.01)), ("other", (0.1,) * 5))
    }
    at_length, below = (
        allocate(curves, 0.15, length=length, sensitivities=known) for length in (2048, 2047)
    )
    assert below == pytest.approx(at_length)


def test_beyond_measured_lengths_the_least_density_falls_with_the_curve():
    curves = curves_of_two_lengths("one", "other")
    known = {
        name: SensitivityCurve(
            lengths=(8192,), densities=((0.045, 0.1, 0.3),), divergences=((0.2, 0.1, scale),)
        )
        for name, scale in (("one", 0.05), ("other", 0.01))
    }
    for density in (0.023, 0.03, 0.1, 0.4):
        shares = allocate(curves, density, length=16384, sensitivities=known)
        assert sum(shares.values()) / 2 == pytest.approx(density, rel=1e-6)
        assert min(shares.values()) >= 0.0225 - 1e-9


class TestChoice:
    def test_what_was_measured_decides_where_nothing_is_asked(self):
        assert choose_allocation(None, SENSITIVITIES) == "sensitivity"
        assert choose_allocation(None, {**SENSITIVITIES, "new": None}) == "uniform"
        assert choose_allocation("uniform", SENSITIVITIES) == "uniform"

    def test_sensitivities_that_were_not_measured_are_not_made_up(self):
        with pytest.raises(ModelStateError, match="'hard' was not measured"):
            choose_allocation("sensitivity", {**SENSITIVITIES, "hard": None})
        with pytest.raises(ModelStateError, match="not measured"):
            allocate(CURVES, 0.1, length=2048, allocation="sensitivity")

    def test_unknown_allocation_is_refused(self):
        with pytest.raises(RangeError, match="allocation"):
            allocate(CURVES, 0.1, length=2048, allocation="greedy")


class TestStore:
    def store(self, **sensitivities):
        store = GateStore()
        for name, known in CURVES.items():
            gate = store.get_or_create(name, heads=2, kv_heads=1, head_dim=8)
            gate.curve, gate.is_trained = known, True
            gate.sensitivity = sensitivities.get(name)
        return store

    def test_budgets_follow_sensitivities_and_stay_with_the_gates(self):
        store = self.store(**SENSITIVITIES)
        store.set_budget(density=0.1)
        shares = allocate(CURVES, 0.1, length=2048, sensitivities=SENSITIVITIES)
        for name, gate in store.items():
            expected = CURVES[name].budget_for(2048, density=shares[name])
            assert float(gate.budget_at(2048)[0]) == pytest.approx(expected, abs=1e-9)
        other = GateStore()
        other.load_state_dict(store.state_dict())
        assert {name: gate.sensitivity for name, gate in other.items()} == SENSITIVITIES

    def test_no_site_gets_less_than_every_selection_keeps(self):
        known = {name: sensitivity((1e-6,) * 5, (0.001, 0.05, 0.1, 0.2, 0.5)) for name in CURVES}
        shares = allocate(CURVES, 0.1, length=2048, sensitivities=known)
        assert min(shares.values()) >= 0.02
        assert sum(shares.values()) / 3 == pytest.approx(0.1)

    def test_without_them_every_site_gets_the_same(self):
        store = self.store()
        store.set_budget(density=0.1)
        for name, gate in store.items():
            expected = CURVES[name].budget_for(2048, density=0.1)
            assert float(gate.budget_at(2048)[0]) == pytest.approx(expected, abs=1e-9)

    @pytest.mark.parametrize("allocation", NOT_SEARCHED)
    def test_a_density_below_what_every_selection_keeps_says_what_is_reached(self, allocation):
        store = self.store(**SENSITIVITIES)
        with pytest.warns(DensityNotReachedWarning, match=r"density=0\.001 .* tokens") as caught:
            store.set_budget(density=0.001, allocation=allocation)
        warning = caught[0].message
        assert isinstance(warning, DensityNotReachedWarning)
        assert warning.asked == 0.001
        lengths = {length for known in CURVES.values() for length in known.lengths}
        assert set(warning.reached) == lengths
        for length, reached in warning.reached.items():
            kept = [
                gate.curve.value_at("densities", length, float(gate.budget_at(length)[0]))
                for _, gate in store.items()
            ]
            assert reached == pytest.approx(sum(kept) / len(kept), rel=1e-6)

    @pytest.mark.filterwarnings("error")
    def test_a_length_that_no_whole_sequence_had_is_not_warned_about(self):
        store = GateStore()
        gate = store.get_or_create("site", heads=2, kv_heads=1, head_dim=8)
        gate.is_trained = True
        gate.curve = BudgetCurve(
            selector="top_p",
            lengths=(2048, 4096),
            budgets=(0.5, 0.9, 1.0),
            densities=((0.16, 0.4, 1.0), (0.08, 0.3, 1.0)),
            captured_mass=((0.6, 0.92, 1.0), (0.55, 0.9, 1.0)),
            halves=(2048,),
        )
        store.set_budget(density=0.1)

    @pytest.mark.filterwarnings("error")
    def test_densities_that_are_reached_are_set_without_a_word(self):
        store = self.store(**SENSITIVITIES)
        store.set_budget(density=0.02, allocation="uniform")  # just what every selection keeps
        for density in (0.3, 0.5, 1.0):
            for allocation in NOT_SEARCHED:
                store.set_budget(density=density, allocation=allocation)

    def test_an_allocation_that_would_be_ignored_is_refused(self):
        with pytest.raises(SeerInputError, match="allocation"):
            self.store().set_budget(mass=0.9, allocation="uniform")

    def test_descriptions_from_before_sensitivities_are_read(self):
        description = self.store(**SENSITIVITIES).describe()
        for gate in description["gates"]:
            del gate["sensitivity"]
        other = GateStore()
        other.rebuild(description, "cpu")
        assert all(gate.sensitivity is None for _, gate in other.items())
