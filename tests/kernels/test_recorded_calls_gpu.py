"""Played calls of the gated operator give the bits of computed ones, for operands of their own."""

from __future__ import annotations

import random
import threading

import pytest
import torch

pytest.importorskip("triton")

from seer_compile.config import GateConfig
from seer_compile.gate import AttnGate
from seer_compile.kernels import counters, engines, gated_attention
from seer_compile.kernels.gated_attention import MODE_SPARSE
from seer_compile.kernels.recorded_calls import playing
from seer_compile.kernels.triton import launching
from seer_compile.types import Visibility
from support.assertions import assert_bitwise_equal
from support.inputs import attention_inputs
from support.kernel_cases import random_visibility

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
CAUSAL = Visibility(upper=0)


@pytest.fixture(autouse=True)
def records():
    gated_attention.RECORDS.clear()
    yield gated_attention.RECORDS
    gated_attention.RECORDS.clear()


class Site:
    """Calls of one gate whose operands differ from call to call."""

    def __init__(self, *, heads=8, kv_heads=2, head_dim=128, layout="bhnd", **config):
        self.sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
        self.layout = layout
        self.gate = AttnGate(
            heads, kv_heads, head_dim, config=GateConfig(**config), device=CUDA
        ).requires_grad_(False)
        self.gate.budget.uniform_(0.5, 0.95)
        self.gate.mode.fill_(MODE_SPARSE)

    def inputs(self, seed, q_len=1000, k_len=None, batch=1, dtype=torch.bfloat16):
        operands = attention_inputs(
            batch=batch,
            q_len=q_len,
            k_len=k_len or q_len,
            dtype=dtype,
            device=CUDA,
            seed=seed,
            **self.sizes,
        )
        if self.layout == "tokens first":
            return [x.transpose(1, 2).contiguous().transpose(1, 2) for x in operands[:3]]
        if self.layout == "one tensor":
            packed = torch.cat([x.transpose(1, 2) for x in operands[:3]], 2)
            sizes = [x.shape[1] for x in operands[:3]]
            return [part.transpose(1, 2) for part in packed.split(sizes, 2)]
        return list(operands[:3])

    def call(self, operands, visibility=CAUSAL, softcap=None):
        gate = self.gate
        return torch.ops.seer_compile.gated_attention.v1(
            *operands,
            gate.query_weight,
            gate.key_weight,
            gate.budget,
            gate.mode,
            self.sizes["head_dim"] ** -0.5,
            *gate.constants().values(),
            "site",
            *visibility.as_arguments().values(),
            softcap,
        )

    def check(self, operands, **options):
        """Compare a call that may be played with one that may not."""
        got = self.call(operands, **options)
        with playing(enabled=False):
            expected = self.call(operands, **options)
        for ours, theirs in zip(got, expected, strict=True):
            assert ours.stride() == theirs.stride()
            assert_bitwise_equal(ours, theirs)


@pytest.mark.parametrize("layout", ["bhnd", "tokens first", "one tensor"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("length", [512, 1000])
def test_played_calls_are_the_computed_ones(records, layout, head_dim, length):
    site = Site(layout=layout, head_dim=head_dim)
    for seed in range(5):
        site.check(site.inputs(seed, length))
    assert records.states() == ["recorded"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("config", [{"sharing": "none"}, {"sharing": "selection"}, {}])
def test_every_dtype_and_sharing_is_right_recorded_or_not(records, dtype, config):
    site = Site(head_dim=64, **config)
    for seed in range(4):
        site.check(site.inputs(seed, dtype=dtype))
    assert len(records.states()) == 1
    assert records.states()[0] != "seen once"
    if not config and dtype is torch.float16:
        assert records.states() == ["recorded"]


@pytest.mark.parametrize("band", ["full", "causal", "window", "tensor_offset", "anti_causal"])
@pytest.mark.parametrize("kind", ["plain", "padding", "documents"])
def test_every_visibility_is_right_recorded_or_not(records, band, kind):
    site, batch = Site(head_dim=64), 2
    for seed in range(4):
        # The same band, other padding and documents.
        visibility = random_visibility(random.Random(band), batch, 700, 700, band=band)
        fields = {
            name: x.to(CUDA) if isinstance(x, torch.Tensor) else x
            for name, x in visibility.as_arguments().items()
        }
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(64, 700, (batch, 1), generator=generator)
        fields |= {"key_padding": None, "query_documents": None, "key_documents": None}
        if kind == "padding":
            fields["key_padding"] = (torch.arange(700) < lengths).to(CUDA)
        if kind == "documents":
            documents = (torch.arange(700) >= lengths).int().to(CUDA)
            fields |= {"query_documents": documents, "key_documents": documents.clone()}
        operands = site.inputs(seed, 700, batch=batch)
        site.check(operands, visibility=Visibility(**fields))
    assert (records.states() == ["recorded"]) == (kind == "plain")


def test_an_offset_on_the_device_is_read_by_every_call(records):
    site = Site()
    for seed in range(5):
        offset = torch.tensor(100 * seed, device=CUDA)
        operands = site.inputs(seed, 512, 1024)
        site.check(operands, visibility=Visibility(upper=0, offset=offset))
    assert records.states() == ["recorded"]


def test_an_offset_on_the_host_is_not_frozen(records):
    site = Site()
    for seed in range(5):
        operands = site.inputs(seed, 512, 1024)
        site.check(operands, visibility=Visibility(upper=0, offset=torch.tensor(100 * seed)))
    assert "recorded" not in records.states()


def test_softcap_is_right_and_recorded(records):
    site = Site(head_dim=64)
    for seed in range(4):
        site.check(site.inputs(seed), softcap=20.0)
    assert records.states() == ["recorded"]


def test_budgets_and_weights_that_change_in_place_count_at_once(records):
    site = Site()
    operands = site.inputs(0)
    for budget in (0.9, 0.9, 0.9, 0.3, 1.0):
        site.gate.budget.fill_(budget)
        site.check(operands)
    site.gate.key_weight.normal_()
    site.check(operands)
    assert records.states() == ["recorded"]


def test_gates_of_one_shape_share_a_recording(records):
    sites = [Site() for _ in range(4)]
    for seed, site in enumerate(sites):
        site.gate.key_weight.normal_()
        site.check(site.inputs(seed))
    assert records.states() == ["recorded"]


def test_addresses_of_another_alignment_have_a_recording_of_their_own(records):
    site = Site()
    for seed in range(4):
        for shift in (0, 1):
            # By two bytes: the copy engine does not take it, the portable kernels do.
            operands = [
                torch.empty(x.numel() + 8, dtype=x.dtype, device=CUDA)[shift : x.numel() + shift]
                .view_as(x)
                .copy_(x)
                for x in site.inputs(seed)
            ]
            site.check(operands)
    assert records.states() == ["recorded", "recorded"]


@pytest.mark.parametrize("engine", ["portable", "hopper"])
def test_engines_have_recordings_of_their_own_and_are_counted(records, engine):
    site = Site()
    with engines.attention_engine(engine):
        engines.reset()
        for seed in range(4):
            site.call(site.inputs(seed))
        answers = engines.answers()
    assert answers == {engine: 4, f"block scores {engine}": 4}
    for seed in range(2):
        site.check(site.inputs(seed))
    assert records.states() == ["recorded", "recorded"]


def test_an_engine_that_was_asked_for_warns_whatever_was_recorded(records):
    site = Site(head_dim=64)
    for seed in range(4):
        site.call(site.inputs(seed), softcap=20.0)
    assert records.states() == ["recorded"]
    for seed in range(4):
        with engines.attention_engine("hopper"), pytest.warns(engines.EngineFallbackWarning):
            site.call(site.inputs(seed), softcap=20.0)
    assert records.states() == ["recorded", "a warning is given"]


@pytest.mark.parametrize("selector", ["top_k", "fraction", "top_p"])
def test_an_infinite_budget_keeps_every_block(selector):
    scores = torch.rand(1, 2, 8, 8, device=CUDA)
    budget = torch.full((2,), torch.inf, dtype=torch.float64, device=CUDA)
    _, counts = torch.ops.seer_compile.select_blocks.v1(
        scores, budget, selector, 64, 64, 512, 512, 0
    )
    assert counts.tolist() == [2 * [list(range(1, 9))]]


def test_densities_are_metered_though_calls_are_recorded(records):
    site = Site()
    for seed in range(3):
        site.call(site.inputs(seed))
    assert records.states() == ["recorded"]
    with counters.collect_density() as meter:
        site.call(site.inputs(3))
    assert 0 < meter.densities()["site"] <= 1


def test_calls_compute_where_allocations_are_filled(records, monkeypatch):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    site = Site()
    for seed in range(3):
        site.check(site.inputs(seed))
    assert records.states() == []


def test_calls_are_counted(records):
    site = Site()
    counters.reset()
    for seed in range(5):
        site.call(site.inputs(seed))
    assert counters.snapshot() == {"site": {"sparse": 5}}


def test_gradients_of_played_calls_are_those_of_computed_ones(records):
    site = Site()
    for seed in range(4):
        gradients = []
        for enabled in (True, False):
            leaves = [x.detach().requires_grad_() for x in site.inputs(seed)]
            with playing(enabled=enabled):
                out, _ = site.call(leaves)
                gradients.append(torch.autograd.grad(out.float().square().sum(), leaves))
        for ours, theirs in zip(*gradients, strict=True):
            assert_bitwise_equal(ours, theirs)
    assert records.states() == ["recorded"]


def test_played_calls_are_captured_in_cuda_graphs(records):
    site = Site()
    held = site.inputs(0)
    for seed in range(3):
        site.call(site.inputs(seed))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = site.call(held)
    for seed in (7, 8):
        operands = site.inputs(seed)
        for mine, theirs in zip(held, operands, strict=True):
            mine.copy_(theirs)
        graph.replay()
        with playing(enabled=False):
            expected, _ = site.call(operands)
        assert_bitwise_equal(out, expected)


def test_played_calls_run_on_the_current_stream(records):
    site = Site()
    for seed in range(2):
        site.call(site.inputs(seed))
    operands = site.inputs(5)
    with playing(enabled=False):
        expected, _ = site.call(operands)
    stream = torch.cuda.Stream()
    for tensor in operands:
        tensor.record_stream(stream)
    with torch.cuda.stream(stream):
        # Operands are there only after a while, on this stream.
        torch.cuda._sleep(50_000_000)
        late = [tensor.clone() for tensor in operands]
        out, _ = site.call(late)
    stream.synchronize()
    assert_bitwise_equal(out, expected)
    assert records.states() == ["recorded"]


def test_threads_play_side_by_side(records):
    site, wrong = Site(), []
    for seed in range(2):
        site.call(site.inputs(seed))

    def work(seed):
        with torch.cuda.stream(torch.cuda.Stream()):
            for number in range(20):
                operands = site.inputs(1000 * seed + number)
                out, _ = site.call(operands)
                with playing(enabled=False):
                    expected, _ = site.call(operands)
                if not torch.equal(out, expected):
                    wrong.append((seed, number))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_nothing_is_read_from_keys_that_are_hidden(records):
    site = Site()
    for seed in range(4):
        query, key, value = site.inputs(seed, 512, 1024)
        expected, _ = site.call((query, key, value))
        key[:, :, 512:], value[:, :, 512:] = float("nan"), float("nan")
        out, _ = site.call((query, key, value))
        assert_bitwise_equal(out, expected)
    assert records.states() == ["recorded"]


def test_long_calls_are_left_alone(records):
    site = Site(heads=32, kv_heads=8)
    operands = [
        torch.randn(1, heads, 65_536, 128, dtype=torch.bfloat16, device=CUDA)
        for heads in (32, 8, 8)
    ]
    for _ in range(3):
        site.check(operands)
    assert records.states() == ["temporary tensors take too much memory"]


def test_a_triton_whose_launcher_is_unknown_launches_itself(records, monkeypatch):
    monkeypatch.setattr(launching, "_is_known", lambda: False)
    site = Site()
    for seed in range(3):
        site.check(site.inputs(seed))
    assert records.states() == []


def test_watching_a_long_call_does_not_hold_its_memory(records):
    site = Site(heads=32, kv_heads=8)
    operands = [
        torch.randn(1, heads, 131_072, 128, dtype=torch.bfloat16, device=CUDA)
        for heads in (32, 8, 8)
    ]
    peaks = []
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        site.call(operands)
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated())
    assert records.states() == ["temporary tensors take too much memory"]
    assert max(peaks) < peaks[0] + (256 << 20)


def test_a_profiler_of_launches_sees_them(records):
    import triton

    site, seen = Site(), []
    for seed in range(3):
        site.call(site.inputs(seed))

    def note(metadata):
        seen.append(metadata.get()["name"])

    triton.knobs.runtime.launch_enter_hook.add(note)
    try:
        site.call(site.inputs(3))
    finally:
        triton.knobs.runtime.launch_enter_hook.remove(note)
    assert len(seen) >= 4
