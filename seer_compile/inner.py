"""The compiler that receives the rewritten graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from seer_compile.errors import RangeError
from seer_compile.gate import AttnGate

InnerCompiler = str | Callable[[GraphModule, list[Any]], Callable[..., Any]]
"""Name of a Dynamo backend (``inductor``, ``aot_eager``, ``eager``), or one itself."""


def check_inner(inner: InnerCompiler) -> InnerCompiler:
    """Return a compiler that exists.

    Raises:
        RangeError: No backend has this name, or it is our own.
    """
    known = torch.compiler.list_backends(exclude_tags=())
    if not callable(inner) and (inner not in known or inner == "seer"):
        others = [name for name in known if name != "seer"]
        raise RangeError(argument="inner", got=inner, expected=f"a callable or one of {others}")
    return inner


def compile_graph(
    graph_module: GraphModule,
    example_inputs: Sequence[Any],
    inner: InnerCompiler,
    *,
    settings: Mapping[str, Any] | None = None,
    identity: str | None = None,
) -> Callable[..., Any]:
    """Compile a graph.

    Args:
        graph_module: The graph; the compiler may change it.
        example_inputs: What Dynamo handed to the backend.
        inner: Who compiles.
        settings: Inductor settings for this graph only.
        identity: What the compiled code depends on beside the graph; enters Inductor's cache key.
    """
    inputs = list(example_inputs)
    if inner != "inductor":
        compiler = torch._dynamo.lookup_backend(inner) if isinstance(inner, str) else inner
        return compiler(graph_module, inputs)
    # Inside the function: importing Inductor costs seconds and loads triton.
    from torch._inductor.compile_fx import compile_fx

    from seer_compile.passes.cache_identity import inductor_settings

    patches = dict(settings or {})
    if identity is not None:
        patches |= inductor_settings(identity)
    return compile_fx(graph_module, inputs, config_patches=patches or None)  # type: ignore[return-value]


def hold_gates_apart(graph_module: GraphModule) -> None:
    """Let a graph hold the tensors of its gates in modules of its own, in place.

    While AOTAutograd traces, its tracers stand in the place of a module's tensors. In the gates
    themselves, other threads that set a budget or save would meet them.
    """
    gates = [
        (path, module)
        for path, module in graph_module.named_modules()
        if isinstance(module, AttnGate)
    ]
    for path, gate in gates:
        holder = nn.Module()
        holder._parameters.update(gate._parameters)
        holder._buffers.update(gate._buffers)
        parent, _, name = path.rpartition(".")
        setattr(graph_module.get_submodule(parent), name, holder)


def inductor_mode(mode: str | None) -> dict[str, Any]:
    """Return the Inductor settings behind a ``torch.compile(mode=...)`` name."""
    if mode in (None, "default"):
        return {}
    from torch._inductor import list_mode_options

    return dict(list_mode_options(mode))
