"""Export: rewritten program, saved, loaded elsewhere, its budget still a knob."""

from __future__ import annotations

import signal
import warnings

import pytest
import torch
from torch import nn

import seer_compile
from seer_compile.config import CalibrationConfig
from seer_compile.errors import (
    DenseFallbackWarning,
    ExportError,
    ModelStateError,
    NothingOptimizedError,
)
from support.models import Triangle, architecture, decoder, token_ids
from support.packages import package
from support.processes import run_apart
from support.rewriting import answer_sparsely

LENGTHS = ({1: torch.export.Dim("tokens", min=2, max=4096)},)
GATED = torch.ops.seer_compile.gated_attention.v1


def optimized(model=None, **options):
    model = decoder() if model is None else model
    options.setdefault("example", token_ids(80))
    seer_compile.optimize(model, zero_shot=True, inner="eager", **options)
    answer_sparsely(model.seer_gates)
    return model


def gated_calls(program):
    return sum(node.target is GATED for node in program.graph.nodes)


@pytest.fixture(scope="module")
def program():
    return seer_compile.export(optimized(), (token_ids(100),), dynamic_shapes=LENGTHS)


@torch.no_grad()
def test_exported_program_is_the_model_at_other_lengths(program):
    model, module = optimized(), program.module()
    assert gated_calls(program) == 2
    for length in (2, 64, 65, 333):
        tokens = token_ids(length)
        dense = type(model).forward(model, tokens)
        expected = dense if length == 2 else model(tokens)
        assert torch.allclose(module(tokens), expected, atol=1e-5), length


def test_exported_range_is_the_one_asked_for(program):
    (bounds,) = program.range_constraints.values()
    assert (bounds.lower, bounds.upper) == (2, 4096)


@torch.no_grad()
def test_budget_stays_a_knob_of_the_program_and_of_its_module(program):
    module, tokens = program.module(), token_ids(500)
    dense = type(decoder()).forward(optimized(), tokens)
    for target in (module, program):
        seer_compile.set_budget(target, mass=0.05)
        sparse = program.module()(tokens)
        assert (sparse - dense).abs().max() > 1e-4
        assert torch.equal(module(tokens), sparse)
        seer_compile.set_budget(target, mass=1.0)
        assert torch.allclose(module(tokens), dense, atol=1e-5)


def test_export_copies_the_gates_and_leaves_the_model_alone():
    model = optimized()
    before = {name: id(module) for name, module in model.named_modules()}
    attributes = list(vars(model))
    program = seer_compile.export(model, (token_ids(100),), dynamic_shapes=LENGTHS)
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert list(vars(model)) == attributes
    budget = next(iter(model.seer_gates.items()))[1].budget.clone()
    seer_compile.set_budget(program, mass=0.1)
    assert torch.equal(next(iter(model.seer_gates.items()))[1].budget, budget)


def test_export_needs_gates():
    with pytest.raises(ModelStateError, match="no gates are given"):
        seer_compile.export(decoder(), (token_ids(100),))


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_export_looks_through_wrappers(wrap):
    program = seer_compile.export(wrap(optimized()), (token_ids(100),), dynamic_shapes=LENGTHS)
    assert gated_calls(program) == 2


def test_export_of_a_model_with_an_optimized_part_names_the_part():
    whole = nn.Sequential(optimized(), nn.Identity())
    with pytest.raises(ModelStateError, match="not optimized, but its part '0' is"):
        seer_compile.export(whole, (token_ids(100),))


@torch.no_grad()
def test_export_takes_a_gate_file_for_any_model(tmp_path):
    model = decoder()
    seer_compile.optimize(model, inner="eager")
    quick = CalibrationConfig(steps=2, warmup_steps=1, holdout_batches=1)
    data = [token_ids(128, seed=seed) for seed in range(4)]
    seer_compile.calibrate(model, data, config=quick, density=0.5, progress=False)
    seer_compile.save_gates(model, tmp_path / "g.safetensors")
    program = seer_compile.export(
        decoder(), (token_ids(100),), dynamic_shapes=LENGTHS, gates=tmp_path / "g.safetensors"
    )
    assert gated_calls(program) == 2
    seer_compile.set_budget(program, density=0.3)
    seer_compile.set_budget(model, density=0.3)
    for name, tensor in program.state_dict.items():
        if name.endswith(".mode"):
            tensor.fill_(2)
    answer_sparsely(model.seer_gates)
    tokens = token_ids(400)
    assert torch.allclose(program.module()(tokens), model(tokens), atol=1e-6)


def test_export_of_a_model_that_cannot_be_exported_says_why():
    class Branches(nn.Module):
        def forward(self, x):
            return x + 1 if x.sum() > 0 else x

    model = Branches()
    seer_compile.optimize(model, inner="eager")
    with pytest.raises(ExportError, match="the model could not be exported") as caught:
        seer_compile.export(model, (torch.randn(3),))
    assert caught.value.__cause__ is not None


def test_strict_export_rejects_a_dense_site():
    class Biased(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(16, 16))

        def forward(self, q):
            return nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=self.bias)

    model = Biased()
    seer_compile.optimize(model, strict=True, inner="eager")
    with pytest.raises(NothingOptimizedError, match="floating-point bias"):
        seer_compile.export(model, (torch.randn(1, 2, 16, 8),))


def test_excluded_sites_are_no_fault_in_a_strict_export():
    model = optimized(strict=True, exclude=("layers.1",))
    assert gated_calls(seer_compile.export(model, (token_ids(100),))) == 1


def test_export_says_what_stays_dense():
    model = seer_compile.optimize(decoder(), inner="eager")
    with pytest.warns(DenseFallbackWarning, match="not calibrated"):
        program = seer_compile.export(model, (token_ids(100),))
    assert gated_calls(program) == 2

    class Biased(nn.Module):
        def forward(self, x, bias):
            return nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=bias)

    model = seer_compile.optimize(Biased(), zero_shot=True, inner="eager")
    with pytest.warns(DenseFallbackWarning, match="floating-point bias"):
        program = seer_compile.export(model, (torch.randn(1, 2, 80, 8), torch.randn(80, 80)))
    assert gated_calls(program) == 0


def test_plain_torch_export_of_an_optimized_model_warns():
    model = optimized()
    with pytest.warns(DenseFallbackWarning, match=r"seer_compile\.export"):
        plain = torch.export.export(model, (token_ids(100),))
    assert gated_calls(plain) == 0


def test_strict_torch_export_of_an_optimized_model_is_the_dense_one():
    """Dynamo traces it: within that trace, an export must be told from a surrounding compile."""
    model, tokens = optimized(), token_ids(100)
    plain = torch.export.export(model, (tokens,), strict=True)
    assert gated_calls(plain) == 0
    assert torch.allclose(plain.module()(tokens), decoder()(tokens), atol=1e-6)


@torch.no_grad()
def test_written_out_attention_is_exported_sparse():
    torch.manual_seed(0)
    model, x = Triangle().eval(), torch.randn(2, 90, 32)
    seer_compile.optimize(model, zero_shot=True, example=x, inner="eager")
    answer_sparsely(model.seer_gates)
    seer_compile.set_budget(model, mass=1.0)
    program = seer_compile.export(
        model, (x,), dynamic_shapes=({1: torch.export.Dim("t", min=2, max=512)},)
    )
    assert gated_calls(program) == 1
    longer = torch.randn(2, 200, 32)
    expected = Triangle.forward(model, longer)
    assert torch.allclose(program.module()(longer), expected, atol=1e-5)


@torch.no_grad()
def test_saved_program_loads_in_another_process(program, tmp_path):
    tokens = token_ids(333)
    seer_compile.set_budget(program, mass=1.0)
    torch.export.save(program, tmp_path / "program.pt2")
    full = program.module()(tokens)
    seer_compile.set_budget(program, mass=0.05)
    sparse = program.module()(tokens)
    seer_compile.set_budget(program, mass=1.0)
    torch.save((tokens, full, sparse), tmp_path / "expected.pt")
    code = f"""
        import torch, seer_compile
        module = torch.export.load(r"{tmp_path / "program.pt2"}").module()
        tokens, full, sparse = torch.load(r"{tmp_path / "expected.pt"}")
        with torch.no_grad():
            assert torch.equal(module(tokens), full)
            seer_compile.set_budget(module, mass=0.05)
            assert torch.equal(module(tokens), sparse)
        assert not torch.equal(full, sparse)
        print("equal")
    """
    done = run_apart(code)
    assert done.stdout.strip() == "equal", done.stderr[-3000:]


@pytest.mark.slow
@torch.no_grad()
def test_hugging_face_model_is_exported_with_a_dynamic_length():
    class Logits(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, tokens):
            return self.model(input_ids=tokens, use_cache=False).logits

    for name in ("llama", "gpt2"):
        model = optimized(Logits(architecture(name)), example=token_ids(90))
        seer_compile.set_budget(model, mass=1.0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = seer_compile.export(model, (token_ids(90),), dynamic_shapes=LENGTHS)
        assert gated_calls(program) == 2
        tokens = token_ids(200)
        dense = type(model).forward(model, tokens)
        assert torch.allclose(program.module()(tokens), dense, atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_aot_inductor_package_answers_and_takes_a_new_budget(program, tmp_path):
    seer_compile.set_budget(program, mass=1.0)
    path = package(program, tmp_path / "model.pt2")
    calls = [(tokens, program.module()(tokens)) for tokens in (token_ids(333), token_ids(100))]
    seer_compile.set_budget(program, mass=0.05)
    budgets = {name: t for name, t in program.state_dict.items() if name.endswith(".budget")}
    tokens = token_ids(500)
    sparse = program.module()(tokens)
    torch.save((calls, budgets, tokens, sparse), tmp_path / "expected.pt")
    seer_compile.set_budget(program, mass=1.0)
    assert (sparse - program.module()(tokens)).abs().max() > 1e-4
    code = f"""
        import torch, seer_compile
        package = torch._inductor.aoti_load_package(r"{path}")
        calls, budgets, tokens, sparse = torch.load(r"{tmp_path / "expected.pt"}")
        for before, expected in calls:
            assert torch.allclose(package(before), expected, atol=1e-5)
        package.load_constants(budgets, check_full_update=False)
        assert torch.allclose(package(tokens), sparse, atol=1e-5)
        print("equal")
    """
    # In a process of its own: the loader is C++, and where it crashes it takes the process along.
    done = run_apart(code)
    if done.returncode == -signal.SIGSEGV and is_known_to_crash_at_loading():
        pytest.skip("torch 2.11 built for CUDA crashes in its own loader where it sees no GPU")
    assert done.stdout.strip() == "equal", done.stderr[-3000:]


def is_known_to_crash_at_loading():
    """Seen with torch 2.11.0+cu130 under a driver whose GPUs are hidden; not without a driver."""
    is_cuda_build = torch.version.cuda is not None
    return torch.__version__ < (2, 12) and is_cuda_build and not torch.cuda.is_available()
