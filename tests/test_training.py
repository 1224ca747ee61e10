"""Training a gated model: gradients, checkpointing, adapters, and gates that learn along."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import seer_compile
from seer_compile.config import CalibrationConfig
from seer_compile.errors import DenseFallbackWarning, ModelStateError
from support.models import Decoder, architecture, decoder, token_ids
from support.rewriting import answer_sparsely

SITES = ("layers.0", "layers.1")


class Checkpointed(Decoder):
    """A decoder that keeps nothing of its layers; ``None`` keeps all."""

    use_reentrant: bool | None = None

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            if self.use_reentrant is None:
                x = x + layer(self.norm(x))
            else:
                x = x + checkpoint(
                    lambda y, layer=layer: layer(self.norm(y)),
                    x,
                    use_reentrant=self.use_reentrant,
                )
        return self.head(x)


def checkpointed(use_reentrant):
    torch.manual_seed(0)
    model = Checkpointed()
    model.use_reentrant = use_reentrant
    return model


def optimized(model, *, example=None, mass=0.3, **options):
    options.setdefault("inner", "aot_eager")
    seer_compile.optimize(
        model, zero_shot=True, example=token_ids(80) if example is None else example, **options
    )
    answer_sparsely(model.seer_gates)
    seer_compile.set_budget(model, mass=mass)
    return model


def gradients(model, *args, **kwargs):
    """Output, and gradients by name, of one step."""
    model.zero_grad()
    output = model(*args, **kwargs)
    output = getattr(output, "logits", output)
    output.float().square().mean().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return output.detach(), grads


def assert_same(got, expected):
    assert torch.equal(got[0], expected[0])
    assert got[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert torch.equal(got[1][name], gradient), name


@pytest.fixture
def _one_thread():
    """Add up in one order: Inductor's threads add to an embedding as they come."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointed_sites_are_sparse_with_the_gradients_of_plain_ones(use_reentrant, inner):
    plain = optimized(checkpointed(None), strict=True, inner=inner)
    model = optimized(checkpointed(use_reentrant), strict=True, inner=inner)
    for length in (300, 260):
        tokens = token_ids(length)
        assert_same(gradients(model, tokens), gradients(plain, tokens))
    report = model.seer_report()
    assert {row.site.decision for row in report.rows} == {"sparse"}
    # Once in the forward, once more where the backward makes the layer again.
    assert report.calls == {name: {"sparse": 4} for name in SITES}
    assert plain.seer_report().calls == {name: {"sparse": 2} for name in SITES}


@pytest.mark.slow
def test_hugging_face_checkpointing_is_sparse_with_padding():
    tokens, mask = token_ids(150, batch=2), torch.ones(2, 150, dtype=torch.int64)
    mask[0, :40] = 0
    inputs = {"input_ids": tokens, "attention_mask": mask, "use_cache": False}
    results = []
    for saves in (False, True):
        model = architecture("llama").train()
        if saves:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        optimized(model, example=inputs, strict=True)
        results.append(gradients(model, **inputs))
        rows = model.seer_report().rows
        assert {(r.site.decision, r.site.visibility) for r in rows} == {
            ("sparse", "causal + key padding")
        }
    assert_same(*results)


def test_dropout_in_training_stays_dense_and_says_so():
    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(16, 48)

        def forward(self, x):
            q, k, v = (p.unflatten(-1, (2, 8)).transpose(1, 2) for p in self.qkv(x).chunk(3, -1))
            rate = 0.1 if self.training else 0.0
            return nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=rate)

    model, x = Dropping(), torch.randn(1, 100, 16)
    seer_compile.optimize(model, zero_shot=True, inner="aot_eager")
    with pytest.warns(DenseFallbackWarning, match="dropout"):
        model(x)
    model.eval()(x)
    decisions = [row.site.decision for row in model.seer_report().rows]
    assert decisions == ["dense", "sparse"]


def test_training_with_sparsity_on_lowers_the_loss():
    model = optimized(decoder().train())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = token_ids(200, batch=2)
    losses = []
    for _ in range(12):
        logits = model(tokens)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert set(model.seer_report().calls["layers.0"]) == {"sparse"}


# --- gates that learn along -----------------------------------------------------------------


def test_the_gates_loss_is_that_of_calibration_and_reaches_the_gates_alone():
    from seer_compile.calibration.losses import backward
    from seer_compile.calibration.targets import gate_target
    from seer_compile.types import SiteInputs, Visibility

    model, tokens = optimized(decoder()), token_ids(200)
    model.seer_gates.requires_grad_(True)
    with seer_compile.distillation(model) as sites:
        output = model(tokens)
    losses = sites.losses()
    assert tuple(losses) == SITES
    sites.loss().backward()
    assert all(p.grad is None for n, p in model.named_parameters() if "seer_gates" not in n)
    gate = model.seer_gates.get("layers.0")
    got = gate.query_weight.grad.clone(), gate.key_weight.grad.clone()

    layer = model.layers[0]
    x = layer.qkv(model.norm(model.embed(tokens)))
    q, k, v = (part.view(1, 200, 4, -1).transpose(1, 2).detach() for part in x.chunk(3, -1))
    inputs = SiteInputs(
        name="layers.0", query=q, key=k, value=v, scale=8**-0.5, visibility=Visibility(upper=0)
    )
    gate.zero_grad()
    target, counts = gate_target(inputs, gate.config, kind="mass")
    expected = backward(gate, inputs, target, counts, kind="kl")
    assert torch.allclose(losses["layers.0"], expected, atol=1e-6)
    for gradient, parameter in zip(got, gate.parameters(), strict=True):
        # The mean over the two sites halves each one's gradient.
        assert torch.allclose(2 * gradient, parameter.grad, rtol=1e-4, atol=1e-7)
    assert output.requires_grad


def test_gates_and_model_learn_together():
    model, tokens = optimized(decoder().train()), token_ids(256, batch=2)
    model.seer_gates.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    tasks, gates = [], []
    for _ in range(10):
        with seer_compile.distillation(model) as sites:
            logits = model(tokens)
        task = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        gate = sites.loss()
        optimizer.zero_grad()
        (task + gate).backward()
        optimizer.step()
        tasks.append(task.item())
        gates.append(gate.item())
    assert tasks[-1] < tasks[0]
    assert gates[-1] < gates[0]
    assert model.seer_report().graphs == 1


def test_rows_are_sampled_anew_in_every_step_and_the_same_in_every_run():
    def run():
        model = optimized(decoder())
        model.seer_gates.requires_grad_(True)
        values = []
        for _ in range(2):
            with seer_compile.distillation(model, config=CalibrationConfig(rows_per_step=3)) as s:
                model(token_ids(200))
            values.append(s.loss().item())
        return values

    first, second = run(), run()
    assert first == second
    assert first[0] != first[1]


def test_other_models_calls_are_not_seen():
    model, other = optimized(decoder()), optimized(decoder())
    model.seer_gates.requires_grad_(True)
    with seer_compile.distillation(model) as sites:
        other(token_ids(100))
    with pytest.raises(ModelStateError, match="no site was called"):
        sites.loss()
    with seer_compile.distillation(model) as sites:
        model(token_ids(100))
        model(token_ids(150))
        other(token_ids(100))
    assert tuple(sites.losses()) == SITES


def test_frozen_gates_are_refused():
    model = optimized(decoder())
    with seer_compile.distillation(model) as sites:
        model(token_ids(100))
    with pytest.raises(ModelStateError, match="frozen"):
        sites.loss()
    with (
        pytest.raises(ModelStateError, match="not optimized"),
        seer_compile.distillation(decoder()),
    ):
        pass


# --- adapters --------------------------------------------------------------------------------


def lora(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, config)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["adapter", "optimize"])
def test_adapters_train_through_sparse_attention(first):
    inputs = {"input_ids": token_ids(150), "use_cache": False}
    base = architecture("llama")
    if first == "adapter":
        model = optimized(lora(base), example=inputs)
    else:
        model = lora(optimized(base, example=inputs))
    model.train()
    labels = inputs["input_ids"]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert trained
    assert all("lora_" in name for name in trained)
    calls = seer_compile.seer_report(model).calls
    assert calls == {f"model.layers.{n}.self_attn": {"sparse": 4} for n in (0, 1)}
    generated = model.generate(input_ids=labels, max_new_tokens=2, do_sample=False)
    assert generated.shape == (1, 152)
    assert seer_compile.seer_report(model).calls["model.layers.0.self_attn"]["sparse"] == 5
