"""Who wants to see the operands of gated attention calls while they run.

A site's queries and keys exist inside a compiled graph only; the operator shows them from there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from seer_compile.types import SiteInputs

Observer = Callable[[SiteInputs], None]

_lock = threading.Lock()
_observers: list[Observer] = []


@contextmanager
def observe(observer: Observer) -> Iterator[None]:
    """Show every gated attention call to an observer while the block runs, in any thread.

    Args:
        observer: Receives the operands, not to be changed; the name is that under which the site's
            calls are counted. Gradients are not recorded through them.
    """
    with _lock:
        _observers.append(observer)
    try:
        yield
    finally:
        with _lock:
            _observers.remove(observer)


def active() -> tuple[Observer, ...]:
    """Return who observes now."""
    if not _observers:
        return ()
    with _lock:
        return tuple(_observers)
