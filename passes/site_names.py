"""From the module stack of a node to the name of the user's module.

Dynamo's stack is keyed by ``id(module)`` and its path strings are relative to the frame, so they
change after graph breaks and collide between models. Names are therefore looked up by identity in
the user's root model; the path serves where there is no root, and for export, whose paths are
relative to the root already.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from torch import nn
from torch.fx import Node

from seer_compile.wrappers import plain_name, unwrap

_FRAME_PREFIX = re.compile(r"^(L\['[^']+'\]|L__[a-z]+__|G\['[^']+'\])\.?")
_CONTAINER = re.compile(r"\._?(?:modules)\['([^']+)'\]|\['([^']+)'\]|\[(\d+)\]")
_CALL_COUNT = re.compile(r"@\d+")
ROOT_NAME = "<root>"


class SiteNames:
    """Names nodes after the module that they were traced in.

    Args:
        root: The user's model, names are relative to what is under its wrappers; None where it is
            unknown (a bare ``torch.compile``).
        frame: Name of the module whose forward the graph was captured from, if not the root's.
    """

    def __init__(self, root: nn.Module | None = None, frame: str = "") -> None:
        self.root = root
        self._frame = frame or ROOT_NAME
        self._names: dict[str, str] = {}
        if root is None:
            return
        # Under a wrapper the model's own names come first: what a gate file stores.
        for owner in (unwrap(root), root):
            for name, module in owner.named_modules():
                self._names.setdefault(str(id(module)), plain_name(name))

    def name(self, key: str | None, path: str = "") -> str:
        """Return the dotted name for one entry of a module stack; ``<root>`` for the model itself.

        Args:
            key: Key of the entry: ``id(module)``, ``@n`` appended from the second call on, and
                ``.child`` for a child that has no entry of its own.
            path: Path text of the entry.
        """
        if key is None:
            return self._frame
        # A fused layer that was written out names a child of the module it knows.
        identity, _, child = _CALL_COUNT.sub("", key).partition(".")
        known = self._names.get(identity)
        if known is not None and child:
            known = f"{known}.{child}"
        if known is None:
            known = _CALL_COUNT.sub("", _FRAME_PREFIX.sub("", path))
            known = _CONTAINER.sub(lambda m: "." + next(filter(None, m.groups())), known)
        return known.strip(".") or ROOT_NAME

    def counter(self) -> SiteCounter:
        """Return a counter that gives the sites of one graph their final names."""
        return SiteCounter(self)


class SiteCounter:
    """Numbers the sites of one graph, in graph order, within one call of one module."""

    def __init__(self, names: SiteNames) -> None:
        self._names = names
        self._seen: Counter[tuple[str | None, str]] = Counter()

    def next_name(self, nodes: Sequence[Node]) -> str:
        """Return the name of the next site, made of ``nodes``.

        The owner is the innermost module that all nodes share, so a softmax module inside an
        attention module does not give its name to the site. ``#1``, ``#2`` ... is appended from
        the second site of one call on; a second call of a shared module repeats the name.
        """
        key, path = _common_owner(nodes)
        ordinal = self._seen[key, path]
        self._seen[key, path] += 1
        name = self._names.name(key, path)
        return f"{name}#{ordinal}" if ordinal else name


def _common_owner(nodes: Sequence[Node]) -> tuple[str | None, str]:
    stacks = [list((node.meta.get("nn_module_stack") or {}).items()) for node in nodes]
    shared: tuple[str | None, str] = (None, "")
    for entries in zip(*stacks, strict=False):
        if len({key for key, _ in entries}) > 1:
            break
        shared = (str(entries[0][0]), str(entries[0][1][0]))
    return shared
