"""The benchmark of peers gives all of them the same blocks, and times no wrong answer."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import gated_calls
import peers

import seer_compile
from seer_compile.kernels import engines
from seer_compile.session import run_with_handler
from support.models import decoder

CPU = torch.device("cpu")
SHAPE = gated_calls.Shape(4, 2, 32)


def kept_blocks(lists):
    """Return ``Bool[1 g m n]``: which blocks are selected."""
    number, columns = lists.indices.shape[2:]
    mask = torch.zeros((*lists.counts.shape, columns + 1), dtype=torch.bool)
    is_kept = torch.arange(columns) < lists.counts[..., None]
    mask.scatter_(-1, torch.where(is_kept, lists.indices, columns).long(), is_kept)
    assert number == columns
    return mask[..., :columns]


@pytest.fixture
def tensors():
    return gated_calls.operands(SHAPE, gated_calls.Size(640, 640), CPU)


def test_random_lists_keep_the_share_that_is_asked_for():
    lists = peers.random_lists(4096, 0.3, 2, 64, CPU)
    kept = kept_blocks(lists)
    assert torch.equal(kept.sum(-1, dtype=torch.int32), lists.counts)
    assert not kept.triu(1).any()
    assert kept.diagonal(dim1=-2, dim2=-1).all()
    assert lists.density == pytest.approx(0.3, abs=0.05)


def test_flex_attention_reads_the_same_blocks():
    lists = peers.random_lists(640, 0.4, 2, 64, CPU)
    mask = peers.block_mask(lists, 4, 640)
    expected = kept_blocks(lists).repeat_interleave(2, 1)
    assert torch.equal(mask.to_dense().bool(), expected)
    # Of a causal row only the block on the diagonal needs a mask.
    assert (mask.kv_num_blocks == 1).all()


def test_gates_give_a_list_of_every_site_before_a_second_one_of_any():
    tokens = torch.randint(64, (1, 640), generator=torch.Generator().manual_seed(0))
    # Two models whose sites have the same names.
    models = [
        seer_compile.optimize(
            decoder(width=64, heads=2), example=(tokens,), zero_shot=True, inner="eager"
        )
        for _ in range(2)
    ]
    model = models[1]
    store, alone = model.get_submodule("seer_gates"), {}

    def answer(site):
        gate = store.get(site.name)
        alone[site.name] = gate.select(site)
        return gate.attend(site)

    run_with_handler(model, (), {"tokens": tokens}, answer)
    lists = peers.lists_of_gates(model, {"tokens": tokens}, 5)
    assert len(alone) == 2
    first, second = alone.values()
    for place, (selection, head) in enumerate(
        [(first, 0), (second, 0), (first, 1), (second, 1), (first, 0)]
    ):
        assert torch.equal(lists.counts[:, place], selection.counts[:, head])
        assert torch.equal(lists.indices[:, place], selection.indices[:, head])


def test_every_peer_is_right_and_timed(tensors):
    with torch.no_grad():
        rows = list(peers.measure(tensors, [0.4]))
    assert [row["what"] for row in rows] == ["default", "auto", "portable", "flex"]
    assert all(row["ms"] > 0 < row["tflops"] for row in rows)


def test_a_wrong_answer_is_not_timed(tensors, monkeypatch):
    lists = peers.random_lists(640, 0.4, 2, 64, CPU)
    call = peers.engine_call("portable", tensors, lists)
    others = lists._replace(counts=lists.counts.clamp(max=1))
    monkeypatch.setattr(peers, "timed", lambda *_: pytest.fail("it was timed"))
    with pytest.raises(SystemExit, match="relative error"):
        peers.sparse_row("portable", call, tensors, others, 0.4)


def test_engines_are_those_that_are_named(tensors, monkeypatch):
    lists, seen = peers.random_lists(640, 0.4, 2, 64, CPU), []
    inner = peers.by_device.block_sparse_attention
    monkeypatch.setattr(
        peers.by_device,
        "block_sparse_attention",
        lambda *args: seen.append(engines._chosen.get()) or inner(*args),
    )
    calls = peers.sparse_calls(tensors, lists)
    for name in ("auto", "portable"):
        calls[name]()
    assert seen == ["auto", "portable"]
