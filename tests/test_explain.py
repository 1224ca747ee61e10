"""``explain`` on well-known models: every site listed, the decision right, the reason true."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import seer_compile
from seer_compile.errors import ModelStateError
from support.models import architecture, decoder, inputs_of, token_ids

HEADER = ("site", "query", "key", "visible", "decision", "reason")
OF_PLACE = r"`\w+ at [\w.]+:\d+`"


def decoder_of(path, shapes, *visible):
    return [(path.format(layer), *shapes, seen, "sparse", "") for layer, seen in enumerate(visible)]


def sites_of_t5():
    """A learned bias per relative position in self attention; across there is none."""
    bias = f"floating-point bias on the logits: values of {OF_PLACE}"
    own, seen = "1 x 4 x 130 x 8", "1 x 4 x 65 x 8"
    rows = [
        (f"encoder.block.{layer}.layer.0.SelfAttention", own, own, "opaque", "dense", bias)
        for layer in range(2)
    ]
    for layer in range(2):
        block = f"decoder.block.{layer}.layer"
        rows.append((f"{block}.0.SelfAttention", seen, seen, "opaque", "dense", bias))
        rows.append((f"{block}.1.EncDecAttention", seen, own, "full", "sparse", ""))
    return rows


def sites_of_whisper():
    sound, text = "1 x 4 x 150 x 8", "1 x 4 x 65 x 8"
    return [
        ("model.encoder.layers.0.self_attn", sound, sound, "full", "sparse", ""),
        ("model.decoder.layers.0.self_attn", text, text, "causal", "sparse", ""),
        ("model.decoder.layers.0.encoder_attn", text, sound, "full", "sparse", ""),
    ]


LLAMA = "model.layers.{}.self_attn"
GROUPED, WIDE = ("1 x 4 x 130 x 8", "1 x 2 x 130 x 8"), ("1 x 4 x 130 x 16", "1 x 2 x 130 x 16")
ALIKE, IMAGE = ("1 x 4 x 130 x 8",) * 2, ("1 x 4 x 145 x 8",) * 2
WINDOW = "causal + window(70)"
GPT2 = decoder_of("transformer.h.{}.attn", ALIKE, "causal", "causal")
EXPECTED = {
    "llama": decoder_of(LLAMA, GROUPED, "causal", "causal"),
    "qwen3": decoder_of(LLAMA, WIDE, "causal", "causal"),
    "mistral": decoder_of(LLAMA, GROUPED, WINDOW, WINDOW),
    "gemma3": decoder_of(LLAMA, WIDE, WINDOW, "causal"),
    "gpt2": GPT2,
    "gpt2, eager": GPT2,
    "bert": decoder_of("encoder.layer.{}.attention.self", ALIKE, "full", "full"),
    "vit": decoder_of("layers.{}.attention", IMAGE, "full", "full"),
    "t5": sites_of_t5(),
    "whisper": sites_of_whisper(),
}


def table_of(text):
    """Return title and rows of a printed table, cells by column; a missing column is empty."""
    title, header, rule, *lines = text.splitlines()
    starts = [match.start() for match in re.finditer("-+", rule)]
    ends = [*starts[1:], None]
    columns = [header[start:end].strip() for start, end in zip(starts, ends, strict=True)]
    cells = [
        {
            column: line[start:end].strip()
            for column, start, end in zip(columns, starts, ends, strict=True)
        }
        for line in lines
    ]
    return title, [tuple(row.get(column, "") for column in HEADER) for row in cells]


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPECTED)
def test_printed_table_tells_every_site(name):
    architecture_name, _, attention = name.partition(", ")
    model = architecture(architecture_name, attention or "sdpa")
    text = str(seer_compile.explain(model, **inputs_of(architecture_name)))
    title, rows = table_of(text)
    expected = EXPECTED[name]
    sparse = sum(row[4] == "sparse" for row in expected)
    found = f"{type(model).__name__}: {sparse} of {len(expected)} attention sites can be sparse"
    assert re.fullmatch(found + r" \((1 graph|\d+ graphs)\)", title)
    assert [row[:5] for row in rows] == [row[:5] for row in expected]
    for row, known in zip(rows, expected, strict=True):
        assert re.fullmatch(known[5], row[5]), row


class Masked(nn.Module):
    def forward(self, q, mask):
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)


class Returned(nn.Module):
    def forward(self, q, mask):
        weights = (q @ q.mT).softmax(-1)
        return weights @ q, weights * mask


@pytest.mark.parametrize(
    ("model", "mask", "reason"),
    [
        (Masked(), torch.rand(1, 1, 16, 16) > 0.5, f"{OF_PLACE[:-1]}` is data per query"),
        (Masked(), torch.rand(1, 2, 16, 16) > 0.5, f"{OF_PLACE[:-1]}` is data per head and query"),
        (Masked(), torch.rand(16, 16), f"values of {OF_PLACE}"),
        (Returned(), torch.rand(16, 16), f"{OF_PLACE} reads them"),
    ],
)
def test_reasons_name_the_line(model, mask, reason):
    (site,) = seer_compile.explain(model, torch.randn(1, 2, 16, 8), mask).sites
    code, _, detail = site.reason.partition(": ")
    assert site.decision == "dense"
    assert code
    named = reason.replace(r" at [\w.]+:\d+", r"( at [\w.]+:\d+)?")
    assert re.fullmatch(named, detail), site.reason


def test_reasons_name_no_file_of_ours():
    """PyTorch's own layers leave no frame of the user's between them and our call."""
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True).eval()
    (site,) = seer_compile.explain(layer, torch.randn(1, 80, 32), torch.randn(80, 80)).sites
    assert site.decision == "dense"
    assert ".py" not in site.reason + site.source


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_wrappers_of_an_optimized_model_are_looked_through(wrap):
    model = seer_compile.optimize(decoder(), inner="eager", exclude=["layers.1"])
    expected = seer_compile.explain(model, token_ids(80))
    assert [site.decision for site in expected.sites] == ["sparse", "dense"]
    assert seer_compile.explain(wrap(model), token_ids(80)) == expected


def test_a_model_with_optimized_parts_is_refused_by_their_names():
    """A part answers in graphs of its own: a capture of the whole would list no site."""
    whole = nn.Sequential(seer_compile.optimize(decoder(), inner="eager"), nn.Identity())
    with pytest.raises(ModelStateError, match="not optimized, but its part '0' is"):
        seer_compile.explain(whole, token_ids(80))
    whole[1] = seer_compile.optimize(decoder(), inner="eager")
    with pytest.raises(ModelStateError, match=r"but its parts \['0', '1'\] are"):
        seer_compile.explain(whole, token_ids(80))
