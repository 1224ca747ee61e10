"""timm's vision transformer, with its attention fused and written out."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import nn

from zoo.architecture import Architecture
from zoo.vision_and_audio import pixels


class _Unused(type):
    """Stands for what is imported and not used: every attribute is another such class."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Unused(name, (), {})


class _Absent(types.ModuleType):
    """Stands for a library that is imported and not used."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Unused(name, (), {})


@contextlib.contextmanager
def _torchvision_may_be_absent() -> Iterator[None]:
    """Let timm be imported without torchvision, whose builds fit one torch build each.

    timm takes image transforms and feature extraction from it; its models need neither.
    """
    if importlib.util.find_spec("torchvision") is not None:
        yield
        return
    names = (
        "torchvision",
        "torchvision.datasets",
        "torchvision.datasets.folder",
        "torchvision.models",
        "torchvision.models.feature_extraction",
        "torchvision.ops",
        "torchvision.ops.misc",
        "torchvision.transforms",
        "torchvision.transforms.functional",
        "torchvision.utils",
    )
    for name in names:
        module = sys.modules[name] = _Absent(name)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    try:
        yield
    finally:
        for name in names:
            sys.modules.pop(name, None)


def _build(spelling: str) -> nn.Module:
    with _torchvision_may_be_absent():
        from timm.models.vision_transformer import VisionTransformer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VisionTransformer(
            img_size=48, patch_size=4, embed_dim=32, depth=2, num_heads=4, num_classes=10
        )
    for block in model.blocks:
        block.attn.fused_attn = spelling == "sdpa"
    return model.eval()


ARCHITECTURES = (
    Architecture(
        name="timm vit",
        family="vision or audio",
        build=_build,
        situations=(pixels("x", 3, 48, 48),),
        sites=2,
        needs=("timm",),
    ),
)
