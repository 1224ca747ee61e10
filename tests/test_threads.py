"""Calls from several threads, while another one sets budgets, looks, saves and loads."""

from __future__ import annotations

import random
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import seer_compile
from seer_compile.calibration import storage
from seer_compile.errors import SeerWarning
from seer_compile.gate_store import GateStore
from seer_compile.real_tensors import real_tensors
from seer_compile.session import find_session
from support.models import decoder, token_ids
from support.rewriting import answer_sparsely


def store_of(*names):
    store = GateStore()
    for name in names:
        store.get_or_create(name, heads=2, kv_heads=1, head_dim=8)
    return store


def test_leaving_modes_in_one_thread_leaves_the_trace_of_another_alone():
    """PyTorch keeps the stack of pre-dispatch modes once for all threads."""
    is_traced = threading.Event()

    def write_metadata(has_begun):
        with real_tensors():
            has_begun.set()
            assert is_traced.wait(60)

    def traced(x):
        has_begun = threading.Event()
        threads.append(threading.Thread(target=write_metadata, args=(has_begun,)))
        threads[0].start()
        assert has_begun.wait(60)
        return x * 2

    threads: list[threading.Thread] = []
    try:
        graph = make_fx(traced, pre_dispatch=True)(torch.ones(3)).graph
    finally:
        is_traced.set()
        threads[0].join()
    called = [node.target for node in graph.nodes if node.op == "call_function"]
    assert called == [torch.ops.aten.mul.Tensor]


def test_modes_of_the_own_thread_are_left():
    def traced(x):
        with real_tensors():
            made.append(torch.ones(3) * 2)
        return x * 2

    for pre_dispatch in (False, True):
        made: list[torch.Tensor] = []
        graph = make_fx(traced, pre_dispatch=pre_dispatch, tracing_mode="fake")(torch.ones(3)).graph
        assert type(made[0]) is torch.Tensor
        assert sum(node.op == "call_function" for node in graph.nodes) == 1


def test_a_compiler_gets_the_gates_tensors_in_modules_of_the_graph():
    """It may put tracers in their place for a while, which no other thread shall meet."""
    handed = []

    def compiler(graph_module, _):
        handed.append(graph_module)
        return graph_module.forward

    model = seer_compile.optimize(decoder(), zero_shot=True, inner=compiler)
    with torch.no_grad():
        model(token_ids(200))
    (graph_module,) = handed
    gates = dict(model.seer_gates.items())
    assert not set(gates.values()) & set(graph_module.modules())
    held = {id(tensor) for tensor in (*graph_module.parameters(), *graph_module.buffers())}
    for gate in gates.values():
        assert {id(gate.query_weight), id(gate.budget), id(gate.mode)} <= held


def test_gates_are_saved_whole_while_others_are_loaded(tmp_path):
    files = {}
    for names in (("a", "b"), ("c",)):
        files[names] = tmp_path / f"{names[0]}.safetensors"
        storage.save_gates(store_of(*names), files[names], model={})
    is_over = threading.Event()

    def load():
        # Into stores without gates of other names: a rebuild drops and adds gates.
        while not is_over.is_set():
            for file in files.values():
                store.rebuild(storage.describe_gates(file)["store"], "cpu")

    store = store_of("a", "b")
    thread = threading.Thread(target=load)
    thread.start()
    try:
        for number in range(60):
            file = tmp_path / f"{number}.safetensors"
            storage.save_gates(store, file, model={})
            assert tuple(storage.describe_gates(file)["sites"]) in files
            assert not store.is_calibrated
    finally:
        is_over.set()
        thread.join()


@pytest.mark.slow
@pytest.mark.skipif(
    torch.__version__ < (2, 12),
    reason="a capture of torch 2.11 replaces the call of every module in every thread",
)
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_four_threads_call_while_verbs_run(tmp_path, inner):
    model = seer_compile.optimize(decoder(), example=token_ids(80), zero_shot=True, inner=inner)
    answer_sparsely(model.seer_gates)
    seer_compile.set_budget(model, mass=1.0)
    expected = {length: type(model).forward(model, token_ids(length)) for length in (90, 200, 333)}
    is_over = threading.Event()

    def call(seed):
        draw, calls = random.Random(seed), 0
        while not is_over.is_set():
            length = draw.choice(list(expected))
            with torch.no_grad():
                got = model(token_ids(length))
            assert torch.allclose(got, expected[length], atol=1e-5)
            calls += 1
        return calls

    def run_verbs():
        try:
            for _ in range(3):
                find_session(model).renew()  # graphs are captured while the verbs run
                for _ in range(10):
                    seer_compile.set_budget(model, mass=1.0)
                    seer_compile.seer_report(model)
                    seer_compile.save_gates(model, tmp_path / "gates.safetensors")
                seer_compile.explain(model, token_ids(100))
        finally:
            is_over.set()

    with warnings.catch_warnings(), ThreadPoolExecutor(5) as pool:
        warnings.simplefilter("error", SeerWarning)
        callers = [pool.submit(call, seed) for seed in range(4)]
        verbs = pool.submit(run_verbs)
    verbs.result()
    assert all(caller.result() > 0 for caller in callers)
    assert not model.seer_report().errors
    assert not model.seer_report().uncompiled_calls
