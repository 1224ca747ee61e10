"""Every architecture of the zoo, by name."""

from __future__ import annotations

from zoo import (
    decoders,
    diffusion,
    encoder_decoders,
    encoders,
    home_made,
    mixtures,
    spellings,
    timm_models,
    vision_and_audio,
    vision_language,
)
from zoo.architecture import Architecture

FAMILIES = (
    decoders,
    mixtures,
    encoders,
    encoder_decoders,
    vision_and_audio,
    vision_language,
    timm_models,
    diffusion,
    home_made,
    spellings,
)
ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture for family in FAMILIES for architecture in family.ARCHITECTURES
}
