"""Which kernel answers: the choice, its counts, and what the Hopper engine does not take."""

from __future__ import annotations

import builtins
import threading

import pytest
import torch

from seer_compile.errors import RangeError, VersionUnsupportedError
from seer_compile.kernels import engines
from seer_compile.kernels.geometry import Grid
from seer_compile.types import Visibility

pytest.importorskip("triton")

from seer_compile.kernels.triton import (
    attention_backward,
    attention_forward,
    block_scores,
    hopper_attention,
    hopper_backward,
    hopper_launch,
    hopper_scores,
)
from seer_compile.kernels.triton.primitives import empty_features


@pytest.fixture(autouse=True)
def _fresh_counts():
    engines.reset()
    yield
    engines.reset()


@pytest.fixture
def launched(monkeypatch):
    """Replace all launches by notes of who was called."""
    calls = []
    for name, module in (
        ("portable", attention_forward),
        ("hopper", hopper_attention),
        ("backward portable", attention_backward),
        ("backward hopper", hopper_backward),
        ("scores portable", block_scores),
        ("scores hopper", hopper_scores),
    ):
        monkeypatch.setattr(module, "launch", lambda *_, name=name, **__: calls.append(name))
    return calls


def call(dim=128, dtype=torch.bfloat16, blocks=(64, 64), query=None, selections=1, softcap=None):
    query = torch.zeros(1, 2, 64, dim, dtype=dtype) if query is None else query
    other = torch.zeros(1, 1, 64, dim, dtype=dtype)
    shape = (1, selections, 1)
    lists = torch.zeros(*shape, 1, dtype=torch.int32), torch.zeros(*shape, dtype=torch.int32)
    return engines.forward(query, other, other, *lists, 0.1, *blocks, softcap=softcap)


def differentiate(dim=128, grad=None, softcap=None):
    query, other = (torch.zeros(1, heads, 64, dim, dtype=torch.bfloat16) for heads in (2, 1))
    grad = torch.zeros_like(query) if grad is None else grad
    lists = torch.zeros(1, 1, 1, 1, dtype=torch.int32), torch.zeros(1, 1, 1, dtype=torch.int32)
    results = (torch.zeros_like(query), torch.zeros(1, 2, 64))
    operands = (grad, query, other, other, *results, *lists)
    return engines.backward(*operands, 0.1, 64, 64, softcap=softcap)


def score(k_len=130, dim=64, sub_blocks=(2, 4), dtype=torch.bfloat16, room=True, **visibility):
    shapes = [
        (1, 2, -(-length // size), dim)
        for length, size in zip((70, k_len), sub_blocks, strict=True)
    ]
    like = torch.empty(0, dtype=dtype)
    make = (lambda shape: empty_features(shape, like)) if room else like.new_empty
    grid = Grid(70, k_len, 64, 64)
    return engines.block_scores(
        *map(make, shapes), 0.1, sub_blocks, grid, 1, Visibility(upper=60, **visibility)
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dim": 16}, "gate dim 16"),
        ({"dtype": torch.float32}, "dtype torch.float32"),
        ({"sub_blocks": (2, 1)}, "32 and 64 sub-blocks per block"),
        ({"room": False}, "key_features end within a block of 16 sub-blocks"),
        ({"key_padding": torch.ones(1, 130, dtype=torch.bool)}, "padding or documents"),
    ],
)
def test_scores_go_where_their_own_kernel_takes_them(change, reason, launched, recwarn):
    score()
    score(**change)
    with engines.attention_engine("portable"):
        score()
    assert not recwarn.list
    with engines.attention_engine("hopper"):
        score()
        with pytest.warns(engines.EngineFallbackWarning, match=reason):
            score(**change)
    order = ("hopper", "portable", "portable", "hopper", "portable")
    assert launched == [f"scores {who}" for who in order]
    assert engines.answers() == {
        "block scores hopper": 2,
        "block scores portable": 1,
        f"block scores portable:{reason}": 2,
    }


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dim": 256}, "head dim 256"),
        ({"dim": 80}, "head dims 80 and 80"),
        ({"softcap": 50.0}, "logits are soft-capped"),
        (
            {"grad": torch.zeros(1, 1, 64, 128, dtype=torch.bfloat16).expand(1, 2, 64, 128)},
            "the gradient of the output has a stride of 0 elements",
        ),
    ],
)
def test_the_backward_goes_where_its_own_kernels_take_it(change, reason, launched, recwarn):
    differentiate()
    differentiate(**change)
    with engines.attention_engine("portable"):
        differentiate()
    assert not recwarn.list
    with engines.attention_engine("hopper"):
        differentiate()
        with pytest.warns(engines.EngineFallbackWarning, match=reason):
            differentiate(**change)
    order = ("hopper", "portable", "portable", "hopper", "portable")
    assert launched == [f"backward {who}" for who in order]
    assert engines.answers() == {
        "backward hopper": 2,
        "backward portable": 1,
        f"backward portable:{reason}": 2,
    }


def test_auto_is_the_hopper_engine_where_it_takes_the_call(launched, recwarn):
    call()
    call(dim=80)
    assert launched == ["hopper", "portable"]
    assert engines.answers() == {"hopper": 1, "portable:head dims 80 and 80": 1}
    assert not recwarn.list


def test_soft_capped_logits_go_to_the_portable_engine(launched):
    call(softcap=50.0)
    assert launched == ["portable"]
    assert engines.answers() == {"portable:logits are soft-capped": 1}


def test_a_choice_holds_inside_the_block_and_in_its_thread_only(launched):
    with engines.attention_engine("portable"):
        call()
        with engines.attention_engine("hopper"):
            call()
        call()
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    call()
    assert launched == ["portable", "hopper", "portable", "hopper", "hopper"]
    assert engines.answers() == {"hopper": 3, "portable": 2}


def test_a_choice_ends_with_an_error(launched):
    with pytest.raises(ZeroDivisionError), engines.attention_engine("portable"):
        raise ZeroDivisionError
    call()
    assert launched == ["hopper"]


def test_an_unknown_engine_is_refused_by_name():
    with pytest.raises(RangeError, match="engine"), engines.attention_engine("fast"):
        pass


STRIDED = torch.zeros(1, 2, 64, 256, dtype=torch.bfloat16)[..., ::2]
REPEATED = torch.zeros(1, 1, 64, 128, dtype=torch.bfloat16).expand(1, 2, 64, 128)
SHIFTED = torch.zeros(1 + 2 * 64 * 128, dtype=torch.bfloat16)[1:].view(1, 2, 64, 128)
NARROW = torch.zeros(1, 2, 64, 132, dtype=torch.bfloat16)[..., :128]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dim": 80}, "head dims 80 and 80"),
        ({"dtype": torch.float32}, "dtype torch.float32"),
        ({"blocks": (32, 64)}, "blocks of 32 x 64 tokens"),
        ({"blocks": (64, 96)}, "blocks of 64 x 96 tokens"),
        ({"query": STRIDED}, "query has no contiguous last axis"),
        ({"query": REPEATED}, "query has a stride of 0 elements"),
        ({"query": SHIFTED}, "query does not begin at a multiple of 16 bytes"),
        ({"query": NARROW}, "query has a stride of 132 elements"),
    ],
)
def test_what_the_hopper_engine_does_not_take_is_answered_portably_and_aloud(
    change, reason, launched
):
    warned = pytest.warns(engines.EngineFallbackWarning, match=reason)
    with engines.attention_engine("hopper"), warned:
        call(**change)
    assert launched == ["portable"]
    assert engines.answers() == {f"portable:{reason}": 1}


@pytest.mark.parametrize("blocks", [(64, 64), (128, 64), (64, 128), (256, 256)])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("selections", [1, 2])
def test_the_hopper_engine_takes_the_usual_shapes(dim, blocks, selections, launched):
    tokens_first = torch.zeros(1, 64, 2, dim, dtype=torch.float16).transpose(1, 2)
    with engines.attention_engine("hopper"):
        call(dim=dim, blocks=blocks, selections=selections, dtype=torch.float16, query=tokens_first)
    assert launched == ["hopper"]


def test_an_axis_of_one_entry_may_have_any_stride(launched):
    query = torch.zeros(64 * 128, dtype=torch.bfloat16).as_strided((1, 1, 64, 128), (3, 1, 128, 1))
    with engines.attention_engine("hopper"):
        call(query=query, blocks=(128, 64))
    assert launched == ["hopper"]
    described = hopper_launch.describe(query)
    assert [stride * 2 % 16 for stride in described.strides[:3]] == [0, 0, 0]


@pytest.fixture
def without_gluon(monkeypatch):
    """Let the import of the engine fail as it does on a Triton that lacks a part of Gluon."""
    load = builtins.__import__

    def fail(name, *rest, **options):
        if name == "seer_compile.kernels.triton" and "hopper_attention" in (rest[2] or ()):
            raise AttributeError("no warpgroup_mma")
        return load(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", fail)


def test_a_triton_without_gluon_is_named(without_gluon):
    unavailable = pytest.raises(VersionUnsupportedError, match="portable engine")
    with engines.attention_engine("hopper"), unavailable as raised:
        call()
    assert isinstance(raised.value.__cause__, AttributeError)


def test_auto_does_without_gluon_and_says_so(without_gluon, launched):
    call()
    assert launched == ["portable"]
    assert engines.answers() == {"portable:this Triton lacks what the engine is written in": 1}
