"""Which kernel answers a dense call, and what happens where it does not."""

import math

import pytest
import torch
import torch.nn.functional as F

from seer_compile.kernels import dense_backends
from seer_compile.kernels.break_even import DENSE, DenseRule
from seer_compile.kernels.dense_backends import answers, device_class, fused_attention, preferred
from support.assertions import assert_bitwise_equal
from support.inputs import attention_inputs

TABLE = {("gpu", 128): DenseRule(flash_below=10.0, cudnn_from=100.0)}
ALWAYS = {
    "flash": DenseRule(flash_below=math.inf, cudnn_from=math.inf),
    "cudnn": DenseRule(flash_below=0.0, cudnn_from=0.0),
    "sdpa": DenseRule(flash_below=0.0, cudnn_from=math.inf),
}


@pytest.fixture(autouse=True)
def _fresh_counts(monkeypatch):
    monkeypatch.setattr(dense_backends, "_failed", set())
    dense_backends.reset()
    yield
    dense_backends.reset()


def choose(monkeypatch, backend, *, takes=True):
    """Let the rule prefer a backend on the CPU, which PyTorch says takes every call, or none."""
    monkeypatch.setitem(DENSE, ("cpu", 64), ALWAYS[backend])
    monkeypatch.setattr(dense_backends, "_takes", lambda *_: takes)


def call(length=128, *, is_causal=True, dtype=torch.bfloat16):
    inputs = attention_inputs(heads=4, kv_heads=2, q_len=length, dtype=dtype)
    out = fused_attention(*inputs[:3], is_causal=is_causal, scale=inputs.scale)
    expected = F.scaled_dot_product_attention(
        *inputs[:3], is_causal=is_causal, scale=inputs.scale, enable_gqa=True
    )
    assert_bitwise_equal(out, expected)


@pytest.mark.parametrize(
    ("device", "dim", "work", "backend"),
    [
        ("gpu", 128, 9.0, "flash"),
        ("gpu", 65, 10.0, "sdpa"),
        ("gpu", 128, 99.0, "sdpa"),
        ("gpu", 128, 100.0, "cudnn"),
        ("gpu", 64, 1e20, "sdpa"),
        ("gpu", 129, 1e20, "sdpa"),
        ("other", 128, 1e20, "sdpa"),
    ],
)
def test_rule_is_a_function_of_device_head_dim_and_work(device, dim, work, backend):
    assert preferred(device, dim, work, TABLE) == backend


def test_shipped_rules_leave_no_size_without_an_answer():
    for (device, head_dim), rule in DENSE.items():
        assert device == "cpu" or device.startswith("cuda-")
        assert head_dim in (64, 128, 256)
        assert rule.flash_below <= rule.cudnn_from


def test_without_a_rule_sdpa_chooses():
    call()
    assert answers() == {"sdpa": 1}
    assert device_class(torch.device("cpu")) == "cpu"


@pytest.mark.parametrize("backend", ["flash", "cudnn"])
@pytest.mark.parametrize("length", [1, 127])
def test_fewer_queries_than_were_measured_are_left_to_sdpa(backend, length, monkeypatch):
    choose(monkeypatch, backend)
    call(length)
    assert answers() == {"sdpa": 1}


@pytest.mark.parametrize("backend", ["flash", "cudnn"])
def test_a_call_that_is_not_taken_goes_to_sdpa_and_says_so(backend, monkeypatch):
    choose(monkeypatch, backend, takes=False)
    call()
    assert answers() == {f"sdpa:{backend} does not take the call": 1}


@pytest.mark.parametrize(
    ("length", "is_causal", "version", "is_trusted"),
    [
        (128, False, 91000, True),
        (130, False, 99999, False),
        (130, True, 91500, False),
        (130, True, 91501, True),
    ],
)
def test_cudnn_gets_odd_lengths_only_where_it_is_right(
    length, is_causal, version, is_trusted, monkeypatch
):
    choose(monkeypatch, "cudnn", takes=False)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    call(length, is_causal=is_causal)
    reason = (
        "cudnn does not take the call" if is_trusted else "cudnn is not trusted with this length"
    )
    assert answers() == {f"sdpa:{reason}": 1}


def test_a_failure_of_cudnn_is_answered_by_sdpa_and_not_repeated(monkeypatch):
    # PyTorch has no such kernel on the CPU: calling it fails as a missing plan does.
    choose(monkeypatch, "cudnn")
    asked = []
    monkeypatch.setattr(dense_backends, "_takes", lambda *_: asked.append(1) or True)
    call()
    call()
    assert answers() == {"sdpa:cudnn failed": 2}
    assert len(asked) == 1
