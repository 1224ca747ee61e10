"""The verbs on a model: what they do, and what they leave alone."""

from __future__ import annotations

import copy
import filecmp
import gc
import io
import pickle
import warnings
import weakref

import numpy as np
import pytest
import torch
from torch import nn

import seer_compile
from seer_compile import session as sessions
from seer_compile.config import CalibrationConfig, GateConfig
from seer_compile.errors import (
    DenseFallbackWarning,
    DtypeError,
    FeatureUnsupportedError,
    GateMismatchError,
    ModelStateError,
    NothingOptimizedError,
    SeerInputError,
    SiteRejectedError,
)
from seer_compile.exporting import exported_store
from support.models import Attention, Triangle, architecture, decoder, token_ids
from support.rewriting import answer_sparsely
from support.state import assert_global_state_unchanged

SITES = ("layers.0", "layers.1")
QUICK = CalibrationConfig(steps=3, warmup_steps=1, holdout_batches=1, checkpoint_every=3)


def optimized(model=None, *, zero_shot=True, sparse=True, **options):
    """A plain decoder whose gates exist and answer whatever the size."""
    model = decoder() if model is None else model
    options.setdefault("inner", "eager")
    seer_compile.optimize(model, zero_shot=zero_shot, example=token_ids(80), **options)
    if sparse:
        answer_sparsely(model.seer_gates)
    return model


def dense(model, tokens):
    return type(model).forward(model, tokens)


def batches(number, length=128):
    return [token_ids(length, seed=seed) for seed in range(number)]


@torch.no_grad()
def test_full_budget_reproduces_the_dense_model():
    model = optimized()
    seer_compile.set_budget(model, mass=1.0)
    exact_model = copy.deepcopy(decoder()).double()
    for length in (80, 300, 65):
        tokens = token_ids(length, batch=2)
        exact = exact_model(tokens)
        error = (model(tokens).double() - exact).abs().max()
        assert error <= 2 * (dense(model, tokens).double() - exact).abs().max() + 1e-6
    assert set(model.seer_report().calls["layers.0"]) == {"sparse"}


@torch.no_grad()
def test_set_budget_takes_effect_without_another_graph():
    model, tokens = optimized(), token_ids(500)
    seer_compile.set_budget(model, mass=1.0)
    full, graphs = model(tokens), model.seer_report().graphs
    seer_compile.set_budget(model, mass=0.05)
    assert (model(tokens) - full).abs().max() > 1e-4
    seer_compile.set_budget(model, mass=1.0)
    assert torch.equal(model(tokens), full)
    assert model.seer_report().graphs == graphs


@torch.no_grad()
def test_uncalibrated_gates_never_answer_and_one_warning_says_so():
    model, tokens = decoder(), token_ids(200)
    seer_compile.optimize(model, inner="eager")
    with pytest.warns(DenseFallbackWarning, match="not calibrated"):
        model(tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(token_ids(210))
    assert torch.equal(model(tokens), dense(model, tokens))
    assert set(model.seer_report().calls["layers.0"]) == {"dense:mode"}


def test_optimize_returns_the_same_object_with_the_same_class_and_signature():
    model = decoder()
    kind = type(model)
    assert seer_compile.optimize(model, inner="eager") is model
    assert type(model) is kind
    assert isinstance(model.seer_gates, seer_compile.GateStore)


def test_optimize_with_an_example_creates_the_gates():
    model = optimized(sparse=False)
    assert model.seer_gates.names() == SITES
    assert model.seer_report().graphs == 0


def test_optimize_refuses_what_is_no_module_and_what_is_optimized_already():
    with pytest.raises(DtypeError, match="model"):
        seer_compile.optimize(lambda x: x)
    model = optimized()
    with pytest.raises(ModelStateError, match="optimized already"):
        seer_compile.optimize(model)


@pytest.mark.parametrize(
    "options",
    [
        {"config": {}},
        {"config": CalibrationConfig()},
        {"exclude": "layers.*"},
        {"exclude": [1]},
        {"exclude": 1},
    ],
)
def test_optimize_refuses_arguments_of_other_types(options):
    """One text for ``exclude`` would be a pattern per letter, and a lone ``*`` every site."""
    model = decoder()
    (argument,) = options
    with pytest.raises(DtypeError, match=f"{argument}="):
        seer_compile.optimize(model, **options)
    assert "seer_gates" not in model._modules


def test_other_verbs_refuse_arguments_of_other_types():
    with pytest.raises(DtypeError, match="model='int'"):
        seer_compile.explain(3)  # type: ignore[arg-type]
    with pytest.raises(DtypeError, match="config="):
        seer_compile.calibrate(optimized(), batches(4), config={"steps": 3})  # type: ignore[arg-type]
    with (
        pytest.raises(DtypeError, match="config="),
        seer_compile.distillation(optimized(), config={}),  # type: ignore[arg-type]
    ):
        pass


def test_optimize_refuses_a_script_and_leaves_it_alone():
    script = torch.jit.script(nn.Linear(2, 2))
    before = set(script.__dict__)
    with pytest.raises(FeatureUnsupportedError, match="TorchScript"):
        seer_compile.optimize(script)
    assert set(script.__dict__) == before


def test_optimize_refuses_a_model_that_uses_its_names():
    model = decoder()
    model.seer_gates = nn.Linear(1, 1)
    with pytest.raises(ModelStateError, match="seer_gates"):
        seer_compile.optimize(model)


def test_parts_that_are_optimized_keep_to_themselves():
    """A verb that took the first part it finds would leave the others as they were."""
    first, second = optimized(), optimized(decoder(seed=1))
    whole = nn.Sequential(first, nn.Identity())
    with pytest.raises(ModelStateError, match=r"optimized already: \['0'\]"):
        seer_compile.optimize(whole)
    seer_compile.set_budget(whole, mass=0.3)
    whole[1] = second
    with pytest.raises(ModelStateError, match=r"several optimized parts: \['0', '1'\]"):
        seer_compile.set_budget(whole, mass=0.5)
    budgets = [gate.budget for _, gate in first.seer_gates.items()]
    assert all(bool((budget == 0.3).all()) for budget in budgets)


def test_optimize_that_fails_leaves_the_model_untouched(tmp_path):
    model = decoder()
    before = dict(vars(model))
    with pytest.raises(OSError, match=r"nothing\.safetensors"):
        seer_compile.optimize(model, gates=tmp_path / "nothing.safetensors")
    assert vars(model).keys() == before.keys()
    assert "seer_gates" not in dict(model.named_children())


@pytest.mark.parametrize("verb", ["restore", "set_budget", "save_gates", "load_gates", "calibrate"])
def test_verbs_need_an_optimized_model(verb):
    arguments = {"save_gates": ("x",), "load_gates": ("x",), "calibrate": ([],)}
    keywords = {"mass": 0.5} if verb == "set_budget" else {}
    with pytest.raises(ModelStateError, match="not optimized"):
        getattr(seer_compile, verb)(decoder(), *arguments.get(verb, ()), **keywords)


def test_strict_raises_where_a_site_stays_dense():
    class Biased(nn.Module):
        def __init__(self):
            super().__init__()
            self.good, self.bias = Attention(32, 4), nn.Parameter(torch.zeros(64, 64))

        def forward(self, x):
            x = self.good(x)
            y = x.unflatten(-1, (4, 8)).transpose(1, 2)
            return nn.functional.scaled_dot_product_attention(y, y, y, attn_mask=self.bias)

    model = Biased()
    x = torch.randn(1, 64, 32)
    seer_compile.optimize(model, zero_shot=True, strict=True, inner="eager")
    with pytest.raises(SiteRejectedError, match="floating-point bias"):
        model(x)
    seer_compile.restore(model)
    seer_compile.optimize(model, zero_shot=True, inner="eager")
    with pytest.warns(DenseFallbackWarning, match="floating-point bias"):
        model(x)


def test_strict_with_an_example_raises_where_nothing_can_be_sparse():
    model = nn.Linear(4, 4)
    with pytest.raises(NothingOptimizedError):
        seer_compile.optimize(model, example=torch.randn(2, 4), strict=True, inner="eager")
    assert "_seer_session" not in vars(model)


@torch.no_grad()
def test_excluded_sites_stay_dense():
    model = optimized(exclude=("layers.1",), sparse=False)
    model(token_ids(100))
    decisions = {row.site.name: row.site.decision for row in model.seer_report().rows}
    assert decisions == {"layers.0": "sparse", "layers.1": "dense"}


@torch.no_grad()
def test_excluded_sites_are_not_calibrated_and_take_no_share_of_a_density():
    model = seer_compile.optimize(decoder(), exclude=("layers.1",), inner="eager")
    data = batches(4, length=512)
    report = seer_compile.calibrate(model, data, config=QUICK, density=0.6, progress=False)
    (site,) = report.sites
    assert site.name == "layers.0"
    assert abs(site.density - 0.6) < 0.08
    decisions = [site.decision for site in seer_compile.explain(model, data[0]).sites]
    assert decisions == ["sparse", "dense"]


@torch.no_grad()
def test_excluded_sites_are_not_loaded_and_take_no_share_of_a_density(tmp_path):
    whole = seer_compile.optimize(decoder(), inner="eager")
    seer_compile.calibrate(whole, batches(4, length=512), config=QUICK, density=0.6, progress=False)
    file = tmp_path / "gates.safetensors"
    seer_compile.save_gates(whole, file)
    model = seer_compile.optimize(decoder(), gates=file, exclude=("layers.1",), inner="eager")
    assert model.seer_gates.names() == ("layers.0",)
    seer_compile.set_budget(model, density=0.6, allocation="sensitivity")
    gate = model.seer_gates.get("layers.0")
    budget = float(gate.budget[0, gate.budget_lengths.index(512)])
    assert gate.curve.value_at("densities", 512, budget) == pytest.approx(0.6, abs=1e-3)
    answer_sparsely(model.seer_gates)
    model(token_ids(512))
    decisions = {row.site.name: row.site.decision for row in model.seer_report().rows}
    assert decisions == {"layers.0": "sparse", "layers.1": "dense"}
    program = seer_compile.export(model, (token_ids(512),), gates=file)
    assert exported_store(program).names() == ("layers.0",)


def test_failing_pass_leaves_the_graph_as_it_came(monkeypatch):
    from seer_compile.passes import pipeline

    def broken(*_):
        raise RuntimeError("lost a node")

    model, tokens = optimized(), token_ids(100)
    monkeypatch.setattr(pipeline, "lower", broken)
    with pytest.warns(DenseFallbackWarning, match="lost a node"):
        got = model(tokens)
    assert torch.equal(got, dense(model, tokens))
    report = model.seer_report()
    assert "lost a node" in report.errors[0]
    assert "compiled as it came" in str(report)


@torch.no_grad()
def test_failing_pass_raises_in_strict_mode(monkeypatch):
    from seer_compile.passes import pipeline

    model = optimized(strict=True)
    monkeypatch.setattr(pipeline, "lower", lambda *_: 1 / 0)
    with pytest.raises(seer_compile.SeerError, match="pass 'lower' failed"):
        model(token_ids(100))


def test_state_dict_is_the_base_models():
    model, untouched = optimized(), decoder()
    assert list(model.state_dict()) == list(untouched.state_dict())
    assert list(model.state_dict()._metadata) == list(untouched.state_dict()._metadata)
    untouched.load_state_dict(model.state_dict())
    model.load_state_dict(untouched.state_dict())
    wrapped = nn.ModuleDict({"inner": model})
    assert not [key for key in wrapped.state_dict() if "seer_gates" in key]
    assert model.seer_gates.state_dict(), "the store itself has a state dict"


@torch.no_grad()
def test_copy_has_a_store_and_a_backend_of_its_own():
    model, tokens = optimized(), token_ids(500)
    seer_compile.set_budget(model, mass=1.0)
    expected = model(tokens)
    twin = copy.deepcopy(model)
    assert twin.seer_gates is not model.seer_gates
    assert sessions.find_session(twin).store is twin.seer_gates
    assert sessions.find_session(twin).model is twin
    assert torch.equal(twin(tokens), expected)
    seer_compile.set_budget(twin, mass=0.05)
    assert not torch.equal(twin(tokens), expected)
    assert torch.equal(model(tokens), expected)
    assert twin.seer_report().graphs == model.seer_report().graphs == 1
    seer_compile.restore(twin)
    assert torch.equal(model(tokens), expected)


@torch.no_grad()
def test_pickled_model_is_optimized_again():
    model, tokens = optimized(), token_ids(300)
    expected = model(tokens)
    file = io.BytesIO()
    torch.save(model, file)
    for twin in (
        pickle.loads(pickle.dumps(model)),
        torch.load(io.BytesIO(file.getvalue()), weights_only=False),
    ):
        assert torch.equal(twin(tokens), expected)
        assert twin.seer_report().calls["layers.0"] == {"sparse": 1}


@torch.no_grad()
def test_restore_brings_back_everything():
    model, tokens = decoder(), token_ids(150)

    def previous(*_):
        return "compiled before"

    model.__dict__["_compiled_call_impl"] = previous
    before = {**vars(model)}
    children, state = dict(model.named_children()), copy.deepcopy(model.state_dict())
    optimized(model)
    model(tokens)
    assert seer_compile.restore(model) is model
    assert list(vars(model)) == list(before)
    assert all(vars(model)[name] is value for name, value in before.items())
    assert dict(model.named_children()) == children
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert not model._state_dict_hooks
    assert not model._load_state_dict_post_hooks
    assert model(tokens) == "compiled before"
    with pytest.raises(ModelStateError):
        seer_compile.restore(model)


@torch.no_grad()
def test_calibrate_save_and_load_in_another_model(tmp_path):
    model = decoder()
    seer_compile.optimize(model, inner="eager")
    model.train()
    weights = copy.deepcopy(model.state_dict())
    density = np.float32(0.6)
    report = seer_compile.calibrate(
        model, batches(6), config=QUICK, density=density, progress=False
    )
    assert {site.name for site in report.sites} == set(SITES)
    assert model.training, "calibration must leave the training flag"
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())
    assert not any(gate.requires_grad for gate in model.seer_gates.parameters())
    model.eval()
    seer_compile.save_gates(model, tmp_path / "gates.safetensors")
    answer_sparsely(model.seer_gates)
    expected = model(token_ids(300))

    other = seer_compile.optimize(decoder(), gates=tmp_path / "gates.safetensors", inner="eager")
    assert other.seer_report().is_calibrated
    answer_sparsely(other.seer_gates)
    assert torch.equal(other(token_ids(300)), expected)
    assert not torch.equal(expected, dense(model, token_ids(300)))
    with pytest.raises(GateMismatchError):
        seer_compile.optimize(decoder(layers=3), gates=tmp_path / "gates.safetensors")


@torch.no_grad()
def test_loaded_gates_answer_in_graphs_compiled_before(tmp_path):
    first, tokens = decoder(), token_ids(300)
    seer_compile.optimize(first, inner="eager")
    seer_compile.calibrate(first, batches(4), config=QUICK, density=0.4, progress=False)
    seer_compile.save_gates(first, tmp_path / "g.safetensors")
    answer_sparsely(first.seer_gates)
    second = optimized(sparse=False)
    second(tokens)
    seer_compile.load_gates(second, tmp_path / "g.safetensors")
    answer_sparsely(second.seer_gates)
    assert torch.equal(second(tokens), first(tokens))
    assert second.seer_report().graphs == 1, "kept gates need no new graph"
    other = optimized(config=GateConfig(gate_dim=32), sparse=False)
    with pytest.raises(GateMismatchError, match="gate_dim"):
        seer_compile.load_gates(other, tmp_path / "g.safetensors")


def test_calibrated_store_makes_no_gate_for_a_new_site(tmp_path):
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Attention(32, 4), Attention(32, 4)

        def forward(self, x, both: bool = False):
            x = self.a(x)
            return self.b(x) if both else x

    torch.manual_seed(0)
    model, x = Branching().eval(), torch.randn(1, 128, 32)
    seer_compile.optimize(model, inner="eager")
    seer_compile.calibrate(model, [x] * 4, config=QUICK, density=0.5, progress=False)
    with pytest.warns(DenseFallbackWarning, match="no gate of this name"):
        model(x, both=True)
    assert model.seer_gates.names() == ("a",)
    seer_compile.calibrate(
        model, [{"x": x, "both": True}] * 4, config=QUICK, density=0.5, progress=False
    )
    model(x, both=True)
    last = {row.site.name: row.site.decision for row in model.seer_report().rows}
    assert last == {"a": "sparse", "b": "sparse"}


def test_a_batch_that_only_decodes_does_not_stop_calibration():
    model = seer_compile.optimize(decoder(), inner="eager")
    short = token_ids(1)
    data = [*batches(3), short, *batches(2), short]
    report = seer_compile.calibrate(model, data, config=QUICK, density=0.5, progress=False)
    assert {site.name for site in report.sites} == set(SITES)


def test_run_with_handler_sees_every_site_of_any_model():
    model, tokens, seen = decoder(), token_ids(90, batch=2), []

    def answer(inputs):
        seen.append(inputs.name)
        return nn.functional.scaled_dot_product_attention(
            inputs.query, inputs.key, inputs.value, is_causal=True
        )

    out = sessions.run_with_handler(model, (tokens,), {}, answer)
    assert seen == list(SITES)
    assert torch.allclose(out, model(tokens), atol=1e-6)
    assert not out.requires_grad
    for length in (91, 200, 300):
        sessions.run_with_handler(model, (token_ids(length),), {}, answer)
    assert len(sessions.runner_of(model).records) <= 3
    assert not [name for name in vars(model) if "seer" in name]


def test_explain_lists_sites_and_changes_nothing(tmp_path):
    model = decoder().train()
    before, state = dict(vars(model)), copy.deepcopy(model.state_dict())
    with assert_global_state_unchanged():
        explanation = seer_compile.explain(model, token_ids(70), draw=tmp_path / "sites.dot")
    assert [site.name for site in explanation.sites] == list(SITES)
    assert {site.visibility for site in explanation.sites} == {"causal"}
    assert (explanation.graphs, explanation.num_sparse) == (1, 2)
    assert "2 of 2 attention sites can be sparse" in str(explanation)
    assert "layers.1" in (tmp_path / "sites.dot").read_text()
    assert vars(model) == before
    assert model.training
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_explain_gives_the_reason_of_a_dense_site():
    class Returned(nn.Module):
        def forward(self, q):
            weights = (q @ q.mT).softmax(-1)
            return weights @ q, weights

    (site,) = seer_compile.explain(Returned(), torch.randn(1, 2, 16, 8)).sites
    assert site.decision == "dense"
    assert site.reason.startswith("attention weights are used outside the site")


@torch.no_grad()
def test_report_counts_this_models_calls_only():
    first = optimized()
    first(token_ids(100))
    second = optimized()
    assert second.seer_report().calls == {}
    second(token_ids(100))
    second(token_ids(100))
    report = second.seer_report()
    assert report.calls == {name: {"sparse": 2} for name in SITES}
    assert report.to_dict()["rows"][0]["site"]["name"] == "layers.0"
    assert "2 sparse" in str(report)
    assert seer_compile.seer_report(nn.ModuleList([second])).calls == report.calls


@torch.no_grad()
def test_report_shows_the_calls_of_a_site_once_and_its_situations_together():
    """Calls are counted per site: on every row they would be read as that many each."""
    model = optimized()
    for length in (1, 100, 150, 200, 1):
        model(token_ids(length))
    model(token_ids(100, batch=2))
    report = model.seer_report()
    assert report.calls == {name: {"sparse": 4} for name in SITES}
    names = [row.site.name for row in report.rows]
    assert names == sorted(names)
    assert names.count("layers.0") > 2
    assert {row.graphs for row in report.rows} == {1}
    assert str(report).count("4 sparse") == len(SITES)
    sparse_rows = sum(row.site.decision == "sparse" for row in report.rows)
    assert str(report).count("(above)") == sparse_rows - len(SITES)


def test_gradients_reach_the_model_and_not_the_gates():
    model, tokens = optimized(), token_ids(150)
    seer_compile.set_budget(model, mass=1.0)
    dense(model, tokens).square().mean().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.train()
    model(tokens).square().mean().backward()
    for name, parameter in model.named_parameters():
        if name.startswith("seer_gates"):
            assert parameter.grad is None, name
        else:
            assert torch.allclose(parameter.grad, expected[name], atol=1e-5), name


@torch.no_grad()
def test_frozen_model_stays_without_gradients():
    model = optimized().requires_grad_(False)
    with torch.enable_grad():
        assert not model(token_ids(100)).requires_grad


@torch.no_grad()
def test_models_of_one_class_do_not_share_graphs_or_limits():
    for _ in range(torch._dynamo.config.recompile_limit + 2):
        model = optimized(sparse=False)
        model(token_ids(70))
        assert model.seer_report().graphs == 1


@torch.no_grad()
def test_nothing_keeps_a_model_alive():
    model = optimized()
    model(token_ids(70))
    watched = [weakref.ref(model), weakref.ref(model.seer_gates)]
    del model
    gc.collect()
    assert [reference() for reference in watched] == [None, None]


def test_wrappers_keep_names_and_leave_gates_out():
    """Data-parallel wrappers ask for tensors to leave alone; the inner model keeps its names."""
    model = optimized(sparse=False)
    ignored = set(model._ddp_params_and_buffers_to_ignore)
    gates = {name for name, _ in model.named_parameters() if name.startswith("seer_gates.")}
    buffers = {name for name, _ in model.named_buffers() if name.startswith("seer_gates.")}
    assert gates | buffers == ignored
    assert gates

    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args):
            return self.module(*args)

    with torch.no_grad():
        Wrapper(model)(token_ids(90))
    assert [row.site.name for row in model.seer_report().rows] == list(SITES)


@torch.no_grad()
def test_surrounding_compile_does_not_trace_through():
    model = optimized()
    outer = torch.compile(model, backend="eager")
    outer(token_ids(100))
    assert model.seer_report().calls == {name: {"sparse": 1} for name in SITES}


@torch.no_grad()
def test_a_changed_mask_buffer_sends_the_graph_back_to_dense():
    torch.manual_seed(0)
    model, x = Triangle().eval(), torch.randn(1, 100, 32)
    seer_compile.optimize(model, zero_shot=True, example=x, inner="eager")
    answer_sparsely(model.seer_gates)
    seer_compile.set_budget(model, mass=1.0)
    assert torch.allclose(model(x), Triangle.forward(model, x), atol=1e-5)
    assert model.seer_report().calls == {"<root>": {"sparse": 1}}
    model.bias.copy_(model.bias.clone())
    model(x)
    assert model.seer_report().calls == {"<root>": {"sparse": 2}}, "a write of equal values"
    model.bias.fill_(1.0)
    with pytest.warns(DenseFallbackWarning, match="other values"):
        assert torch.allclose(model(x), Triangle.forward(model, x), atol=1e-6)
    assert model.seer_report().calls == {"<root>": {"sparse": 2}}


def replace_by_attribute(model, mask):
    model.bias = mask
    return model(model.x)


def replace_by_loading(model, mask):
    model.load_state_dict(model.state_dict() | {"bias": mask}, assign=True)
    answer_sparsely(model.seer_gates)
    return model(model.x)


def replace_storage(model, mask):
    model.bias.data = mask
    return model(model.x)


def replace_for_one_call(model, mask):
    return torch.func.functional_call(model, {"bias": mask}, (model.x,))


@torch.no_grad()
@pytest.mark.parametrize(
    "way", [replace_by_attribute, replace_by_loading, replace_storage, replace_for_one_call]
)
def test_a_mask_buffer_in_place_of_another_is_compared(way):
    torch.manual_seed(0)
    model = Triangle().eval()
    model.x = torch.randn(1, 100, 32)
    seer_compile.optimize(model, zero_shot=True, example=model.x, inner="eager")
    answer_sparsely(model.seer_gates)
    seer_compile.set_budget(model, mass=1.0)
    before = way(model, model.bias.clone())  # equal values: no warning
    assert torch.allclose(before, Triangle.forward(model, model.x), atol=1e-5)
    window = model.bias.triu(-20)
    with pytest.warns(DenseFallbackWarning, match="other values"):
        got = way(model, window)
    model.bias = window
    assert torch.allclose(got, Triangle.forward(model, model.x), atol=1e-6)
    assert not torch.allclose(got, before, atol=1e-2)


def test_calibration_does_not_run_on_with_a_mask_of_other_values():
    model, x = Triangle().eval(), torch.randn(1, 100, 32)
    seer_compile.optimize(model, example=x, inner="eager")
    model.bias.fill_(1.0)
    with pytest.raises(ModelStateError, match="other values"):
        seer_compile.calibrate(model, [x] * 4, config=QUICK, progress=False)


def test_a_mask_buffer_made_in_inference_mode_proves_nothing():
    with torch.inference_mode():
        model, x = Triangle().eval(), torch.randn(1, 100, 32)
        (site,) = seer_compile.explain(model, x).sites
    assert (site.decision, site.visibility) == ("dense", "opaque")


@pytest.mark.parametrize("zero_shot", [False, True])
def test_a_budget_is_not_lost_where_there_are_no_gates_yet(zero_shot):
    model = seer_compile.optimize(decoder(), zero_shot=zero_shot, inner="eager")
    with pytest.raises(ModelStateError, match=r"no gates yet that mass=0\.3"):
        seer_compile.set_budget(model, mass=0.3)


def test_set_budget_takes_exactly_one_target():
    model = optimized()
    with pytest.raises(SeerInputError, match="exactly one"):
        seer_compile.set_budget(model, density=0.1, mass=0.9)


@pytest.mark.slow
def test_save_pretrained_writes_the_base_model(tmp_path):
    model = architecture("llama")
    model.save_pretrained(tmp_path / "before")
    optimized(model)
    model.save_pretrained(tmp_path / "optimized")
    seer_compile.restore(model)
    model.save_pretrained(tmp_path / "restored")
    names = sorted(path.name for path in (tmp_path / "before").iterdir())
    for folder in ("optimized", "restored"):
        assert sorted(path.name for path in (tmp_path / folder).iterdir()) == names
        for name in names:
            pair = (tmp_path / "before" / name, tmp_path / folder / name)
            assert filecmp.cmp(*pair, shallow=False), pair
