"""What Hugging Face's ``generate`` needs beside a compiled model.

Masks. With a static cache, ``generate`` builds the attention mask before it calls the model, and
a mask that arrives as a tensor proves nothing. It asks the model for a function of its
own first (``create_masks_for_generate``), which is what is attached here, per instance, to models
whose class has none: during prefill the padding mask is passed on as it is, and the model builds
the same mask itself, in the graph. Decoding steps keep the prepared mask: they are dense.

Encoders. ``generate`` calls the encoder of an encoder-decoder model by itself, past the model's
own call, so the encoder is compiled as an entry of its own.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

HOOK = "create_masks_for_generate"


class MasksInGraph:
    """Stands in for ``transformers.masking_utils.create_masks_for_generate`` on one model."""

    def __call__(self, **arguments: Any) -> Any:
        """Return the padding mask in prefill and the prepared masks in decoding."""
        if arguments["inputs_embeds"].shape[1] > 1:
            return arguments["attention_mask"]
        from transformers import masking_utils

        return masking_utils.create_masks_for_generate(**arguments)


def entry_modules(model: nn.Module) -> tuple[nn.Module, ...]:
    """Return the modules that callers call: the model, and an encoder that ``generate`` calls."""
    config = getattr(model, "config", None)
    get_encoder = getattr(model, "get_encoder", None)
    if not getattr(config, "is_encoder_decoder", False) or not callable(get_encoder):
        return (model,)
    encoder: Any = get_encoder()
    is_part = any(module is encoder for module in model.modules())
    return (model, encoder) if is_part and encoder is not model else (model,)


def is_decoding_step(arguments: dict[str, Any]) -> bool:
    """Whether the keyword arguments of a call hold one token per sequence and a cache."""
    tokens = arguments.get("input_ids")
    return (
        isinstance(tokens, Tensor)
        and tokens.ndim == 2
        and tokens.shape[1] == 1
        and arguments.get("past_key_values") is not None
    )


def attach_masks(model: nn.Module) -> None:
    """Attach the hook to a model that generates and has none of its own."""
    generates = callable(getattr(model, "prepare_inputs_for_generation", None))
    if generates and not hasattr(model, HOOK):
        model.__dict__[HOOK] = MasksInGraph()


def detach_masks(model: nn.Module) -> None:
    """Remove the hook where :func:`attach_masks` put it."""
    if isinstance(model.__dict__.get(HOOK), MasksInGraph):
        del model.__dict__[HOOK]
