"""Models of Hugging Face that read images and text together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zoo.architecture import Architecture, Batch, Door, Situation
from zoo.hugging_face import DECODER, from_config, library
from zoo.text_situations import token_ids, without_cache
from zoo.wrappers import Forward

IMAGE_TOKEN = 95
_EYE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 4,
}
PATCHES = 64


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
        vision_start_token_id=93,
        vision_end_token_id=92,
    )
    return from_config("Qwen2VLForConditionalGeneration", config, spelling)


def _picture(model: nn.Module, batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randn(batch, 3, 32, 32, generator=generator)
    return pixels.to(next(model.parameters()).dtype)


def _with_image(size: int, batch: int, patches: int = PATCHES) -> Tensor:
    """Return token ids that end in text: image, then words (no image token among them)."""
    words = token_ids(size, batch).clamp(max=90)
    return torch.cat([torch.full((batch, patches), IMAGE_TOKEN), words], dim=1)


def _plain(model: nn.Module, size: int) -> Batch:
    return Batch(inputs={"input_ids": _with_image(size, 2), "pixel_values": _picture(model, 2)})


def _left_padded(model: nn.Module, size: int) -> Batch:
    ids = torch.cat([torch.zeros(2, 20, dtype=torch.long), _with_image(size, 2)], dim=1)
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    ids[0, :20] = 7
    return Batch(
        inputs={"input_ids": ids, "attention_mask": mask, "pixel_values": _picture(model, 2)},
        rows=mask.bool(),
    )


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


def _patches(model: nn.Module, size: int) -> Batch:
    generator = torch.Generator().manual_seed(3)
    flat = torch.randn(256, 3 * 2 * 4 * 4, generator=generator)
    ids = torch.cat([torch.full((1, 1), 93), _with_image(size, 1)], dim=1)
    return Batch(
        inputs={
            "input_ids": ids,
            "pixel_values": flat.to(next(model.parameters()).dtype),
            "image_grid_thw": torch.tensor([[1, 16, 16]]),
            "mm_token_type_ids": (ids == IMAGE_TOKEN).long(),
        }
    )


def _bare(model: nn.Module, door: Door) -> nn.Module:
    del door
    return Forward(model)


def _situation(
    name: str, make: Callable[[nn.Module, int], Batch], wrap: Any = without_cache
) -> Situation:
    varying: dict[str, Any] = {"input_ids": (1,), "mm_token_type_ids": (1,)}
    if "padding" in name:
        varying["attention_mask"] = (1,)
    return Situation(name=name, wrap=wrap, make=make, sizes=(80, 71), dynamic=varying)


_READING = (_situation("no mask", _plain), _situation("left padding", _left_padded))
_CONTRAST = (
    _situation("no mask", _clip_plain, _bare),
    _situation("right padding", _clip_padded, _bare),
)

_TABLE: dict[str, tuple[Callable[[str], nn.Module], tuple[Situation, ...]]] = {
    "clip": (_clip, _CONTRAST),
    "llava": (_llava, _READING),
    "paligemma": (_paligemma, _READING),
    "qwen2-vl": (_qwen2_vl, (_situation("no mask", _patches),)),
}
ARCHITECTURES = tuple(
    Architecture(name=name, family="vision-language", build=build, situations=situations, sites=4)
    for name, (build, situations) in _TABLE.items()
)
