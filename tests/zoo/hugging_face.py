"""Build Hugging Face models from small configurations, with random weights."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from zoo.text_situations import VOCABULARY

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = SIZES | SPECIAL | {"num_key_value_heads": 2}
ONE_LAYER = {"num_hidden_layers": 1}
"""For models whose layers are all alike: the second would show what the first shows."""


@functools.cache
def library() -> Any:
    """Return transformers, quiet."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


@dataclass(frozen=True)
class Builder:
    """Builds one model per spelling (``sdpa`` or ``eager``)."""

    model_class: str
    config_class: str
    arguments: Mapping[str, Any]

    def __call__(self, spelling: str, **changes: Any) -> nn.Module:
        """Return a model, with some arguments of the configuration changed."""
        config = getattr(library(), self.config_class)(**{**self.arguments, **changes})
        return from_config(self.model_class, config, spelling)


def from_config(model_class: str, config: Any, spelling: str) -> nn.Module:
    """Return the model with weights that depend on its configuration only.

    Norms and biases that start at 0 or 1 are moved, so that a term that is dropped shows.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config._attn_implementation = spelling
        model = getattr(library(), model_class)._from_config(config, attn_implementation=spelling)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim <= 1:
                    parameter.add_(0.1 * torch.randn(parameter.shape))
                else:
                    parameter.mul_(4.0)
    return model.float().eval()
