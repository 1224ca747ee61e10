"""Which site feeds which: a graph of the sites of a model, for reading and drawing.

    input -> layers.0.self_attn -> layers.1.self_attn -> output

An edge says that what a site reads (its queries, keys, values or mask) depends on the output of
another. Residual connections make every site depend on all before it, so of those only the last
are drawn, for each operand by itself: the keys of cross-attention still show where they come from.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import networkx
from torch.fx import GraphModule, Node

from seer_compile.errors import FeatureUnsupportedError, SeerInputError
from seer_compile.types import RewritePlan, SiteDecision

SPARSE_COLOUR, DENSE_COLOUR, END_COLOUR = "#9fd6a5", "#e3b7a0", "#d9d9d9"
_IMAGES = (".png", ".svg", ".pdf")


def site_graph(graph_module: GraphModule, plan: RewritePlan, prefix: str = "") -> Any:
    """Return the sites of one captured graph and what feeds what.

    Args:
        graph_module: The graph that the plan was made for, not rewritten.
        plan: Its decisions.
        prefix: Starts the name of every vertex, to tell graphs of one model apart.

    Returns:
        A ``networkx.DiGraph`` with a vertex per site (attributes ``label``, ``decision``,
        ``reason``, ``visibility``), one named ``input`` and one named ``output``; edges carry
        ``roles``, the operands that depend on the source.
    """
    graph: Any = networkx.DiGraph()
    producers = {decision.site.output: decision for decision in plan.decisions}
    vertices = {node: f"{prefix}{node.name}" for node in producers}
    first, last = f"{prefix}input", f"{prefix}output"
    graph.add_node(first, label="input", decision="")
    for node, decision in producers.items():
        graph.add_node(vertices[node], **_attributes(decision))
    graph.add_node(last, label="output", decision="")
    for node, decision in producers.items():
        if decision.site.graph_path:
            continue
        for role, sources in _reads(decision).items():
            _connect(graph, vertices, _feeding(sources, vertices), vertices[node], first, role)
    ends = [node for node in graph_module.graph.nodes if node.op == "output"]
    results = [source for node in ends for source in node.all_input_nodes]
    _connect(graph, vertices, _feeding(results, vertices), last, first, "result")
    return graph


def draw_sites(
    graphs: Sequence[tuple[GraphModule, RewritePlan]], path: str | os.PathLike[str]
) -> None:
    """Write the site graphs of a model's captured graphs into one file.

    Args:
        graphs: Each captured graph and its plan.
        path: Its suffix says how: ``.dot`` or ``.gv`` (Graphviz), ``.json`` (lists of vertices and
            edges), or ``.png``, ``.svg``, ``.pdf`` (drawn by matplotlib).

    Raises:
        SeerInputError: Another suffix.
        FeatureUnsupportedError: An image is asked for and matplotlib is not installed.
    """
    target = Path(path)
    several = len(graphs) > 1
    whole: Any = networkx.DiGraph()
    for number, (graph_module, plan) in enumerate(graphs):
        whole.update(site_graph(graph_module, plan, f"graph{number}." if several else ""))
    if target.suffix in (".dot", ".gv"):
        target.write_text(to_dot(whole))
    elif target.suffix == ".json":
        target.write_text(json.dumps(to_plain(whole), indent=2))
    elif target.suffix in _IMAGES:
        _draw(whole, target)
    else:
        raise SeerInputError(
            argument="draw", got=str(path), expected=".dot, .gv, .json, .png, .svg or .pdf"
        )


def to_plain(graph: Any) -> dict[str, list[dict[str, Any]]]:
    """Return a site graph as lists of vertices and edges."""
    return {
        "nodes": [{"id": vertex, **data} for vertex, data in graph.nodes(data=True)],
        "edges": [{"source": a, "target": b, **data} for a, b, data in graph.edges(data=True)],
    }


def to_dot(graph: Any) -> str:
    """Return a site graph in the language of Graphviz."""
    lines = ["digraph sites {", "  rankdir=TB;", "  node [shape=box, style=filled];"]
    for vertex, data in graph.nodes(data=True):
        text = "\\n".join(_quoted(line) for line in _lines(data))
        colour = _colour(data["decision"])
        lines.append(f'  "{_quoted(vertex)}" [label="{text}", fillcolor="{colour}"];')
    for source, target, data in graph.edges(data=True):
        roles = ", ".join(data["roles"])
        lines.append(f'  "{_quoted(source)}" -> "{_quoted(target)}" [label="{_quoted(roles)}"];')
    return "\n".join([*lines, "}", ""])


def _attributes(decision: SiteDecision) -> dict[str, str]:
    visibility = decision.proof.visibility
    return {
        "label": decision.site.name,
        "decision": "sparse" if decision.is_sparse else "dense",
        "reason": str(decision.reason or ""),
        "visibility": "opaque" if visibility is None else visibility.describe(),
    }


def _reads(decision: SiteDecision) -> dict[str, list[Node]]:
    site = decision.site
    return {
        "query": [site.query.node],
        "key": [site.key.node],
        "value": [site.value.node],
        "mask": [term.node for term in site.mask_terms],
    }


def _feeding(sources: Iterable[Node], sites: dict[Node, str]) -> tuple[set[Node], bool]:
    """Return the nearest sites behind some nodes, and whether an input reaches them directly."""
    found: set[Node] = set()
    from_input = False
    pending, seen = list(sources), set[Node]()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in sites:
            found.add(node)
            continue
        from_input |= node.op == "placeholder"
        pending += node.all_input_nodes
    return found, from_input


def _connect(
    graph: Any,
    vertices: dict[Node, str],
    feeding: tuple[set[Node], bool],
    target: str,
    first: str,
    role: str,
) -> None:
    sites, from_input = feeding
    names = [vertices[node] for node in sites]
    sources = [name for name in names if not _leads_on(graph, name, names)]
    # Behind another site every operand depends on weights too: the input counts on its own only.
    # A mask comes from sizes and buffers as often as from inputs, and says nothing then.
    if not sources and from_input and role != "mask":
        sources = [first]
    for source in sources:
        if graph.has_edge(source, target):
            graph.edges[source, target]["roles"].append(role)
        else:
            graph.add_edge(source, target, roles=[role])


def _leads_on(graph: Any, name: str, others: Sequence[str]) -> bool:
    """Whether a site feeds one of the others, directly or not."""
    return any(other != name and networkx.has_path(graph, name, other) for other in others)


def _lines(data: dict[str, str]) -> list[str]:
    details = [data.get("visibility", ""), data.get("reason", "")]
    return [data["label"], *(detail for detail in details if detail)]


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


def _colour(decision: str) -> str:
    return {"sparse": SPARSE_COLOUR, "dense": DENSE_COLOUR}.get(decision, END_COLOUR)


def _draw(graph: Any, path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError as cause:
        raise FeatureUnsupportedError(
            "drawing an image needs matplotlib",
            hint="Install seer_compile[plots], or ask for a .dot or .json file.",
        ) from cause
    for depth, generation in enumerate(networkx.topological_generations(graph)):
        for vertex in generation:
            graph.nodes[vertex]["depth"] = -depth
    places = networkx.multipartite_layout(graph, subset_key="depth", align="horizontal")
    depths = {data["depth"] for _, data in graph.nodes(data=True)}
    widest = max(len(list(layer)) for layer in networkx.topological_generations(graph))
    figure = Figure(figsize=(4.0 * widest + 1.5, 0.9 * len(depths) + 1))
    axes = figure.add_subplot()
    # Curved, so that an edge past a site does not vanish behind it.
    networkx.draw_networkx_edges(
        graph, places, ax=axes, node_size=900, arrowsize=12, connectionstyle="arc3,rad=0.25"
    )
    for vertex, (x, y) in places.items():
        data = graph.nodes[vertex]
        box = {"boxstyle": "round", "facecolor": _colour(data["decision"])}
        axes.text(x, y, "\n".join(_lines(data)), ha="center", va="center", fontsize=7, bbox=box)
    axes.axis("off")
    figure.savefig(path, bbox_inches="tight", dpi=150)
