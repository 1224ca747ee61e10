"""Signals that wait for the end of a training step."""

from __future__ import annotations

import signal
import threading
from typing import Any


class Interruption:
    """Turns SIGINT and SIGTERM into a checkpoint between two steps, then lets them through."""

    def __init__(self, *, enabled: bool) -> None:
        # Only the main thread may set handlers; elsewhere signals do what they do.
        self._enabled = enabled and threading.current_thread() is threading.main_thread()
        self._previous: dict[int, Any] = {}
        self.requested: int | None = None

    def __enter__(self) -> Interruption:
        if self._enabled:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def check(self, *, stops_all: bool) -> None:
        """Deliver a signal that arrived meanwhile.

        Args:
            stops_all: Some process of the group was interrupted, this one or another.
        """
        if not stops_all:
            return
        self._restore()
        if self.requested is not None:
            signal.raise_signal(self.requested)
        raise KeyboardInterrupt

    def _note(self, number: int, _: object) -> None:
        if self.requested is not None:
            # The second one does not wait for the step to end.
            self._restore()
            signal.raise_signal(number)
        self.requested = number

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
