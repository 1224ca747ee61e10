"""A site keeps its name, and its gate, through everything that happens to a model."""

from __future__ import annotations

import copy
import io
import json
import pickle
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import seer_compile
from seer_compile.config import CalibrationConfig
from seer_compile.errors import DenseFallbackWarning
from seer_compile.session import find_session
from support.models import Attention, architecture, decoder, token_ids
from support.rewriting import answer_sparsely

SITES = ("layers.0", "layers.1")
QUICK = CalibrationConfig(steps=2, warmup_steps=1, holdout_batches=1)
WORKER = Path(__file__).parent / "support" / "distributed_identity.py"


def optimized(model=None, example=None, **options):
    model = decoder() if model is None else model
    options.setdefault("inner", "eager")
    example = token_ids(80) if example is None else example
    seer_compile.optimize(model, zero_shot=True, example=example, **options)
    answer_sparsely(model.seer_gates)
    seer_compile.set_budget(model, mass=0.3)
    return model


def tell_apart(model):
    """Give every gate weights of its own, so that a mix-up shows in the output."""
    for number, (_, gate) in enumerate(model.seer_gates.items()):
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in gate.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def paths_of(model):
    return {name: set(paths) for name, paths in seer_compile.seer_report(model).calls.items()}


SPARSE = {name: {"sparse"} for name in SITES}


@torch.no_grad()
def test_recompiles_find_the_same_gates():
    model = optimized()
    gates = dict(model.seer_gates.items())
    for batch, length in ((1, 100), (1, 200), (3, 150), (2, 333)):
        model(token_ids(length, batch=batch))
    with torch.enable_grad():
        model(token_ids(120))
    model.train()(token_ids(130))
    assert model.seer_report().graphs >= 3
    assert {row.site.name for row in model.seer_report().rows} == set(SITES)
    after = dict(model.seer_gates.items())
    assert tuple(after) == SITES
    assert all(after[name] is gate for name, gate in gates.items())


@torch.no_grad()
def test_exported_sites_carry_the_same_names():
    model = optimized()
    program = seer_compile.export(model, (token_ids(100),))
    calls = [node for node in program.graph.nodes if "gated_attention" in str(node.target)]
    assert tuple(next(a for a in node.args if a in SITES) for node in calls) == SITES
    gates = {name.split(".")[2] for name in program.state_dict if "query_weight" in name}
    assert gates == {name.replace(".", "__") for name in SITES}


@torch.no_grad()
def test_module_called_several_times_has_one_gate():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.last = Attention(32, 4), Attention(32, 4)
            self.alias = self.shared

        def forward(self, x):
            return self.last(self.alias(self.shared(x)))

    torch.manual_seed(0)
    model, x = Twice().eval(), torch.randn(1, 200, 32)
    optimized(model, example=x)
    for length in (200, 150):
        model(x[:, :length])
    assert model.seer_gates.names() == ("shared", "last")
    assert model.seer_report().calls == {"shared": {"sparse": 4}, "last": {"sparse": 2}}
    for found in (model.seer_report(), seer_compile.explain(model, torch.randn(1, 100, 32))):
        assert found.shared_gates == {"shared": 2}
        assert "2 calls share the one gate of shared" in str(found)
        assert "gate of last" not in str(found)


@torch.no_grad()
def test_module_that_splits_heads_otherwise_from_call_to_call_is_half_dense():
    class Heads(nn.Module):
        def forward(self, x, heads):
            q = x.unflatten(-1, (heads, -1)).transpose(1, 2)
            return nn.functional.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared = Heads()

        def forward(self, x):
            return self.shared(self.shared(x, 2), 4)

    model, x = Twice().eval(), torch.randn(1, 200, 32)
    expected = model(x)
    seer_compile.set_budget(optimized(model, example=x), mass=1.0)
    with pytest.warns(DenseFallbackWarning, match="no gate of this name and shape"):
        got = model(x)
    assert torch.allclose(got, expected, atol=1e-5)
    assert model.seer_report().calls == {"shared": {"sparse": 1}}
    seer_compile.calibrate(model, [x] * 3, config=QUICK, density=0.9, progress=False)


@torch.no_grad()
@pytest.mark.parametrize("moment", ["before the first call", "after a call"])
def test_model_in_another_dtype_keeps_its_gates(moment):
    model = tell_apart(optimized())
    gates = dict(model.seer_gates.items())
    weights = {name: gate.query_weight.clone() for name, gate in gates.items()}
    if moment == "after a call":
        model(token_ids(200))
    model.to(torch.bfloat16)
    assert model(token_ids(200)).dtype is torch.bfloat16
    assert paths_of(model) == SPARSE
    for name, gate in model.seer_gates.items():
        assert gate is gates[name]
        assert torch.equal(gate.query_weight, weights[name])
    model.to(torch.float32)
    twin = tell_apart(optimized(decoder().to(torch.bfloat16).float()))
    assert torch.equal(model(token_ids(300)), twin(token_ids(300)))


@torch.no_grad()
def test_model_without_memory_gets_it_and_runs():
    with torch.device("meta"):
        model = decoder()
    seer_compile.optimize(model, zero_shot=True, inner="eager")
    model.to_empty(device="cpu")
    model.load_state_dict(decoder().state_dict())
    reference = seer_compile.optimize(decoder(), zero_shot=True, inner="eager")
    for one in (model, reference):
        one(token_ids(80))
        answer_sparsely(one.seer_gates)
    assert torch.equal(model(token_ids(200)), reference(token_ids(200)))
    assert model.seer_gates.names() == SITES


@torch.no_grad()
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_keep_names_and_have_gates_of_their_own(way):
    model, tokens = tell_apart(optimized()), token_ids(300)
    expected = model(tokens)
    if way == "deepcopy":
        twin = copy.deepcopy(model)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert twin.seer_gates.names() == SITES
    assert torch.equal(twin(tokens), expected)
    assert paths_of(twin) == SPARSE
    assert find_session(twin).store is twin.seer_gates
    seer_compile.set_budget(twin, mass=1.0)
    assert not torch.equal(twin(tokens), expected)
    assert torch.equal(model(tokens), expected)


class Broken(nn.Module):
    """A decoder whose layers are graphs of their own."""

    def __init__(self):
        super().__init__()
        self.inner = decoder()

    def forward(self, tokens):
        x = self.inner.embed(tokens)
        for layer in self.inner.layers:
            torch._dynamo.graph_break()
            x = x + layer(self.inner.norm(x))
        return self.inner.head(x)


@torch.no_grad()
def test_parts_between_graph_breaks_keep_their_gates():
    """Each layer is a graph of its own, which Dynamo would hand on to the next layer."""
    names = {f"inner.{name}" for name in SITES}
    model = optimized(Broken())
    assert set(model.seer_gates.names()) == names
    tell_apart(model)
    tokens = token_ids(200)
    got = model(tokens)
    assert paths_of(model) == {name: {"sparse"} for name in names}
    twin = tell_apart(optimized())
    assert torch.allclose(got, twin(tokens), atol=1e-6)


def test_a_graph_of_calibration_that_dynamo_runs_in_a_plain_call_is_dense():
    """At its limit Dynamo takes any graph that fits, whichever compile made it."""
    model, tokens = Broken(), token_ids(128)
    seer_compile.optimize(model, inner="eager")
    data = [token_ids(128, seed=seed) for seed in range(3)]
    seer_compile.calibrate(model, data, config=QUICK, density=0.3, progress=False)
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=1):
        with pytest.warns(DenseFallbackWarning, match="recompile_limit"):
            got = model(tokens)
        assert torch.equal(got, Broken()(tokens))


@torch.no_grad()
def test_layers_behind_hooks_that_cannot_be_traced_keep_their_gates():
    model = decoder()
    for layer in model.layers:
        layer.register_forward_pre_hook(torch.compiler.disable(lambda *_: None))
    tell_apart(optimized(model))
    assert model.seer_gates.names() == SITES
    twin, tokens = tell_apart(optimized()), token_ids(200)
    assert torch.allclose(model(tokens), twin(tokens), atol=1e-6)
    assert paths_of(model) == SPARSE


def free_port():
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


@pytest.mark.slow
def test_data_parallel_processes_agree_on_names_and_weights():
    command = [sys.executable, "-W", "ignore", str(WORKER)]
    port = str(free_port())
    workers = [
        subprocess.Popen(
            [*command, str(rank), port], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    results = []
    for worker in workers:
        output, errors = worker.communicate(timeout=280)
        assert worker.returncode == 0, errors[-3000:]
        results.append(json.loads(output.splitlines()[-1]))
    assert results[0] == results[1]
    assert results[0].keys() == {
        f"{kind} {order}" for kind in ("ddp", "fsdp") for order in ("optimize first", "wrap first")
    }
    for result in results[0].values():
        assert tuple(result["names"]) == SITES
        assert result["errors"] == []
        assert all(calls["sparse"] == 2 for calls in result["calls"].values())
    weights = [result["weights"] for result in results[0].values()]
    assert weights == pytest.approx([weights[0]] * 4, rel=1e-5)


@pytest.mark.slow
def test_data_parallel_buckets_do_not_cut_masks_off(tmp_path, monkeypatch):
    """Dynamo would split the graph at gradient buckets, behind which the mask is a mere input."""
    from torch import distributed as dist

    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 8000)
        model = architecture("llama").train()
        seer_compile.optimize(model, zero_shot=True, inner="aot_eager")
        wrapped = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=0.01)
        mask = torch.ones(2, 150, dtype=torch.int64)
        mask[0, :40] = 0
        inputs = {"input_ids": token_ids(150, batch=2), "attention_mask": mask}
        wrapped(**inputs, use_cache=False).logits.sum().backward()
    finally:
        dist.destroy_process_group()
    report = model.seer_report()
    assert report.graphs == 1
    assert {(row.site.decision, row.site.visibility) for row in report.rows} == {
        ("sparse", "causal + key padding")
    }


# --- adapters --------------------------------------------------------------------------------


def lora(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, config)


@pytest.mark.slow
def test_gates_of_a_model_fit_it_under_an_adapter_and_back(tmp_path):
    inputs = {"input_ids": token_ids(128), "use_cache": False}
    base = seer_compile.optimize(architecture("llama"), inner="eager")
    data = [{**inputs, "input_ids": token_ids(128, seed=seed)} for seed in range(3)]
    seer_compile.calibrate(base, data, config=QUICK, mass=0.5, progress=False)
    seer_compile.save_gates(base, tmp_path / "base.safetensors")
    names = base.seer_gates.names()
    assert names == tuple(f"model.layers.{n}.self_attn" for n in range(2))

    # An adapter that was not trained yet adds nothing.
    wrapped = lora(architecture("llama")).eval()
    seer_compile.optimize(wrapped, gates=tmp_path / "base.safetensors", inner="eager")
    assert wrapped.seer_gates.names() == names
    around = lora(base).eval()
    for model in (wrapped, around):
        answer_sparsely(base.seer_gates if model is around else model.seer_gates)
    with torch.no_grad():
        assert torch.equal(wrapped(**inputs).logits, around(**inputs).logits)
    assert paths_of(wrapped) == paths_of(around) == {name: {"sparse"} for name in names}
    seer_compile.save_gates(wrapped, tmp_path / "wrapped.safetensors")
    seer_compile.optimize(
        architecture("llama"), gates=tmp_path / "wrapped.safetensors", inner="eager"
    )
