"""Value types shared by every layer; nothing here imports another part of the package.

Letters of every shape in the project: b batch, h query heads, g key/value heads, q query tokens,
k key tokens, d head dim, v value head dim, m query blocks, n key blocks, r query sub-blocks,
c key sub-blocks, s selection heads (h, or g where a group shares one selection), a gate heads (h,
or g where a group shares one gate), e gate dim.
"""

from __future__ import annotations

import enum
import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor
from torch.fx import GraphModule, Node

from seer_compile.errors import RangeError

PoolKind = Literal["mean", "max", "min"]
Sharing = Literal["none", "selection", "gate"]
POOL_KINDS: tuple[PoolKind, ...] = ("mean", "max", "min")
SHARINGS: tuple[Sharing, ...] = ("none", "selection", "gate")


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockSize:
    """Tokens per block on the query and on the key side; the unit of selection."""

    query: int = 64
    key: int = 64

    def __post_init__(self) -> None:
        for name, tokens in (("query", self.query), ("key", self.key)):
            if tokens not in (16, 32, 64, 128):
                raise RangeError(
                    argument=f"block_size.{name}", got=tokens, expected="16, 32, 64 or 128 tokens"
                )


class BlockSelection(NamedTuple):
    """Which key blocks each query block reads.

    The layout is FlexAttention's ``kv_indices`` and ``kv_num_blocks``: entries past the count are
    undefined, indices of one row are distinct and ascending.
    """

    indices: Tensor
    """``Int32[b s m capacity]``, capacity <= n."""
    counts: Tensor
    """``Int32[b s m]``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Visibility:
    """Which keys a query may read: a band, key padding, and documents, all of which must agree.

    Query ``i`` may read key ``j`` when ``lower + offset <= j - i <= upper + offset``, key ``j`` is
    not padding, and both belong to the same document. Causal attention is ``upper=0`` (the
    top-left alignment of ``F.scaled_dot_product_attention``), a chunk behind ``p`` cached tokens
    ``upper=p``, a sliding window of ``w`` tokens ``upper=0, lower=1 - w``.

    In a captured graph the same fields hold what will become these values: ``int``, ``SymInt`` or
    ``Node`` for the bounds, ``Node`` for the tensors.
    """

    upper: Any = None
    """``int`` or None: largest visible ``j - i``; None is unbounded."""
    lower: Any = None
    """``int`` or None: smallest visible ``j - i``; None is unbounded."""
    offset: Any = None
    """``Int[]`` tensor or None: added to both bounds (the write position of a static cache)."""
    key_padding: Any = None
    """``Bool[b k]`` or None: True where the key may be read."""
    query_documents: Any = None
    """``Int[b q]`` or None: document of each query; given together with ``key_documents``."""
    key_documents: Any = None
    """``Int[b k]`` or None."""

    @classmethod
    def from_arguments(cls, *arguments: Any) -> Visibility:
        """Return the visibility of an operator's last arguments, of which trailing ones may lack.

        The dispatcher leaves out what is at its default.
        """
        return cls(**dict(zip(VISIBILITY_ARGUMENTS, arguments, strict=False)))

    def as_arguments(self) -> dict[str, Any]:
        """Return the fields under the argument names that every operator uses for them."""
        return {name: getattr(self, name) for name in VISIBILITY_ARGUMENTS}

    @property
    def is_full(self) -> bool:
        """Whether every query sees every key."""
        return all(getattr(self, name) is None for name in VISIBILITY_ARGUMENTS)

    def describe(self) -> str:
        """Return a short text for tables, such as ``causal + window(64) + key padding``."""
        parts: list[str] = []
        if self.upper is not None:
            shift = self.offset if self.offset is not None else self.upper
            is_plain = isinstance(shift, int) and shift == 0
            parts.append("causal" if is_plain else f"causal(offset={shift})")
        if self.lower is not None:
            if self.upper is None:
                parts.append(f"keys from {self.lower}")
            else:
                parts.append(f"window({self.upper - self.lower + 1})")
        if self.key_padding is not None:
            parts.append("key padding")
        if self.key_documents is not None:
            parts.append("same document")
        return " + ".join(parts) or "full"


VISIBILITY_ARGUMENTS = (
    "upper",
    "lower",
    "offset",
    "key_padding",
    "query_documents",
    "key_documents",
)


class LayoutStep(NamedTuple):
    """One ATen layout call to replay on a tensor: ``target(tensor, *arguments)``."""

    target: Any
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Operand:
    """A graph value and the layout calls that bring it to ``b heads tokens dim``."""

    node: Node
    steps: tuple[LayoutStep, ...] = ()


class MaskFunction(NamedTuple):
    """The mask function of ``flex_attention``: of batch item, head, query and key."""

    body: GraphModule
    captured: tuple[Any, ...]
    """What the function reads beside those four: nodes of the graph that calls it, numbers."""


class MaskTerm(NamedTuple):
    """One restriction or bias that the graph applies to the logits of a site."""

    kind: Literal["attn_mask", "add", "masked_fill", "where"]
    """``attn_mask``: the argument of SDPA, or that of ``flex_attention`` before it became blocks.
    ``add``: added to the logits. ``masked_fill``: logits replaced by ``fill`` where ``node`` is
    True. ``where``: logits kept where ``node`` is True."""
    node: Node
    fill: Any = None
    axes: tuple[tuple[str, ...], ...] = (("b",), ("h",), ("q",), ("k",))
    """What each axis of the logits is where the term applies: letters of
    ``AttentionSite.axis_sizes``, several where axes are merged (outermost first). ``node``
    broadcasts to these axes."""
    factor: float = 1.0
    """What multiplies ``node`` or ``fill`` on its way to the softmax."""
    function: MaskFunction | None = None
    """What applies inside the blocks of ``node`` that are not full; the two must agree."""


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class AttentionSite:
    """One attention computation in a captured graph."""

    name: str
    """Module path from the user's root model, ``#n`` appended from the second site of one call."""
    kind: Literal["sdpa", "decomposed", "flex"]
    query: Operand
    """``Float[b h q d]``."""
    key: Operand
    """``Float[b g k d]``, before any expansion to the query heads."""
    value: Operand
    """``Float[b g k v]``, before any expansion to the query heads."""
    output: Node
    """The node whose value is replaced."""
    output_steps: tuple[LayoutStep, ...] = ()
    """Layout calls from ``Float[b h q v]`` to the layout of ``output``."""
    sinks: Operand | None = None
    """``Float[h]``: logits that take part in the softmax and have no value."""
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    mask_terms: tuple[MaskTerm, ...] = ()
    axis_sizes: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Tokens, heads or batch items (``int`` or ``SymInt``) along each letter that the mask terms
    use; ``q`` and ``k`` are always there."""
    is_causal: bool = False
    softcap: float | None = None
    """Bound of the logits: ``softcap * tanh(scale * q k^T / softcap)``, before the mask."""
    dropout: float = 0.0
    """Dropout probability in effect; 0 in evaluation."""
    obstacles: tuple[SkipReason, ...] = ()
    """What the finder saw that forbids a rewrite, such as weights that are returned."""
    reader: Node | None = None
    """The node that reads query and key: the first product, or the fused call."""
    graph_path: str = ""
    """Name of the sub-graph module that holds the nodes; empty for the graph itself."""
    source: str = ""
    """The user's source line, for tables."""


class SkipCode(enum.Enum):
    """Why a site stays dense. The value is the text that a table shows before the detail."""

    DECODE = "one query token (decode)"
    DROPOUT = "dropout is active"
    WEIGHTS_ESCAPE = "attention weights are used outside the site"
    SOFTCAP = "softcap of another form"
    SINK_LOGIT = "sink logit of another form"
    FLOAT_BIAS = "floating-point bias on the logits"
    OPAQUE_MASK = "mask could not be proved"
    AMBIGUOUS = "dataflow between the two products is ambiguous"
    MUTATION = "an input is modified in place between its uses"
    HEAD_DIM = "head dim above 256 or value dim different"
    HEADS = "query heads are not a multiple of key heads"
    FLEX = "flex_attention of another form"
    SCALE = "scale is not a constant"
    SUBGRAPH = "inside a sub-graph (a branch, a loop, a shared body)"
    DTYPE = "dtype is not float16, bfloat16 or float32"
    RANK = "operands are not batch x heads x tokens x dim"
    NO_GATE = "no gate of this name and shape"
    EXCLUDED = "excluded by configuration"


@dataclass(frozen=True, slots=True)
class SkipReason:
    """Why one site stays dense."""

    code: SkipCode
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.code.value}: {self.detail}" if self.detail else self.code.value


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class MaskProof:
    """What the mask subgraph of a site provably is."""

    visibility: Visibility | None
    """None where the mask is opaque."""
    reason: SkipReason | None = None
    """Set exactly when ``visibility`` is None."""
    constants: tuple[str, ...] = ()
    """Graph names of the buffers whose values the proof read: it holds while they keep them."""


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class SiteDecision:
    """What the rewriter does to one site."""

    site: AttentionSite
    proof: MaskProof
    reason: SkipReason | None = None
    """None for a sparse site."""

    @property
    def is_sparse(self) -> bool:
        """Whether the site is rewritten."""
        return self.reason is None


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class RewritePlan:
    """The decisions for every site of one graph, in graph order."""

    decisions: tuple[SiteDecision, ...]

    @property
    def sparse(self) -> tuple[SiteDecision, ...]:
        """The decisions that rewrite."""
        return tuple(decision for decision in self.decisions if decision.is_sparse)


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class PassResult:
    """What a pass hands back to the pipeline."""

    graph_module: GraphModule
    rewritten: tuple[str, ...] = ()
    """Site names that this pass changed; empty means the graph is untouched."""


def is_excluded(site: str, patterns: Sequence[str]) -> bool:
    """Whether a shell pattern of ``exclude=`` names a site."""
    return any(fnmatch.fnmatchcase(site, pattern) for pattern in patterns)


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteSummary:
    """One row of ``explain`` and of ``seer_report``: plain data, safe to keep and to print."""

    name: str
    kind: str
    query_shape: tuple[Any, ...]
    key_shape: tuple[Any, ...]
    visibility: str
    decision: Literal["sparse", "dense"]
    reason: str = ""
    source: str = ""


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class SiteInputs:
    """What one site computes with in one forward."""

    name: str
    query: Tensor
    """``Float[b h q d]``."""
    key: Tensor
    """``Float[b g k d]``."""
    value: Tensor
    """``Float[b g k v]``."""
    scale: float
    visibility: Visibility
    softcap: float | None = None
    """Bound of the logits: ``softcap * tanh(logits / softcap)``, before the mask."""
    sinks: Tensor | None = None
    """``Float[h]``: logits that take part in the softmax and have no value."""

    def last_arguments(self) -> tuple[Any, ...]:
        """Return what operators of attention take last: visibility, softcap, sinks."""
        return (*self.visibility.as_arguments().values(), self.softcap, self.sinks)


class SiteHandler(Protocol):
    """Answers a site in place of its attention: how calibration and evaluation look inside."""

    def __call__(self, inputs: SiteInputs) -> Tensor:
        """Return ``Float[b h q v]``."""
        ...
