"""What of an architecture's input is short or long, and how calls of each size are made.

Most often the tokens of its first situation. Images have a side; what reads images or sound of one
size only takes several of them, which is what its situation varies.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zoo.architecture import Architecture, Batch, Door
from zoo.registry import ARCHITECTURES
from zoo.text_situations import never_cached, token_ids
from zoo.wrappers import Forward

SHORTEST, LONGEST = 64, 512
"""Tokens; no configuration of the zoo says that it takes more."""
OTHER_SIZES = (32, 64, 96, 160)
"""Sizes that no architecture of the zoo was made for that takes one size only."""

Make = Callable[[nn.Module, int], Batch]


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """The sizes of calls of one architecture."""

    unit: str
    wrap: Callable[[nn.Module, Door], nn.Module]
    make: Make
    shortest: int
    longest: int
    step: int = 1
    other: Make | None = None
    """Makes inputs of another size of picture or sound, where the model must refuse any."""

    def draw(self, number: int, longest: int) -> list[int]:
        """Return random sizes, among them the two ends; repeated where there are fewer."""
        draw, sizes = random.Random(0), range(self.shortest, longest + 1, self.step)
        ends = (sizes[0], sizes[-1])
        return [*(draw.choice(sizes) for _ in range(number - len(ends))), *ends]

    def longest_accepted(self, model: nn.Module) -> int:
        """Return the longest size that the plain model takes: tables of positions have an end."""
        lowest, highest = self.shortest, self.longest
        if self.accepts(model, self.make, highest):
            return highest
        while highest - lowest > self.step:
            middle = lowest + (highest - lowest) // (2 * self.step) * self.step
            if self.accepts(model, self.make, middle):
                lowest = middle
            else:
                highest = middle
        return lowest

    def refuses(self, model: nn.Module) -> bool:
        """Whether the plain model takes no other size of picture or sound than its own."""
        return self.other is not None and not any(
            self.accepts(model, self.other, size) for size in OTHER_SIZES
        )

    def accepts(self, model: nn.Module, make: Make, size: int) -> bool:
        """Whether the plain model answers at all."""
        inputs = make(model, size).inputs
        try:
            self.wrap(model, "dynamo")(inputs)
        # Each library has its own words, and types, for a size that is too large.
        except Exception:
            return False
        return True


def _noise(model: nn.Module, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(next(model.parameters()).dtype)


def _square(name: str) -> Make:
    def make(model: nn.Module, side: int) -> Batch:
        return Batch(inputs={name: _noise(model, 1, 3, side, side)})

    return make


def _latents(model: nn.Module, side: int, batch: int = 2) -> Batch:
    return Batch(
        inputs={
            "sample": _noise(model, batch, 4, side, side),
            "timestep": torch.tensor(7),
            "encoder_hidden_states": _noise(model, batch, 20, 24),
        }
    )


def _latent(model: nn.Module, side: int) -> Batch:
    return _latents(model, side, batch=1)


def _classes(model: nn.Module, side: int) -> Batch:
    return Batch(
        inputs={
            "hidden_states": _noise(model, 1, 4, side, side),
            "timestep": torch.tensor([3]),
            "class_labels": torch.tensor([1]),
        }
    )


def _spectrum(model: nn.Module, frames: int) -> Batch:
    return Batch(inputs={"input_values": _noise(model, 2, frames, 32)})


def _interpolating(model: nn.Module, door: Door) -> nn.Module:
    del door
    return Forward(model, interpolate_pos_encoding=True)


def _two_lengths(model: nn.Module, size: int) -> Batch:
    """Return texts of unrelated lengths, which PyTorch takes for one number where they agree."""
    del model
    other = SHORTEST + 37 * size % (LONGEST - SHORTEST)
    return Batch(inputs={"input_ids": token_ids(size), "decoder_input_ids": token_ids(other)})


_BATCH = {"unit": "items", "shortest": 1, "longest": 12}
_SOUND = {"unit": "samples", "shortest": 20 * SHORTEST, "longest": 20 * LONGEST}
_PICTURE = {
    "unit": "pixels a side",
    "shortest": 32,
    "longest": 112,
    "make": _square("pixel_values"),
}
_ANY_PICTURE = _PICTURE | {"wrap": _interpolating}
_LATENT = {"unit": "latents a side", "shortest": 16, "longest": 56, "step": 2}

_OTHERWISE: dict[str, dict[str, Any]] = {
    "vit": _ANY_PICTURE,
    "siglip-vision": _ANY_PICTURE,
    "beit": _ANY_PICTURE,
    "dinov2": _PICTURE,
    "swin": _PICTURE,
    "timm vit": _BATCH | {"other": _square("x")},
    "audio-spectrogram": _BATCH | {"other": _spectrum},
    "wav2vec2": _SOUND,
    "hubert": _SOUND,
    "dit": _LATENT | {"make": _classes},
    "unet": _LATENT | {"make": _latent},
}
"""What does not read tokens. Transformers of pictures are told to interpolate their positions."""

_WINDOWED = ("mistral", "gemma3", "phi3", "gemma2", "gpt-oss")
_ALSO: dict[str, tuple[str, dict[str, Any]]] = {
    "bart, two lengths": ("bart", {"make": _two_lengths}),
    "swin, whole windows": ("swin", _PICTURE | {"step": 16}),
    "unet, large": ("unet", _LATENT | {"make": _latents, "shortest": 52, "longest": 72}),
} | {f"{name}, no cache": (name, {"wrap": never_cached}) for name in _WINDOWED}
"""More kinds of calls. A cache that a window slides over has a graph of its own where it is just
full. Swin pads a side that is no multiple of its windows, by an amount that PyTorch guards on. On a
CPU, PyTorch's convolutions guard on whether an input has more than 20,480 numbers; each one of a
large picture has, and each one of pictures in practice."""


def kinds_of_calls() -> dict[str, tuple[Architecture, Lengths]]:
    """Return, by name, every architecture with what varies in its calls."""
    kinds = {name: (each, _lengths(each)) for name, each in ARCHITECTURES.items()}
    for name, (architecture, changes) in _ALSO.items():
        known = ARCHITECTURES[architecture]
        kinds[name] = (known, _lengths(known, **changes))
    return kinds


def _lengths(architecture: Architecture, **changes: Any) -> Lengths:
    situation = architecture.situations[0]
    usual = {"unit": "tokens", "shortest": SHORTEST, "longest": LONGEST}
    usual |= {"wrap": situation.wrap, "make": situation.make}
    return Lengths(**usual | _OTHERWISE.get(architecture.name, {}) | changes)
