"""Untrained gates are as sure of themselves as fits, and rank as they did."""

import dataclasses

import pytest
import torch

from seer_compile.calibration.targets import gate_target
from seer_compile.calibration.temperature import fit_temperature
from seer_compile.config import GateConfig
from seer_compile.gate import AttnGate
from seer_compile.types import SHARINGS, BlockSize, SiteInputs, Visibility
from support.inputs import generator, key_padding

HEADS, KV_HEADS, DIM, TOKENS = 4, 2, 16, 200
CONFIG = GateConfig(
    query_sub_block=2, key_sub_block=4, gate_dim=16, block_size=BlockSize(query=16, key=16)
)


def site(sharpness, *, padding=None, seed=0):
    """Return operands whose neighbouring tokens are alike; sharpness scales the logits."""
    draw = generator(seed)

    def tokens(heads):
        coarse = torch.randn(2, heads, -(-TOKENS // 8), DIM, generator=draw)
        fine = 0.3 * torch.randn(2, heads, TOKENS, DIM, generator=draw)
        return coarse.repeat_interleave(8, 2)[:, :, :TOKENS] + fine

    return SiteInputs(
        name="site",
        query=sharpness * tokens(HEADS),
        key=tokens(KV_HEADS),
        value=tokens(KV_HEADS),
        scale=DIM**-0.5,
        visibility=Visibility(upper=0, key_padding=padding),
    )


def gate_for(sharing="gate"):
    return AttnGate(HEADS, KV_HEADS, DIM, config=dataclasses.replace(CONFIG, sharing=sharing))


def losses(gate, inputs):
    """Return ``Float64[a]``: cross-entropy of each gate head over all rows, by hand."""
    target, counts = gate_target(inputs, gate.config, kind="mass")
    with torch.no_grad():
        logs = gate.row_log_mass(inputs.query, inputs.key, inputs.scale, inputs.visibility)
    rows = -(target.double() * logs.double()).sum(-1) * counts
    return rows.sum((0, 2))


def factors(gate, config):
    fresh = AttnGate(HEADS, KV_HEADS, DIM, config=config)
    heads = gate.query_weight.shape[0]
    query = gate.query_weight.flatten(1).norm(dim=1) / fresh.query_weight.flatten(1).norm(dim=1)
    key = gate.key_weight.flatten(1).norm(dim=1) / fresh.key_weight.flatten(1).norm(dim=1)
    return query * key.repeat_interleave(heads // len(key))


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("sharpness", [0.2, 1.0, 20.0])
def test_no_factor_fits_better(sharing, sharpness):
    inputs, gate = site(sharpness), gate_for(sharing)
    plain = losses(gate, inputs)
    fit_temperature(gate, inputs)
    fitted = losses(gate, inputs)
    assert bool((fitted <= plain + 1e-6).all())
    for step in (2**-0.25, 2**0.25):
        other = gate_for(sharing)
        with torch.no_grad():
            other.query_weight.copy_(gate.query_weight * step)
            other.key_weight.copy_(gate.key_weight)
        assert bool((losses(other, inputs) >= fitted - 1e-6).all())


def test_sharp_attention_is_made_less_sure_and_keeps_its_order():
    inputs, gate = site(20.0), gate_for()
    visible = (inputs.query, inputs.key, inputs.scale, inputs.visibility)
    with torch.no_grad():
        before = gate.row_log_mass(*visible)
        fit_temperature(gate, inputs)
        after = gate.row_log_mass(*visible)
    assert bool((factors(gate, gate.config) < 1).all())
    # Differences of logits shrink by the same factor: no pair of blocks changes places.
    shown = before > -1e6
    middle = before.masked_fill(~shown, 0.0), after.masked_fill(~shown, 0.0)
    change = [part - part.sum(-1, keepdim=True) / shown.sum(-1, keepdim=True) for part in middle]
    by_head = factors(gate, gate.config)[:: HEADS // KV_HEADS]
    expected = change[0] * by_head[None, :, None, None]
    torch.testing.assert_close(
        change[1].masked_fill(~shown, 0.0),
        expected.masked_fill(~shown, 0.0),
        rtol=1e-3,
        atol=1e-3,
    )


def test_both_sides_take_equal_parts():
    gate = gate_for("none")
    fresh = gate.query_weight.detach().clone(), gate.key_weight.detach().clone()
    fit_temperature(gate, site(20.0))
    for weight, before in zip((gate.query_weight, gate.key_weight), fresh, strict=True):
        ratio = weight.flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1)
        torch.testing.assert_close(ratio.square(), factors(gate, gate.config))
    # Steps of a fourth root of two.
    steps = 4 * factors(gate, gate.config).log2()
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)


def test_padding_does_not_matter():
    padded = site(5.0, padding=key_padding([TOKENS, 120], TOKENS))
    poisoned = site(5.0, padding=key_padding([TOKENS, 120], TOKENS))
    poisoned.query[1, :, 120:] = 1e4
    poisoned.key[1, :, 120:] = -1e4
    one, other = gate_for(), gate_for()
    fit_temperature(one, padded)
    fit_temperature(other, poisoned)
    assert torch.equal(one.query_weight, other.query_weight)


def test_what_reads_nothing_stays_as_it_is():
    inputs, gate = site(5.0, padding=key_padding([0, 0], TOKENS)), gate_for()
    before = gate.query_weight.detach().clone()
    fit_temperature(gate, inputs)
    assert torch.equal(gate.query_weight, before)


def test_rows_are_drawn_by_the_seed(monkeypatch):
    monkeypatch.setattr("seer_compile.calibration.temperature._ROWS", 8)
    inputs, found = site(3.0), []
    for seed in ("a", "a", "b", "c", "d"):
        gate = gate_for("none")
        fit_temperature(gate, inputs, seed=seed)
        found.append(factors(gate, gate.config))
    assert torch.equal(found[0], found[1])
    assert not all(torch.equal(found[0], other) for other in found[2:])


def test_a_sharp_site_can_be_given_more_blocks():
    inputs = site(40.0)
    reached = []
    for is_fitted in (False, True):
        gate = gate_for()
        if is_fitted:
            fit_temperature(gate, inputs)
        budget = torch.full((gate.selection_heads,), 1 - 1e-12, dtype=torch.float64)
        reached.append(int(gate.select(inputs, budget).counts.sum()))
    assert reached[1] > 1.2 * reached[0]
