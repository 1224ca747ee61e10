"""The gate loss: right at the optimum, the same in chunks, finite on degenerate rows."""

import pytest
import torch

from seer_compile.calibration.losses import backward, row_losses
from seer_compile.calibration.schedule import learning_rate
from seer_compile.calibration.targets import gate_target
from seer_compile.config import CalibrationConfig, GateConfig
from seer_compile.gate import AttnGate
from seer_compile.types import BlockSize, SiteInputs, Visibility
from support.inputs import attention_inputs, key_padding, normal

CONFIG = GateConfig(
    block_size=BlockSize(query=16, key=16),
    query_sub_block=8,
    key_sub_block=8,
    gate_dim=16,
    sharing="none",
)


def site(visibility=None, **sizes):
    tensors = attention_inputs(**sizes)
    inputs = SiteInputs(
        name="site",
        query=tensors.query,
        key=tensors.key,
        value=tensors.value,
        scale=tensors.scale,
        visibility=visibility or Visibility(upper=0),
    )
    gate = AttnGate(
        inputs.query.shape[1], inputs.key.shape[1], inputs.query.shape[-1], config=CONFIG
    )
    return gate, inputs


def loss_and_gradients(gate, inputs, *, kind="kl", target="mass", **options):
    gate.zero_grad()
    wanted, counts = gate_target(inputs, gate.config, kind=target)
    with torch.no_grad():
        loss = backward(gate, inputs, wanted, counts, kind=kind, **options)
    return loss, [weight.grad for weight in gate.parameters()]


@pytest.mark.parametrize("kind", ["kl", "mse"])
def test_loss_is_zero_exactly_at_the_target_and_positive_elsewhere(kind):
    target = normal(1, 2, 5, 7).softmax(-1)
    at_target = row_losses(target.log(), target, kind)
    torch.testing.assert_close(at_target, torch.zeros(1, 2, 5), rtol=0, atol=1e-6)
    elsewhere = row_losses(normal(1, 2, 5, 7, seed=1).log_softmax(-1), target, kind)
    assert (elsewhere > 1e-3).all()


@pytest.mark.parametrize("kind", ["kl", "mse"])
def test_loss_and_gradient_equal_plain_autograd(kind):
    visibility = Visibility(upper=0, key_padding=key_padding([77, 30], 77))
    gate, inputs = site(visibility, batch=2, heads=4, kv_heads=2, q_len=77)
    loss, gradients = loss_and_gradients(gate, inputs, kind=kind)
    target, counts = gate_target(inputs, CONFIG, kind="mass")
    log_mass = gate.row_log_mass(inputs.query, inputs.key, inputs.scale, visibility)
    expected = row_losses(log_mass, target, kind)[counts].mean()
    by_autograd = torch.autograd.grad(expected, list(gate.parameters()))
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-4, atol=1e-6)
    for found, wanted in zip(gradients, by_autograd, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("logits_bytes", [1, 900, 5000, 40_000])
def test_chunks_change_neither_loss_nor_gradient(logits_bytes):
    gate, inputs = site(batch=2, heads=4, kv_heads=2, q_len=77)
    loss, gradients = loss_and_gradients(gate, inputs)
    expected = (loss.clone(), [gradient.clone() for gradient in gradients])
    loss, gradients = loss_and_gradients(gate, inputs, logits_bytes=logits_bytes)
    torch.testing.assert_close(loss, expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients, expected[1], rtol=1e-4, atol=1e-6)


def degenerate():
    yield "one token", site(q_len=1)
    yield "one query behind a cache", site(Visibility(upper=40), q_len=1, k_len=41)
    yield "all padding", site(Visibility(upper=0, key_padding=key_padding([0], 40)), q_len=40)
    padded = Visibility(upper=0, key_padding=key_padding([3, 40], 40))
    yield "padded rows", site(padded, batch=2, q_len=40)
    gate, inputs = site(q_len=50)
    inputs.query.zero_()
    yield "all scores equal", (gate, inputs)
    gate, inputs = site(q_len=50)
    inputs.query.mul_(1e4)
    yield "a single key wins", (gate, inputs)
    gate, inputs = site(Visibility(upper=0, key_padding=key_padding([32], 48)), q_len=48)
    for tensor in (inputs.query, inputs.key):
        tensor[..., :16, :] = float("nan")
    yield "NaN in padding", (gate, inputs)
    yield "nothing visible", site(Visibility(upper=-100), q_len=40)


@pytest.mark.parametrize("case", list(degenerate()), ids=lambda case: case[0])
@pytest.mark.parametrize("kind", ["kl", "mse"])
@pytest.mark.parametrize("target", ["mass", "max"])
def test_degenerate_rows_give_finite_loss_and_gradient(case, kind, target):
    loss, gradients = loss_and_gradients(*case[1], kind=kind, target=target)
    assert loss.isfinite()
    for gradient in gradients:
        assert gradient.isfinite().all()


def test_infinite_keys_give_a_loss_that_is_not_finite():
    gate, inputs = site(q_len=50)
    inputs.key[..., 10, :] = float("inf")
    loss, _ = loss_and_gradients(gate, inputs)
    assert not loss.isfinite()


def test_schedule_warms_up_then_falls_to_the_final_rate():
    config = CalibrationConfig(steps=100, warmup_steps=10, learning_rate=1e-3)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[9] == rates[10] == 1e-3
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(1e-5)
    short = CalibrationConfig(steps=1, warmup_steps=20, learning_rate=1e-3)
    assert learning_rate(0, short) == 1e-3
