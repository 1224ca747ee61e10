"""Gate files: the gates of a model, their curves, and which model they belong to.

Layout: a verified safetensors file (see :mod:`seer_compile.calibration.verified_file`) holding
``<site>.query_weight``, ``<site>.key_weight`` and ``<site>.budget`` for each site.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from seer_compile.calibration.verified_file import (
    encode,
    parse_header,
    read_bytes,
    read_tensors,
    write_verified,
)
from seer_compile.config_json import config_to_json
from seer_compile.errors import (
    CheckpointWriteError,
    GateFileSchemaError,
    GateMismatchError,
    ModelStateError,
    NonFiniteGateError,
)
from seer_compile.gate_store import GateStore
from seer_compile.types import is_excluded
from seer_compile.wrappers import base_parameters, unwrap

SCHEMA = 3
"""Of the layout, and of what weights mean: 1 summed over the sub-blocks of a block; 2 pooled
queries as keys."""
GATE_TENSORS = ("query_weight", "key_weight", "budget")

_HEADER_FIELDS = {"format", "library", "model", "sites", "store", "calibration"}
_CONFIG_FIELDS = (
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_size",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "sliding_window",
)
# All weights of most models: fine-tuning may move the projections of a few layers and nothing else.
_SAMPLED_WEIGHTS = 1024
_SAMPLES = 8
# Rounded to bfloat16, a value moves by up to 0.4 %.
_SAMPLE_TOLERANCE = 0.005


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Describe a model so that gates can tell whether they belong to it.

    Weights are sampled, not hashed, so that the same model in another precision is recognised.

    Args:
        model: The base model; wrappers are looked through, gates and adapters are left out.

    Returns:
        Plain data: architecture, layers, heads, rope parameters, parameter count, and a few values
        of each weight.
    """
    model = unwrap(model)
    config = getattr(model, "config", None)
    text_config = getattr(config, "get_text_config", lambda: config)()
    facts = {name: getattr(text_config, name, None) for name in _CONFIG_FIELDS}
    weights = [
        (name, weight)
        for name, weight in base_parameters(model)
        if "seer_gates." not in name and not weight.is_meta and weight.is_floating_point()
    ]
    chosen = weights[:: max(1, math.ceil(len(weights) / _SAMPLED_WEIGHTS))]
    return {
        "architecture": type(model).__name__,
        "config": {name: _plain(value) for name, value in facts.items() if value is not None},
        "parameters": sum(weight.numel() for _, weight in weights),
        "weights": {name: _sample(weight) for name, weight in chosen if weight.numel()},
    }


def save_gates(
    store: GateStore,
    path: str | os.PathLike[str],
    *,
    model: Mapping[str, Any],
    calibration: Mapping[str, Any] | None = None,
) -> None:
    """Write the gates of a model, atomically and verified.

    Args:
        store: The gates.
        path: File to write; an existing one is replaced only after the new one was read back.
        model: :func:`fingerprint` of the model.
        calibration: Summary of the training, plain data.

    Raises:
        ModelStateError: There are no gates.
        NonFiniteGateError: A gate holds NaN or infinity.
        CheckpointWriteError: The file could not be written; an older one is intact.
    """
    if not store.names():
        raise ModelStateError(
            "there are no gates to save", hint="Run the optimized model or calibrate it first."
        )
    with store.lock:
        tensors = {
            f"{name}.{kind}": getattr(gate, kind)
            for name, gate in store.items()
            for kind in GATE_TENSORS
        }
        _check_finite(tensors, os.fspath(path))
        header = {
            "format": "seer_compile gates",
            "library": importlib.metadata.version("seer_compile"),
            "model": dict(model),
            "sites": list(store.names()),
            "store": store.describe(),
            "calibration": dict(calibration or {}),
        }
        data = encode(tensors, header, schema=SCHEMA)
    try:
        write_verified(path, data, check=lambda found: _decode(found, os.fspath(path)))
    except OSError as cause:
        raise CheckpointWriteError(
            f"{os.fspath(path)!r} could not be written: {cause}. A file that was there is intact.",
            context={"needed_bytes": len(data)},
        ) from cause


def load_gates(
    store: GateStore,
    path: str | os.PathLike[str],
    *,
    model: Mapping[str, Any],
    check_weights: bool = True,
    exclude: Sequence[str] = (),
) -> dict[str, Any]:
    """Read gates into a store: everything is checked first, then swapped in under its lock.

    Gates that exist with the same sizes keep their identity and get new values, so compiled graphs
    see them. After an error the store is as it was.

    Args:
        store: Where the gates go.
        path: A file from :func:`save_gates`.
        model: :func:`fingerprint` of the model that the store belongs to.
        check_weights: Also compare samples of the model's weights; turn off to use the gates on a
            fine-tuned model.
        exclude: Shell patterns of sites that stay dense: their gates are left in the file, so that
            they take no share of a density.

    Returns:
        The calibration summary.

    Raises:
        GateFileError: One of its children, by what is wrong: truncated, corrupted, unsafe, another
            schema, another model, non-finite.
    """
    source = os.fspath(path)
    data = read_bytes(path)
    parsed = parse_header(data, schema=SCHEMA, source=source)
    header = _checked_fields(parsed.header, source)
    _check_model(header, model, check_weights=check_weights, source=source)
    with store.lock:
        _check_sites(store, header, source)
    tensors = read_tensors(data, parsed, source=source)
    _check_finite(tensors, source)
    _check_shapes(header, tensors, source)
    entries = header["store"]["gates"]
    kept = [entry for entry in entries if not is_excluded(entry["name"], exclude)]
    with store.lock, torch.no_grad():
        store.rebuild({**header["store"], "gates": kept}, store.metadata.device)
        for name, gate in store.items():
            for kind in GATE_TENSORS:
                getattr(gate, kind).copy_(tensors[f"{name}.{kind}"])
    return header["calibration"]


def describe_gates(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the header of a gate file, all digests checked, without needing a model."""
    return _decode(read_bytes(path), os.fspath(path))


def _decode(data: bytes, source: str) -> dict[str, Any]:
    parsed = parse_header(data, schema=SCHEMA, source=source)
    header = _checked_fields(parsed.header, source)
    tensors = read_tensors(data, parsed, source=source)
    _check_finite(tensors, source)
    _check_shapes(header, tensors, source)
    return header


def _checked_fields(header: Any, source: str) -> dict[str, Any]:
    if not isinstance(header, dict) or set(header) != _HEADER_FIELDS:
        found = sorted(header) if isinstance(header, dict) else type(header).__name__
        raise GateFileSchemaError(f"{source!r} has header fields {found}")
    if header["format"] != "seer_compile gates":
        raise GateFileSchemaError(f"{source!r} is a file of {header['format']!r}, not of gates")
    return header


def _check_model(
    header: Mapping[str, Any], model: Mapping[str, Any], *, check_weights: bool, source: str
) -> None:
    differences = fingerprint_differences(header["model"], model, check_weights=check_weights)
    _raise_differences(differences, source)


def fingerprint_differences(
    theirs: Mapping[str, Any], ours: Mapping[str, Any], *, check_weights: bool = True
) -> list[str]:
    """Return what tells the model that gates were calibrated on from another, a line for each.

    Args:
        theirs: :func:`fingerprint` of the gates' model.
        ours: That of the other.
        check_weights: Also compare samples of the weights.
    """
    differences = [
        f"{name}: {theirs.get(name)!r} against {ours.get(name)!r}"
        for name in ("architecture", "parameters")
        if theirs.get(name) != ours.get(name)
    ]
    old, new = theirs.get("config", {}), ours.get("config", {})
    differences += [
        f"{name}: {old.get(name)!r} against {new.get(name)!r}"
        for name in sorted(set(old) | set(new))
        if old.get(name) != new.get(name)
    ]
    if check_weights:
        differences += _weight_differences(theirs.get("weights", {}), ours.get("weights", {}))
    return differences


def _weight_differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    # Files written before all weights were sampled name fewer than the model has.
    differences = [f"weight {name}: no longer there" for name in sorted(set(theirs) - set(ours))]
    for name in sorted(set(theirs) & set(ours)):
        if theirs[name]["shape"] != ours[name]["shape"]:
            differences.append(
                f"weight {name}: shape {theirs[name]['shape']} against {ours[name]['shape']}"
            )
        elif not _are_close(theirs[name]["values"], ours[name]["values"]):
            differences.append(f"weight {name}: other values")
    return differences


def _are_close(left: list[float], right: list[float]) -> bool:
    largest = max(map(abs, (*left, *right)))
    return all(
        abs(a - b) <= _SAMPLE_TOLERANCE * max(abs(a), abs(b), 0.01 * largest)
        for a, b in zip(left, right, strict=True)
    )


def _check_sites(store: GateStore, header: Mapping[str, Any], source: str) -> None:
    entries = {entry["name"]: entry for entry in header["store"]["gates"]}
    differences = [f"site {name}: not in the file" for name in store.names() if name not in entries]
    for name, gate in store.items():
        entry = entries.get(name)
        if entry is None:
            continue
        sizes = (entry["heads"], entry["kv_heads"], entry["head_dim"])
        if sizes != (gate.heads, gate.kv_heads, gate.head_dim):
            differences.append(
                f"site {name}: heads, kv heads, head dim {sizes} in the file, "
                f"{(gate.heads, gate.kv_heads, gate.head_dim)} in the model"
            )
    if store.names():
        old, new = (
            _form(data) for data in (header["store"]["config"], config_to_json(store.config))
        )
        differences += [
            f"gate {name}: file {old.get(name)!r}, store {new[name]!r}"
            for name in new
            if old.get(name) != new[name]
        ]
    _raise_differences(differences, source)


def _form(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what gates of two stores must agree on.

    The selector's kind is a property of gates, its default budget is none, and neither is how
    calibration chose sub-blocks.
    """
    form = {name: value for name, value in config.items() if name != "resolution"}
    if isinstance(form.get("selector"), list):
        form["selector"] = form["selector"][:1]
    return form


def _check_shapes(header: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str) -> None:
    """Compare the tensors with those of gates built after the file's own description."""
    scratch = GateStore()
    scratch.rebuild(header["store"], "meta")
    expected = {
        f"{name}.{kind}": (getattr(gate, kind).shape, getattr(gate, kind).dtype)
        for name, gate in scratch.items()
        for kind in GATE_TENSORS
    }
    found = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    odd = sorted(
        name for name in set(expected) | set(found) if expected.get(name) != found.get(name)
    )
    if odd or list(scratch.names()) != header["sites"]:
        raise GateFileSchemaError(
            f"{source!r}: sites and tensors do not fit each other, first {odd[:3]}"
        )


def _check_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    bad = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if bad:
        raise NonFiniteGateError(
            f"{source!r}: {len(bad)} tensors hold NaN or infinity, first {bad[:3]}"
        )


def _raise_differences(differences: list[str], source: str) -> None:
    if differences:
        raise GateMismatchError(
            f"{source!r} holds gates of another model: {len(differences)} differences, "
            f"first {differences[:5]}. Nothing was loaded."
        )


def _sample(weight: Tensor) -> dict[str, Any]:
    flat = weight.detach().reshape(-1)
    places = torch.linspace(0, flat.numel() - 1, _SAMPLES, dtype=torch.float64).long()
    values = flat[places.to(flat.device)].float().cpu().tolist()
    return {"shape": list(weight.shape), "values": [float(f"{value:.6g}") for value in values]}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in sorted(value.items())}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, bool | int | float | str | None) else str(value)
