"""FlashAttention-4's block-sparse forward as an engine: optional, chosen by name, never by itself.

Where the package ``flash-attn-4`` is installed and ``attention_engine("flash-attn-4")`` asks for
it, forward calls that :func:`obstacle` has nothing against go there. Its kernels tile queries and
keys by 128, so selections must have such blocks: ``GateConfig(block_size=BlockSize(128, 128))``.

The package changes from one version to the next. So the first call of every kind (dtype, heads,
head dim, blocks, band) is also answered by the default kernels, and an answer that differs raises.
Two differences remain: values that are not finite spoil queries that may not read them, where they
share a tile with what these read; and a backward goes to the default kernels. Importing the package
sets environment variables where it finds JAX.

Source:
    Dao-AILab/flash-attention, ``flash_attn/cute``: ``flash_attn_func`` and
    ``BlockSparseTensorsTorch``, as of 4.0.0b12 to 4.0.0b36. Lists ascend: the kernel takes them
    from the end and looks for the end of the keys in the last block of a list alone.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seer_compile.errors import EngineMismatchError, VersionUnsupportedError
from seer_compile.result_layout import laid_like_query
from seer_compile.types import Visibility

NAME = "flash-attn-4"

_TILE = 128
_DIMS = (64, 96, 128)
_DTYPES = (torch.float16, torch.bfloat16)

_proved: set[Any] = set()
_lock = threading.Lock()


class BlockLists(NamedTuple):
    """Selected blocks, split by whether every query of the row may read every key of the block."""

    masked_counts: Tensor
    """``Int32[b h m]``."""
    masked: Tensor
    """``Int32[b h m n]``, ascending; entries past the count are 0."""
    full_counts: Tensor
    full: Tensor


def obstacle(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    blocks: tuple[int, int],
    visibility: Visibility,
    softcap: float | None = None,
) -> str | None:
    """Return why this engine does not take a call, or None.

    Args:
        query: ``Float[b h q d]``.
        key: ``Float[b g k d]``.
        value: ``Float[b g k v]``.
        scale: Of the logits.
        blocks: Tokens per query block and per key block.
        visibility: Which keys a query may read.
        softcap: Bounds the logits; None where nothing does.
    """
    reason = _shape_obstacle(query, key, value, blocks)
    if reason is not None:
        return reason
    if softcap is not None:
        return "logits are soft-capped"
    if scale <= 0:
        return f"a scale of {scale}"
    return _band_obstacle(query.shape[2], key.shape[2], visibility)


def _band_obstacle(q_len: int, k_len: int, visibility: Visibility) -> str | None:
    upper, lower, *rest = visibility.as_arguments().values()
    if any(part is not None for part in rest):
        return "padding, documents, or an offset that only the device knows"
    if lower is not None:
        return "a window"
    if upper is not None and (upper != k_len - q_len or upper < 0):
        return f"a causal band that ends {upper} keys after a query, and not with both lengths"
    return None


def _shape_obstacle(
    query: Tensor, key: Tensor, value: Tensor, blocks: tuple[int, int]
) -> str | None:
    if query.dtype not in _DTYPES:
        return f"dtype {query.dtype}"
    if query.shape[3] not in _DIMS or value.shape[3] != query.shape[3]:
        return f"head dims {query.shape[3]} and {value.shape[3]}"
    if blocks[0] % _TILE or blocks[1] != _TILE:
        return f"blocks of {blocks[0]} x {blocks[1]} tokens"
    if 0 in (query.numel(), key.shape[2]):
        return "nothing to attend to"
    return None


def split_lists(
    indices: Tensor,
    counts: Tensor,
    heads: int,
    blocks: tuple[int, int],
    shift: int | None,
) -> BlockLists:
    """Split selections by whether a mask is needed, for every query head.

    Args:
        indices: ``Int32[b s m n]``, ascending in the first ``counts`` entries of a row.
        counts: ``Int32[b s m]``.
        heads: Query heads; s divides them.
        blocks: Tokens per query block and per key block.
        shift: A query ``i`` reads keys up to ``i + shift``; None where it reads all.

    Cost:
        Some twenty small launches over the lists.
    """
    number, columns = indices.shape[2:]
    places = torch.arange(columns, device=indices.device)
    is_kept = places < counts[..., None]
    is_full, is_masked = is_kept, torch.zeros_like(is_kept)
    if shift is not None:
        first_query = torch.arange(number, device=indices.device)[:, None] * blocks[0]
        first_key = torch.where(is_kept, indices, 0) * blocks[1]
        is_full = is_kept & (first_key + blocks[1] - 1 <= first_query + shift)
        is_seen = first_key <= first_query + blocks[0] - 1 + shift
        is_masked = is_kept & is_seen & ~is_full
    per_selection = heads // indices.shape[1]
    parts = (part for flags in (is_masked, is_full) for part in _compact(indices, flags))
    return BlockLists(*(part.repeat_interleave(per_selection, 1) for part in parts))


def _compact(indices: Tensor, flags: Tensor) -> tuple[Tensor, Tensor]:
    """Return counts and indices of the marked entries, in their order, at the front of each row."""
    columns = indices.shape[-1]
    # What is not marked goes to a column more, which is dropped.
    targets = torch.where(flags, flags.cumsum(-1) - 1, columns)
    wide = indices.new_zeros((*indices.shape[:-1], columns + 1))
    wide.scatter_(-1, targets, indices)
    return flags.sum(-1, dtype=torch.int32), wide[..., :columns].contiguous()


def launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    counts: Tensor,
    scale: float,
    blocks: tuple[int, int],
    upper: int | None,
    answer_by_default: Callable[[], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """Compute block-sparse attention; results as ``attention_forward.launch``.

    The call must have no :func:`obstacle`.

    Args:
        query: ``Float[b h q d]``.
        key: ``Float[b g k d]``.
        value: ``Float[b g k d]``.
        indices: ``Int32[b s m n]``.
        counts: ``Int32[b s m]``.
        scale: Of the logits.
        blocks: Tokens per query block and per key block.
        upper: Largest visible ``j - i``; None where all is visible.
        answer_by_default: The same call to the default kernels; made once per kind of call.

    Raises:
        VersionUnsupportedError: The package is not there, or lacks what is used of it.
        EngineMismatchError: The first answer of its kind is not that of the default kernels.
    """
    lists = split_lists(indices, counts, query.shape[1], blocks, upper)
    answer = attend(query, key, value, lists, scale, blocks, is_causal=upper is not None)
    sizes = (query.shape[1], key.shape[1], indices.shape[1], query.shape[3])
    kind = (query.device, query.dtype, *sizes, *blocks, upper is None)
    with _lock:
        is_proved = kind in _proved
    if not is_proved:
        _prove(answer, answer_by_default())
        with _lock:
            _proved.add(kind)
    return answer


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lists: BlockLists,
    scale: float,
    blocks: tuple[int, int],
    *,
    is_causal: bool,
) -> tuple[Tensor, Tensor]:
    """Call the package on lists that are split already; results as of :func:`launch`, unproved."""
    package = _package()
    tokens_first = (part.transpose(1, 2) for part in (query, key, value))
    with torch.no_grad():
        out, lse = package.attend(
            *tokens_first,
            softmax_scale=scale,
            mask_mod=package.causal if is_causal else None,
            block_sparse_tensors=package.lists(
                mask_block_cnt=lists.masked_counts,
                mask_block_idx=lists.masked,
                full_block_cnt=lists.full_counts,
                full_block_idx=lists.full,
                block_size=blocks,
            ),
            return_lse=True,
        )[:2]
    return laid_like_query(out.transpose(1, 2), query), lse


def _prove(answer: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Raise unless both answers are the same up to four roundings of the largest output."""
    (out, lse), (other, other_lse) = answer, expected
    largest = other.abs().amax().float()
    apart = (out.float() - other.float()).abs().amax()
    limit = 4 * torch.finfo(out.dtype).eps * largest
    is_close = (apart <= limit) & ~((lse - other_lse).abs() > 1e-2).any()
    is_same = torch.equal(lse == -torch.inf, other_lse == -torch.inf)
    if not (is_same and bool(is_close)):
        raise EngineMismatchError(
            f"{NAME} answers otherwise than the default kernels: outputs are {float(apart):.3g} "
            f"apart, {float(limit):.3g} allowed",
            hint="Leave the engine to 'auto', and report the version of the package.",
        )


class _Package(NamedTuple):
    attend: Callable[..., Any]
    lists: Callable[..., Any]
    causal: Callable[..., Any]


@functools.cache
def _package() -> _Package:
    """Import what is used of the package."""
    try:
        interface = importlib.import_module("flash_attn.cute.interface")
        lists = importlib.import_module("flash_attn.cute.block_sparsity")
        if "block_sparse_tensors" not in inspect.signature(interface.flash_attn_func).parameters:
            raise AttributeError("flash_attn_func takes no block_sparse_tensors")
        return _Package(interface.flash_attn_func, lists.BlockSparseTensorsTorch, _causal_mask())
    except (ImportError, AttributeError) as error:
        raise VersionUnsupportedError(
            argument=NAME,
            got=f"{type(error).__name__}: {error}",
            expected="version 4.0.0b12 or later, and what it needs",
            hint="pip install --pre flash-attn-4, or choose another engine.",
        ) from error


def _causal_mask() -> Callable[..., Any]:
    """Return the mask of a band that ends with both lengths, in the package's language."""
    cutlass = importlib.import_module("cutlass")
    cute = importlib.import_module("cutlass.cute")
    utils = importlib.import_module("flash_attn.cute.utils")

    @cute.jit
    def causal(batch: Any, head: Any, query: Any, key: Any, lengths: Any, tensors: Any) -> Any:
        del batch, head, tensors
        shift = lengths.seqlen_k - lengths.seqlen_q
        return key <= query + utils.scalar_to_ssa(shift, cutlass.Int32)

    return causal
