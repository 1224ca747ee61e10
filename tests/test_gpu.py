"""Whole models on a GPU: optimize, generate, calibrate, train, export, CUDA graphs, no waiting."""

from __future__ import annotations

import copy
import math
import signal
import warnings

import pytest
import torch
from torch import nn

import seer_compile
from seer_compile.config import CalibrationConfig
from seer_compile.kernels import counters
from support.models import architecture, decoder, token_ids
from support.packages import package
from support.processes import run_apart
from support.rewriting import answer_sparsely

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
LENGTHS = ({1: torch.export.Dim("tokens", min=2, max=4096)},)
LIMIT = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def plain(dtype=torch.float32) -> nn.Module:
    """A decoder with heads of 16, on the GPU."""
    return decoder(width=64).to(DEVICE, dtype)


def optimized(model: nn.Module, *, mass=1.0, inner="aot_eager", example=None) -> nn.Module:
    """Optimize a model and let its untrained gates answer at any size."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        example = token_ids(80) if example is None else example
        seer_compile.optimize(model, zero_shot=True, inner=inner, example=example)
    answer_sparsely(model.seer_gates)
    seer_compile.set_budget(model, mass=mass)
    return model


def sparse_calls(model: nn.Module) -> dict[str, int]:
    calls = model.seer_report().calls
    return {name: paths.get("sparse", 0) for name, paths in calls.items()}


def relative(actual, expected) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("dtype", LIMIT)
def test_full_budget_gives_the_dense_answer_through_inductor(dtype):
    model = plain(dtype)
    lengths = (300, 1000, 65)
    tokens = [token_ids(length, batch=2).to(DEVICE) for length in lengths]
    expected = [model(each) for each in tokens]
    optimized(model, inner="inductor")
    for each, dense in zip(tokens, expected, strict=True):
        assert relative(model(each), dense) < LIMIT[dtype]
    assert set(sparse_calls(model).values()) == {len(lengths)}
    assert model.seer_report().errors == ()
    seer_compile.set_budget(model, mass=0.3)
    with counters.collect_density() as meter:
        out = model(tokens[1])
    assert out.isfinite().all()
    assert all(0 < density < 1 for density in meter.densities().values())


@pytest.mark.parametrize(
    "cache", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"]
)
def test_generate_gives_the_dense_tokens(cache):
    tokens = token_ids(200, batch=3)
    mask = torch.ones_like(tokens)
    for row, padding in enumerate((0, 7, 140)):
        mask[row, :padding] = 0
    inputs = {"input_ids": tokens.masked_fill(mask == 0, 0).to(DEVICE)}
    inputs["attention_mask"] = mask.to(DEVICE)

    def generate(model):
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return model.generate(
                **inputs, **cache, max_new_tokens=5, do_sample=False, disable_compile=True
            )

    model = architecture("llama").to(DEVICE)
    expected = generate(model)
    optimized(model, example=inputs)
    assert torch.equal(generate(model), expected)
    assert set(sparse_calls(model).values()) == {1}
    assert model.seer_report().errors == ()
    seer_compile.set_budget(model, mass=0.3)
    assert generate(model).shape == expected.shape


def test_calibrated_gates_answer_and_come_back_from_a_file(tmp_path):
    model, path = plain(), tmp_path / "gates.safetensors"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seer_compile.optimize(model, inner="aot_eager", example=token_ids(300))
    data = [token_ids(300, batch=2, seed=seed) for seed in range(4)]
    quick = CalibrationConfig(steps=3, warmup_steps=1, holdout_batches=1)
    report = seer_compile.calibrate(model, data, config=quick, density=0.5, progress=False)
    assert all(math.isfinite(loss) for loss in report.losses)
    seer_compile.save_gates(model, path)
    other = seer_compile.optimize(plain(), gates=path, inner="aot_eager")
    tokens = token_ids(500).to(DEVICE)
    outputs = []
    for each in (model, other):
        seer_compile.set_budget(each, density=0.4)
        each.seer_gates.set_mode(True, at_any_size=True)
        with torch.no_grad():
            outputs.append(each(tokens))
        assert set(sparse_calls(each).values()) == {1}
    assert torch.equal(*outputs)
    for _, gate in other.seer_gates.items():
        assert gate.query_weight.device.type == DEVICE
        assert gate.mode.device.type == "cpu"


def test_gradients_of_a_full_budget_are_the_dense_ones():
    tokens, dense = token_ids(300, batch=2).to(DEVICE), plain()
    model = optimized(copy.deepcopy(dense))
    for each in (dense, model):
        each(tokens).square().mean().backward()
    assert set(sparse_calls(model).values()) == {1}
    ours, theirs = (dict(each.named_parameters()) for each in (model, dense))
    for name, parameter in theirs.items():
        assert relative(ours[name].grad, parameter.grad) < LIMIT[torch.float32], name


@torch.no_grad()
def test_exported_program_answers_on_the_gpu_and_keeps_its_knob():
    model = optimized(plain())
    program = seer_compile.export(model, (token_ids(100).to(DEVICE),), dynamic_shapes=LENGTHS)
    module = program.module()
    for length in (64, 65, 333):
        tokens = token_ids(length).to(DEVICE)
        assert relative(module(tokens), model(tokens)) < LIMIT[torch.float32]
    seer_compile.set_budget(program, mass=0.05)
    seer_compile.set_budget(model, mass=0.05)
    assert relative(program.module()(tokens), model(tokens)) < LIMIT[torch.float32]


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@torch.no_grad()
def test_a_sparse_forward_never_waits_for_the_device():
    model, tokens = plain(torch.bfloat16), token_ids(600).to(DEVICE)
    optimized(model, mass=0.5)
    expected = model(tokens)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = model(tokens)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(out, expected)


@pytest.mark.filterwarnings("ignore::seer_compile.errors.DenseFallbackWarning")
@torch.no_grad()
@pytest.mark.parametrize("mode", [0, 2], ids=["dense", "sparse"])
def test_a_cuda_graph_holds_a_forward(mode):
    model, tokens = plain(torch.bfloat16), token_ids(600).to(DEVICE)
    optimized(model, mass=0.5)
    for _, gate in model.seer_gates.items():
        gate.mode.fill_(mode)
    expected = model(tokens)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        model(tokens)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out = model(tokens)
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)


def crashes_with_a_linear_layer(folder):
    """Whether the loader of packages crashes without anything of ours."""
    tokens = torch.ones(2, 8, device=DEVICE)
    program = torch.export.export(torch.nn.Linear(8, 8, device=DEVICE), (tokens,))
    path = package(program, folder / "linear.pt2")
    load = f'import torch; torch._inductor.aoti_load_package(r"{path}")'
    return run_apart(load).returncode == -signal.SIGSEGV


@pytest.mark.slow
@torch.no_grad()
def test_aot_inductor_package_answers_on_the_gpu(tmp_path):
    model = optimized(plain())
    program = seer_compile.export(model, (token_ids(100).to(DEVICE),), dynamic_shapes=LENGTHS)
    path = package(program, tmp_path / "model.pt2")
    tokens = token_ids(333).to(DEVICE)
    torch.save((tokens, program.module()(tokens)), tmp_path / "expected.pt")
    code = f"""
        import faulthandler, torch, seer_compile
        faulthandler.enable()
        tokens, expected = torch.load(r"{tmp_path / "expected.pt"}")
        package = torch._inductor.aoti_load_package(r"{path}")
        actual = package(tokens)
        print(float((actual.double() - expected.double()).norm() / expected.double().norm()))
    """
    # In a process of its own: the loader is C++, and where it crashes it takes the process along.
    done = run_apart(code)
    if done.returncode == -signal.SIGSEGV and crashes_with_a_linear_layer(tmp_path):
        pytest.skip("PyTorch crashes here as well when it loads a package of one linear layer")
    assert done.returncode == 0, f"{done.returncode}: {done.stdout[-500:]} {done.stderr[-3000:]}"
    assert float(done.stdout) < LIMIT[torch.float32]
