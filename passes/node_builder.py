"""Insertion of nodes at one place of a graph, each with its traced value and provenance.

Traced values are computed with guards suppressed: a tensor that exists only between two passes
must not restrict the sizes for which the compiled graph is valid.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from seer_compile.passes.fx_utils import fake_value
from seer_compile.passes.symbolic import as_argument
from seer_compile.types import Operand

MARK = "seer_mark"
"""Metadata key of :class:`SiteMark`."""
_PROVENANCE = ("nn_module_stack", "stack_trace", "source_fn_stack")
_COMPUTED = object()


class SiteMark(NamedTuple):
    """What an inserted node is, so that a later pass finds it."""

    key: str
    """Name of the node that the site replaces; unique in a graph, unlike the site's name."""
    site: str
    role: str
    gate: str = ""
    """Path of the gate in the graph module."""


class NodeBuilder:
    """Inserts calls before one node, on behalf of one site.

    Args:
        graph_module: Owner of the graph.
        before: Where to insert; its module stack and source line pass on to the new nodes.
        site: Name of the site.
        key: Identity of the site in this graph; the name of ``before`` when None.
    """

    def __init__(
        self, graph_module: GraphModule, before: Node, site: str, *, key: str | None = None
    ) -> None:
        self.graph_module = graph_module
        self.before = before
        self.site = site
        self.key = before.name if key is None else key
        self._provenance = {name: before.meta[name] for name in _PROVENANCE if name in before.meta}

    def call(
        self,
        target: Callable[..., Any],
        *arguments: Any,
        role: str = "layout",
        gate: str = "",
        value: Any = _COMPUTED,
        keywords: dict[str, Any] | None = None,
    ) -> Node:
        """Insert a call; symbolic numbers among the arguments become nodes.

        Args:
            target: An operator or a function.
            *arguments: Nodes, numbers, strings, None, or lists of them.
            role: What the node is within the site.
            gate: Path of the gate that the node belongs to.
            value: Traced value; computed from the arguments' values by default.
            keywords: Constant keyword arguments.
        """
        graph = self.graph_module.graph
        arguments = tuple(self._argument(argument) for argument in arguments)
        with graph.inserting_before(self.before):
            node = graph.call_function(target, arguments, keywords)
        if value is _COMPUTED:
            value = traced_value(functools.partial(target, **(keywords or {})), arguments)
        return self._finish(node, role, gate, value)

    def call_module(self, path: str, *arguments: Any, role: str, value: Any) -> Node:
        """Insert a call of a submodule, whose traced value the caller knows."""
        arguments = tuple(self._argument(argument) for argument in arguments)
        with self.graph_module.graph.inserting_before(self.before):
            node = self.graph_module.graph.call_module(path, arguments)
        return self._finish(node, role, "", value)

    def attribute(self, path: str, *, gate: str = "") -> Node:
        """Insert a read of a parameter or buffer."""
        with self.graph_module.graph.inserting_before(self.before):
            node = self.graph_module.graph.get_attr(path)
        owner, _, name = path.rpartition(".")
        tensor = getattr(self.graph_module.get_submodule(owner), name)
        inputs = [fake_value(other) for other in self.before.all_input_nodes]
        mode = fake_mode_of(tree_leaves(inputs))
        value = tensor if mode is None else mode.from_tensor(tensor, static_shapes=True)
        return self._finish(node, "gate", gate, value)

    def replay(self, operand: Operand) -> Node:
        """Insert the layout calls of an operand and return the node in the site's layout."""
        node = operand.node
        for step in operand.steps:
            node = self.call(step.target, node, *step.arguments)
        return node

    def add_submodule(self, path: str, module: nn.Module) -> str:
        """Register a module under a path, once."""
        existing = dict(self.graph_module.named_modules(remove_duplicate=False)).get(path)
        if existing is None:
            self.graph_module.add_submodule(path, module)
        elif existing is not module:
            raise ValueError(f"{path!r} is another module of this graph")
        return path

    def _finish(self, node: Node, role: str, gate: str, value: Any) -> Node:
        node.meta.update(self._provenance)
        node.meta[MARK] = SiteMark(self.key, self.site, role, gate)
        node.meta["val"] = value
        return node

    def _argument(self, argument: Any) -> Any:
        if isinstance(argument, list | tuple):
            return [self._argument(item) for item in argument]
        return as_argument(argument, self.graph_module.graph, self.before)


def traced_value(target: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Return what a call yields on the traced values of its arguments, adding no guard."""
    values = map_arg(arguments, fake_value)
    mode = fake_mode_of(tree_leaves(values))
    with guard_free(mode), torch.no_grad():
        return target(*values)


def operand_value(operand: Operand) -> Tensor | None:
    """Return the traced value of an operand in the site's layout; None if it has none."""
    value = fake_value(operand.node)
    for step in operand.steps:
        if not isinstance(value, Tensor):
            return None
        value = traced_value(step.target, (value, *step.arguments))
    return value if isinstance(value, Tensor) else None


def fake_mode_of(values: Iterable[Any]) -> FakeTensorMode | None:
    """Return the fake mode of the first fake tensor.

    Inside a backend the tracing context holds another mode than the graph's own values.
    """
    return next((value.fake_mode for value in values if isinstance(value, FakeTensor)), None)


@contextlib.contextmanager
def guard_free(mode: FakeTensorMode | None) -> Iterator[None]:
    """Enter a fake mode (or none) without recording guards."""
    if mode is None:
        yield
        return
    suppress = mode.shape_env.suppress_guards() if mode.shape_env else contextlib.nullcontext()
    with mode, suppress:
        yield


def marked(graph_module: GraphModule, role: str) -> Iterator[tuple[Node, SiteMark]]:
    """Iterate over the nodes that passes inserted in a role, in graph order."""
    for node in graph_module.graph.nodes:
        mark = node.meta.get(MARK)
        if mark is not None and mark.role == role:
            yield node, mark
