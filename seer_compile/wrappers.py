"""Looking through what others wrap around a model, so that names and identities stay the model's.

    DistributedDataParallel(model), torch.compile(model), a PEFT model   ->  model
    layers.0._checkpoint_wrapped_module.attention                        ->  layers.0.attention

Wrappers are told by the attributes they have; none of their libraries is imported.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

_HELD_UNDER = ("_orig_mod", "_fsdp_wrapped_module")
_PARALLEL = ("DistributedDataParallel", "DataParallel")
_SEGMENTS = frozenset({*_HELD_UNDER, "_checkpoint_wrapped_module"})


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module under ``torch.compile``, data-parallel and adapter (PEFT) wrappers."""
    while True:
        inner = _held(model)
        if inner is None or inner is model:
            return model
        model = inner


def _held(model: nn.Module) -> nn.Module | None:
    inner = next((model._modules[name] for name in _HELD_UNDER if name in model._modules), None)
    if inner is None and type(model).__name__ in _PARALLEL:
        inner = model._modules.get("module")
    get_base = getattr(model, "get_base_model", None)
    if inner is None and callable(get_base) and hasattr(model, "peft_config"):
        base = get_base()
        inner = base if isinstance(base, nn.Module) else None
    return inner


def unwrap_call(model: nn.Module) -> nn.Module:
    """Return the module that ``torch.compile`` and data-parallel wrappers call as they are called.

    Adapters may change the arguments, and sharded parameters exist in a wrapper's call only: those
    wrappers stay.
    """
    while True:
        inner = model._modules.get("_orig_mod")
        if inner is None and type(model).__name__ in _PARALLEL:
            inner = model._modules.get("module")
        if inner is None:
            return model
        model = inner


def plain_name(name: str) -> str:
    """Return a dotted name without the segments that wrappers inside of a model add."""
    return ".".join(part for part in name.split(".") if part not in _SEGMENTS)


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Iterate over a model's own parameters under their plain names, without adapters.

    An adapter layer holds the layer that it adapts as ``base_layer``; what it holds beside is not
    the model's.
    """
    adapted = {name for name, module in model.named_modules() if "base_layer" in module._modules}
    for name, parameter in model.named_parameters():
        owners = [owner for owner in adapted if name.startswith(f"{owner}.")]
        if all(name.startswith(f"{owner}.base_layer.") for owner in owners):
            yield plain_name(name.replace(".base_layer.", ".")), parameter
