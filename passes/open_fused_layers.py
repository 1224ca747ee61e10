"""Write out the fused layers that PyTorch's encoder takes in evaluation.

    torch._transformer_encoder_layer_fwd -> linear, scaled_dot_product_attention, linear ...
    torch._native_multi_head_attention   -> the same without the feed-forward part

In evaluation without gradients ``nn.TransformerEncoderLayer`` calls one operator that hides its
attention; in training it does not. Written out, both have the same site under the same name. Legal
because these are the operators' own definitions (layer norm, attention, feed-forward, residuals).
What they add is that a mask is boolean, True where a key is hidden.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter
from torch.fx import traceback as fx_traceback


class FusedLayerOpener(Interpreter):
    """Runs a graph, replacing calls of fused layers by their parts.

    Autocast regions are entered for real: tracing records the calls that open and close them but
    does not make them, and every dtype inside would be wrong.

    Args:
        graph_module: The graph to run.
        contexts: Receives the autocast regions, which end with it.
    """

    def __init__(self, graph_module: GraphModule, contexts: contextlib.ExitStack) -> None:
        super().__init__(graph_module)
        self._contexts = contexts

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one call; a fused layer as its parts."""
        if target is torch.amp.autocast_mode._enter_autocast:
            device_type, dtype, enabled, cache_enabled = args
            region = contextlib.ExitStack()
            region.enter_context(
                torch.autocast(device_type, dtype, enabled=enabled, cache_enabled=cache_enabled)
            )
            return self._contexts.enter_context(region)
        if target is torch.amp.autocast_mode._exit_autocast:
            return args[0].close()
        opener = _OPENERS.get(target)
        result = opener(*args, **kwargs) if opener is not None else NotImplemented
        return super().call_function(target, args, kwargs) if result is NotImplemented else result


def _encoder_layer(
    src: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Any:
    if src.is_nested or src.dim() != 3:
        return NotImplemented

    def first_norm(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def second_norm(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    with _inside("self_attn", nn.MultiheadAttention):
        attended = _attention(
            first_norm(src) if norm_first else src,
            num_heads,
            (qkv_weight, qkv_bias, proj_weight, proj_bias),
            _visible(mask, mask_type),
        )
    x = src + attended
    x = x if norm_first else first_norm(x)
    hidden = F.linear(second_norm(x) if norm_first else x, ffn_weight_1, ffn_bias_1)
    hidden = F.gelu(hidden) if use_gelu else F.relu(hidden)
    x = x + F.linear(hidden, ffn_weight_2, ffn_bias_2)
    return x if norm_first else second_norm(x)


def _multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_head: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    mask: Tensor | None = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> Any:
    is_self_attention = query is key and key is value
    if need_weights or not is_self_attention or query.is_nested or query.dim() != 3:
        return NotImplemented
    parameters = (qkv_weight, qkv_bias, proj_weight, proj_bias)
    return _attention(query, num_head, parameters, _visible(mask, mask_type)), None


def _attention(
    x: Tensor, heads: int, parameters: tuple[Tensor, ...], visible: Tensor | None
) -> Tensor:
    qkv_weight, qkv_bias, proj_weight, proj_bias = parameters
    b, t, width = x.shape
    query, key, value = (
        part.reshape(b, t, heads, width // heads).transpose(1, 2)
        for part in F.linear(x, qkv_weight, qkv_bias).split(width, dim=-1)
    )
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=visible)
    return F.linear(out.transpose(1, 2).reshape(b, t, width), proj_weight, proj_bias)


def _visible(mask: Tensor | None, mask_type: int | None) -> Tensor | None:
    """Return ``Bool`` broadcasting to ``b h q k``, True where a key may be read."""
    if mask is None:
        return None
    visible = mask.to(torch.bool).logical_not()
    # Type 1 is key padding, Bool[b k]; 0 is Bool[q k], 2 is Bool[b h q k].
    return visible[:, None, None, :] if mask_type == 1 else visible


@contextlib.contextmanager
def _inside(child: str, kind: type) -> Iterator[None]:
    """Give the calls made here the module stack of a child of the current module."""
    meta = fx_traceback.get_current_meta()
    stack = meta.get("nn_module_stack") or {}
    if not stack:
        yield
        return
    key, (path, *_) = list(stack.items())[-1]
    meta["nn_module_stack"] = {**stack, f"{key}.{child}": (f"{path}.{child}", kind)}
    try:
        yield
    finally:
        meta["nn_module_stack"] = stack


_C: Any = torch
_OPENERS: dict[Any, Callable[..., Any]] = {
    _C._transformer_encoder_layer_fwd: _encoder_layer,
    _C._native_multi_head_attention: _multi_head_attention,
    torch.ops.aten._transformer_encoder_layer_fwd.default: _encoder_layer,
    torch.ops.aten._native_multi_head_attention.default: _multi_head_attention,
}
