"""Models of Hugging Face that read images and text together."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zoo.architecture import Architecture, Batch, Door, Situation
from zoo.caches import decoder_cache, fill
from zoo.hugging_face import DECODER, from_config, library
from zoo.text_situations import (
    CAPACITY,
    SIDES,
    Side,
    never_cached,
    token_ids,
    without_cache,
)
from zoo.wrappers import Forward, WithCache

Make = Callable[[nn.Module, int], Batch]
IMAGE_TOKEN, IMAGE_START = 95, 93
LAST_WORD = 90
"""The largest token that stands for no image."""
_EYE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 4,
}
PATCHES = 64
PREFIX = 20
"""Words behind the image in a cache when a call goes on, or in the first of two documents."""
PADDING = 20
SITES, SITES_TEXT = 4, 2
"""Two layers for images, two for text, which alone run when a call goes on."""
SITES_PATCHES = 6
"""The same where the layers for images read two images one after the other."""


def _clip(spelling: str) -> nn.Module:
    text = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "eos_token_id": 2}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 512}
    config = library().CLIPConfig(text_config=text, vision_config=_EYE, projection_dim=16)
    return from_config("CLIPModel", config, spelling)


def _llava(spelling: str) -> nn.Module:
    config = library().LlavaConfig(
        vision_config=library().CLIPVisionConfig(**_EYE),
        text_config=library().LlamaConfig(**DECODER),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-1,
    )
    return from_config("LlavaForConditionalGeneration", config, spelling)


def _paligemma(spelling: str) -> nn.Module:
    config = library().PaliGemmaConfig(
        vision_config=library().SiglipVisionConfig(**_EYE, vision_use_head=False),
        text_config=library().GemmaConfig(**DECODER, head_dim=16),
        image_token_index=IMAGE_TOKEN,
        projection_dim=32,
        hidden_size=32,
        vocab_size=96,
    )
    return from_config("PaliGemmaForConditionalGeneration", config, spelling)


def _qwen2_vl(spelling: str) -> nn.Module:
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = library().Qwen2VLConfig(
        text_config=DECODER | {"rope_parameters": rope},
        vision_config=vision,
        image_token_id=IMAGE_TOKEN,
        video_token_id=94,
        vision_start_token_id=IMAGE_START,
        vision_end_token_id=92,
    )
    return from_config("Qwen2VLForConditionalGeneration", config, spelling)


def _picture(model: nn.Module, batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randn(batch, 3, 32, 32, generator=generator)
    return pixels.to(next(model.parameters()).dtype)


def _with_image(size: int, batch: int, patches: int = PATCHES) -> Tensor:
    """Return token ids that end in text: image, then words (no image token among them)."""
    words = token_ids(size, batch).clamp(max=LAST_WORD)
    return torch.cat([torch.full((batch, patches), IMAGE_TOKEN), words], dim=1)


def _plain(model: nn.Module, size: int) -> Batch:
    return Batch(inputs={"input_ids": _with_image(size, 2), "pixel_values": _picture(model, 2)})


def _padded(model: nn.Module, size: int, side: Side) -> Batch:
    """Return two prompts, of which the second has padding where the first has words."""
    words = torch.full((2, PADDING), 7)
    ids = torch.cat(_ordered(side, words, _with_image(size, 2)), dim=1)
    mask = torch.ones_like(ids)
    padded = slice(PADDING) if side == "left" else slice(-PADDING, None)
    ids[1, padded], mask[1, padded] = 0, 0
    return Batch(
        inputs={"input_ids": ids, "attention_mask": mask, "pixel_values": _picture(model, 2)},
        rows=mask.bool(),
    )


def _ordered(side: Side, padding: Tensor, prompt: Tensor) -> tuple[Tensor, Tensor]:
    return (padding, prompt) if side == "left" else (prompt, padding)


def _packed(model: nn.Module, size: int) -> Batch:
    """Return two documents in one row: an image with words, and words."""
    ids = torch.cat([_with_image(PREFIX, 1), token_ids(size).clamp(max=LAST_WORD)], dim=1)
    positions = torch.cat([torch.arange(PATCHES + PREFIX), torch.arange(size)])[None]
    return Batch(
        inputs={"input_ids": ids, "position_ids": positions, "pixel_values": _picture(model, 1)}
    )


def _prefix(model: nn.Module, size: int) -> Batch:
    """Return a prompt of PaliGemma and its answer, as in training: only the answer is causal."""
    inputs = _plain(model, size).inputs
    answers = torch.arange(inputs["input_ids"].shape[1]) >= PATCHES + PREFIX
    kinds = answers.long().expand_as(inputs["input_ids"])
    return Batch(
        inputs=inputs | {"token_type_ids": kinds, "attention_mask": torch.ones_like(kinds)}
    )


def _prompt(model: nn.Module, size: int) -> Batch:
    inputs = {"input_ids": _with_image(size, 1), "pixel_values": _picture(model, 1)}
    return Batch(inputs=inputs)


def _words(model: nn.Module, size: int) -> Batch:
    del model
    return Batch(inputs={"input_ids": token_ids(size, seed=2).clamp(max=LAST_WORD)})


def _clip_plain(model: nn.Module, size: int) -> Batch:
    return Batch(
        inputs={"input_ids": _ended(token_ids(size, 2)), "pixel_values": _picture(model, 2)}
    )


def _clip_padded(model: nn.Module, size: int) -> Batch:
    inputs = _clip_plain(model, size).inputs
    mask, ids = torch.ones(2, size, dtype=torch.long), inputs["input_ids"]
    mask[1, -20:], ids[1, -20:], ids[1, -21] = 0, 0, 2
    return Batch(inputs=inputs | {"attention_mask": mask})


def _ended(ids: Tensor) -> Tensor:
    ids = ids.clone()
    ids[:, -1] = 2
    return ids


def _patches(model: nn.Module, size: int, batch: int = 1) -> Batch:
    """Return what Qwen2-VL reads: each image as rows of patches, with its grid."""
    generator = torch.Generator().manual_seed(3)
    flat = torch.randn(4 * PATCHES * batch, 3 * 2 * 4 * 4, generator=generator)
    starts = torch.full((batch, 1), IMAGE_START)
    ids = torch.cat([starts, _with_image(size, batch)], dim=1)
    return Batch(
        inputs={
            "input_ids": ids,
            "pixel_values": flat.to(next(model.parameters()).dtype),
            "image_grid_thw": torch.tensor([[1, 16, 16]] * batch),
            "mm_token_type_ids": (ids == IMAGE_TOKEN).long(),
        }
    )


def _patches_padded(model: nn.Module, size: int, side: Side) -> Batch:
    inputs = _patches(model, size, batch=2).inputs
    padding = torch.zeros(2, PADDING, dtype=torch.long)
    mask = torch.cat(_ordered(side, padding, torch.ones_like(inputs["input_ids"])), dim=1)
    mask[0] = 1
    for name in ("input_ids", "mm_token_type_ids"):
        inputs[name] = torch.cat(_ordered(side, padding, inputs[name]), dim=1)
    return Batch(inputs=inputs | {"attention_mask": mask}, rows=mask.bool())


def _patches_packed(model: nn.Module, size: int) -> Batch:
    """Return two documents in one row. The first of four positions is the one in the text."""
    first, second = _patches(model, PREFIX).inputs, _words(model, size).inputs["input_ids"]
    length = first["input_ids"].shape[1]
    positions = torch.cat([torch.arange(length), torch.arange(size)]).expand(4, 1, -1)
    return Batch(
        inputs={
            "input_ids": torch.cat([first["input_ids"], second], dim=1),
            "pixel_values": first["pixel_values"],
            "image_grid_thw": first["image_grid_thw"],
            "position_ids": positions,
        }
    )


def _placed_words(model: nn.Module, size: int) -> Batch:
    """Return words behind an image, with the positions that ``generate()`` hands to Qwen2-VL."""
    prompt = _patches(model, PREFIX).inputs
    length = prompt["input_ids"].shape[1]
    _, shift = model.model.get_rope_index(
        prompt["input_ids"], prompt["mm_token_type_ids"], prompt["image_grid_thw"]
    )
    positions = (torch.arange(length, length + size) + shift).expand(3, 1, -1)
    return Batch(inputs=_words(model, size).inputs | {"position_ids": positions})


def _bare(model: nn.Module, door: Door) -> nn.Module:
    del door
    return Forward(model)


def _cached(
    model: nn.Module,
    door: Door,
    *,
    capacity: int | None = CAPACITY,
    prefix: Make | None = None,
) -> nn.Module:
    cache = decoder_cache(model, capacity)
    if prefix is not None:
        fill(model, cache, prefix(model, PREFIX).inputs)
    return WithCache(model, cache, exported=door == "export")


_LENGTH_AXES = {
    "input_ids": (1,),
    "mm_token_type_ids": (1,),
    "attention_mask": (1,),
    "token_type_ids": (1,),
}
_POSITIONS = _LENGTH_AXES | {"position_ids": (1,)}
_POSITIONS_IN_SPACE = _LENGTH_AXES | {"position_ids": (2,)}


def _situation(name: str, make: Make, wrap: Any = without_cache, **changes: Any) -> Situation:
    fields = {"sizes": (80, 71), "dynamic": _LENGTH_AXES} | changes
    return Situation(name=name, wrap=wrap, make=make, **fields)


def _continued(prompt: Make, words: Make) -> tuple[Situation, ...]:
    """Return how a prompt is read into a cache, and how words follow an image that is in one."""
    chunk = {"make": words, "sizes": (75, 66), "sites": SITES_TEXT, "dynamic": _POSITIONS_IN_SPACE}
    behind = partial(_cached, prefix=prompt)
    decode = {"sizes": (1, 1), "dynamic": {}, "decodes": True}
    return (
        _situation("dynamic cache, chunk", wrap=partial(behind, capacity=None), **chunk),
        _situation("static cache, prefill", prompt, _cached),
        _situation("static cache, chunk", wrap=behind, **chunk),
        _situation("static cache, decode", wrap=behind, **chunk | decode),
    )


_READING = (
    _situation("no mask", _plain),
    *(_situation(f"{side} padding", partial(_padded, side=side)) for side in SIDES),
    _situation("packed", _packed, never_cached, dynamic=_POSITIONS),
    *_continued(_prompt, _words),
)
_READING_PATCHES = (
    _situation("no mask", _patches),
    *(
        _situation(f"{side} padding", partial(_patches_padded, side=side), sites=SITES_PATCHES)
        for side in SIDES
    ),
    _situation("packed", _patches_packed, never_cached, dynamic=_POSITIONS_IN_SPACE),
    *_continued(_patches, _placed_words),
)
_PREFIX_BOTH_WAYS = _situation("prefix read both ways", _prefix)
_CONTRAST = (
    _situation("no mask", _clip_plain, _bare),
    _situation("right padding", _clip_padded, _bare),
)

_TABLE: dict[str, tuple[Callable[[str], nn.Module], tuple[Situation, ...]]] = {
    "clip": (_clip, _CONTRAST),
    "llava": (_llava, _READING),
    "paligemma": (_paligemma, (*_READING, _PREFIX_BOTH_WAYS)),
    "qwen2-vl": (_qwen2_vl, _READING_PATCHES),
}
ARCHITECTURES = tuple(
    Architecture(
        name=name, family="vision-language", build=build, situations=situations, sites=SITES
    )
    for name, (build, situations) in _TABLE.items()
)
