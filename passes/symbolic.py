"""Symbolic sizes as nodes: a bound such as ``k_len - q_len`` becomes arithmetic in the graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import sympy
import torch
from torch import SymInt, Tensor
from torch.fx import Graph, Node, Proxy
from torch.fx.node import map_arg
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from seer_compile.errors import PassError


def as_argument(value: Any, graph: Graph, before: Node) -> Any:
    """Return what may stand as an argument in a graph: a node for a symbolic number.

    A number that the graph already computes is used as it is; otherwise the expression is rebuilt
    from the sizes of the graph's tensors, before ``before``. Everything else passes unchanged.

    Raises:
        PassError: The expression needs a symbol that no earlier node holds.
    """
    if not isinstance(value, SymInt):
        return value
    expression = value.node.expr
    if expression.is_number:
        return int(expression)
    known = _known_numbers(graph, before)
    if expression in known:
        return known[expression]
    symbols = {
        symbol: Proxy(known.get(symbol) or _size_node(symbol, graph, before))
        for symbol in expression.free_symbols
    }
    last = before.prev
    with graph.inserting_before(before):
        result = sympy_interp(PythonReferenceAnalysis, symbols, expression)
    _set_values(last, before)
    return result.node if isinstance(result, Proxy) else result


def _known_numbers(graph: Graph, before: Node) -> dict[sympy.Expr, Node]:
    known: dict[sympy.Expr, Node] = {}
    for node in _earlier(graph, before):
        value = node.meta.get("val")
        if isinstance(value, SymInt):
            known.setdefault(value.node.expr, node)
    return known


def _size_node(symbol: Any, graph: Graph, before: Node) -> Node:
    for node in _earlier(graph, before):
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            continue
        for axis, size in enumerate(value.shape):
            if isinstance(size, SymInt) and size.node.expr == symbol:
                with graph.inserting_before(before):
                    read = graph.call_function(torch.ops.aten.sym_size.int, (node, axis))
                read.meta["val"] = size
                return read
    raise PassError(
        f"no node of the graph holds the size {symbol}", context={"before": before.name}
    )


def _set_values(last: Node, before: Node) -> None:
    """Trace the arithmetic inserted between two nodes; sums and products add no guard."""
    node = last.next
    while node is not before:
        if "val" not in node.meta:
            arguments = map_arg(node.args, lambda item: item.meta["val"])
            node.meta["val"] = node.target(*arguments)  # pyright: ignore[reportCallIssue]
        node = node.next


def _earlier(graph: Graph, before: Node) -> Iterator[Node]:
    for node in graph.nodes:
        if node is before:
            return
        yield node
