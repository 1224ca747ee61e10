"""The owner of all gates of one model: creation by site name, mode, budgets, state dict."""

from __future__ import annotations

import functools
import json
import re
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from seer_compile.allocation import Allocation, check_shares
from seer_compile.budget_curve import check_fraction
from seer_compile.budget_tables import budget_tables
from seer_compile.config import GateConfig, check_type
from seer_compile.config_json import config_from_json, config_to_json
from seer_compile.errors import GateMismatchError, ModelStateError, SeerInputError
from seer_compile.gate import AttnGate
from seer_compile.gate_entry import GateEntry
from seer_compile.kernels.gated_attention import (
    MODE_AUTO,
    MODE_DENSE,
    MODE_FULL_BUDGET,
    MODE_SPARSE,
)
from seer_compile.latency import relative_time
from seer_compile.real_tensors import real_tensors
from seer_compile.watchers import Watchers

METADATA_VERSION = 2
_READABLE_VERSIONS = (1, METADATA_VERSION)
"""Gates of version 1 all have the sub-blocks of their store."""


class GateStore(nn.Module):
    """All gates of one model, by site name.

    Its state dict carries the gates and, as JSON bytes in ``metadata``, what is needed to build
    them: loading it into an empty store creates the gates. A state dict without any gate (the
    base model's checkpoint) leaves the gates as they are.

    Args:
        config: Shape of every gate, and the selector; gates may have other sub-blocks.
        seed: Of the gates' initial values.
    """

    metadata: Tensor
    """``UInt8[bytes]``: JSON; safetensors and ``save_pretrained`` carry tensors only."""

    def __init__(self, config: GateConfig | None = None, *, seed: int = 0) -> None:
        super().__init__()
        self.config = GateConfig() if config is None else config
        check_type("config", self.config, GateConfig)
        self.seed = seed
        self.gates = nn.ModuleDict()
        self._names: dict[str, str] = {}
        self._is_sparse = False
        self._at_any_size = False
        self._untrained_may_answer = False
        self._budget_without_curve: float | None = None
        self._absent_prefix: str | None = None
        self._lock = threading.RLock()
        self._watchers = Watchers()
        self.register_buffer("metadata", torch.empty(0, dtype=torch.uint8, device="cpu"))
        self.register_load_state_dict_post_hook(_forgive_absent_gates)
        self.write_metadata()

    def forward(self, value: Any) -> Any:
        """Pass a value on: a container that runs its children in turn meets the store as well."""
        return value

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what can be neither pickled nor copied."""
        left_out = ("_lock", "_watchers")
        return {key: value for key, value in self.__dict__.items() if key not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._lock = threading.RLock()
        self._watchers = Watchers()

    @property
    def lock(self) -> threading.RLock:
        """Held while gates are created, swapped or saved."""
        return self._lock

    @property
    def is_calibrated(self) -> bool:
        """Whether there are gates and all of them are trained."""
        gates = [gate for _, gate in self.items()]
        return bool(gates) and all(gate.is_trained for gate in gates)

    def names(self) -> tuple[str, ...]:
        """Return the site names in the order of creation."""
        return tuple(self._names)

    def get(self, name: str) -> AttnGate | None:
        """Return the gate of a site, or None."""
        with self._lock:
            key = self._names.get(name)
            return None if key is None else self._gate(key)

    def items(self) -> Iterator[tuple[str, AttnGate]]:
        """Iterate over site names and gates in the order of creation."""
        with self._lock:
            found = [(name, self._gate(key)) for name, key in self._names.items()]
        yield from found

    def get_or_create(
        self,
        name: str,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        scale: float | None = None,
        device: torch.device | str | None = None,
    ) -> AttnGate:
        """Return the gate of a site, building it when the name is new.

        Safe while a graph is being traced: the parameters are real tensors whatever modes are on.

        Args:
            name: Site name.
            heads: Query heads.
            kv_heads: Key/value heads.
            head_dim: Channels per head.
            scale: Factor on the logits of the site; ``1 / sqrt(head_dim)`` when None.
            device: Where a new gate lives; the CPU when None.

        Raises:
            GateMismatchError: The name exists with other sizes.
        """
        with self._lock:
            gate = self.get(name)
            if gate is None:
                with real_tensors():
                    gate = AttnGate(
                        heads,
                        kv_heads,
                        head_dim,
                        config=self.config,
                        scale=scale,
                        seed=self.seed + zlib.crc32(name.encode()),
                        device=device,
                    )
                    if self._budget_without_curve is not None:
                        gate.budget.fill_(self._budget_without_curve)
                    self._add(name, gate)
                    self.write_metadata()
            sizes = (gate.heads, gate.kv_heads, gate.head_dim)
            if sizes != (heads, kv_heads, head_dim):
                raise GateMismatchError(
                    argument="(heads, kv_heads, head_dim)",
                    got=(heads, kv_heads, head_dim),
                    expected=f"{sizes}, the sizes of the gate that exists",
                    context={"site": name},
                )
            return gate

    def watch(self, watcher: Callable[[], None]) -> None:
        """Call a method, held weakly, after gates were replaced: graphs may hold the old ones."""
        self._watchers.add(watcher)

    def at_sub_blocks(self, name: str, query: int, key: int) -> AttnGate:
        """Return the gate of a site at a resolution: that which is there, or a new one for it.

        A gate never changes its sub-blocks, which are constants of the graphs that hold it: the one
        that is replaced answers densely from then on.

        Raises:
            KeyError: There is no such site.
            RangeError: A size is unknown or does not divide the block.
        """
        with self._lock:
            old = self._gate(self._names[name])
            entry = GateEntry.of(name, old)._replace(sub_blocks=(query, key))
            gate = self._fitting(entry, self.config, old.query_weight.device)
            self.replace(name, gate)
            return gate

    def replace(self, name: str, gate: AttnGate) -> None:
        """Put a gate in the place of a site's, which answers densely from then on."""
        with self._lock, torch.no_grad():
            old = self._gate(self._names[name])
            if old is gate:
                return
            old.mode.fill_(MODE_DENSE)
            self.gates[self._names[name]] = gate
            self._apply_mode(gate)
            self._watchers.is_due = True

    def set_mode(
        self, sparse: bool, *, untrained: bool | None = None, at_any_size: bool = False
    ) -> None:
        """Let gates answer sparsely or not; gates created later follow.

        Args:
            sparse: False answers every site densely.
            untrained: Whether gates that were never trained may answer sparsely (the zero-shot
                gate); unchanged when None, and False in a new store.
            at_any_size: Also where dense attention is faster, to measure what sparsity costs.
        """
        with self._lock, torch.no_grad():
            self._is_sparse = sparse
            self._at_any_size = at_any_size
            if untrained is not None:
                self._untrained_may_answer = untrained
            for _, gate in self.items():
                self._apply_mode(gate)
        self._watchers.tell()

    def set_budget(
        self,
        *,
        density: float | None = None,
        mass: float | None = None,
        max_error: float | None = None,
        latency: float | None = None,
        allocation: Allocation | None = None,
    ) -> None:
        """Move every gate to a budget along its measured curve, in place, without a recompile.

        Args:
            density: Average share of visible blocks to keep, in (0, 1].
            mass: Share of the attention mass to capture at every site, in (0, 1].
            max_error: Largest relative L2 error of a site's output, in (0, 1].
            latency: Share of dense attention's time that the sites may take, gates included, by
                the prices of the device; see :mod:`seer_compile.kernels.cost_model`.
            allocation: How sites share an average density; None is the best that was measured,
                see :func:`seer_compile.allocation.allocate`.

        Raises:
            SeerInputError: Not exactly one target is given, or it is out of range.
            ModelStateError: There are no gates, none has a curve that translates the target, or
                sensitivities are asked for that were not measured.
            NotConvergedError: No budget keeps the error within ``max_error``, or is fast enough.

        Warns:
            DensityNotReachedWarning: What every selection keeps is more than ``density``.
        """
        targets = {"density": density, "mass": mass, "max_error": max_error, "latency": latency}
        given = {name: value for name, value in targets.items() if value is not None}
        if len(given) != 1:
            expected = "exactly one of density, mass, max_error, latency"
            raise SeerInputError(argument="targets", got=given, expected=expected)
        ((target, value),) = given.items()
        check_fraction(target, value)
        check_shares(allocation, target)
        with self._lock:
            if not self._names:
                raise ModelStateError(
                    f"there are no gates yet that {target}={value} could be set on",
                    hint="Calibrate, load gates, or let optimize find the sites: example=...",
                )
            tables = budget_tables(
                {name: gate.curve for name, gate in self.items()},
                self.config,
                target,
                float(value),
                allocation=allocation,
                sensitivities={name: gate.sensitivity for name, gate in self.items()},
                searched={name: gate.shares for name, gate in self.items()},
                time_of=functools.partial(relative_time, dict(self.items())),
            )
            with torch.no_grad():
                for name, table in tables.items():
                    gate = self._gate(self._names[name])
                    gate.budget.copy_(torch.tensor(table, dtype=torch.float64, device="cpu"))
                    if int(gate.mode) in (MODE_AUTO, MODE_FULL_BUDGET):
                        gate.mode.fill_(_auto_mode(gate))
            # Untrained gates that are made later answer beside these, so at the same budget.
            is_measured = any(gate.curve is not None for _, gate in self.items())
            self._budget_without_curve = None if is_measured else float(value)
            self.write_metadata()

    def write_metadata(self) -> None:
        """Rewrite the JSON buffer from the gates; call after changing a curve or a flag."""
        text = json.dumps(self.describe(), sort_keys=True, separators=(",", ":"))
        with real_tensors():
            payload = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
            self.metadata = payload.to(self.metadata.device)

    def describe(self) -> dict[str, Any]:
        """Return plain data from which the gates can be built, without their weights."""
        return {
            "version": METADATA_VERSION,
            "config": config_to_json(self.config),
            "seed": self.seed,
            "gates": [GateEntry.of(name, gate).to_json() for name, gate in self.items()],
        }

    def rebuild(self, description: Mapping[str, Any], device: torch.device | str) -> None:
        """Replace all gates by untrained ones after a description, keeping those that fit.

        A kept gate stays the same object, so graphs that hold it see what is loaded into it.

        Raises:
            GateMismatchError: The description is of another version or incomplete.
        """
        try:
            if description["version"] not in _READABLE_VERSIONS:
                raise ValueError(f"metadata version {description['version']}")
            config = config_from_json(description["config"])
            seed = int(description["seed"])
            entries = [GateEntry.parse(entry) for entry in description["gates"]]
            gates = [self._fitting(entry, config, device) for entry in entries]
        except (KeyError, TypeError, ValueError) as cause:
            raise GateMismatchError(f"the gates' metadata cannot be read: {cause}") from cause
        with self._lock:
            for _, gate in self.items():
                # A graph may still hold a gate that is dropped here: it must answer densely.
                gate.mode.fill_(0)
                self._watchers.is_due |= all(gate is not other for other in gates)
            self.config, self.seed = config, seed
            self._budget_without_curve = None
            self._names.clear()
            self.gates.clear()
            for entry, gate in zip(entries, gates, strict=True):
                gate.scale, gate.curve = entry.scale, entry.curve
                gate.sensitivity, gate.shares = entry.sensitivity, entry.shares
                gate.config, gate.is_trained = entry.config_in(config), entry.is_trained
                self._add(entry.name, gate)
            self.write_metadata()

    def _fitting(
        self, entry: GateEntry, config: GateConfig, device: torch.device | str
    ) -> AttnGate:
        old, config = self.get(entry.name), entry.config_in(config)
        if old is not None:
            sizes = (old.heads, old.kv_heads, old.head_dim)
            if (*sizes, *old.config.form) == (*entry.sizes, *config.form):
                return old
        with real_tensors():
            return AttnGate(
                *entry.sizes,
                config=config,
                scale=entry.scale,
                seed=entry.seed,
                device=device if old is None else old.query_weight.device,
            )

    def _add(self, name: str, gate: AttnGate) -> None:
        key = _key(name)
        self._names[name] = key
        self.gates[key] = gate
        self._apply_mode(gate)

    def _apply_mode(self, gate: AttnGate) -> None:
        may_answer = gate.is_trained or self._untrained_may_answer
        answers = MODE_SPARSE if self._at_any_size else _auto_mode(gate)
        gate.mode.fill_(answers if self._is_sparse and may_answer else MODE_DENSE)

    def _gate(self, key: str) -> AttnGate:
        gate = self.gates[key]
        assert isinstance(gate, AttnGate)
        return gate

    def _load_from_state_dict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        payload = state_dict.get(prefix + "metadata")
        has_gates = any(key.startswith(prefix) for key in state_dict)
        self._absent_prefix = None if has_gates else prefix
        if payload is not None:
            try:
                self.rebuild(json.loads(bytes(payload.tolist())), self.metadata.device)
            except (ValueError, GateMismatchError) as cause:
                error_messages: list[str] = args[-1]
                error_messages.append(f"{prefix}metadata: {cause}")
                return
        local_metadata = {**local_metadata, "assign_to_params_buffers": False}
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def _auto_mode(gate: AttnGate) -> int:
    """Return the mode that is never slower: selecting everything is dense attention at a loss."""
    return MODE_FULL_BUDGET if gate.keeps_every_block else MODE_AUTO


def _forgive_absent_gates(store: GateStore, incompatible: Any) -> None:
    prefix, store._absent_prefix = store._absent_prefix, None
    if prefix is not None:
        incompatible.missing_keys[:] = [
            key for key in incompatible.missing_keys if not key.startswith(prefix)
        ]
    for _, gate in store.items():
        store._apply_mode(gate)
    store._watchers.tell()


def _key(name: str) -> str:
    """Return a state-dict key for a site name: readable, injective, without dots."""
    key = re.sub(r"\W", "__", name)
    is_plain = key.replace("__", ".") == name and not hasattr(nn.ModuleDict, key) and key
    return key if is_plain else f"{key}_{zlib.crc32(name.encode()):08x}"
