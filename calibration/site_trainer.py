"""The site handler of a training step: a dense answer, and one update of the site's gate."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from seer_compile.calibration import distributed
from seer_compile.calibration.losses import backward
from seer_compile.calibration.record import dense_answer, gate_of
from seer_compile.calibration.replay import UpdateReplay
from seer_compile.calibration.schedule import learning_rate
from seer_compile.calibration.statistics_start import fit_to_statistics
from seer_compile.calibration.targets import far_row_weights, gate_target, sample_rows
from seer_compile.calibration.temperature import fit_temperature
from seer_compile.config import CalibrationConfig
from seer_compile.errors import CalibrationDataError, NonFiniteLossError
from seer_compile.gate import AttnGate
from seer_compile.gate_store import GateStore
from seer_compile.types import SiteInputs


class GateTrainer:
    """The site handler of a training step: dense answer, and one update of the site's gate."""

    def __init__(self, store: GateStore, config: CalibrationConfig) -> None:
        self.store, self.config = store, config
        self.step = 0
        self.chosen_sub_blocks: dict[str, tuple[int, int]] = {}
        """Sub-block sizes that were chosen for a site; others have the store's."""
        self.optimizers: dict[str, torch.optim.AdamW] = {}
        self.starts: dict[str, dict[str, Tensor]] = {}
        """Weights of gates before their first update, where a share of them stays."""
        self.losses: list[dict[str, float]] = []
        self._current: dict[str, Tensor] = {}
        """Of the sites reached in this step: see :meth:`_update`."""
        self._replay = UpdateReplay(self._train)

    def add(self, name: str, inputs: SiteInputs | None = None) -> AttnGate:
        """Start to train the gate of a site, or one at other sub-blocks in its place in the store.

        Args:
            name: Of a site that has a gate.
            inputs: Of the site: what the start is fitted to.

        Returns:
            The gate that is trained.
        """
        gate = self.gate(name)
        if self.config.start != "current":
            usual = self.store.config.sub_blocks
            sizes = self.chosen_sub_blocks.get(name, usual)
            gate = self.store.at_sub_blocks(name, *sizes)
            gate.reset()
        if inputs is not None:
            with plain_numerics(inputs.query.device):
                self._fit_start(name, gate, inputs)
        gate.requires_grad_(True)
        is_cuda, rate = gate.query_weight.is_cuda, 0.0
        if is_cuda:
            # A number would be recorded with an update that is replayed. The forward may run under
            # modes and defaults of its own.
            with torch.inference_mode(False):
                rate = torch.zeros((), dtype=torch.float32, device=gate.query_weight.device)
        self.optimizers[name] = torch.optim.AdamW(
            gate.parameters(),
            lr=rate,
            weight_decay=self.config.weight_decay,
            # One launch where the host would make ten.
            fused=is_cuda,
            capturable=is_cuda,
        )
        return gate

    def _fit_start(self, name: str, gate: AttnGate, inputs: SiteInputs) -> None:
        seed = f"{self.config.seed}:{name}"
        if self.config.start == "temperature":
            fit_temperature(gate, inputs, seed=seed)
        elif self.config.start == "statistics":
            fit_to_statistics(gate, inputs, seed=seed)

    def __call__(self, inputs: SiteInputs) -> Tensor:
        """Train the site's gate on these inputs and answer densely."""
        gate = gate_of(self.store, inputs)
        if inputs.name not in self.optimizers:
            # Processes meet other data: what all start from must not depend on it here.
            gate = self.add(inputs.name, None if distributed.is_on() else inputs)
        with plain_numerics(inputs.query.device):
            self._current[inputs.name] = self._update(gate, inputs)
        return dense_answer(gate, inputs)

    @property
    def device(self) -> torch.device:
        """Where collectives run: the device of the first gate."""
        return next(iter(self.store.items()))[1].query_weight.device

    def gate(self, name: str) -> AttnGate:
        """Return the gate of a site that is being trained."""
        gate = self.store.get(name)
        if gate is None:
            raise KeyError(name)
        return gate

    def begin(self) -> None:
        """Start a step."""
        self._current = {}

    def end(self) -> float:
        """Finish a step; return its mean loss over the sites reached, NaN when there was none.

        Raises:
            NonFiniteLossError: The loss or gradient norm of a site is NaN or infinite.
        """
        numbers = [row.to(self.device) for row in self._current.values()]
        # One transfer for all sites: it is the only one of the step.
        rows = torch.stack(numbers).tolist() if numbers else []
        for name, row in zip(self._current, rows, strict=True):
            if not (math.isfinite(row[0]) and math.isfinite(row[1])):
                raise self._non_finite(name, row)
        losses = {name: row[0] for name, row in zip(self._current, rows, strict=True)}
        self.losses.append(losses)
        if self.step < self.config.shared_steps:
            self._share()
        self.step += 1
        return sum(losses.values()) / len(losses) if losses else math.nan

    def loss_history(self) -> dict[str, tuple[float, ...]]:
        """Return the loss of every step per site; NaN where a step did not reach the site."""
        return {
            name: tuple(step.get(name, math.nan) for step in self.losses)
            for name in self.optimizers
        }

    def _update(self, gate: AttnGate, inputs: SiteInputs) -> Tensor:
        """Train on one call; return loss, gradient norm, and sums that show what is not finite.

        Nothing waits for the device; the step's end reads the numbers of all sites at once.
        """
        config = self.config
        if config.start_share and inputs.name not in self.starts:
            weights = gate.named_parameters()
            self.starts[inputs.name] = {label: part.detach().clone() for label, part in weights}
        rows = sample_rows(
            -(-inputs.query.shape[-2] // gate.config.query_sub_block),
            config.rows_per_step,
            key=f"{config.seed}:{self.step}:{distributed.rank()}:{inputs.name}",
            device=inputs.query.device,
        )
        group, rate = self.optimizers[inputs.name].param_groups[0], learning_rate(self.step, config)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
        # Collectives are not replayed, nor is an average whose pace depends on the step.
        is_single = not distributed.is_on() and not config.average
        return (self._replay if is_single else self._train)(gate, inputs, rows)

    def _train(self, gate: AttnGate, inputs: SiteInputs, rows: Tensor | None) -> Tensor:
        optimizer, config = self.optimizers[inputs.name], self.config
        target, counts = gate_target(
            inputs, gate.config, kind=config.target, sharpness=config.sharpness, rows=rows
        )
        optimizer.zero_grad(set_to_none=True)
        weights = None
        if config.far_rows:
            weights = far_row_weights(target, inputs, gate.config, rows, more=config.far_rows)
        loss = backward(gate, inputs, target, counts, kind=config.loss, rows=rows, weights=weights)
        gradients = [weight.grad for weight in gate.parameters() if weight.grad is not None]
        if config.tie_keys and gate.key_weight.grad is not None:
            grouped = gate.key_weight.grad.unflatten(0, (gate.kv_heads, -1))
            grouped.copy_(grouped.mean(1, keepdim=True).expand_as(grouped))
        distributed.average([*gradients, loss])
        norm = torch.linalg.vector_norm(torch.stack([part.norm() for part in gradients]))
        factor = (config.clip_norm / norm).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(factor)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if config.average:
            self._follow(optimizer, gate)
        parts = (inputs.query, inputs.key, inputs.value, target)
        return torch.stack([loss, norm, *(part.sum(dtype=torch.float32) for part in parts)])

    def finish(self) -> None:
        """Put averages and shares of the start in place, and free what is replayed."""
        self._replay = UpdateReplay(self._train)
        for name, optimizer in self.optimizers.items():
            for label, weight in self.gate(name).named_parameters():
                average = (
                    optimizer.state[weight].get("average") if weight in optimizer.state else None
                )
                if average is not None:
                    weight.data.copy_(average)
                if name in self.starts:
                    weight.data.lerp_(self.starts[name][label], self.config.start_share)

    def _follow(self, optimizer: torch.optim.AdamW, gate: AttnGate) -> None:
        # The first steps are forgotten quickly: they are far from where training ends.
        decay = min(self.config.average, (1 + self.step) / (10 + self.step))
        for weight in gate.parameters():
            state = optimizer.state[weight]
            if "average" not in state:
                state["average"] = weight.detach().clone()
            state["average"].lerp_(weight.detach(), 1 - decay)

    def _share(self) -> None:
        """Give gates of equal sizes the mean of their weights."""
        kinds: dict[tuple[tuple[int, ...], ...], list[AttnGate]] = {}
        for name in self._current:
            gate = self.gate(name)
            # What was learned of other sub-blocks is not what these need.
            shapes = tuple(part.shape for part in gate.parameters())
            kinds.setdefault((gate.config.sub_blocks, *shapes), []).append(gate)
        with torch.no_grad():
            for gates in kinds.values():
                for parts in zip(*(gate.parameters() for gate in gates), strict=True):
                    mean = torch.stack([part.to(parts[0].device) for part in parts]).mean(0)
                    for part in parts:
                        part.copy_(mean)

    def _non_finite(self, name: str, row: list[float]) -> NonFiniteLossError:
        loss, norm, *sums = row
        known = zip(("query", "key", "value", "target"), sums, strict=True)
        culprit = next((part for part, total in known if not math.isfinite(total)), "gate")
        return NonFiniteLossError(
            f"gate loss is {loss}, gradient norm {norm}; the {culprit} holds NaN or infinity. "
            "The step does not count",
            hint="Look at that batch; the last checkpoint is intact.",
            context={
                "site": name,
                "step": self.step,
                "sample": f"training batch {self.step}",
            },
        )


@contextlib.contextmanager
def plain_numerics(device: torch.device) -> Iterator[None]:
    """Compute in float32 with gradients, whatever modes the model's forward runs under."""
    with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
        yield


def no_site() -> CalibrationDataError:
    """Return the error for data that reaches no site."""
    return CalibrationDataError(
        "the forward reached no attention site that can be sparse",
        hint="seer_compile.explain(model, example) lists the sites and the reasons.",
    )
