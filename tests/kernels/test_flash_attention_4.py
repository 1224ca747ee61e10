"""The optional engine: what it hands to the package, what it declines, and that answers are proved.

The package is played by a plain softmax over the very lists it is given, from its own description
of them; on a GPU where it is installed the last test runs it.
"""

from __future__ import annotations

import types
from typing import NamedTuple

import pytest
import torch

from seer_compile.errors import EngineMismatchError, VersionUnsupportedError
from seer_compile.kernels import engines, flash_attention_4, reference
from seer_compile.types import Visibility
from support.assertions import assert_no_worse_than_eager
from support.inputs import random_selection

pytest.importorskip("triton")

from seer_compile.kernels.triton import attention_forward, hopper_attention


class Lists(NamedTuple):
    mask_block_cnt: torch.Tensor
    mask_block_idx: torch.Tensor
    full_block_cnt: torch.Tensor
    full_block_idx: torch.Tensor
    block_size: tuple[int, int]


def play(query, key, value, *, softmax_scale, mask_mod, block_sparse_tensors, return_lse):
    """Attend to the listed blocks, tokens first; masked ones through ``mask_mod``."""
    assert return_lse
    lists = block_sparse_tensors
    (batch, q_len, heads, _), k_len = query.shape, key.shape[1]
    rows, columns = torch.arange(q_len)[:, None], torch.arange(k_len)
    readable = torch.zeros(batch, heads, q_len, k_len, dtype=torch.bool)
    for kind in ("mask", "full"):
        counts = getattr(lists, f"{kind}_block_cnt")
        blocks = getattr(lists, f"{kind}_block_idx")
        assert counts.dtype == blocks.dtype == torch.int32
        assert counts.shape == (batch, heads, -(-q_len // lists.block_size[0]))
        for place in torch.cartesian_prod(*map(torch.arange, counts.shape)):
            b, h, row = place.tolist()
            kept = blocks[b, h, row, : counts[b, h, row]]
            assert (kept.diff() > 0).all()
            here = (rows // lists.block_size[0] == row) & torch.isin(
                columns // lists.block_size[1], kept
            )
            if kind == "mask" and len(kept):
                here = here & mask_mod(rows, columns, q_len, k_len)
            readable[b, h] |= here
    key, value = (part.repeat_interleave(heads // part.shape[2], 2) for part in (key, value))
    logits = torch.einsum("bqhd,bkhd->bhqk", query.double(), key.double()) * softmax_scale
    logits = logits.masked_fill(~readable, -torch.inf)
    lse = logits.logsumexp(-1)
    weights = torch.where(readable, (logits - lse[..., None]).exp(), 0.0)
    out = torch.einsum("bhqk,bkhd->bqhd", weights, value.double())
    return out.to(query.dtype), lse.float()


def causal(rows, columns, q_len, k_len):
    return columns <= rows + k_len - q_len


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setattr(flash_attention_4, "_proved", set())
    engines.reset()
    yield
    engines.reset()


@pytest.fixture
def package(monkeypatch):
    played = flash_attention_4._Package(play, Lists, causal)
    monkeypatch.setattr(flash_attention_4, "_package", lambda: played)


def inputs(q_len, k_len, selections=2, query_block=128, dim=64):
    generator = torch.Generator().manual_seed(q_len + k_len)
    query, key, value = (
        torch.randn(2, length, heads, dim, generator=generator).bfloat16().transpose(1, 2)
        for heads, length in ((4, q_len), (2, k_len), (2, k_len))
    )
    selection = random_selection(
        2, selections, -(-q_len // query_block), -(-k_len // 128), density=0.6
    )
    return query, key, value, selection


def by_reference(query, key, value, selection, blocks, upper, dtype):
    tensors = (part.to(dtype) for part in (query, key, value))
    return reference.block_sparse_attention(
        *tensors, selection, 0.125, *blocks, Visibility(upper=upper)
    )


def by_default(*inputs, blocks=(128, 128), upper=0):
    """Answer as the default kernels do: outputs rounded, sums in float32."""
    out, _ = by_reference(*inputs, blocks, upper, torch.bfloat16)
    return out, by_reference(*inputs, blocks, upper, torch.float64)[1].float()


@pytest.mark.parametrize("query_block", [128, 256])
@pytest.mark.parametrize("selections", [1, 2, 4])
@pytest.mark.parametrize(
    ("q_len", "k_len", "is_causal"),
    [(512, 512, True), (512, 512, False), (300, 700, True), (130, 1, False), (257, 515, True)],
)
def test_the_lists_say_what_the_selection_says(
    q_len, k_len, is_causal, selections, query_block, package
):
    query, key, value, selection = inputs(q_len, k_len, selections, query_block)
    upper, blocks = (k_len - q_len if is_causal else None), (query_block, 128)
    eager, _ = by_reference(query, key, value, selection, blocks, upper, torch.bfloat16)
    gold, gold_lse = by_reference(query, key, value, selection, blocks, upper, torch.float64)
    out, lse = flash_attention_4.launch(
        query,
        key,
        value,
        *selection,
        0.125,
        blocks,
        upper,
        lambda: (eager, gold_lse.float()),
    )
    assert_no_worse_than_eager(out, eager, gold, name="out")
    assert torch.equal(lse == -torch.inf, gold_lse == -torch.inf)
    torch.testing.assert_close(lse.double(), gold_lse, rtol=1e-5, atol=1e-5)


def test_the_answer_lies_like_the_query(package):
    query, *rest, selection = inputs(256, 256)
    for first in (query, query.contiguous()):
        out, _ = flash_attention_4.launch(
            first,
            *rest,
            *selection,
            0.125,
            (128, 128),
            0,
            lambda: by_default(query, *rest, selection),
        )
        assert out.stride() == first.stride()


def test_a_block_needs_a_mask_where_some_query_may_not_read_some_key():
    indices = torch.arange(5, dtype=torch.int32).expand(1, 1, 4, 5).contiguous()
    counts = torch.tensor([5, 5, 3, 2], dtype=torch.int32).view(1, 1, 4)
    lists = flash_attention_4.split_lists(indices, counts, 2, (128, 128), 60)
    parts = zip(*(part[0, 1] for part in lists), strict=True)
    rows = [
        (masked[:number].tolist(), full[:count].tolist()) for number, masked, count, full in parts
    ]
    assert rows == [([0, 1], []), ([1, 2], [0]), ([2], [0, 1]), ([], [0, 1])]
    everything = flash_attention_4.split_lists(indices, counts, 2, (128, 128), None)
    assert torch.equal(everything.full_counts[0, 0], counts[0, 0])
    assert not everything.masked_counts.any()


def test_the_first_answer_of_a_kind_is_compared_and_later_ones_are_not(package):
    query, key, value, selection = inputs(256, 256)
    asked = []

    def default():
        asked.append(1)
        return by_default(query, key, value, selection)

    for _ in range(3):
        flash_attention_4.launch(query, key, value, *selection, 0.125, (128, 128), 0, default)
    assert len(asked) == 1


@pytest.mark.parametrize("part", [0, 1])
def test_an_answer_that_differs_raises_every_time(part, package):
    query, key, value, selection = inputs(256, 256)

    def default():
        answer = by_default(query, key, value, selection)
        answer[part][0, 1, 7] += 0.5
        return answer

    for _ in range(2):
        with pytest.raises(EngineMismatchError, match="flash-attn-4"):
            flash_attention_4.launch(query, key, value, *selection, 0.125, (128, 128), 0, default)


def test_a_default_that_is_not_finite_does_not_prove_anything(package):
    query, key, value, selection = inputs(256, 256)
    answer = by_default(query, key, value, selection)
    answer[0][0, 0, 0] = torch.nan
    with pytest.raises(EngineMismatchError):
        flash_attention_4.launch(
            query, key, value, *selection, 0.125, (128, 128), 0, lambda: answer
        )


SHORT = torch.zeros(1, 2, 256, 64, dtype=torch.bfloat16)
PADDING = torch.ones(1, 256, dtype=torch.bool)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"query": SHORT.float()}, "dtype torch.float32"),
        ({"value": SHORT[..., :32]}, "head dims 64 and 32"),
        ({"blocks": (64, 128)}, "blocks of 64 x 128 tokens"),
        ({"blocks": (128, 64)}, "blocks of 128 x 64 tokens"),
        ({"query": SHORT[:, :, :0]}, "nothing to attend to"),
        ({"softcap": 30.0}, "logits are soft-capped"),
        ({"scale": -0.1}, "a scale of -0.1"),
        ({"upper": 0, "lower": -100}, "a window"),
        ({"upper": 3}, "a causal band that ends 3 keys after a query"),
        ({"upper": -256, "key": SHORT.repeat(1, 1, 1, 1)[:, :, :0]}, "nothing to attend to"),
        ({"upper": -128, "key": SHORT[:, :, :128]}, "a causal band that ends -128 keys"),
        ({"key_padding": PADDING}, "padding, documents"),
        ({"offset": torch.tensor(0)}, "padding, documents"),
    ],
)
def test_what_it_does_not_take_goes_to_the_default_kernels_aloud(change, reason, monkeypatch):
    calls = []
    for module in (attention_forward, hopper_attention):
        monkeypatch.setattr(module, "launch", lambda *_, **__: calls.append("default"))
    given = {"query": SHORT, "key": SHORT, "value": SHORT, "blocks": (128, 128), "scale": 0.1}
    given |= change
    tensors = [given.pop(name) for name in ("query", "key", "value")]
    blocks, scale, softcap = given.pop("blocks"), given.pop("scale"), given.pop("softcap", None)
    visibility = Visibility(**given).as_arguments().values()
    lists = torch.zeros(1, 1, 2, 2, dtype=torch.int32), torch.zeros(1, 1, 2, dtype=torch.int32)
    warned = pytest.warns(engines.EngineFallbackWarning, match=reason)
    with engines.attention_engine("flash-attn-4"), warned:
        engines.forward(*tensors, *lists, scale, *blocks, *visibility, softcap=softcap)
    assert calls == ["default"]
    assert any(name.startswith("auto:") and reason in name for name in engines.answers())


def test_an_engine_that_is_not_installed_is_named(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(flash_attention_4.importlib, "import_module", missing)
    flash_attention_4._package.cache_clear()
    query, key, value, selection = inputs(256, 256)
    unavailable = pytest.raises(VersionUnsupportedError, match=r"(?s)flash-attn-4.*pip install")
    with engines.attention_engine("flash-attn-4"), unavailable as raised:
        engines.forward(query, key, value, *selection, 0.125, 128, 128, 0)
    assert isinstance(raised.value.__cause__, ModuleNotFoundError)
    assert engines.answers() == {}


def test_a_version_without_block_lists_is_named(monkeypatch):
    def old(q, k, v, full_block_cnt=None):
        del q, k, v, full_block_cnt

    package = types.SimpleNamespace(flash_attn_func=old, BlockSparseTensorsTorch=Lists)
    monkeypatch.setattr(flash_attention_4.importlib, "import_module", lambda _: package)
    flash_attention_4._package.cache_clear()
    with pytest.raises(VersionUnsupportedError, match=r"4\.0\.0b12"):
        flash_attention_4._package()


def test_it_answers_where_it_was_chosen_and_is_counted(package, monkeypatch):
    query, key, value, selection = inputs(384, 384)
    expected = by_default(query, key, value, selection)
    monkeypatch.setattr(hopper_attention, "launch", lambda *_, **__: expected)
    with engines.attention_engine("flash-attn-4"):
        for _ in range(2):
            out, _ = engines.forward(query, key, value, *selection, 0.125, 128, 128, 0)
    torch.testing.assert_close(out, expected[0], rtol=2e-2, atol=2e-2)
    assert engines.answers()["flash-attn-4"] == 2


@pytest.fixture(scope="module")
def installed():
    """Import the package before a test looks at the environment, to which it adds variables."""
    pytest.importorskip("flash_attn.cute.interface")


@pytest.mark.gpu
@pytest.mark.usefixtures("installed")
# Of the package's own compiler (nvidia-cutlass-dsl 4.8), about an argument of the package's.
@pytest.mark.filterwarnings("ignore:Argument aux_data:UserWarning")
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("q_len", "k_len"), [(1024, 1024), (700, 1500)])
@pytest.mark.parametrize("is_causal", [True, False])
def test_the_installed_package_attends(dim, q_len, k_len, is_causal):
    query, key, value, selection = inputs(q_len, k_len, 2, 128, dim)
    upper = k_len - q_len if is_causal else None
    eager, _ = by_reference(query, key, value, selection, (128, 128), upper, torch.bfloat16)
    gold, _ = by_reference(query, key, value, selection, (128, 128), upper, torch.float64)
    tensors = [part.cuda() for part in (query, key, value, *selection)]
    with engines.attention_engine("flash-attn-4"):
        out, _ = engines.forward(*tensors, 0.125, 128, 128, upper)
    assert engines.answers()["flash-attn-4"] == 1
    assert_no_worse_than_eager(out.cpu(), eager, gold, name="out")
