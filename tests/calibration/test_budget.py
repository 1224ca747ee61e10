"""Curves: what is measured equals what a selection really keeps and captures."""

import pytest
import torch

from seer_compile.calibration import budget
from seer_compile.calibration.budget import tabulate
from seer_compile.calibration.curve_sums import (
    CurveSums,
    control_windows,
    curve_of,
    selection_totals,
    windows_of,
)
from seer_compile.calibration.targets import attention_mass
from seer_compile.config import Fraction, GateConfig, Threshold, TopK
from seer_compile.errors import CalibrationDataError
from seer_compile.gate_store import GateStore
from seer_compile.types import SHARINGS, BlockSize
from support.inputs import random_selection
from support.planted import BLOCK, FirstHalf, PlantedModel, batches

SIZE = BlockSize(query=BLOCK, key=BLOCK)
CONFIG = GateConfig(gate_dim=32, block_size=SIZE)
GRID = (0.2, 0.5, 0.9, 1.0)


def measure(data, config=CONFIG, grid=GRID, model=None, **options):
    store = GateStore(config)
    model = model or PlantedModel()
    return store, tabulate(model.run, store, data, grid=grid, **options)


def kept_map(selection, blocks):
    kept = torch.zeros(*selection.counts.shape, blocks, dtype=torch.bool)
    for row in torch.cartesian_prod(*(torch.arange(side) for side in selection.counts.shape)):
        place = tuple(row.tolist())
        count = int(selection.counts[place])
        kept[place][selection.indices[place][:count].long()] = True
    return kept


def test_totals_ignore_entries_past_the_count():
    selection = random_selection(2, 3, 5, 7, density=0.4)
    mass = torch.rand(2, 3, 5, 7)
    kept, captured = selection_totals(selection, mass)
    expected = kept_map(selection, 7)
    assert torch.equal(kept, expected.sum((0, 3)))
    torch.testing.assert_close(captured.float(), (mass * expected).sum((0, 3)))


@pytest.mark.parametrize("sharing", SHARINGS)
def test_budgets_measured_together_are_as_those_measured_alone(sharing, monkeypatch):
    config = GateConfig(gate_dim=32, block_size=SIZE, sharing=sharing)
    grid = (0.2, 0.5, 0.7, 0.9, 0.95, 1.0)
    _, together = measure(batches(2, 200), config, grid, measure_errors=True)
    monkeypatch.setattr(budget, "_SCORES_AT_ONCE", 1)
    _, alone = measure(batches(2, 200), config, grid, measure_errors=True)
    assert together == alone
    curve = together["layers.1.attn"].gate
    assert curve.densities[0][0] < curve.densities[0][-1] == 1.0
    assert curve.errors[0][0] > curve.errors[0][-1]


@pytest.mark.parametrize("sharing", SHARINGS)
def test_curve_equals_a_selection_done_by_hand(sharing):
    config = GateConfig(gate_dim=32, block_size=SIZE, sharing=sharing)
    data = batches(2, 200)
    model = PlantedModel()
    store, tables = measure(data, config, model=model)
    kept, visible, captured, rows = 0, 0, 0.0, 0

    def handler(inputs):
        nonlocal kept, visible, captured, rows
        if inputs.name != "layers.1.attn":
            return inputs.query
        gate = store.get(inputs.name)
        selection = gate.select(inputs, torch.full((gate.selection_heads,), GRID[1]))
        mass = attention_mass(inputs, query_unit=BLOCK, key_unit=BLOCK)
        mass = mass.unflatten(1, (gate.selection_heads, -1)).mean(2)
        chosen = kept_map(selection, mass.shape[-1])
        kept += int(chosen.sum())
        visible += mass.shape[1] * sum(range(1, mass.shape[-1] + 1))
        captured += float((mass * chosen).sum())
        rows += mass.shape[1] * mass.shape[2]
        return inputs.query

    for batch in data:
        model.run(batch, handler)
    found = tables["layers.1.attn"].gate
    assert found.densities[0][1] == pytest.approx(kept / visible)
    assert found.captured_mass[0][1] == pytest.approx(captured / rows, rel=1e-5)


@pytest.mark.parametrize("kind", ["gate", "oracle", "control"])
def test_curves_rise_to_everything(kind):
    _, tables = measure(batches(2, 250))
    for table in tables.values():
        measured = getattr(table, kind)
        for row in (*measured.densities, *measured.captured_mass):
            assert list(row) == sorted(row)
            assert row[-1] == pytest.approx(1.0, abs=1e-5)


def test_oracle_captures_at_least_what_the_untrained_gate_does():
    _, tables = measure(batches(3, 384))
    for table in tables.values():
        for density in (0.2, 0.3, 0.5):
            oracle = table.oracle.mass_at_density(384, density)
            assert oracle >= table.gate.mass_at_density(384, density) - 1e-3
            assert oracle >= table.control.mass_at_density(384, density) - 1e-3


def test_each_length_has_its_own_row_and_density_falls_with_length():
    _, tables = measure(batches(4, 128, 512))
    measured = tables["layers.0.attn"].gate
    assert measured.lengths == (128, 512)
    assert measured.densities[1][0] < measured.densities[0][0]


def test_the_first_half_of_a_causal_sequence_is_measured_as_a_sequence_of_its_own():
    data = batches(2, 1024)
    _, both = measure(data, measure_errors=True)
    _, alone = measure(data, model=FirstHalf(), measure_errors=True)
    for name, table in both.items():
        for kind in ("gate", "oracle", "control"):
            found, expected = getattr(table, kind), getattr(alone[name], kind)
            assert found.lengths == (512, 1024)
            assert expected.lengths == (512,)
            width = len(expected.budgets)
            for values in ("densities", "captured_mass"):
                ours, theirs = getattr(found, values)[0][:width], getattr(expected, values)[0]
                assert ours == pytest.approx(theirs, rel=1e-4)
        assert table.gate.errors[0] == pytest.approx(alone[name].gate.errors[0], rel=1e-3, abs=1e-5)


def test_a_half_is_no_sequence_where_rows_know_what_comes_later():
    data = [{**batch, "real": torch.tensor(1000)} for batch in batches(1, 1024)]
    assert measure(data)[1]["layers.0.attn"].gate.lengths == (1024,)


def test_a_mask_that_hides_nothing_leaves_a_half_a_sequence():
    data = [{**batch, "real": torch.tensor(1024)} for batch in batches(1, 1024)]
    found = measure(data)[1]["layers.0.attn"].gate
    assert found.lengths == (512, 1024)
    assert found.halves == (512,)


def test_a_length_of_whole_sequences_is_none_of_halves():
    assert measure(batches(2, 1024, 512))[1]["layers.0.attn"].gate.halves == ()


def test_close_lengths_share_a_row():
    _, tables = measure(batches(4, 250, 256, 260, 255))
    assert tables["layers.0.attn"].gate.lengths == (255,)


def test_padded_rows_carry_no_mass_and_do_not_dilute_it():
    data = [{**batch, "real": torch.tensor(200)} for batch in batches(2, 320)]
    _, tables = measure(data)
    assert tables["layers.0.attn"].gate.captured_mass[0][-1] == pytest.approx(1.0, abs=1e-5)


def test_output_errors_fall_to_zero_and_are_measured_on_request_only():
    data = batches(1, 200)
    assert measure(data)[1]["layers.0.attn"].gate.errors is None
    _, tables = measure(data, measure_errors=True)
    errors = tables["layers.0.attn"].gate.errors[0]
    assert errors[0] > errors[1] > errors[3]
    assert errors[3] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("selector", [Fraction(), TopK(), Threshold()])
def test_every_selector_has_a_grid_of_rising_density(selector):
    config = GateConfig(gate_dim=32, block_size=SIZE, selector=selector)
    store, tables = measure(batches(1, 200), config, grid=None)
    for name, table in tables.items():
        densities = table.gate.densities[0]
        assert list(densities) == sorted(densities)
        assert densities[-1] == pytest.approx(1.0)
        store.get(name).curve = table.gate
    store.set_budget(density=0.5)
    again = tabulate(
        PlantedModel().run, store, batches(1, 200), grid=[float(store.get(name).budget_at(200)[0])]
    )
    assert again[name].gate.densities[0][0] == pytest.approx(0.5, abs=0.12)


def test_head_densities_average_to_the_density():
    _, tables = measure(batches(1, 256))
    table = tables["layers.0.attn"]
    for place, row in enumerate(table.head_densities):
        assert sum(row) / len(row) == pytest.approx(table.gate.densities[0][place])


def test_block_maps_show_the_longest_sequence():
    _, tables = measure(batches(2, 128, 512))
    block_map = tables["layers.0.attn"].block_map
    assert len(block_map.scores) == len(block_map.oracle) == 512 // BLOCK
    assert block_map.scores[0][5] == 0.0


def test_windows_reach_from_none_to_all():
    for blocks in (1, 2, 5, 64):
        windows = control_windows(blocks)
        assert windows[0] == 0
        assert windows[-1] >= blocks
        assert windows == sorted(set(windows))


@pytest.mark.parametrize("lengths", [(960, 1120), (1120, 960)])
def test_every_window_counts_lengths_that_have_fewer_windows(lengths):
    # 60 and 70 blocks: windows end at 64 and at 128, in one bucket.
    _, tables = measure(batches(len(lengths), *lengths))
    for table in tables.values():
        assert table.control.lengths[-1] == 1040
        assert table.control.budgets[-2:] == (64.0, 128.0)
        for row in (*table.control.densities, *table.control.captured_mass):
            assert list(row) == pytest.approx(sorted(row), abs=1e-6)
            assert row[-1] == pytest.approx(1.0, abs=1e-5)
        assert table.control.mass_at_density(1040, 1.0) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("sides", [(3, 5), (5, 3), (2, 3, 9), (5, 2, 9, 3)])
def test_control_adds_up_what_each_batch_keeps_in_each_window(sides):
    sums, expected, pairs = CurveSums(1, 1), dict.fromkeys(control_windows(max(sides)), 0), 0
    for side in sides:
        place = torch.arange(side)
        visible = place[:, None] >= place
        distance, sink = (place[:, None] - place).clamp(min=0), visible & (place == 0)
        mass = visible / visible.sum(-1, keepdim=True)
        sums.add_rows(side, mass[None, None], visible)
        sums.add_control(mass[None, None], visible, sink, distance)
        pairs += int(visible.sum())
        for window in expected:
            expected[window] += int((visible & ((distance < window) | sink)).sum())
    curve = curve_of("control", "sink_local", windows_of([sums]), [sums])
    assert curve["budgets"] == list(map(float, expected))
    assert curve["densities"][0] == pytest.approx([kept / pairs for kept in expected.values()])
    assert curve["captured_mass"][0][-1] == pytest.approx(1.0)


def test_data_that_reaches_no_site_is_named():
    store = GateStore(CONFIG)
    with pytest.raises(CalibrationDataError, match="no attention site"):
        tabulate(lambda batch, handler: None, store, [{}])


def test_infinite_keys_are_named():
    with pytest.raises(CalibrationDataError, match=r"layers\.1\.attn"):
        measure([{**batches(1, 200)[0], "poison": torch.tensor(1)}])


def test_measuring_changes_no_gate():
    store, _ = measure(batches(1, 200))
    before = {key: value.clone() for key, value in store.state_dict().items()}
    tabulate(PlantedModel().run, store, batches(2, 200), grid=GRID)
    for key, value in store.state_dict().items():
        assert torch.equal(value, before[key])
