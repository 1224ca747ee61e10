"""Who wants to know that something was replaced, without being kept alive for it."""

from __future__ import annotations

import weakref
from collections.abc import Callable


class Watchers:
    """Methods that are called once after changes, and only while their objects live."""

    def __init__(self) -> None:
        self.is_due = False
        """Whether something changed since they were told."""
        self._methods: list[weakref.WeakMethod[Callable[[], None]]] = []

    def add(self, method: Callable[[], None]) -> None:
        """Call a bound method from now on."""
        self._methods.append(weakref.WeakMethod(method))

    def tell(self) -> None:
        """Call all of them, if something changed."""
        if not self.is_due:
            return
        self.is_due = False
        self._methods = [method for method in self._methods if method() is not None]
        for reference in tuple(self._methods):
            method = reference()
            if method is not None:
                method()
