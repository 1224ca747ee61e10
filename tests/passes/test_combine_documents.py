"""Several numberings of documents are one: equal exactly where all of them are."""

import pytest
import torch

from seer_compile.passes.combine_documents import combine_documents
from seer_compile.passes.find_sites import find_sites
from seer_compile.passes.prove_masks import prove_masks
from seer_compile.passes.site_names import SiteNames
from support.graphs import B, T, qkv, trace
from support.inputs import generator
from support.mask_oracle import Inspected, check_all

EXTREMES = torch.tensor([-(2**63), -1, 0, 2**31, 2**62, 2**63 - 1])


def call(target, *args):
    return target(*args)


def numbering(draw, choices, length):
    return choices[torch.randint(len(choices), (3, length), generator=draw)]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("lengths", [(9, 14), (14, 9), (1, 6), (0, 4)])
def test_combined_numbers_are_equal_exactly_where_all_numbers_are(count, lengths):
    draw = generator(count)
    pairs = []
    for place in range(count):
        choices = EXTREMES[torch.randperm(len(EXTREMES), generator=draw)][: 2 + place % 2]
        pairs.append(tuple(numbering(draw, choices, length) for length in lengths))
    expected = torch.ones(3, *lengths, dtype=torch.bool)
    for query, key in pairs:
        expected &= query[:, :, None] == key[:, None]
    query, key = combine_documents(pairs, lengths[0], call)
    assert (query.shape, key.shape) == ((3, lengths[0]), (3, lengths[1]))
    assert torch.equal(query[:, :, None] == key[:, None], expected)
    assert expected.any() or not expected.numel()


def test_a_single_numbering_is_passed_on():
    pair = (torch.ones(1, 3), torch.ones(1, 4))
    assert combine_documents([pair], 3, call) == pair


@pytest.mark.parametrize("dynamic", [False, True])
def test_chunks_of_packed_documents_are_proved_and_right(dynamic):
    """As Llama 4 masks its chunked layers when documents are packed."""

    def attend(q, k, v, documents, chunks):
        index = torch.arange(q.shape[2])
        same = documents[:, None, :, None] == documents[:, None, None]
        same = same & (chunks[:, None, :, None] == chunks[:, None, None])
        visible = same & (index[None, :] <= index[:, None])
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible)

    documents = torch.tensor([3, -7]).repeat_interleave(5)[:T].expand(B, -1)
    documents = torch.cat([documents, documents.new_full((B, T - documents.shape[1]), 2**40)], 1)
    chunks = (torch.arange(T) // 4).expand(B, -1)
    captured = trace(attend, *qkv(), documents.contiguous(), chunks.contiguous(), dynamic=dynamic)
    sites = find_sites(captured.graph_module, SiteNames())
    proofs = prove_masks(captured.graph_module, sites)
    assert proofs[0].visibility.describe() == "causal + same document"
    assert check_all(Inspected(captured, sites, proofs)) == 1
