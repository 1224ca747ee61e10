"""Encoder-decoders of Hugging Face: self attention on both sides, and attention across."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zoo.architecture import Architecture, Batch, Door, Situation
from zoo.caches import encoder_decoder_cache, fill
from zoo.hugging_face import SPECIAL, Builder
from zoo.text_situations import (
    CAPACITY,
    ITEMS,
    PREFIX,
    SIDES,
    Side,
    padding,
    token_ids,
    without_cache,
)
from zoo.wrappers import WithCache

_BART = {
    "vocab_size": 96,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 512,
    "decoder_start_token_id": 2,
}
_T5 = {
    "vocab_size": 96,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
}
_WHISPER = {name: value for name, value in _BART.items() if name != "max_position_embeddings"} | {
    "num_mel_bins": 8,
    "max_source_positions": 150,
    "max_target_positions": 512,
    "decoder_start_token_id": 3,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
SITES, SITES_DECODER = 6, 4
"""Two layers: encoder, decoder, across."""
ENCODED = 90
"""Tokens that the encoder has read when only the decoder runs."""


def _plain(model: nn.Module, size: int) -> Batch:
    del model
    return Batch(
        inputs={
            "input_ids": token_ids(size, ITEMS),
            "decoder_input_ids": token_ids(size, ITEMS, seed=1),
        }
    )


def _padded(model: nn.Module, size: int, side: Side) -> Batch:
    return Batch(inputs=_plain(model, size).inputs | {"attention_mask": padding(size, side)})


def _padded_on_both_sides(model: nn.Module, size: int) -> Batch:
    mask = padding(size, "left")
    inputs = _padded(model, size, "right").inputs | {"decoder_attention_mask": mask}
    return Batch(inputs=inputs, rows=mask.bool())


def _sound(model: nn.Module, size: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    dtype = next(model.parameters()).dtype
    features = torch.randn(2, 8, 300, generator=generator).to(dtype)
    return Batch(
        inputs={"input_features": features, "decoder_input_ids": token_ids(size, 2, seed=1)}
    )


def _encoded(model: nn.Module, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    width = model.config.d_model
    hidden = torch.randn(1, length, width, generator=generator)
    return hidden.to(next(model.parameters()).dtype)


def _decoding(model: nn.Module, size: int) -> Batch:
    return Batch(
        inputs={
            "decoder_input_ids": token_ids(size, seed=2),
            "encoder_hidden": _encoded(model, ENCODED),
        }
    )


def _cached(
    model: nn.Module, door: Door, *, capacity: int | None = CAPACITY, prefix: int = PREFIX
) -> nn.Module:
    encoded = _encoded(model, ENCODED)
    cache = encoder_decoder_cache(model, capacity, encoded)
    if prefix:
        read = {"decoder_input_ids": token_ids(prefix, seed=1), "encoder_outputs": (encoded,)}
        fill(model, cache, read)
    return WithCache(model, cache, exported=door == "export")


def _cache_situations(barred: int) -> tuple[Situation, ...]:
    """Return those in which the decoder alone runs, behind an encoder that has run."""
    chunk = {"make": _decoding, "dynamic": {"decoder_input_ids": (1,)}, "sizes": (75, 66)}
    part = {"sites": SITES_DECODER, "barred": barred}
    return (
        Situation(
            name="dynamic cache, chunk", wrap=partial(_cached, capacity=None), **chunk, **part
        ),
        Situation(name="static cache, prefill", wrap=partial(_cached, prefix=0), **chunk, **part),
        Situation(name="static cache, chunk", wrap=_cached, **chunk, **part),
        Situation(
            name="static cache, decode",
            wrap=_cached,
            make=_decoding,
            sizes=(1, 1),
            sites=SITES_DECODER,
            decodes=True,
        ),
    )


_TOKENS = {"input_ids": (1,), "decoder_input_ids": (1,)}
_MASKED = _TOKENS | {"attention_mask": (1,)}
_TEXT = (
    Situation(name="no mask", wrap=without_cache, make=_plain, dynamic=_TOKENS),
    *(
        Situation(
            name=f"{side} padding",
            wrap=without_cache,
            make=partial(_padded, side=side),
            dynamic=_MASKED,
        )
        for side in SIDES
    ),
    Situation(
        name="padding in encoder and decoder",
        wrap=without_cache,
        make=_padded_on_both_sides,
        dynamic=_MASKED | {"decoder_attention_mask": (1,)},
    ),
)
_SPEECH = (
    Situation(name="no mask", wrap=without_cache, make=_sound, dynamic={"decoder_input_ids": (1,)}),
)
_TABLE: dict[str, tuple[str, str, dict[str, Any], tuple[Situation, ...], dict[str, int]]] = {
    "t5": ("T5ForConditionalGeneration", "T5Config", _T5, _TEXT, {"float bias": 4}),
    "bart": ("BartForConditionalGeneration", "BartConfig", _BART | SPECIAL, _TEXT, {}),
    "pegasus": ("PegasusForConditionalGeneration", "PegasusConfig", _BART | SPECIAL, _TEXT, {}),
    "m2m-100": ("M2M100ForConditionalGeneration", "M2M100Config", _BART | SPECIAL, _TEXT, {}),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        _WHISPER | SPECIAL,
        _SPEECH,
        {},
    ),
}
"""T5 learns a bias per relative position for self attention; across there is none."""

ARCHITECTURES = tuple(
    Architecture(
        name=name,
        family="encoder-decoder",
        build=Builder(model_class, config_class, arguments),
        situations=(*situations, *_cache_situations(sum(barred.values()) // 2)),
        sites=SITES,
        barred=barred,
    )
    for name, (model_class, config_class, arguments, situations, barred) in _TABLE.items()
)
