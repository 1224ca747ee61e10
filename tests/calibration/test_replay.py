"""Updates that are replayed change gates exactly as updates that are issued one by one."""

import dataclasses
import logging
from collections import Counter

import pytest
import torch

from seer_compile.calibration import replay, site_trainer
from seer_compile.calibration.replay import UpdateReplay
from seer_compile.calibration.train import fit
from seer_compile.config import CalibrationConfig
from seer_compile.gate_store import GateStore
from seer_compile.types import SiteInputs, Visibility
from support.inputs import generator
from support.state import default_dtype

TRAINING = CalibrationConfig(steps=12, warmup_steps=3, holdout_batches=1, rows_per_step=64)
HEADS, KV_HEADS, DIM = 4, 2, 64


def inputs_of(seed, length, device, **visibility):
    draw = generator(seed)
    query, key, value = (
        torch.randn(1, heads, length, DIM, generator=draw, dtype=torch.float32).to(
            device, torch.bfloat16
        )
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    return SiteInputs(
        name=f"site {seed % 2}",
        query=query,
        key=key,
        value=value,
        scale=DIM**-0.5,
        visibility=Visibility(upper=0, **visibility),
    )


def run(batch, handler, device="cuda"):
    """Two sites; a batch is a seed, a length, and whether its last tokens are padding."""
    seed, length = int(batch["seed"]), int(batch["length"])
    hidden = {}
    if int(batch.get("padded", 0)):
        padding = torch.ones(1, length, dtype=torch.bool, device=device)
        padding[:, -100:] = False
        hidden = {"key_padding": padding}
    return [handler(inputs_of(2 * seed + site, length, device, **hidden)) for site in range(2)]


def data(*batches):
    return [
        {"seed": torch.tensor(seed), **{name: torch.tensor(part) for name, part in batch.items()}}
        for seed, batch in enumerate(batches)
    ]


LENGTHS = data(*({"length": (512, 384)[place % 2]} for place in range(9)))
PADDED = data(*({"length": 512, "padded": place % 2} for place in range(9)))


def calibrated(batches, monkeypatch, *, replays):
    """Return weights and losses, and how often updates were issued."""
    issued = Counter()
    train = site_trainer.GateTrainer._train

    def counted(trainer, gate, inputs, rows):
        issued[inputs.name] += 1
        return train(trainer, gate, inputs, rows)

    with monkeypatch.context() as patch:
        patch.setattr(site_trainer.GateTrainer, "_train", counted)
        if not replays:
            patch.setattr(replay, "_LARGEST", 0)
        store = GateStore()
        report = fit(run, store, batches, TRAINING, progress=False)
    weights = {name: value.clone() for name, value in store.state_dict().items()}
    return weights, [site.losses for site in report.sites], issued


@pytest.mark.gpu
@pytest.mark.parametrize("batches", [LENGTHS, PADDED], ids=["lengths", "padded"])
def test_gates_have_the_bits_of_updates_issued_one_by_one(batches, monkeypatch):
    weights, losses, issued = calibrated(batches, monkeypatch, replays=True)
    expected, expected_losses, all_issued = calibrated(batches, monkeypatch, replays=False)
    assert losses == expected_losses
    for name, value in expected.items():
        assert torch.equal(weights[name], value), name
    assert set(all_issued.values()) == {TRAINING.steps}
    # Two lengths are two kinds, three issued updates each; padded batches are never replayed.
    by_lengths, by_padding = 3 + 3, 3 + TRAINING.steps // 2
    assert set(issued.values()) == {by_lengths if batches is LENGTHS else by_padding}


@pytest.mark.gpu
def test_what_cannot_be_recorded_is_issued_and_said(monkeypatch, caplog):
    train = site_trainer.GateTrainer._train

    def waiting(trainer, gate, inputs, rows):
        found = train(trainer, gate, inputs, rows)
        assert float(found[0]) > 0  # a recording cannot wait for a number
        return found

    monkeypatch.setattr(site_trainer.GateTrainer, "_train", waiting)
    with caplog.at_level(logging.WARNING, "seer_compile"):
        weights, losses, _ = calibrated(LENGTHS, monkeypatch, replays=True)
    assert [
        record.message for record in caplog.records if "could not be recorded" in record.message
    ]
    monkeypatch.undo()
    expected, expected_losses, _ = calibrated(LENGTHS, monkeypatch, replays=False)
    assert losses == expected_losses
    for name, value in expected.items():
        assert torch.equal(weights[name], value), name
    # The process goes on as before: random numbers, and an allocator that counts no recording.
    assert torch.rand(8, device="cuda").unique().numel() == 8
    torch.cuda.empty_cache()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_forward_under_modes_and_defaults_of_its_own_is_trained_alike(device):
    def forward(batch, handler):
        return run(batch, handler, device)

    def in_inference_mode(batch, handler):
        with torch.inference_mode():
            return forward(batch, handler)

    plain, store = GateStore(), GateStore()
    fit(forward, plain, LENGTHS, TRAINING, progress=False)
    with default_dtype(torch.bfloat16):
        fit(in_inference_mode, store, LENGTHS, TRAINING, progress=False)
    state, expected = store.state_dict(), plain.state_dict()
    assert state.keys() == expected.keys()
    for name, value in state.items():
        assert torch.equal(value, expected[name]), name


def step(length, first, names):
    """Return the operands of sites in the order of their calls."""
    return [
        dataclasses.replace(inputs_of(first + place, length, "cuda"), name=name)
        for place, name in enumerate(names)
    ]


@pytest.mark.gpu
def test_results_hold_while_others_are_replayed():
    """The site recorded last runs first: its result may lie where another keeps something else."""

    def update(gate, inputs, rows):
        large = inputs.query.float().repeat(1, 1, 8, 1) @ inputs.query.float().transpose(-1, -2)
        return torch.stack([large.amax(), large.sum(), *(inputs.value.float().sum(),) * 4])

    repeated, weights = UpdateReplay(update), torch.nn.Linear(2, 2).cuda()
    names = ["decoder", "encoder"]
    for place in range(12):
        order = names[:1] if place < 4 else names[::-1]
        sites = step(512, place, order)
        found = [repeated(weights, site, None) for site in sites]
        for result, site in zip(found, sites, strict=True):
            torch.testing.assert_close(result, update(None, site, None))
    assert len(repeated._graphs) == 2


@pytest.mark.gpu
def test_graphs_of_all_sites_take_the_memory_of_one():
    def reserved_after(sites):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        repeated = UpdateReplay(lambda gate, inputs, rows: large_update(inputs))
        for place in range(3):
            for inputs in step(2048, place, [f"site {number}" for number in range(sites)]):
                repeated(torch.nn.Linear(2, 2), inputs, None)
        torch.cuda.synchronize()
        assert len(repeated._graphs) == sites
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved() - before

    def large_update(inputs):
        logits = inputs.query.float() @ inputs.query.float().transpose(-1, -2)
        return torch.stack([logits.exp().softmax(-1).sum()] * 6)

    reserved_after(1)
    one, many = reserved_after(1), reserved_after(8)
    assert many < 1.5 * one


def test_on_a_cpu_every_update_is_issued():
    seen = []

    def update(gate, inputs, rows):
        seen.append(inputs)
        return torch.zeros(6)

    repeated, one = UpdateReplay(update), inputs_of(0, 64, "cpu")
    for _ in range(5):
        repeated(None, one, None)
    assert len(seen) == 5
    assert all(part is one for part in seen)
