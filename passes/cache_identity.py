"""What compiled code depends on beyond the graph: the sources of the package.

Inductor's caches key a graph by the names of its operators, not by what they do. A changed kernel
or fake kernel under an unchanged name would be answered from a stale entry (PyTorch issues 185323
and 187319), so the identity below is made part of the key. What a fake promises is decided in core
files as well as beside the kernels, so every source file counts: a list of those that matter would
be wrong one day, and reading all takes 3 ms, once, when a graph is compiled.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

_PACKAGE = Path(__file__).absolute().parent.parent
_FOLDERS = ("calibration", "kernels", "passes")


@functools.cache
def source_digest() -> str:
    """Return a sha256 over every source file of the package, names included."""
    # The folders are links in a checkout, which a search from the package does not enter.
    paths = [*_PACKAGE.glob("*.py")]
    for folder in _FOLDERS:
        paths += (_PACKAGE / folder).rglob("*.py")
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.relative_to(_PACKAGE).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


class CacheIdentity(CustomGraphPass):
    """A pass of Inductor that changes nothing and adds an identity to the cache key.

    Args:
        configuration: ``repr`` of what else decides what is compiled.
        wrapped: A pass that the user has set; it still runs and still counts.
    """

    def __init__(self, configuration: str, wrapped: CustomGraphPass | None = None) -> None:
        self.configuration = configuration
        self.wrapped = wrapped

    def __call__(self, graph: Graph) -> None:
        """Run the wrapped pass, if there is one."""
        if self.wrapped is not None:
            self.wrapped(graph)

    def uuid(self) -> Any:
        """Return what the cache key receives; None where the wrapped pass forbids caching."""
        if self.wrapped is None:
            return (source_digest(), self.configuration)
        inner = self.wrapped.uuid()
        return None if inner is None else (source_digest(), self.configuration, inner)


def inductor_settings(configuration: str) -> dict[str, Any]:
    """Return settings for one compilation that carry the identity; empty where none can.

    A pass of the user's without identity turns Inductor's caches off already.
    """
    current = inductor_config.post_grad_custom_post_pass
    if current is not None and not isinstance(current, CustomGraphPass):
        return {}
    return {"post_grad_custom_post_pass": CacheIdentity(configuration, current)}
