"""Transformers and blocks of diffusers: DiT, Flux, and the UNet of latent diffusion."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zoo.architecture import Architecture, Batch, Door, Situation
from zoo.wrappers import Forward


def _noise(model: nn.Module, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(next(model.parameters()).dtype)


def _seeded(make: Callable[[], Any]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval()


def _written_out(model: Any, spelling: str) -> nn.Module:
    """Choose the processor: SDPA, or products and a softmax."""
    if spelling == "eager":
        from diffusers.models.attention_processor import AttnProcessor

        for module in model.modules():
            if hasattr(module, "set_processor"):
                module.set_processor(AttnProcessor())
    return model


def _dit(spelling: str) -> nn.Module:
    from diffusers import DiTTransformer2DModel

    model = _seeded(
        lambda: DiTTransformer2DModel(
            num_attention_heads=4,
            attention_head_dim=8,
            in_channels=4,
            num_layers=2,
            sample_size=24,
            patch_size=2,
            num_embeds_ada_norm=10,
        )
    )
    return _written_out(model, spelling)


def _flux(spelling: str) -> nn.Module:
    from diffusers import FluxTransformer2DModel

    del spelling
    return _seeded(
        lambda: FluxTransformer2DModel(
            patch_size=1,
            in_channels=8,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            pooled_projection_dim=16,
            axes_dims_rope=(4, 4, 8),
        )
    )


def _unet(spelling: str) -> nn.Module:
    from diffusers import UNet2DConditionModel

    model = _seeded(
        lambda: UNet2DConditionModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=24,
            attention_head_dim=8,
            norm_num_groups=4,
        )
    )
    return _written_out(model, spelling)


def _dit_inputs(model: nn.Module, size: int) -> Batch:
    return Batch(
        inputs={
            "hidden_states": _noise(model, size, 4, 24, 24),
            "timestep": torch.arange(size) + 3,
            "class_labels": torch.arange(size),
        }
    )


def _flux_inputs(model: nn.Module, size: int) -> Batch:
    places = torch.stack(
        [torch.zeros(size), torch.arange(size) // 12, torch.arange(size) % 12], dim=-1
    )
    return Batch(
        inputs={
            "hidden_states": _noise(model, 2, size, 8),
            "encoder_hidden_states": _noise(model, 2, 20, 24, seed=1),
            "pooled_projections": _noise(model, 2, 16, seed=2),
            "timestep": torch.tensor([0.4, 0.4]).to(next(model.parameters()).dtype),
            "img_ids": places,
            "txt_ids": torch.zeros(20, 3),
        }
    )


def _unet_inputs(model: nn.Module, size: int) -> Batch:
    return Batch(
        inputs={
            "sample": _noise(model, size, 4, 24, 24),
            "timestep": torch.tensor(7),
            "encoder_hidden_states": _noise(model, size, 20, 24, seed=1),
        }
    )


def _bare(model: nn.Module, door: Door) -> nn.Module:
    del door
    return Forward(model)


def _situation(
    make: Callable[[nn.Module, int], Batch], sizes: tuple[int, int], dynamic: dict[str, Any]
) -> tuple[Situation, ...]:
    return (Situation(name="no mask", wrap=_bare, make=make, sizes=sizes, dynamic=dynamic),)


_ITEMS = {"hidden_states": (0,), "timestep": (0,), "class_labels": (0,)}
_PIXELS = {"hidden_states": (1,), "img_ids": (0,)}
_SAMPLES = {"sample": (0,), "encoder_hidden_states": (0,)}


def _architecture(
    name: str,
    build: Callable[[str], nn.Module],
    situations: tuple[Situation, ...],
    sites: int,
    spellings: tuple[str, ...] = ("sdpa", "eager"),
) -> Architecture:
    return Architecture(
        name=name,
        family="diffusion",
        build=build,
        situations=situations,
        sites=sites,
        spellings=spellings,
        needs=("diffusers",),
    )


ARCHITECTURES = (
    _architecture("dit", _dit, _situation(_dit_inputs, (2, 3), _ITEMS), sites=2),
    _architecture(
        "flux", _flux, _situation(_flux_inputs, (130, 97), _PIXELS), sites=2, spellings=("sdpa",)
    ),
    _architecture("unet", _unet, _situation(_unet_inputs, (2, 3), _SAMPLES), sites=8),
)
"""The UNet attends to itself and to text in one block down, one up and the one between."""
