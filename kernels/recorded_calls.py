"""Calls recorded once per shape and played again: kernel launches without the Python around them.

What an operator launches on a GPU follows from sizes, strides, dtypes and constants: its key. So
the second call of a key is watched, and the later ones repeat its launches with the addresses of
their own tensors. On a slow host that takes a fifth of the time.

A recording must not miss anything. What does more than launch kernels (a copy by PyTorch, a number
read from a device, a tensor that a module keeps) is refused by :mod:`.call_recorder`, and calls of
that key go on as they were, also those that would not have been refused.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field

from torch import Tensor

from seer_compile.kernels.call_recorder import Recorder
from seer_compile.kernels.played_calls import RecordedCall

_logger = logging.getLogger(__name__)


_SEEN_ONCE = "seen once"
_watching = threading.Lock()
"""One call at a time is watched: PyTorch's dispatch modes share flags between threads."""


@dataclass
class CallRecords:
    """Recordings by key, of one operator; for any thread."""

    limit: int = 256
    """Keys; all are forgotten when there are more."""
    _calls: dict[Hashable, RecordedCall | str] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(
        self,
        key: Hashable,
        operands: Sequence[Tensor],
        compute: Callable[[], tuple[Tensor, ...]],
    ) -> tuple[Tensor, ...]:
        """Return the results of a call: played, or computed.

        Args:
            key: All that decides which launches a call makes, but for what the operands look like.
            operands: Every tensor that the call reads, queries first: they say where results are,
                and how large.
            compute: The call.
        """
        key = (key, looks(*operands))
        known = self._calls.get(key)
        if isinstance(known, RecordedCall):
            return known.play(operands)
        if known is None:
            # A call that never comes again is not worth a recording.
            self._keep(key, _SEEN_ONCE)
        if known is not _SEEN_ONCE or not _watching.acquire(blocking=False):
            return compute()
        try:
            return self._watch(key, operands, compute)
        finally:
            _watching.release()

    def _watch(
        self,
        key: Hashable,
        operands: Sequence[Tensor],
        compute: Callable[[], tuple[Tensor, ...]],
    ) -> tuple[Tensor, ...]:
        # In case it fails: what is watched needs more memory, and must not be tried for ever.
        self._keep(key, "the call failed while it was watched")
        with Recorder(operands) as recorder:
            results = compute()
        call = recorder.finish(results)
        if isinstance(call, str):
            _logger.debug("Calls are not recorded: %s", call)
        self._keep(key, call)
        return results

    def states(self) -> list[str]:
        """Return ``recorded``, ``seen once``, or why it cannot be played, per key."""
        with self._lock:
            calls = list(self._calls.values())
        return ["recorded" if isinstance(call, RecordedCall) else call for call in calls]

    def clear(self) -> None:
        """Forget all calls."""
        with self._lock:
            self._calls.clear()

    def _keep(self, key: Hashable, call: RecordedCall | str) -> None:
        with self._lock:
            if len(self._calls) >= self.limit and key not in self._calls:
                self._calls.clear()
            self._calls[key] = call


_may_play: ContextVar[bool] = ContextVar("seer_compile_may_play", default=True)


def may_play() -> bool:
    """Whether calls may be recorded and played, for all that was asked for."""
    return _may_play.get()


@contextlib.contextmanager
def playing(*, enabled: bool) -> Iterator[None]:
    """Choose whether calls that are made in the block may be recorded and played.

    For comparisons: by default they may, and results are the same bits either way.
    """
    token = _may_play.set(enabled)
    try:
        yield
    finally:
        _may_play.reset(token)


def looks(*tensors: Tensor) -> Hashable:
    """Return what of tensors decides which kernels are launched for them."""
    # A list, as every call pays for it: a generator takes twice as long.
    return tuple([(x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16) for x in tensors])
