"""What Hugging Face's ``generate`` needs beside a compiled model.

Masks. With a static cache, ``generate`` builds the attention mask before it calls the model, and
a mask that arrives as a tensor proves nothing. It asks the model for a function of its
own first (``create_masks_for_generate``), which is what is attached here, per instance, to models
whose class has none: during prefill the padding mask is passed on as it is, and the model builds
the same mask itself, in the graph. Decoding steps keep the prepared mask: they are dense.

Parts. ``generate`` calls the encoder of an encoder-decoder model by itself, and that of an adapter
wrapper calls the wrapped model, both past the optimized model's own call. So these parts are
compiled as entries of their own.
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
    """Return the modules that callers call; the first is the model.

    The others are the model that an adapter wrapper wraps, and encoders that ``generate`` calls.
    """
    entries = [model]
    get_base = getattr(model, "get_base_model", None)
    if callable(get_base):
        _add_part(entries, model, get_base())
    for entry in list(entries):
        get_encoder = getattr(entry, "get_encoder", None)
        config = getattr(entry, "config", None)
        if getattr(config, "is_encoder_decoder", False) and callable(get_encoder):
            _add_part(entries, model, get_encoder())
    return tuple(entries)


def _add_part(entries: list[nn.Module], model: nn.Module, part: Any) -> None:
    is_part = any(module is part for module in model.modules())
    if is_part and not any(module is part for module in entries):
        entries.append(part)


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
