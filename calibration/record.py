"""Batches in, sites out: how calibration feeds the frozen model and looks inside its forward."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from seer_compile.callers import warn_caller
from seer_compile.errors import CalibrationDataError, ResumeMismatchError, SeerWarning
from seer_compile.gate import AttnGate
from seer_compile.gate_store import GateStore
from seer_compile.types import SiteHandler, SiteInputs

Run = Callable[[Any, SiteHandler], Any]
"""One forward of the frozen model on one batch, every provable site answered by the handler.

Returns what the model returns."""

_END = object()
_OTHER_ORDER = (
    "the data comes in another order each time, so gates train on batches that are held out to "
    "measure budgets, which will look better than they are. Pass batches in a fixed order: a "
    "DataLoader without shuffle, or a list."
)


def split_batch(
    batch: Any, *, device: torch.device | str | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Turn a batch into arguments of the model.

    Args:
        batch: A mapping (keyword arguments), a tuple or list (positional arguments), or one tensor;
            a one-dimensional integer tensor is one sequence of token ids.
        device: Where tensors are moved; left where they are when None.

    Returns:
        Positional and keyword arguments.

    Raises:
        CalibrationDataError: The batch is none of these.
    """
    if isinstance(batch, Mapping):
        arguments: tuple[Any, ...] = ()
        keywords = {str(name): value for name, value in batch.items()}
    elif isinstance(batch, tuple | list) and batch:
        arguments, keywords = tuple(batch), {}
    elif isinstance(batch, Tensor):
        is_sequence = batch.ndim == 1 and not batch.is_floating_point()
        arguments, keywords = (batch[None] if is_sequence else batch,), {}
    else:
        raise CalibrationDataError(
            argument="batch",
            got=type(batch).__name__,
            expected="a mapping, a tuple, a list or a tensor: the arguments of the model",
        )
    if device is None:
        return arguments, keywords
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), (arguments, keywords))


def batch_digest(batch: Any) -> str:
    """Return a sha256 over the structure and the values of a batch."""
    leaves, structure = pytree.tree_flatten(split_batch(batch))
    digest = hashlib.sha256(str(structure).encode())
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            host = leaf.detach().cpu().contiguous()
            digest.update(f"{host.dtype}{tuple(host.shape)}".encode())
            digest.update(host.reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(leaf).encode())
    return digest.hexdigest()


def _digest(batches: Iterable[Any]) -> str:
    digests = "".join(batch_digest(batch) for batch in batches)
    return hashlib.sha256(digests.encode()).hexdigest()


class BatchStream:
    """Splits data into held-out and training batches, repeats it, and can be put to a position.

    The first batches are held out. Training cycles through the rest: data that can be iterated
    again is streamed again each time; an iterator that cannot ends the training when it ends.

    Args:
        data: Any iterable of batches, in a fixed order.
        holdout: Batches to hold out; a quarter where the data has fewer than four times as many.

    Raises:
        CalibrationDataError: It is no iterable, or there are fewer than two batches.
    """

    def __init__(self, data: Iterable[Any], *, holdout: int) -> None:
        self._data = data
        try:
            iterator = iter(data)
        except TypeError as cause:
            raise CalibrationDataError(
                argument="data", got=type(data).__name__, expected="an iterable of batches"
            ) from cause
        self._can_repeat = iterator is not data
        head = list(itertools.islice(iterator, 4 * holdout))
        if len(head) < 2:
            raise CalibrationDataError(
                argument="data",
                got=f"{len(head)} batches",
                expected="at least 2: one to train on and one held out",
                hint="An iterator that was used before is empty; pass a list or a DataLoader.",
            )
        count = holdout if len(head) == 4 * holdout else max(1, len(head) // 4)
        self.holdout: tuple[Any, ...] = tuple(head[:count])
        self._source = itertools.chain(head[count:], iterator)
        self._history = hashlib.sha256()
        self._warned = False
        self.position = 0

    @property
    def cursor(self) -> dict[str, Any]:
        """Where the stream is: training batches taken, and a digest of them all."""
        return {"position": self.position, "digest": self._history.hexdigest()}

    def holdout_digest(self) -> str:
        """Return a digest of the held-out batches, which tells one data set from another."""
        return _digest(self.holdout)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        batch = next(self._source, _END)
        if batch is _END and self._can_repeat:
            self._source = self._again()
            batch = next(self._source, _END)
        if batch is _END:
            raise StopIteration
        self._history.update(batch_digest(batch).encode())
        self.position += 1
        return batch

    def _again(self) -> Iterator[Any]:
        """Return the training batches anew, behind those that are held out.

        Warns:
            SeerWarning: The first time that other batches than at first come in their place.
        """
        iterator = iter(self._data)
        first = tuple(itertools.islice(iterator, len(self.holdout)))
        if not self._warned and _digest(first) != self.holdout_digest():
            self._warned = True
            warn_caller(_OTHER_ORDER, SeerWarning)
        return iterator

    def seek(self, cursor: Mapping[str, Any]) -> None:
        """Take batches until the stream is where a cursor was.

        Raises:
            ResumeMismatchError: The batches on the way are not those of the first run.
        """
        taken = sum(1 for _ in itertools.islice(self, int(cursor["position"]) - self.position))
        if self.cursor != dict(cursor):
            raise ResumeMismatchError(
                f"the first {taken} training batches are not those that the checkpoint saw",
                hint="Pass the same data in the same order, or another checkpoint_dir.",
            )


def gate_of(store: GateStore, inputs: SiteInputs) -> AttnGate:
    """Return the gate of a site, created when the site is met for the first time."""
    return store.get_or_create(
        inputs.name,
        heads=inputs.query.shape[1],
        kv_heads=inputs.key.shape[1],
        head_dim=inputs.query.shape[-1],
        scale=inputs.scale,
        device=inputs.query.device,
    )


def dense_answer(gate: AttnGate, inputs: SiteInputs) -> Tensor:
    """Answer a site densely: ``Float[b h q v]``, by the operator that a compiled model calls."""
    return torch.ops.seer_compile.gated_attention.v1(
        inputs.query,
        inputs.key,
        inputs.value,
        gate.query_weight.detach(),
        gate.key_weight.detach(),
        gate.budget,
        torch.zeros((), dtype=torch.int8, device="cpu"),
        inputs.scale,
        *gate.constants().values(),
        inputs.name,
        *inputs.last_arguments(),
    )[0]
