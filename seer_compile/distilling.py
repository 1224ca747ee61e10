"""The gates' loss beside a task loss: gates keep up with the model while it is fine-tuned.

Calibration trains gates on a frozen model. When the model itself is trained, its queries and keys
move; here each gate's loss on the queries and keys of the very forward that the task loss is made
of is returned as one number, to be added to it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from seer_compile.config import CalibrationConfig, check_type
from seer_compile.errors import ModelStateError
from seer_compile.gate import AttnGate
from seer_compile.kernels.observation import observe
from seer_compile.session import Session, require_session
from seer_compile.types import SiteInputs, Visibility


class Distillation:
    """What passed through the sites of a model while :func:`distillation` was active.

    Args:
        session: Of the optimized model.
        config: Which loss, which target, and how many rows enter it.
    """

    def __init__(self, session: Session, config: CalibrationConfig) -> None:
        self._session, self._config = session, config
        self._seen: list[SiteInputs] = []
        self._number = session.distillations
        session.distillations += 1
        # From here on the gates learn along with the weights: they belong to those of the moment.
        session.provenance = dataclasses.replace(session.provenance, model=None)

    def observe(self, inputs: SiteInputs) -> None:
        """Keep the operands of one call, if it is this model's."""
        name = inputs.name.removesuffix(self._session.suffix)
        if name + self._session.suffix != inputs.name or self._session.store.get(name) is None:
            return
        readable = inputs.visibility.as_arguments()
        offset = readable["offset"]
        # A cache counts its tokens in place; the operands themselves are kept by autograd as well.
        readable["offset"] = None if offset is None else offset.clone()
        self._seen.append(
            SiteInputs(
                name=name,
                query=inputs.query.detach(),
                key=inputs.key.detach(),
                value=inputs.value.detach(),
                scale=inputs.scale,
                visibility=Visibility(**readable),
                softcap=inputs.softcap,
                sinks=None if inputs.sinks is None else inputs.sinks.detach(),
            )
        )

    def losses(self) -> dict[str, Tensor]:
        """Return the loss of every site that was called, by name.

        Returns:
            ``Float32[]`` each, differentiable in the gate's weights only: the divergence of the
            gate's prediction from the true attention map, in nats, averaged over rows and over the
            calls of the site.

        Raises:
            ModelStateError: No site was called, or the gates are frozen.
        """
        if not self._seen:
            raise ModelStateError(
                "no site was called in the block",
                hint="Call the optimized model inside `with seer_compile.distillation(model)`; "
                "model.seer_report() tells which sites are compiled.",
            )
        parts: dict[str, list[Tensor]] = {}
        for number, inputs in enumerate(self._seen):
            parts.setdefault(inputs.name, []).append(self._loss(inputs, number))
        return {name: torch.stack(values).mean() for name, values in parts.items()}

    def loss(self) -> Tensor:
        """Return the mean of :meth:`losses` over the sites: ``Float32[]``, on the first's device.

        Add it to the task's loss, times a weight: its gradient reaches the gates alone, the task's
        everything else, so the weight acts on the gates' learning rate only.
        """
        values = list(self.losses().values())
        return torch.stack([value.to(values[0].device) for value in values]).mean()

    def _loss(self, inputs: SiteInputs, number: int) -> Tensor:
        from seer_compile.calibration import distributed
        from seer_compile.calibration.losses import differentiable_loss
        from seer_compile.calibration.targets import far_row_weights, gate_target, sample_rows

        gate, config, device = self._gate(inputs.name), self._config, inputs.query.device
        rows = sample_rows(
            -(-inputs.query.shape[-2] // gate.config.query_sub_block),
            config.rows_per_step,
            key=f"{config.seed}:{self._number}:{number}:{distributed.rank()}:{inputs.name}",
            device=device,
        )
        with torch.autocast(device.type, enabled=False):
            target, counts = gate_target(inputs, gate.config, kind=config.target, rows=rows)
            weights = None
            if config.far_rows:
                weights = far_row_weights(target, inputs, gate.config, rows, more=config.far_rows)
            return differentiable_loss(
                gate, inputs, target, counts, kind=config.loss, rows=rows, weights=weights
            )

    def _gate(self, name: str) -> AttnGate:
        gate = self._session.store.get(name)
        if gate is None or not gate.query_weight.requires_grad:
            raise ModelStateError(
                f"the gate of {name!r} is frozen, so there is nothing to learn",
                hint="Call model.seer_gates.requires_grad_(True) before the optimizer is made.",
            )
        return gate


@contextlib.contextmanager
def distillation(
    model: nn.Module, *, config: CalibrationConfig | None = None
) -> Iterator[Distillation]:
    """Watch the sites of an optimized model, to train its gates together with it.

    Args:
        model: An optimized model, or a wrapper around one (PEFT, data parallel).
        config: Its ``loss``, ``target``, ``far_rows``, ``rows_per_step`` and ``seed`` count; the
            defaults of calibration when None.

    Yields:
        Collects the calls made in the block; afterwards ``loss()`` gives the gates' loss.

    Raises:
        ModelStateError: The model is not optimized.

    Cost:
        Queries, keys and values of every site stay alive until the result is dropped. The loss
        takes the time of one dense attention map per site; gradients of one chunk exist at a time.

    Example:
        ::

            model.seer_gates.requires_grad_(True)
            with seer_compile.distillation(model) as sites:
                loss = model(**batch).loss
            (loss + sites.loss()).backward()
    """
    config = CalibrationConfig() if config is None else config
    check_type("config", config, CalibrationConfig)
    watched = Distillation(require_session(model), config)
    with observe(watched.observe):
        yield watched
