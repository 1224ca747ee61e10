"""Models and tokenizers by folder or hub id, for the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from seer_compile.errors import DeviceError, SeerInputError, VersionUnsupportedError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str) -> torch.device:
    """Return a device; ``auto`` is the first GPU where there is one.

    Raises:
        DeviceError: There is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as cause:
        raise DeviceError(argument="device", got=name, expected="auto, cpu or cuda") from cause
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise DeviceError(argument="device", got=name, expected=f"one of {count} GPUs, or cpu")
    return device


def load_model(name: str, *, device: torch.device, dtype: str = "auto") -> nn.Module:
    """Load a language model for inference, with SDPA attention.

    Args:
        name: Folder or hub id.
        device: Where it goes.
        dtype: ``auto`` is the checkpoint's own on a GPU and float32 on a CPU, where half
            precision is slow.

    Raises:
        SeerInputError: There is no such model, or transformers cannot build it.
    """
    transformers = _transformers()
    wanted: Any = _DTYPES.get(dtype, torch.float32 if device.type == "cpu" else "auto")
    failures: list[str] = []
    # A model without a language head is still worth explaining.
    for loader in (transformers.AutoModelForCausalLM, transformers.AutoModel):
        try:
            model = loader.from_pretrained(name, dtype=wanted, attn_implementation="sdpa")
        except (OSError, ValueError, KeyError) as cause:
            failures.append(str(cause).strip().splitlines()[0])
            continue
        return model.to(device).eval()
    raise SeerInputError(
        argument="model",
        got=name,
        expected="a folder or hub id of a model that transformers can load",
        hint=failures[0],
    )


def load_tokenizer(name: str) -> Tokenizer:
    """Load the tokenizer of a model, in the form that reports offsets.

    Raises:
        SeerInputError: The model has no such tokenizer.
    """
    from tokenizers import Tokenizer

    path = Path(name) / "tokenizer.json"
    if path.is_file():
        return Tokenizer.from_file(str(path))
    try:
        loaded = _transformers().AutoTokenizer.from_pretrained(name)
        return loaded.backend_tokenizer
    except (OSError, ValueError, KeyError, AttributeError) as cause:
        raise SeerInputError(
            argument="model",
            got=name,
            expected="a model with a tokenizer.json",
            hint="Planted keys need one; --retrieval 0 does without.",
        ) from cause


def vocabulary_size(model: nn.Module) -> int | None:
    """Return how many token ids a model knows, or None where its configuration does not say."""
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    return size if isinstance(size, int) else None


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as cause:
        raise VersionUnsupportedError(
            "this verb loads models with transformers, which is not installed",
            hint="pip install 'transformers>=5.10'",
        ) from cause
    return transformers
