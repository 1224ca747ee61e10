"""Targets: the true map, pooled as the gate pools, against a plain softmax."""

import dataclasses

import pytest
import torch
from torch import nn

from seer_compile.calibration.targets import attention_mass, gate_target, sample_rows
from seer_compile.config import GateConfig
from seer_compile.types import BlockSize, SiteInputs, Visibility
from support.inputs import attention_inputs, key_padding

CONFIG = GateConfig(
    block_size=BlockSize(query=16, key=16),
    query_sub_block=8,
    key_sub_block=8,
    gate_dim=16,
    sharing="none",
)


def inputs_of(visibility=None, **sizes):
    tensors = attention_inputs(**sizes)
    return SiteInputs(
        name="site",
        query=tensors.query,
        key=tensors.key,
        value=tensors.value,
        scale=tensors.scale,
        visibility=visibility or Visibility(upper=0),
    )


def probabilities(inputs):
    """Return ``Float64[b h q k]``; rows that read nothing are zero."""
    groups = inputs.query.shape[1] // inputs.key.shape[1]
    key = inputs.key.double().repeat_interleave(groups, 1)
    logits = inputs.query.double() @ key.mT * inputs.scale
    offsets = torch.arange(key.shape[-2]) - torch.arange(logits.shape[-2])[:, None]
    readable = (offsets <= inputs.visibility.upper)[None, None]
    if inputs.visibility.key_padding is not None:
        readable = readable & inputs.visibility.key_padding[:, None, None]
    return logits.masked_fill(~readable, float("-inf")).softmax(-1).nan_to_num(0.0)


def by_units(rows, unit):
    return nn.functional.pad(rows, (0, 0, 0, -rows.shape[-2] % unit)).unflatten(-2, (-1, unit))


def by_blocks(columns, unit):
    return nn.functional.pad(columns, (0, -columns.shape[-1] % unit)).unflatten(-1, (-1, unit))


@pytest.mark.parametrize("length", [1, 7, 16, 77])
@pytest.mark.parametrize("padding", [None, [77, 30]])
def test_mass_target_is_the_mean_row_of_a_sub_block(length, padding):
    visibility = Visibility(upper=0)
    if padding:
        real = [min(count, length) for count in padding]
        visibility = Visibility(upper=0, key_padding=key_padding(real, length))
    inputs = inputs_of(visibility, batch=2, heads=4, kv_heads=2, q_len=length)
    target, counts = gate_target(inputs, CONFIG, kind="mass")
    summed = by_units(by_blocks(probabilities(inputs), 16).sum(-1), 8).sum(-2)
    totals = summed.sum(-1, keepdim=True)
    expected = torch.where(totals > 0, summed / totals.clamp(min=1e-30), 0.0)
    torch.testing.assert_close(target.double(), expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(counts, totals[..., 0] > 0)


def test_max_target_is_the_published_map():
    config = GateConfig.paper()
    inputs = inputs_of(heads=4, kv_heads=2, q_len=150)
    target, counts = gate_target(inputs, config, kind="max")
    largest = by_units(by_blocks(probabilities(inputs), 64).amax(-1), 64).amax(-2)
    expected = largest / largest.sum(-1, keepdim=True)
    torch.testing.assert_close(target.double(), expected, rtol=1e-4, atol=1e-6)
    assert counts.all()


def test_chosen_rows_equal_the_same_rows_of_all():
    inputs, rows = inputs_of(q_len=100), torch.tensor([1, 4, 12])
    target, counts = gate_target(inputs, CONFIG, kind="mass")
    chosen, chosen_counts = gate_target(inputs, CONFIG, kind="mass", rows=rows)
    assert torch.equal(chosen, target[:, :, rows])
    assert torch.equal(chosen_counts, counts[:, :, rows])


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_padded_queries_do_not_count(side):
    padding = key_padding([40], 64, side=side)
    inputs = inputs_of(Visibility(upper=0, key_padding=padding), q_len=64)
    _, counts = gate_target(inputs, CONFIG, kind="mass")
    real = padding.unflatten(-1, (8, 8)).any(-1)
    assert torch.equal(counts, real[:, None].expand_as(counts))


def test_rows_with_nan_count_so_that_the_loss_shows_them():
    inputs = inputs_of(q_len=64)
    inputs.key[..., 20, 0] = float("nan")
    target, counts = gate_target(inputs, CONFIG, kind="mass")
    assert counts[:, :, -1].all()
    assert target[:, :, -1].isnan().any()


def test_captured_mass_map_averages_over_the_queries_of_a_block():
    inputs = inputs_of(q_len=70)
    found = attention_mass(inputs, query_unit=16, key_unit=16)
    totals = by_units(by_blocks(probabilities(inputs), 16).sum(-1), 16).sum(-2)
    sizes = torch.tensor([16.0] * 4 + [6.0])[:, None]
    torch.testing.assert_close(found.double(), totals / sizes, rtol=1e-4, atol=1e-6)


def test_sampled_rows_are_distinct_ascending_and_depend_on_the_key_alone():
    cpu = torch.device("cpu")
    state = torch.get_rng_state()
    rows = sample_rows(500, 64, key="0:3:0:a", device=cpu)
    torch.manual_seed(99)
    assert torch.equal(rows, sample_rows(500, 64, key="0:3:0:a", device=cpu))
    torch.set_rng_state(state)
    assert not torch.equal(rows, sample_rows(500, 64, key="0:4:0:a", device=cpu))
    assert (rows.diff() > 0).all()
    assert rows.max() < 500
    assert sample_rows(64, 64, key="x", device=cpu) is None


@pytest.mark.gpu
def test_choosing_rows_does_not_wait_for_the_device():
    choices = {"total": 500, "wanted": 64, "key": "0:3:0:a"}
    device = torch.device("cuda")
    # The first call takes the memory that later ones find.
    sample_rows(**choices, device=device)
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)
    busy = torch.cuda.Event()
    busy.record()
    rows = sample_rows(**choices, device=device)
    assert not busy.query()
    assert torch.equal(rows.cpu(), sample_rows(**choices, device=torch.device("cpu")))


@pytest.mark.parametrize("sharpness", [0.5, 1.6, 40.0])
@pytest.mark.parametrize("sharing", ["gate", "selection"])
def test_a_sharper_target_holds_the_powers_of_its_shares(sharpness, sharing):
    inputs = inputs_of(batch=1, heads=4, kv_heads=2, q_len=77)
    config = dataclasses.replace(CONFIG, sharing=sharing)
    plain, counts = gate_target(inputs, config, kind="mass")
    sharp, same = gate_target(inputs, config, kind="mass", sharpness=sharpness)
    expected = plain.double().pow(sharpness)
    expected /= expected.sum(-1, keepdim=True)
    torch.testing.assert_close(sharp.double(), expected, rtol=1e-4, atol=1e-7)
    assert torch.equal(counts, same)


def test_sharpening_keeps_rows_of_nothing_and_of_nan():
    from seer_compile.calibration.targets import _sharpened

    target = torch.tensor([[0.0, 0.0], [0.25, 0.75], [torch.nan, 0.5], [1e-30, 3e-30]])
    sharp = _sharpened(target, 2.0)
    assert torch.equal(sharp[0], torch.zeros(2))
    torch.testing.assert_close(sharp[1], torch.tensor([0.1, 0.9]))
    assert sharp[2].isnan().all()
    torch.testing.assert_close(sharp[3], torch.tensor([0.1, 0.9]))
