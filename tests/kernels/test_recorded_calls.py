"""Played calls are the recorded ones at other addresses; what could be missed is refused."""

from __future__ import annotations

import ctypes
import gc
import threading
import weakref

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from seer_compile.kernels import call_recorder
from seer_compile.kernels.call_recorder import Recorder, active_recorder
from seer_compile.kernels.recorded_calls import CallRecords, looks
from seer_compile.kernels.triton.launching import launch_kernel


def numbers(argument, size):
    """Return what a kernel sees behind an argument: a tensor, or an address."""
    pointer = argument if isinstance(argument, int) else argument.data_ptr()
    return np.ctypeslib.as_array((ctypes.c_float * size).from_address(pointer))


class Kernel:
    """Stands in for a compiled kernel: computes ``out = factor * source``, element by element."""

    arg_names = ("source", "out", "factor", "SIZE")

    def __init__(self):
        self.launched = []

    def __getitem__(self, grid):
        def start(*arguments, **options):
            others = [options[name] for name in self.arg_names[len(arguments) :]]
            self.run(*grid, 1, 1, 0, "function", "packed", None, None, None, *arguments, *others)
            return Compiled(self)

        return start

    def run(self, x, y, z, stream, function, metadata, about, enter, leave, *arguments):
        assert (y, z, stream, function, metadata) == (1, 1, 0, "function", "packed")
        assert about is enter is leave is None
        source, out, factor, size = arguments
        source = getattr(source, "base", source)
        self.launched.append((x, factor, size))
        numbers(out, size)[:] = factor * numbers(source, size)


class Compiled:
    """Has what a compiled kernel has."""

    function, packed_metadata = "function", "packed"

    def __init__(self, kernel):
        self.run = kernel.run


class Descriptor:
    """Has what a tensor descriptor has."""

    def __init__(self, base):
        self.base, self.shape, self.block_shape = base, [4], [4]


@pytest.fixture
def kernel():
    return Kernel()


@pytest.fixture
def calls():
    return CallRecords()


def twice_thrice(kernel, source, made):
    """Return ``2 * source`` and ``6 * source`` by two launches, the second through a temporary."""

    def compute():
        made.append(source)
        size = source.numel()
        double, between, out = (torch.empty_like(source) for _ in range(3))
        launch_kernel(kernel, 7, source, double, factor=2.0, SIZE=size)
        launch_kernel(kernel, 8, double, between, 1.5, SIZE=size)
        launch_kernel(kernel, 9, between, out, 2.0, SIZE=size)
        return double, out

    return compute


def operand(seed, size=4):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def test_the_third_call_and_later_ones_are_played(kernel, calls):
    made, kept = [], []
    for seed in range(6):
        source = operand(seed)
        double, out = calls.answer("key", (source,), twice_thrice(kernel, source, made))
        kept.append((source, double, out))
        assert calls.states() == (["seen once"] if seed == 0 else ["recorded"])
    assert len(made) == 2
    assert kernel.launched == 6 * [(7, 2.0, 4), (8, 1.5, 4), (9, 2.0, 4)]
    # Checked at the end: no result was written by a later call.
    for source, double, out in kept:
        torch.testing.assert_close(double, 2 * source)
        torch.testing.assert_close(out, 6 * source)


def test_keys_have_recordings_of_their_own(kernel, calls):
    for seed in range(4):
        for size in (4, 8):
            source = operand(seed, size)
            _, out = calls.answer(size, (source,), twice_thrice(kernel, source, []))
            torch.testing.assert_close(out, 6 * source)
    assert calls.states() == ["recorded", "recorded"]


def test_operands_that_look_otherwise_have_recordings_of_their_own(kernel, calls):
    for seed in range(4):
        for begin in (0, 1, 4):
            # 4 bytes off, and 16: the kernel of an aligned address is another one.
            source = operand(seed, 12)[begin : begin + 4]
            _, out = calls.answer("key", (source,), twice_thrice(kernel, source, []))
            torch.testing.assert_close(out, 6 * source)
    assert calls.states() == ["recorded", "recorded"]


def test_results_are_laid_out_as_they_were(kernel, calls):
    def compute():
        out = torch.empty(2, 3).transpose(0, 1)
        launch_kernel(kernel, 1, source, out, 1.0, SIZE=6)
        return (out,)

    for seed in range(3):
        source = operand(seed, 6)
        (out,) = calls.answer("key", (source,), compute)
        assert (out.shape, out.stride()) == ((3, 2), (1, 3))
        torch.testing.assert_close(out.t().flatten(), source)
    assert calls.states() == ["recorded"]


def test_a_view_of_an_operand_keeps_its_distance(kernel, calls):
    def compute():
        out = torch.empty(2)
        launch_kernel(kernel, 1, table[1], out, 1.0, SIZE=2)
        return (out,)

    for seed in range(3):
        # Each lies elsewhere in a tensor of its own.
        table = operand(seed, 4 * seed + 6)[4 * seed :].view(3, 2)
        (out,) = calls.answer("key", (table,), compute)
        torch.testing.assert_close(out, table[1])
    assert calls.states() == ["recorded"]


def test_descriptors_are_moved_and_not_changed(kernel, calls):
    def compute():
        described.append(Descriptor(source))
        out = torch.empty(4)
        launch_kernel(kernel, 1, described[-1], out, 3.0, SIZE=4)
        return (out,)

    described = []
    for seed in range(4):
        source = operand(seed)
        (out,) = calls.answer("key", (source,), compute)
        torch.testing.assert_close(out, 3 * source)
    assert calls.states() == ["recorded"]
    assert len(described) == 2
    # And no recording keeps a tensor alive.
    assert described[1].base is not None
    recorded = next(iter(calls._calls.values()))
    assert recorded.launches[0].descriptors[0][1].base is None


def test_operands_of_one_tensor_are_told_apart_by_where_they_begin(kernel, calls):
    def compute():
        out = torch.empty(4)
        launch_kernel(kernel, 1, second, out, 1.0, SIZE=4)
        return (out,)

    for seed in range(2):
        first, second = operand(seed, 8).chunk(2)
        calls.answer("key", (first, second), compute)
    first, second = operand(2), operand(3)
    (out,) = calls.answer("key", (first, second), compute)
    assert calls.states() == ["recorded"]
    torch.testing.assert_close(out, second)


def test_one_tensor_given_twice_is_not_recorded(kernel, calls):
    def compute():
        out = torch.empty(4)
        launch_kernel(kernel, 1, source, out, 1.0, SIZE=4)
        return (out,)

    for seed in range(3):
        source = operand(seed)
        (out,) = calls.answer("key", (source, source), compute)
        torch.testing.assert_close(out, source)
    assert calls.states() == ["a tensor belongs to no operand, or to several"]


order = torch.arange(4)
constant = torch.full((4,), 5.0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda source: source + 1, "aten.add.Tensor runs"),
        (lambda source: torch.zeros(4), "aten.zeros.default runs"),
        (lambda source: source.index_select(0, order), "aten.index_select.default runs"),
        (lambda source: source.clone(), "aten.clone.default runs"),
        (lambda source: source * float(source[0]), "aten._local_scalar_dense.default runs"),
        (lambda source: constant, "a tensor belongs to no operand, or to several"),
    ],
)
def test_what_is_no_launch_is_refused_and_still_right(kernel, calls, change, reason):
    def compute():
        out = torch.empty(4)
        launch_kernel(kernel, 1, change(source), out, 2.0, SIZE=4)
        return (out,)

    for seed in range(4):
        source = operand(seed)
        (out,) = calls.answer("key", (source,), compute)
        torch.testing.assert_close(out, 2 * change(source))
    assert calls.states() == [reason]


@pytest.mark.parametrize("kind", ["operand", "part", "twice", "foreign"])
def test_a_result_must_be_memory_of_its_own(kernel, calls, kind):
    def compute():
        out = torch.empty(8)
        launch_kernel(kernel, 1, source, out, 2.0, SIZE=8)
        return {
            "operand": (out, source),
            "part": (out[:4],),
            "twice": (out, out.view(2, 4)),
            "foreign": (out, constant),
        }[kind]

    for seed in range(3):
        source = operand(seed, 8)
        results = calls.answer("key", (source,), compute)
        torch.testing.assert_close(results[0], 2 * source[: len(results[0])])
    assert calls.states() == ["a result is no memory of its own"]


@pytest.mark.parametrize("wrap", [lambda x: (x, 1), lambda x: [x], lambda x: {"x": x}])
def test_tensors_inside_of_arguments_are_refused(kernel, calls, wrap):
    def compute():
        out = torch.empty(4)
        recorder = active_recorder()
        if recorder is not None:
            recorder.add_launch(Compiled(kernel), 1, [wrap(source), out])
        return (out,)

    source = operand(0)
    for _ in range(2):
        calls.answer("key", (source,), compute)
    assert calls.states() == [f"an argument is a {type(wrap(kernel)).__name__}"]


def test_operands_of_two_devices_are_refused(kernel, calls):
    source, offset = operand(0), torch.zeros((), device="meta")
    for _ in range(3):
        calls.answer("key", (source, offset), twice_thrice(kernel, source, []))
    assert calls.states() == ["an operand is on another device"]


def test_a_call_that_needs_much_memory_is_not_played(kernel, calls, monkeypatch):
    monkeypatch.setattr(call_recorder, "LARGEST_WORKSPACE", 1024)
    much = "temporary tensors take too much memory"
    for size, expected in ((64, "recorded"), (512, much)):
        for seed in range(2):
            source = operand(seed, size)
            calls.answer(size, (source,), twice_thrice(kernel, source, []))
        assert calls.states()[-1] == expected


def test_memory_is_not_held_where_a_recording_is_refused(kernel, monkeypatch):
    monkeypatch.setattr(call_recorder, "LARGEST_WORKSPACE", 1024)
    source, held = operand(0, 64), []
    with Recorder((source,)) as recorder:
        for _ in range(20):
            between = torch.empty(32)
            launch_kernel(kernel, 1, source, between, 1.0, SIZE=32)
            held.append(weakref.ref(between))
            del between
        alive = sum(reference() is not None for reference in held)
    assert recorder.obstacle == "temporary tensors take too much memory"
    assert alive == 0


def test_what_a_kernel_has_loaded_outlives_its_caches(kernel, calls):
    loaded = []

    def compute():
        out = torch.empty(4)
        compiled = Compiled(kernel)
        loaded.append(weakref.ref(compiled))
        recorder = active_recorder()
        if recorder is not None:
            recorder.add_launch(compiled, 1, [source, out, 1.0, 4])
        return (out,)

    for seed in range(2):
        source = operand(seed)
        calls.answer("key", (source,), compute)
    gc.collect()
    assert [reference() is not None for reference in loaded] == [False, True]
    source = operand(2)
    (out,) = calls.answer("key", (source,), compute)
    torch.testing.assert_close(out, source)


def test_effects_on_the_host_are_repeated(kernel, calls):
    counted = []

    def compute():
        recorder = active_recorder()
        counted.append("hopper")
        if recorder is not None:
            recorder.add_effect(counted.append, "hopper")
        return twice_thrice(kernel, source, [])()

    source = operand(0)
    for _ in range(5):
        calls.answer("key", (source,), compute)
    assert counted == 5 * ["hopper"]


def test_an_error_leaves_no_recording_and_no_recorder(calls):
    def fail():
        raise ValueError("no")

    source = operand(0)
    for _ in range(3):
        with pytest.raises(ValueError, match="no"):
            calls.answer("key", (source,), fail)
    assert active_recorder() is None
    # Watching takes memory: what fails for that must not be watched, and fail, for ever.
    assert calls.states() == ["the call failed while it was watched"]
    (out,) = calls.answer("key", (source,), lambda: (source,))
    assert out is source


def test_all_is_forgotten_at_the_limit(kernel):
    calls = CallRecords(limit=3)
    source = operand(0)
    for key in range(7):
        calls.answer(key, (source,), twice_thrice(kernel, source, []))
    assert len(calls.states()) == 1
    calls.clear()
    assert calls.states() == []


def test_threads_play_one_recording_side_by_side(kernel, calls):
    for seed in range(2):
        source = operand(seed)
        calls.answer("key", (source,), twice_thrice(kernel, source, []))
    wrong = []

    def play(seed):
        for number in range(50):
            source = operand(1000 * seed + number)
            _, out = calls.answer("key", (source,), twice_thrice(kernel, source, []))
            if not torch.equal(out, 2 * (1.5 * (2 * source))):
                wrong.append(seed)

    threads = [threading.Thread(target=play, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_one_thread_at_a_time_is_watched(kernel, calls):
    entered, leave = threading.Event(), threading.Event()
    watched = []

    def slowly():
        watched.append(active_recorder())
        entered.set()
        assert leave.wait(10)
        return twice_thrice(kernel, first, [])()

    first, second = operand(0), operand(1)
    for key in ("a", "b"):
        calls.answer(key, (first,), twice_thrice(kernel, first, []))
    thread = threading.Thread(target=lambda: calls.answer("a", (first,), slowly))
    thread.start()
    assert entered.wait(10)
    calls.answer("b", (second,), lambda: watched.append(active_recorder()) or (second,))
    leave.set()
    thread.join()
    assert [recorder is None for recorder in watched] == [False, True]
    assert calls.states() == ["recorded", "seen once"]


def test_compilers_do_not_stop_while_a_call_is_watched(kernel):
    source = operand(0)
    with Recorder((source,)):
        assert not torch.utils._python_dispatch.is_in_torch_dispatch_mode(include_infra_modes=False)


def test_another_thread_is_not_watched(kernel):
    source = operand(0)
    seen = []
    with Recorder((source,)) as recorder:
        thread = threading.Thread(target=lambda: seen.append((active_recorder(), source + 1)))
        thread.start()
        thread.join()
        assert active_recorder() is recorder
    assert seen[0][0] is None
    assert recorder.obstacle is None


def test_looks_tell_apart_what_kernels_are_compiled_for():
    tensor = torch.zeros(4, 8)
    variants = [
        tensor,
        tensor.t(),
        tensor[:2],
        tensor.double(),
        torch.zeros(33)[1:].view(4, 8),
        torch.zeros(4, 8, device="meta"),
    ]
    assert len({looks(variant) for variant in variants}) == len(variants)
    assert looks(tensor) == looks(torch.zeros(64)[4:36].view(4, 8))
    assert looks(tensor, tensor) == (*looks(tensor), *looks(tensor))
