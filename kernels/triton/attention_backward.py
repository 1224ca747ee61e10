"""Block-sparse attention, backward: gradients of query, key and value.

With ``p`` recomputed from the saved log-sum-exp, ``delta[i] = sum_v grad_out[i] out[i]`` and
``dlogits = p * (grad_out value^T - delta)``:

    dquery = scale * dlogits key      dkey = scale * dlogits^T query      dvalue = p^T grad_out

Behind a softcap, ``dlogits`` is multiplied by ``1 - tanh^2`` first.

Layout: two kernels. The first walks the list of each query block and writes dquery and delta. The
second walks, for each key tile, the transposed lists of all query heads of its key head, so that
the sum over these heads happens in registers. Neither uses atomics: results are deterministic.

Numerics: as in the forward; ``p`` and ``dlogits`` are rounded to the input dtype before products.

Source:
    Dao, "FlashAttention-2", arXiv:2307.08691, algorithm 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seer_compile.kernels.triton.key_value_gradient import key_value_gradient
from seer_compile.kernels.triton.launching import launch_kernel
from seer_compile.kernels.triton.primitives import (
    ceil_div,
    dot_precision,
    fine_rules,
    launching_on,
    make_band,
    padded_dim,
)
from seer_compile.kernels.triton.query_gradient import query_gradient
from seer_compile.kernels.triton.transpose_selection import transpose_selection
from seer_compile.kernels.triton.tuning import (
    BackwardTiling,
    backward_tiling,
    head_layout,
    shared_memory,
)


def launch(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    indices: Tensor,
    counts: Tensor,
    scale: float,
    query_block: int,
    key_block: int,
    upper: int | None = None,
    lower: int | None = None,
    offset: Tensor | None = None,
    key_padding: Tensor | None = None,
    query_documents: Tensor | None = None,
    key_documents: Tensor | None = None,
    *,
    softcap: float | None = None,
    tiling: BackwardTiling | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate block-sparse attention.

    Args:
        grad_out: ``Float[b h q v]``, any strides.
        query: ``Float[b h q d]``.
        key: ``Float[b g k d]``.
        value: ``Float[b g k v]``.
        out: ``Float[b h q v]``, of the forward.
        lse: ``Float32[b h q]``, of the forward.
        indices: ``Int32[b s m capacity]``.
        counts: ``Int32[b s m]``.
        scale: Factor on the logits.
        query_block: Tokens per query block.
        key_block: Tokens per key block.
        upper: Largest visible ``j - i``.
        lower: Smallest visible ``j - i``.
        offset: ``Int[]``, added to both bounds.
        key_padding: ``Bool[b k]``.
        query_documents: ``Int[b q]``.
        key_documents: ``Int[b k]``.
        softcap: Bounds the logits by ``softcap * tanh(logits / softcap)``, before the mask.
        tiling: Overrides the tuning table.

    Returns:
        Contiguous gradients of query, key and value, in their dtypes. Keys that no query reads,
        and queries that read nothing, get 0.

    Cost:
        Seven products per listed block to the forward's two; the transposed selection,
        five bytes per block pair.
    """
    batch, heads, q_len, dim = query.shape
    kv_heads, k_len, value_dim = key.shape[1], key.shape[2], value.shape[3]
    layout = head_layout(heads, kv_heads, indices.shape[1])
    gradients = tuple(
        torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        for tensor in (query, key, value)
    )
    if query.numel() == 0 or key.numel() == 0:
        return tuple(gradient.zero_() for gradient in gradients)  # type: ignore[return-value]
    grad_query, grad_key, grad_value = gradients
    padded = padded_dim(dim), padded_dim(value_dim)
    tiling = tiling or backward_tiling(
        query_block, key_block, max(padded), query.dtype, shared_memory(query.device)
    )
    band = make_band(upper, lower, offset)
    delta = torch.empty_like(lse, memory_format=torch.contiguous_format)
    lse, indices, counts = lse.contiguous(), indices.contiguous(), counts.contiguous()
    key_blocks = ceil_div(k_len, key_block)
    visibility = (
        band.offset,
        *fine_rules(key_padding, query_documents, key_documents),
        q_len,
        k_len,
        band.upper,
        band.lower,
        float(scale),
        1.0 if softcap is None else float(softcap),
    )
    constants = {
        "PER_KEY_HEAD": layout.per_key_head,
        "PER_SELECTION": layout.per_selection,
        "BLOCK_Q": query_block,
        "BLOCK_K": key_block,
        "TILE_Q": tiling.rows,
        "TILE_K": tiling.keys,
        "DIM": dim,
        "VALUE_DIM": value_dim,
        "PADDED_DIM": padded[0],
        "PADDED_VALUE_DIM": padded[1],
        "PRECISION": dot_precision(query.dtype),
        "IS_CAPPED": softcap is not None,
    }
    with launching_on(query, "query"):
        lists, list_counts = transpose_selection(indices, counts, key_blocks)
        tiles = ceil_div(q_len, tiling.rows)
        launch_kernel(query_gradient, tiles * heads * batch,
            query, key, value, out, grad_out, lse, delta, indices, counts, grad_query,
            *(tensor.stride() for tensor in (query, key, value, out, grad_out, grad_query)),
            *visibility, *indices.shape[1:], tiles, heads, **constants,
            num_warps=tiling.query_warps, num_stages=tiling.query_stages,
        )  # fmt: skip
        tiles = ceil_div(k_len, tiling.keys)
        launch_kernel(key_value_gradient, tiles * kv_heads * batch,
            query, key, value, grad_out, lse, delta, lists, list_counts, grad_key, grad_value,
            *(tensor.stride() for tensor in (query, key, value, grad_out, grad_key, grad_value)),
            *visibility, tiles, kv_heads, lists.shape[3], **constants,
            num_warps=tiling.key_warps, num_stages=tiling.key_stages,
        )  # fmt: skip
    return grad_query, grad_key, grad_value
