"""The gate, its store, and the budget curve."""

import copy
import math
import pickle
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from seer_compile.budget_curve import BudgetCurve
from seer_compile.config import Fraction, GateConfig, Threshold, TopK, TopP
from seer_compile.config_json import config_from_json, config_to_json
from seer_compile.errors import (
    DtypeError,
    GateMismatchError,
    HeadConfigError,
    ModelStateError,
    NotConvergedError,
    RangeError,
    SeerInputError,
    ShapeError,
)
from seer_compile.gate import BUDGET_LENGTHS, AttnGate
from seer_compile.gate_scores import HIDDEN_LOGIT, visible_units
from seer_compile.gate_store import GateStore
from seer_compile.kernels.gated_attention import (
    MODE_AUTO,
    MODE_DENSE,
    MODE_FULL_BUDGET,
    MODE_SPARSE,
)
from seer_compile.types import POOL_KINDS, SHARINGS, BlockSize, SiteInputs, Visibility
from support.inputs import attention_inputs, documents, key_padding, normal

SMALL = GateConfig(
    query_pools=POOL_KINDS,
    query_sub_block=4,
    gate_dim=32,
    block_size=BlockSize(query=16, key=16),
    sharing="none",
)
CAUSAL = Visibility(upper=0)


def site_inputs(visibility=CAUSAL, *, name="site", **sizes):
    tensors = attention_inputs(**sizes)
    return SiteInputs(
        name=name,
        query=tensors.query,
        key=tensors.key,
        value=tensors.value,
        scale=tensors.scale,
        visibility=visibility,
    )


def gate_for(inputs, config=SMALL, seed=0):
    return AttnGate(
        inputs.query.shape[1],
        inputs.key.shape[1],
        inputs.query.shape[-1],
        config=config,
        scale=inputs.scale,
        seed=seed,
    )


def sub_block_means(tokens, size):
    short = -tokens.shape[-2] % size
    sums = nn.functional.pad(tokens, (0, 0, 0, short)).unflatten(-2, (-1, size)).sum(-2)
    counts = torch.full((sums.shape[-2],), float(size))
    counts[-1] = size - short
    return sums / counts[:, None]


def curve(densities=((0.1, 0.4, 1.0), (0.05, 0.2, 1.0)), masses=None, **changes):
    return BudgetCurve(
        **{
            "selector": "top_p",
            "lengths": (1024, 4096),
            "budgets": (0.5, 0.9, 1.0),
            "densities": densities,
            "captured_mass": masses or ((0.6, 0.92, 1.0), (0.55, 0.9, 1.0)),
            **changes,
        }
    )


class TestUntrainedGate:
    @pytest.mark.parametrize("gate_dim", [32, 64])
    @pytest.mark.parametrize("pools", [("mean", "max", "min"), ("max", "mean"), ("mean",)])
    def test_features_multiply_to_the_product_of_means(self, gate_dim, pools):
        inputs = site_inputs(heads=4, kv_heads=2, q_len=70, head_dim=32)
        config = GateConfig(
            query_pools=pools,
            key_pools=pools[::-1],
            gate_dim=gate_dim,
            query_sub_block=8,
            key_sub_block=8,
            sharing="selection",
        )
        query, key = gate_for(inputs, config).features(inputs.query, inputs.key)
        expected = sub_block_means(inputs.query, 8) @ sub_block_means(
            inputs.key.repeat_interleave(2, 1), 8
        ).transpose(-1, -2)
        torch.testing.assert_close(query @ key.transpose(-1, -2), expected, rtol=1e-4, atol=1e-4)

    def test_smaller_gate_dim_multiplies_to_the_product_of_means_on_average(self):
        inputs = site_inputs(heads=1, q_len=16, head_dim=64)
        products = []
        for seed in range(400):
            gate = gate_for(
                inputs, GateConfig(gate_dim=16, query_sub_block=8, key_sub_block=8), seed
            )
            query, key = gate.features(inputs.query, inputs.key)
            products.append((query @ key.transpose(-1, -2)).detach())
        found = torch.stack(products)
        expected = sub_block_means(inputs.query, 8) @ sub_block_means(inputs.key, 8).mT
        error_of_mean = found.std(0) / math.sqrt(len(products))
        assert ((found.mean(0) - expected).abs() < 4 * error_of_mean).all()

    def test_gate_without_mean_pooling_starts_from_the_extremes(self):
        inputs = site_inputs(q_len=32, head_dim=32)
        config = GateConfig(query_pools=("max", "min"), key_pools=("max", "min"), gate_dim=32)
        query, _ = gate_for(inputs, config).features(inputs.query, inputs.key)
        tokens = inputs.query.unflatten(-2, (-1, config.query_sub_block))
        torch.testing.assert_close(query, (tokens.amax(-2) + tokens.amin(-2)) / 2)

    def test_every_weight_channel_has_a_gradient(self):
        inputs = site_inputs(q_len=192, head_dim=16)
        gate = gate_for(inputs, GateConfig(gate_dim=32))
        wide = gate.row_log_mass(inputs.query, inputs.key, inputs.scale, Visibility())
        wide.var().backward()
        for weight in gate.parameters():
            per_channel = weight.grad.abs().sum((0, 1))
            extra = per_channel[16:] if weight is gate.query_weight else per_channel[:16]
            assert (extra > 0).all()

    def test_reset_forgets_training_in_place(self):
        inputs = site_inputs()
        gate, fresh = gate_for(inputs), gate_for(inputs)
        address = gate.query_weight.data_ptr()
        with torch.no_grad():
            gate.query_weight.mul_(2)
            gate.budget.fill_(0.1)
        gate.curve, gate.is_trained = curve(), True
        gate.reset()
        assert gate.query_weight.data_ptr() == address
        assert torch.equal(gate.query_weight, fresh.query_weight)
        assert torch.equal(gate.budget, fresh.budget)
        assert gate.curve is None
        assert not gate.is_trained

    @pytest.mark.parametrize(
        "fields",
        [
            {"selector": "top_p"},
            {"selector": TopP},
            {"block_size": 64},
            {"query_pools": "mean"},
        ],
    )
    def test_fields_of_other_types_are_refused(self, fields):
        (name,) = fields
        with pytest.raises(DtypeError, match=f"{name}="):
            GateConfig(**fields)
        with pytest.raises(DtypeError, match=r"mass='0\.9'"):
            TopP(mass="0.9")

    def test_sizes_are_checked(self):
        with pytest.raises(HeadConfigError, match="kv_heads=3"):
            AttnGate(8, 3, 32, config=SMALL)
        with pytest.raises(RangeError, match="head_dim"):
            AttnGate(8, 2, 512, config=SMALL)
        inputs = site_inputs(heads=4)
        with pytest.raises(ShapeError, match="sizes of this gate"):
            gate_for(site_inputs(heads=2)).block_scores(inputs)


class TestRowLogMass:
    @pytest.mark.parametrize(
        "visibility",
        [
            Visibility(),
            CAUSAL,
            Visibility(upper=0, lower=-20),
            Visibility(upper=17),
            Visibility(upper=0, key_padding=key_padding([77, 40], 77)),
            Visibility(upper=0, key_padding=key_padding([77, 40], 77, side="right")),
            Visibility(
                upper=0,
                query_documents=documents([30, 50], 77).expand(2, -1),
                key_documents=documents([30, 50], 77).expand(2, -1),
            ),
            Visibility(upper=-5, offset=torch.tensor(5)),
        ],
    )
    @pytest.mark.parametrize("sharing", SHARINGS)
    def test_agrees_with_the_block_score_operator(self, visibility, sharing):
        inputs = site_inputs(visibility, batch=2, heads=4, kv_heads=2, q_len=77)
        config = GateConfig(
            gate_dim=16,
            block_size=BlockSize(query=16, key=32),
            query_sub_block=4,
            key_sub_block=8,
            sharing=sharing,
        )
        gate = gate_for(inputs, config)
        shares = gate.row_log_mass(inputs.query, inputs.key, inputs.scale, visibility).exp()
        visible = visible_units(
            visibility, units=(4, 8), lengths=(77, 77), device=torch.device("cpu")
        )
        shares = torch.where(visible.any(-1, keepdim=True), shares, 0.0)
        padded = nn.functional.pad(shares, (0, 0, 0, -shares.shape[-2] % 4))
        expected = padded.unflatten(-2, (-1, 4)).amax(-2)
        if sharing == "selection":
            expected = expected.unflatten(1, (2, 2)).amax(2)
        torch.testing.assert_close(gate.block_scores(inputs), expected, rtol=1e-4, atol=1e-6)

    def test_rows_sum_to_one_and_hidden_blocks_carry_nothing(self):
        inputs = site_inputs(q_len=64)
        log_mass = gate_for(inputs).row_log_mass(inputs.query, inputs.key, inputs.scale, CAUSAL)
        torch.testing.assert_close(log_mass.exp().sum(-1), torch.ones(1, 2, 16))
        assert (log_mass[:, :, 0, 1:] < HIDDEN_LOGIT / 2).all()
        assert log_mass.isfinite().all()

    def test_chosen_rows_equal_the_same_rows_of_all(self):
        inputs = site_inputs(q_len=90)
        gate, rows = gate_for(inputs), torch.tensor([0, 3, 22])
        arguments = (inputs.query, inputs.key, inputs.scale, CAUSAL)
        every = gate.row_log_mass(*arguments)
        torch.testing.assert_close(gate.row_log_mass(*arguments, rows), every[:, :, rows])

    def test_gradient_is_finite_where_rows_see_nothing(self):
        visibility = Visibility(upper=0, key_padding=key_padding([64, 0], 64))
        inputs = site_inputs(visibility, batch=2, q_len=64)
        gate = gate_for(inputs)
        gate.row_log_mass(
            inputs.query, inputs.key, inputs.scale, visibility
        ).exp().square().sum().backward()
        for weight in gate.parameters():
            assert weight.grad.isfinite().all()

    @pytest.mark.parametrize("units", [(8, 8), (16, 64), (64, 16)])
    @pytest.mark.parametrize("lengths", [(77, 77), (5, 90), (90, 5), (1, 1)])
    @pytest.mark.parametrize(
        "band", [{}, {"upper": 0}, {"upper": 3, "lower": -9}, {"lower": 2}, {"upper": -80}]
    )
    def test_visible_units_hold_a_readable_pair(self, units, lengths, band):
        visibility = Visibility(**band)
        offsets = torch.arange(lengths[1]) - torch.arange(lengths[0])[:, None]
        readable = torch.ones_like(offsets, dtype=torch.bool)
        if "upper" in band:
            readable &= offsets <= band["upper"]
        if "lower" in band:
            readable &= offsets >= band["lower"]
        tiles = nn.functional.pad(
            readable, (0, -lengths[1] % units[1], 0, -lengths[0] % units[0])
        ).unflatten(1, (-1, units[1]))
        expected = tiles.unflatten(0, (-1, units[0])).any(-1).any(1)
        found = visible_units(visibility, units=units, lengths=lengths, device=torch.device("cpu"))
        assert torch.equal(found[0, 0], expected)


class TestSelection:
    def test_full_budget_selects_every_visible_block_and_answers_densely(self):
        inputs = site_inputs(heads=4, kv_heads=2, q_len=100)
        gate = gate_for(inputs)
        counts = gate.select(inputs, torch.ones(4)).counts
        expected = torch.arange(1, 8, dtype=torch.int32).expand(1, 4, -1)
        assert torch.equal(counts, expected)
        with torch.no_grad():
            gate.budget.fill_(1.0)
            gate.mode.fill_(1)
            out = gate.attend(inputs)
        dense = nn.functional.scaled_dot_product_attention(
            inputs.query, inputs.key, inputs.value, is_causal=True, enable_gqa=True
        )
        torch.testing.assert_close(out, dense, rtol=1e-4, atol=1e-5)

    def test_budget_table_is_read_at_the_key_length(self):
        gate = AttnGate(2, 1, 16, config=SMALL)
        with torch.no_grad():
            gate.budget.copy_(torch.linspace(0.1, 0.9, len(BUDGET_LENGTHS)).expand(2, -1))
        for place, length in enumerate(BUDGET_LENGTHS):
            torch.testing.assert_close(gate.budget_at(length), gate.budget[:, place])
        between = gate.budget_at(round(math.sqrt(2) * 8192))
        middle = gate.budget[:, 6:8].mean(1)
        torch.testing.assert_close(between, middle, rtol=1e-4, atol=1e-4)
        assert torch.equal(gate.budget_at(1), gate.budget[:, 0])
        assert torch.equal(gate.budget_at(10**8), gate.budget[:, -1])

    def test_constants_are_in_the_operators_order(self):
        schema = torch.ops.seer_compile.gated_attention.v1._schema
        names = [argument.name for argument in schema.arguments]
        constants = list(AttnGate(2, 1, 16, config=SMALL).constants())
        first = names.index("query_pools")
        assert names[first : first + len(constants)] == constants


class TestPlacement:
    @pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.double])
    def test_weights_stay_float32_and_unrounded(self, cast):
        model = nn.Module()
        model.linear = nn.Linear(4, 4)
        model.seer_gates = GateStore(SMALL)
        gate = model.seer_gates.get_or_create("a", heads=2, kv_heads=1, head_dim=16)
        before = gate.query_weight.detach().clone()
        cast(model)
        assert model.linear.weight.dtype != torch.float32
        assert torch.equal(gate.query_weight, before)
        assert gate.budget.dtype == torch.float64
        assert gate.mode.dtype == torch.int8

    def test_mode_stays_on_the_cpu(self):
        gate = AttnGate(2, 1, 16, config=SMALL).to("meta")
        assert gate.query_weight.is_meta
        assert gate.mode.device.type == "cpu"

    @pytest.mark.gpu
    def test_moves_with_the_model(self):
        gate = AttnGate(2, 1, 16, config=SMALL).to("cuda", torch.bfloat16)
        assert gate.query_weight.is_cuda
        assert gate.budget.is_cuda
        assert gate.query_weight.dtype == torch.float32
        assert gate.mode.device.type == "cpu"


class TestStore:
    def test_gates_created_while_tracing_are_real(self):
        store = GateStore(SMALL)
        with FakeTensorMode(), torch.inference_mode(), torch.device("meta"):
            gate = store.get_or_create("a", heads=2, kv_heads=1, head_dim=16)
        for tensor in (gate.query_weight, gate.budget, gate.mode, store.metadata):
            assert type(tensor) in (torch.Tensor, nn.Parameter)
            assert tensor.device.type == "cpu"
            assert not tensor.is_inference()
        gate.query_weight.sum().backward()

    def test_same_name_gives_the_same_gate_and_other_sizes_raise(self):
        store = GateStore(SMALL)
        gate = store.get_or_create("a", heads=2, kv_heads=1, head_dim=16)
        assert store.get_or_create("a", heads=2, kv_heads=1, head_dim=16) is gate
        with pytest.raises(GateMismatchError, match="site=a"):
            store.get_or_create("a", heads=2, kv_heads=2, head_dim=16)
        assert store.get("b") is None

    def test_threads_share_one_gate_per_name(self):
        store, found = GateStore(SMALL), []
        barrier = threading.Barrier(8)

        def create():
            barrier.wait()
            for name in "abc":
                found.append(store.get_or_create(name, heads=2, kv_heads=1, head_dim=16))

        threads = [threading.Thread(target=create) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 24
        assert len({id(gate) for gate in found}) == 3

    def test_awkward_names_get_distinct_keys(self):
        names = ["a.b", "a__b", "a_b", "a/b", "a#1", "", "pop", "items", "0", "a..b", "ä"]
        store = GateStore(SMALL)
        for name in names:
            store.get_or_create(name, heads=1, kv_heads=1, head_dim=8)
        assert store.names() == tuple(names)
        other = GateStore(SMALL)
        other.load_state_dict(store.state_dict())
        assert other.names() == tuple(names)

    def test_state_dict_rebuilds_the_gates(self):
        store = GateStore(GateConfig.paper(density=0.2), seed=4)
        gate = store.get_or_create("x.attn", heads=4, kv_heads=2, head_dim=16, scale=0.3)
        with torch.no_grad():
            gate.key_weight.add_(1)
        gate.curve, gate.is_trained = curve(selector="fraction"), True
        store.write_metadata()
        other = GateStore()
        other.load_state_dict(store.state_dict(), assign=True)
        copied = other.get("x.attn")
        assert other.config == store.config
        assert torch.equal(copied.key_weight, gate.key_weight)
        assert copied.key_weight is not gate.key_weight
        assert (copied.scale, copied.curve, copied.is_trained) == (0.3, gate.curve, True)

    def test_checkpoint_of_the_base_model_loads_and_leaves_gates_alone(self):
        model = nn.Sequential(nn.Linear(3, 3))
        base = {key: value.clone() for key, value in model.state_dict().items()}
        model.seer_gates = GateStore(SMALL)
        gate = model.seer_gates.get_or_create("a", heads=1, kv_heads=1, head_dim=8)
        before = gate.query_weight.detach().clone()
        assert not model.load_state_dict(base).missing_keys
        assert torch.equal(gate.query_weight, before)

    def test_checkpoint_with_half_of_the_gates_is_refused(self):
        store = GateStore(SMALL)
        store.get_or_create("a", heads=1, kv_heads=1, head_dim=8)
        state = store.state_dict()
        del state["gates.a.key_weight"]
        with pytest.raises(RuntimeError, match=r"gates\.a\.key_weight"):
            GateStore(SMALL).load_state_dict(state)

    def test_damaged_metadata_is_refused_with_the_reason(self):
        store = GateStore(SMALL)
        state = dict(store.state_dict())
        state["metadata"] = torch.tensor(list(b'{"version": 9}'), dtype=torch.uint8)
        with pytest.raises(RuntimeError, match="metadata"):
            GateStore(SMALL).load_state_dict(state)

    def test_copies_and_pickles_are_whole(self):
        store = GateStore(SMALL)
        gate = store.get_or_create("a", heads=1, kv_heads=1, head_dim=8)
        for other in (copy.deepcopy(store), pickle.loads(pickle.dumps(store))):
            twin = other.get("a")
            assert twin is not gate
            assert torch.equal(twin.query_weight, gate.query_weight)
            other.get_or_create("b", heads=1, kv_heads=1, head_dim=8)
        assert store.names() == ("a",)

    def test_untrained_gates_answer_densely_unless_allowed(self):
        store = GateStore(SMALL)
        old = store.get_or_create("old", heads=1, kv_heads=1, head_dim=8)
        old.is_trained = True
        store.set_mode(True)
        new = store.get_or_create("new", heads=1, kv_heads=1, head_dim=8)
        assert (int(old.mode), int(new.mode), store.is_calibrated) == (1, 0, False)
        store.set_mode(True, untrained=True)
        later = store.get_or_create("later", heads=1, kv_heads=1, head_dim=8)
        assert (int(new.mode), int(later.mode)) == (1, 1)
        store.set_mode(False)
        assert [int(gate.mode) for _, gate in store.items()] == [0, 0, 0]

    def test_budget_moves_in_place_along_the_curve(self):
        store = GateStore(SMALL)
        gate = store.get_or_create("a", heads=2, kv_heads=1, head_dim=8)
        gate.curve, gate.is_trained = curve(), True
        address = gate.budget.data_ptr()
        store.set_budget(density=0.4)
        torch.testing.assert_close(gate.budget_at(1024), torch.full((2,), 0.9).double())
        store.set_budget(density=0.2)
        torch.testing.assert_close(gate.budget_at(4096), torch.full((2,), 0.9).double())
        store.set_budget(mass=0.6)
        torch.testing.assert_close(gate.budget_at(1024), torch.full((2,), 0.5).double())
        store.set_budget(mass=1.0)
        assert torch.equal(gate.budget, torch.ones_like(gate.budget))
        assert gate.budget.data_ptr() == address

    def test_a_gate_that_is_made_later_has_the_budget_of_the_others(self):
        store = GateStore(SMALL)
        store.get_or_create("a", heads=2, kv_heads=1, head_dim=8)
        store.set_budget(mass=0.3)
        for twin in (store, pickle.loads(pickle.dumps(store))):
            late = twin.get_or_create("b", heads=2, kv_heads=1, head_dim=8)
            assert bool((late.budget == 0.3).all())

    def test_full_budget_is_answered_densely_until_the_budget_falls(self):
        store = GateStore(SMALL)
        store.set_mode(True)
        gate = store.get_or_create("a", heads=2, kv_heads=1, head_dim=8)
        gate.curve, gate.is_trained = curve(), True
        store.set_budget(density=1.0)
        assert int(gate.mode) == MODE_DENSE  # it may not answer yet
        store.set_mode(True)
        assert int(gate.mode) == MODE_FULL_BUDGET
        store.set_budget(density=0.4)
        assert int(gate.mode) == MODE_AUTO
        store.set_budget(mass=1.0)
        assert int(gate.mode) == MODE_FULL_BUDGET
        store.set_mode(True, at_any_size=True)
        store.set_budget(mass=1.0)
        assert int(gate.mode) == MODE_SPARSE  # asked for, to measure

    @pytest.mark.parametrize(
        ("targets", "error"),
        [
            ({}, SeerInputError),
            ({"density": 0.1, "mass": 0.9}, SeerInputError),
            ({"density": 0.0}, RangeError),
            ({"density": float("nan")}, RangeError),
            ({"mass": 1.5}, RangeError),
            ({"density": True}, RangeError),
            ({"max_error": 0.1}, SeerInputError),
        ],
    )
    def test_impossible_budgets_are_refused_and_change_nothing(self, targets, error):
        store = GateStore(SMALL)
        gate = store.get_or_create("a", heads=1, kv_heads=1, head_dim=8)
        gate.curve, gate.is_trained = curve(), True
        before = gate.budget.clone()
        with pytest.raises(error):
            store.set_budget(**targets)
        assert torch.equal(gate.budget, before)

    def test_error_below_rounding_is_out_of_reach_and_says_where(self):
        store = GateStore(SMALL)
        for name, least in (("a", 1e-4), ("b", 4e-3)):
            gate = store.get_or_create(name, heads=1, kv_heads=1, head_dim=8)
            gate.curve = curve(errors=((0.5, 0.1, least), (0.6, 0.2, least / 2)))
        with pytest.raises(NotConvergedError, match=r"'b' within 0\.001; the least"):
            store.set_budget(max_error=0.001)
        store.set_budget(max_error=0.005)

    def test_gates_without_a_curve_take_the_selectors_own_unit_only(self):
        store = GateStore(SMALL)
        gate = store.get_or_create("a", heads=1, kv_heads=1, head_dim=8)
        store.set_budget(mass=0.7)
        assert torch.equal(gate.budget, torch.full_like(gate.budget, 0.7))
        with pytest.raises(ModelStateError, match="no measured curve"):
            store.set_budget(density=0.1)


@pytest.mark.parametrize("selector", [TopP(mass=0.8), Fraction(), TopK(blocks=3), Threshold()])
def test_configuration_survives_json(selector):
    config = GateConfig(
        query_pools=("max",), gate_dim=128, block_size=BlockSize(query=128), selector=selector
    )
    assert config_from_json(config_to_json(config)) == config


class TestBudgetCurve:
    @pytest.mark.parametrize("length", [1024, 2000, 4096, 100, 10**6])
    def test_budget_for_a_density_gives_that_density(self, length):
        measured = curve()
        for density in (0.12, 0.3, 0.7, 1.0):
            budget = measured.budget_for(length, density=density)
            known = measured.row("densities", length)
            # Between the nodes both directions follow one curve, straight in log density.
            place = math.log(density)
            there = measured.interpolate([math.log(value) for value in known], budget)
            # A budget close to 1 has no more digits than float64 leaves to its distance from 1.
            digits = np.finfo(np.float64).eps / (1 - budget) if budget < 1 else 0.0
            assert there == pytest.approx(max(place, math.log(known[0])), abs=1e-6 + digits)

    def test_densities_go_on_falling_beyond_the_longest_length_for_one_octave(self):
        # Of 0.4 and 0.2 half is left after an octave, 0.9 and 0.8 fall to 8/9, all blocks stay.
        measured = curve(densities=((0.4, 0.9, 1.0), (0.2, 0.8, 1.0)), lengths=(1024, 2048))
        row = measured.row("densities", 4096)
        assert row == pytest.approx((0.1, 0.8 * 8 / 9, 1.0))
        half_way = measured.row("densities", 2048 * 2**0.5)
        assert half_way == pytest.approx((0.2 * 0.5**0.5, 0.8 * (8 / 9) ** 0.5, 1.0))
        assert measured.row("densities", 2**20) == pytest.approx(row)
        # More is kept of longer sequences than by the budget of the longest measured one.
        assert measured.budget_for(8192, density=0.2) > measured.budget_for(2048, density=0.2)
        masses = (measured.row("captured_mass", length) for length in (2048, 8192))
        assert np.array_equal(*masses)

    def test_the_trend_is_that_of_the_last_octave(self):
        measured = curve(
            lengths=(512, 1024, 1400, 2048),
            densities=((0.9, 1.0, 1.0), (0.4, 1.0, 1.0), (0.3, 1.0, 1.0), (0.2, 1.0, 1.0)),
            masses=((0.5, 0.9, 1.0),) * 4,
        )
        assert measured.row("densities", 4096)[0] == pytest.approx(0.1)

    def test_densities_that_rose_are_not_taken_to_rise_on(self):
        measured = curve(densities=((0.2, 0.8, 1.0), (0.4, 0.9, 1.0)), lengths=(1024, 2048))
        assert measured.row("densities", 8192) == pytest.approx((0.4, 0.9, 1.0))

    def test_lengths_close_to_one_another_show_no_trend(self):
        # 5 % apart over a twentieth of an octave would be a fall by two thirds over a whole one.
        measured = curve(densities=((0.4, 0.9, 1.0), (0.38, 0.9, 1.0)), lengths=(1200, 1240))
        assert measured.row("densities", 2480) == pytest.approx((0.38, 0.9, 1.0))

    def test_lengths_of_halves_alone_are_told_apart_and_kept(self):
        measured = curve(halves=(1024,))
        assert measured.whole_lengths == (4096,)
        assert BudgetCurve.from_json(measured.to_json()) == measured
        before = {name: value for name, value in measured.to_json().items() if name != "halves"}
        assert BudgetCurve.from_json(before).whole_lengths == (1024, 4096)

    def test_one_length_shows_no_trend(self):
        measured = curve(lengths=(1024,), densities=((0.2, 0.8, 1.0),), masses=((0.5, 0.9, 1.0),))
        assert measured.row("densities", 8192) == pytest.approx((0.2, 0.8, 1.0))

    def test_full_density_and_full_mass_are_budget_one_exactly(self):
        assert curve().budget_for(3000, density=1.0) == 1.0
        assert curve().budget_for_mass(3000, mass=1.0) == 1.0

    @pytest.mark.parametrize("selector", ["top_p", "fraction"])
    def test_everything_is_asked_for_where_less_was_enough_on_measured_data(self, selector):
        everything = ((0.4, 1.0, 1.0), (0.2, 1.0, 1.0))
        measured = curve(selector=selector, densities=everything, masses=everything)
        assert measured.budget_for(1024, density=1.0) == 1.0
        assert measured.budget_for_mass(1024, mass=1.0) == 1.0
        assert measured.budget_for_mass(1024, mass=0.999) < 1.0

    def test_descending_budgets_of_a_threshold_are_understood(self):
        measured = curve(selector="threshold", budgets=(4.0, 1.0, 0.25))
        assert measured.budget_for(1024, density=0.4) == pytest.approx(1.0)
        assert measured.value_at("captured_mass", 1024, 1.0) == pytest.approx(0.92)

    def test_error_targets_need_measured_errors(self):
        with pytest.raises(SeerInputError, match="not measured"):
            curve().budget_for_error(1024, error=0.1)
        measured = curve(errors=((0.5, 0.1, 0.0), (0.6, 0.2, 0.0)))
        assert measured.budget_for_error(1024, error=0.1) == pytest.approx(0.9)

    def test_json_round_trip(self):
        measured = curve(errors=((0.5, 0.1, 0.0), (0.6, 0.2, 0.0)))
        assert BudgetCurve.from_json(measured.to_json()) == measured

    @pytest.mark.parametrize(
        "changes",
        [
            {"lengths": (4096, 1024)},
            {"lengths": ()},
            {"densities": ((0.1, 0.4),)},
            {"densities": ((0.1, 0.4, float("nan")),) * 2},
        ],
    )
    def test_what_is_no_curve_is_refused(self, changes):
        with pytest.raises(SeerInputError):
            curve(**changes)
        with pytest.raises(SeerInputError):
            BudgetCurve.from_json({**curve().to_json(), **changes, "budgets": "x"})


def test_gate_is_blind_to_padded_keys():
    visibility = Visibility(upper=0, key_padding=key_padding([40], 64))
    inputs = site_inputs(visibility, q_len=64)
    gate = gate_for(inputs)
    expected = gate.block_scores(inputs)
    poisoned = inputs.key.clone()
    poisoned[:, :, :24] = float("nan")
    changed = SiteInputs(
        name="site",
        query=inputs.query,
        key=poisoned,
        value=inputs.value,
        scale=inputs.scale,
        visibility=visibility,
    )
    assert torch.equal(gate.block_scores(changed), expected)


def test_features_do_not_reach_back_into_the_model():
    query = normal(1, 2, 32, 16).requires_grad_()
    gate = AttnGate(2, 2, 16, config=SMALL)
    features, _ = gate.features(query, query)
    features.sum().backward()
    assert query.grad is None
    assert gate.query_weight.grad is not None


class TestUnresolvedMass:
    """Sites whose mass sits in few blocks: budgets beyond what sums resolve."""

    CURVE = BudgetCurve(
        selector="top_p",
        lengths=(1024,),
        budgets=(0.5, 0.99, 1 - 1e-12, 1.0),
        densities=((0.01, 0.03, 0.05, 1.0),),
        captured_mass=((0.6, 0.99, 0.99999, 1.0),),
    )

    @pytest.mark.parametrize("density", [0.05, 0.2, 0.9])
    def test_density_in_the_unresolved_part_stays_at_the_last_resolved_budget(self, density):
        assert self.CURVE.budget_for(1024, density=density) == 1 - 1e-12

    def test_everything_is_given_when_everything_is_asked_for(self):
        assert self.CURVE.budget_for(1024, density=1.0) == 1.0


@pytest.mark.parametrize(
    ("sparse", "at_any_size", "mode"), [(False, True, 0), (True, False, 1), (True, True, 2)]
)
def test_mode_of_a_trained_gate_follows_the_store(sparse, at_any_size, mode):
    store = GateStore(SMALL)
    gate = store.get_or_create("a", heads=2, kv_heads=1, head_dim=8)
    gate.is_trained = True
    store.set_mode(sparse, at_any_size=at_any_size)
    assert int(gate.mode) == mode
