"""What the zoo is made of: architectures, and the situations in which each is called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

Door = Literal["dynamo", "export"]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The inputs of one call."""

    inputs: dict[str, Any]
    """Tensors and lists of tensors, handed to the module as one dictionary."""
    rows: Tensor | None = None
    """``Bool[...]``: which leading entries of the output mean something; None for all. Queries
    that are padding read nothing, and frameworks differ in what they answer then."""


@dataclass(frozen=True, kw_only=True)
class Situation:
    """One way to call a model: what masks, caches and documents are there."""

    name: str
    wrap: Callable[[nn.Module, Door], nn.Module]
    """Return the module that is compiled or exported. It maps the dictionary to one tensor."""
    make: Callable[[nn.Module, int], Batch]
    """Return the inputs for a model and a size, the same ones for the same size."""
    sizes: tuple[int, int] = (130, 97)
    """Sizes to trace with and, where sizes are dynamic, to run as well."""
    dynamic: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Which axes vary with the size, per input: a tuple of axes; the same for lists."""
    decodes: bool = False
    """Whether every site has one query token: never sparse by design."""
    sites: int | None = None
    """Attention computations in one forward, where not the whole model runs."""
    barred: int | None = None
    """Those of them that cannot be block-sparse in principle."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One kind of model, small and with random weights."""

    name: str
    family: str
    build: Callable[[str], nn.Module]
    """Return the model in evaluation mode for a spelling. The same weights each time."""
    situations: tuple[Situation, ...]
    sites: int
    """Attention computations in one forward, read off the configuration."""
    spellings: tuple[str, ...] = ("sdpa", "eager")
    barred: Mapping[str, int] = field(default_factory=dict[str, int])
    """Sites that cannot be block-sparse in principle, by why: ``float bias``, ``weights``."""
    needs: tuple[str, ...] = ()
    """Optional libraries."""
