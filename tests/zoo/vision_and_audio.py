"""Encoders of Hugging Face for images and sound."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from zoo.architecture import Architecture, Batch, Door, Situation
from zoo.hugging_face import Builder
from zoo.wrappers import Forward

_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_IMAGE = _SIZES | {"image_size": 48, "patch_size": 4}
_SWIN = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2],
    "num_heads": [4],
    "window_size": 8,
}
_SOUND = _SIZES | {
    "conv_dim": (16, 16, 16),
    "conv_kernel": (10, 3, 3),
    "conv_stride": (5, 2, 2),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "vocab_size": 32,
    "num_feat_extract_layers": 3,
}
_SPECTRUM = _SIZES | {
    "patch_size": 8,
    "frequency_stride": 6,
    "time_stride": 6,
    "max_length": 128,
    "num_mel_bins": 32,
}


def _bare(model: nn.Module, door: Door) -> nn.Module:
    del door
    return Forward(model)


def _noise(model: nn.Module, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(next(model.parameters()).dtype)


def pixels(name: str, *shape: int) -> Situation:
    """Return the situation of an image-like input of fixed size; the batch is what varies."""

    def make(model: nn.Module, size: int) -> Batch:
        return Batch(inputs={name: _noise(model, size, *shape)})

    return Situation(name="no mask", wrap=_bare, make=make, sizes=(2, 3), dynamic={name: (0,)})


def _sound(model: nn.Module, size: int) -> Batch:
    return Batch(inputs={"input_values": _noise(model, 2, size)})


def _padded_sound(model: nn.Module, size: int) -> Batch:
    mask = torch.ones(2, size, dtype=torch.long)
    mask[1, round(0.6 * size) :] = 0
    values = _noise(model, 2, size) * mask
    kept = model._get_feat_extract_output_lengths(mask.sum(-1))
    total = int(model._get_feat_extract_output_lengths(torch.tensor(size)))
    rows = torch.arange(total)[None] < kept[:, None]
    return Batch(inputs={"input_values": values, "attention_mask": mask}, rows=rows)


_WAVES = (
    Situation(
        name="no mask", wrap=_bare, make=_sound, sizes=(2700, 2000), dynamic={"input_values": (1,)}
    ),
    Situation(
        name="right padding",
        wrap=_bare,
        make=_padded_sound,
        sizes=(2700, 2000),
        dynamic={"input_values": (1,), "attention_mask": (1,)},
    ),
)
_PICTURE = (pixels("pixel_values", 3, 48, 48),)
_WINDOWS = {"float bias": 2}

_TABLE: dict[str, tuple[str, str, dict[str, Any], tuple[Situation, ...], int, dict[str, int]]] = {
    "vit": ("ViTModel", "ViTConfig", _IMAGE, _PICTURE, 2, {}),
    "dinov2": ("Dinov2Model", "Dinov2Config", _IMAGE, _PICTURE, 2, {}),
    "siglip-vision": (
        "SiglipVisionModel",
        "SiglipVisionConfig",
        _IMAGE | {"vision_use_head": False},
        _PICTURE,
        2,
        {},
    ),
    "swin": ("SwinModel", "SwinConfig", _SWIN, (pixels("pixel_values", 3, 32, 32),), 2, _WINDOWS),
    "beit": (
        "BeitModel",
        "BeitConfig",
        _IMAGE | {"use_relative_position_bias": True},
        _PICTURE,
        2,
        _WINDOWS,
    ),
    "wav2vec2": ("Wav2Vec2Model", "Wav2Vec2Config", _SOUND, _WAVES, 2, {}),
    "hubert": ("HubertModel", "HubertConfig", _SOUND, _WAVES, 2, {}),
    "audio-spectrogram": (
        "ASTModel",
        "ASTConfig",
        _SPECTRUM,
        (pixels("input_values", 128, 32),),
        2,
        {},
    ),
}
"""Swin and BEiT learn a bias per relative position."""

ARCHITECTURES = tuple(
    Architecture(
        name=name,
        family="vision or audio",
        build=Builder(model_class, config_class, arguments),
        situations=situations,
        sites=sites,
        barred=barred,
    )
    for name, (model_class, config_class, arguments, situations, sites, barred) in _TABLE.items()
)
