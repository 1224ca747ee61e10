"""The Dynamo backend: from the entry point, under options, over lengths and in ``generate``."""

from __future__ import annotations

import copy
import os
import random
import shutil
import subprocess
import sys
import textwrap
import warnings
import weakref

import pytest
import torch

import seer_compile
from seer_compile import backend as backends
from seer_compile.backend import BackendOptions, SeerBackend
from seer_compile.config import CalibrationConfig
from seer_compile.errors import DenseFallbackWarning, RangeError, SeerInputError
from seer_compile.gate_store import GateStore
from support.inputs import generator
from support.models import CHANGES, architecture, breaks_its_graph, decoder, inputs_of, token_ids
from support.rewriting import answer_sparsely
from support.state import assert_global_state_unchanged
from zoo.wrappers import main_output

ROWS = (
    *((name, "sdpa") for name in CHANGES),
    *((name, "eager") for name in ("llama", "gpt2")),
)
DENSE_SITES = {"t5": 4}
"""Sites with a learned bias on the logits, of all sites found."""


def run_python(code):
    """Run a program in a process of its own and return what it prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def bare(model, **options):
    return torch.compile(model, backend="seer", options={"inner": "eager", **options})


def backend_of(model):
    """The backend that a bare compile of this model uses."""
    return next(
        known.backend
        for known in backends._BACKENDS._known.values()
        if any(parameter is known.anchor() for parameter in model.parameters())
    )


def test_entry_point_works_without_importing_the_package():
    printed = run_python("""
        import sys, torch
        import torch.nn.functional as F
        class Net(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.qkv = torch.nn.Linear(16, 48)
            def forward(self, x):
                parts = self.qkv(x).chunk(3, -1)
                q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in parts)
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        assert "seer" in torch._dynamo.list_backends(exclude_tags=())
        net, x = Net().eval(), torch.randn(2, 100, 16)
        assert "seer_compile" not in sys.modules
        with torch.no_grad():
            got = torch.compile(net, backend="seer", options={"inner": "aot_eager"})(x)
            assert torch.allclose(got, net(x), atol=1e-6)
        from seer_compile.kernels import counters
        print(counters.snapshot())
    """)
    assert printed.strip() == "{'<root>': {'dense:mode': 1}}"


@torch.no_grad()
def test_bare_backend_answers_densely_until_it_has_gates():
    model, tokens = decoder(), token_ids(200)
    with pytest.warns(DenseFallbackWarning, match="not calibrated"):
        got = bare(model)(tokens)
    assert torch.equal(got, model(tokens))


def calibrated(path):
    """Write gates that were calibrated for ``decoder()``; return the model that has them."""
    model = seer_compile.optimize(decoder(), inner="eager")
    quick = CalibrationConfig(steps=2, warmup_steps=1, holdout_batches=1)
    data = [token_ids(128, seed=seed) for seed in range(4)]
    seer_compile.calibrate(model, data, config=quick, progress=False)
    seer_compile.set_budget(model, mass=0.05)  # few enough blocks that weights matter
    seer_compile.save_gates(model, path)
    answer_sparsely(model.seer_gates)
    return model


@torch.no_grad()
def test_bare_backend_takes_a_gate_file(tmp_path):
    tokens = token_ids(300)
    expected = calibrated(tmp_path / "g.safetensors")(tokens)

    plain = decoder()
    compiled = bare(plain, gates=tmp_path / "g.safetensors")
    compiled(token_ids(64))
    store = backend_of(plain).store
    assert store.is_calibrated
    answer_sparsely(store)
    assert torch.equal(compiled(tokens), expected)
    assert not torch.allclose(expected, plain(tokens), atol=1e-4)


@torch.no_grad()
def test_bare_backend_loads_a_gate_file_again_once_it_was_written_anew(tmp_path):
    path, plain, tokens = tmp_path / "g.safetensors", decoder(), token_ids(300)

    def answer_anew():
        torch._dynamo.reset()
        compiled = bare(plain, gates=path)
        compiled(token_ids(64))
        backend = backend_of(plain)
        answer_sparsely(backend.store)
        return compiled(tokens), backend

    model = calibrated(path)
    first, backend = answer_anew()
    assert torch.equal(first, model(tokens))
    assert answer_anew()[1] is backend, "the file is the same"

    for parameter in model.seer_gates.parameters():
        parameter.normal_(generator=generator())
    seer_compile.save_gates(model, path)
    second, other = answer_anew()
    assert torch.equal(second, model(tokens))
    assert not torch.allclose(second, first, atol=1e-4)
    used = [known.backend for known in backends._BACKENDS._known.values()]
    assert other in used
    assert backend not in used, "nobody asks for the older gates again"


@torch.no_grad()
def test_bare_models_of_one_class_answer_with_their_own_weights():
    """Dynamo hands a graph on to a model that differs in weights only: they are inputs."""
    tokens = token_ids(300)
    for seed in (0, 1):
        model = decoder(seed=seed)
        compiled = bare(model, zero_shot=True)
        seer_compile.optimize(model, zero_shot=True, inner="eager")
        assert torch.equal(compiled(tokens), model(tokens))
        seer_compile.restore(model)


@torch.no_grad()
def test_bare_models_under_other_options_have_stores_of_their_own():
    first, second = decoder(), decoder()
    bare(first, zero_shot=True)(token_ids(100))
    bare(second, zero_shot=True, exclude=["layers.1"])(token_ids(100))
    stores = [backend_of(model).store for model in (first, second)]
    assert stores[0].names() == ("layers.0", "layers.1")
    assert stores[1].names() == ("layers.0",)
    assert stores[0].get("layers.0") is not stores[1].get("layers.0")


@torch.no_grad()
def test_bare_backend_takes_a_store_and_a_root():
    store, model = GateStore(), decoder()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bare(model, gates=store, root=model)(token_ids(100))
    assert store.names() == ("layers.0", "layers.1")


def test_bare_backend_forgets_a_model_that_is_gone():
    import gc

    # What earlier tests left to the collector is not what is counted.
    gc.collect()
    model = decoder()
    with torch.no_grad():
        bare(model, zero_shot=True)(token_ids(70))
    store = weakref.ref(backend_of(model).store)
    known = len(backends._BACKENDS._known)
    torch._dynamo.reset()
    del model
    gc.collect()
    assert len(backends._BACKENDS._known) == known - 1
    assert store() is None


def test_unknown_options_are_refused():
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        bare(decoder(), gate="x")(token_ids(64))
    assert isinstance(caught.value.inner_exception, SeerInputError)
    with pytest.raises(RangeError, match="inner"):
        SeerBackend(GateStore(), options=BackendOptions(inner="seer"))


@torch.no_grad()
def test_backend_called_twice_with_one_graph_is_idempotent():
    seen = []
    model, store = decoder(), GateStore()
    store.set_mode(True, untrained=True)
    backend = SeerBackend(store, root=model, options=BackendOptions(inner="eager"))

    def twice(graph_module, example_inputs):
        first, second = (backend(graph_module, example_inputs) for _ in range(2))
        seen.append((first(*example_inputs), second(*example_inputs)))
        return second

    torch.compile(model, backend=twice)(token_ids(100))
    ((first, second),) = seen
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert store.names() == ("layers.0", "layers.1")
    assert backend.log.records[0].sites == backend.log.records[1].sites


@torch.no_grad()
def test_graph_without_attention_is_compiled_as_it_came():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU())
    x = torch.randn(2, 8)
    expected = model(x)
    with warnings.catch_warnings(), assert_global_state_unchanged():
        warnings.simplefilter("error")
        seer_compile.optimize(model, inner="eager")
        assert torch.equal(model(x), expected)
    assert model.seer_report().rows == ()
    assert model.seer_gates.names() == ()


@torch.no_grad()
def test_random_lengths_need_at_most_three_graphs():
    model, lengths = decoder(), random.Random(0)
    compiled = torch.compile(
        model, backend="seer", options={"inner": "eager", "zero_shot": True}, fullgraph=True
    )
    for number in range(60):
        length = lengths.randint(64, 4096 if number % 20 == 0 else 300)
        compiled(token_ids(length, seed=number))
    assert len(backend_of(model).log.records) <= 3


@torch.no_grad()
def test_inductor_gives_the_same_numbers_static_and_dynamic():
    model = decoder(layers=1)
    seer_compile.optimize(model, zero_shot=True, example=token_ids(70))
    answer_sparsely(model.seer_gates)
    seer_compile.set_budget(model, mass=1.0)
    with assert_global_state_unchanged():
        for length in (100, 180, 333):
            tokens = token_ids(length)
            dense = type(model).forward(model, tokens)
            assert torch.allclose(model(tokens), dense, atol=1e-5)
    report = model.seer_report()
    assert report.graphs == 2
    assert report.calls == {"layers.0": {"sparse": 3}}


def test_inductors_cache_key_holds_the_sources_and_the_configuration(monkeypatch):
    from torch._inductor import config

    from seer_compile.passes import cache_identity

    first = cache_identity.inductor_settings("a")["post_grad_custom_post_pass"].uuid()
    other = cache_identity.inductor_settings("b")["post_grad_custom_post_pass"].uuid()
    assert first != other
    monkeypatch.setattr(cache_identity, "source_digest", lambda: "changed kernel")
    assert cache_identity.inductor_settings("a")["post_grad_custom_post_pass"].uuid() != first

    class Users(cache_identity.CacheIdentity):
        calls = 0

        def __call__(self, graph):
            Users.calls += 1

    with config.patch(post_grad_custom_post_pass=Users("theirs")):
        ours = cache_identity.inductor_settings("a")["post_grad_custom_post_pass"]
    ours(torch.fx.Graph())
    assert Users.calls == 1
    assert "theirs" in str(ours.uuid())
    with config.patch(post_grad_custom_post_pass=lambda graph: None):
        assert cache_identity.inductor_settings("a") == {}


@pytest.mark.parametrize(
    "name", ["result_layout.py", "gate.py", "passes/lower.py", "kernels/triton/primitives.py"]
)
def test_a_change_in_any_layer_changes_the_digest_of_the_sources(name, monkeypatch, tmp_path):
    from seer_compile.passes import cache_identity

    package = tmp_path / "seer_compile"
    shutil.copytree(cache_identity._PACKAGE, package, ignore=shutil.ignore_patterns("*.pyc"))
    monkeypatch.setattr(cache_identity, "_PACKAGE", package)
    digest = cache_identity.source_digest.__wrapped__  # the cached one reads once per process
    first = digest()
    assert digest() == first
    with (package / name).open("a") as file:
        file.write("# changed")
    assert digest() != first


# --- Hugging Face ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("name", "attention"), ROWS)
@torch.no_grad()
def test_full_budget_reproduces_the_architecture(name, attention):
    model = architecture(name, attention)
    # A forward of the optimized model itself would go through its compiled encoder.
    plain_model, exact_model = copy.deepcopy(model), copy.deepcopy(model).double()
    is_cut = breaks_its_graph(model)
    # The parts of a model that is cut share wrappers, and the limit on graphs of one function.
    limit = 64 if is_cut else torch._dynamo.config.recompile_limit
    reports = []
    with warnings.catch_warnings(), torch._dynamo.config.patch(recompile_limit=limit):
        warnings.simplefilter("ignore", DenseFallbackWarning)
        seer_compile.optimize(model, zero_shot=True, example=inputs_of(name), inner="aot_eager")
        answer_sparsely(model.seer_gates)
        seer_compile.set_budget(model, mass=1.0)
        for seed, length in enumerate((130, 130) if name == "vit" else (130, 97)):
            inputs = inputs_of(name, length, seed)
            wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
            exact = main_output(exact_model(**wide))
            eager = main_output(plain_model(**inputs)).double()
            ours = main_output(model(**inputs)).double()
            floor = 4 * torch.finfo(torch.float32).eps * exact.abs().max()
            assert (ours - exact).abs().max() <= 2 * (eager - exact).abs().max() + floor
            reports.append(model.seer_report())
    first, report = reports
    assert report.errors == ()
    assert report.graphs <= 2 or is_cut
    assert first.graphs == 1 or is_cut
    dense = [row for row in first.rows if row.site.decision == "dense"]
    assert len(dense) == DENSE_SITES.get(name, 0)
    assert all(row.site.reason.startswith("floating-point bias") for row in dense)
    sparse = {row.site.name for row in first.rows if row.site.decision == "sparse"}
    assert {name for name, calls in report.calls.items() if calls == {"sparse": 2}} == sparse
    assert all(not report.calls[row.site.name] for row in dense)


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
@torch.no_grad()
def test_generate_gives_the_dense_tokens_at_full_budget(name, cache):
    model = architecture(name)
    tokens = token_ids(90, batch=3)
    mask = torch.ones_like(tokens)
    mask[0, :40], mask[1, :7] = 0, 0
    arguments = {
        "input_ids": tokens.masked_fill(mask == 0, 0),
        "attention_mask": mask,
        "max_new_tokens": 8,
        "do_sample": False,
        **({"cache_implementation": "static"} if cache == "static" else {}),
    }
    expected = model.generate(**arguments)
    example = {key: arguments[key] for key in ("input_ids", "attention_mask")}
    seer_compile.optimize(model, zero_shot=True, example=example, inner="aot_eager")
    answer_sparsely(model.seer_gates)
    seer_compile.set_budget(model, mass=1.0)
    assert torch.equal(model.generate(**arguments), expected)
    report = model.seer_report()
    assert report.graphs <= 3
    prefill, *steps = [row.site for row in report.rows if row.site.name.endswith("0.self_attn")]
    assert prefill.decision == "sparse"
    assert prefill.visibility.endswith("key padding")
    assert steps
    assert {site.reason for site in steps} == {"one query token (decode)"}
    assert set(report.calls) == {f"model.layers.{layer}.self_attn" for layer in range(2)}
    assert all(calls == {"sparse": 1} for calls in report.calls.values())
    seer_compile.set_budget(model, mass=0.05)
    model.generate(**arguments)
    seer_compile.restore(model)
    assert "create_masks_for_generate" not in vars(model)
    assert torch.equal(model.generate(**arguments), expected)


@pytest.mark.slow
@torch.no_grad()
def test_encoder_that_generate_calls_by_itself_is_sparse():
    model = architecture("whisper")
    features = inputs_of("whisper")["input_features"]
    expected = model.generate(input_features=features, max_new_tokens=5, do_sample=False)
    seer_compile.optimize(model, zero_shot=True, example=inputs_of("whisper"), inner="aot_eager")
    answer_sparsely(model.seer_gates)
    seer_compile.set_budget(model, mass=1.0)
    got = model.generate(input_features=features, max_new_tokens=5, do_sample=False)
    assert torch.equal(got, expected)
    assert model.seer_report().calls["model.encoder.layers.0.self_attn"] == {"sparse": 1}
    twin = copy.deepcopy(model)
    assert twin.get_encoder()._compiled_call_impl is not None
    seer_compile.restore(model)
    assert "_compiled_call_impl" not in vars(model.get_encoder())


@pytest.mark.slow
@torch.no_grad()
def test_generate_that_compiles_decoding_itself_keeps_prefill_sparse(monkeypatch):
    from transformers import CompileConfig

    # ``generate`` sets this itself, for good, when it compiles.
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "0")
    model, tokens = architecture("llama"), token_ids(90, batch=2)
    decode = CompileConfig(backend="aot_eager", mode=None)
    decode._compile_all_devices = True
    arguments = {
        "max_new_tokens": 6,
        "do_sample": False,
        "cache_implementation": "static",
        "attention_mask": torch.ones_like(tokens),
    }
    expected = model.generate(tokens, **arguments)
    seer_compile.optimize(model, zero_shot=True, example={"input_ids": tokens}, inner="aot_eager")
    answer_sparsely(model.seer_gates)
    seer_compile.set_budget(model, mass=1.0)
    got = model.generate(tokens, compile_config=decode, **arguments)
    assert torch.equal(got, expected)
    assert model.seer_report().calls["model.layers.0.self_attn"] == {"sparse": 1}
