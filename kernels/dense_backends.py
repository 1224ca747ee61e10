"""Which fused kernel answers a dense call without a mask: by a measured rule, called directly.

PyTorch's ``sdpa_kernel`` would choose by global flags, which other threads see. The kernels are
operators of their own, with gradients: calling one changes nothing for anyone else. PyTorch says
for each call whether a kernel takes it; that covers what the user switched off, determinism, and
layouts. Where the rule has no opinion, or its kernel does not take a call, SDPA chooses.
"""

from __future__ import annotations

import functools
import threading

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams

from seer_compile.kernels.break_even import DENSE, DenseRule, head_dim_class
from seer_compile.kernels.counters import Tally

SDPA, FLASH, CUDNN = "sdpa", "flash", "cudnn"
_FEWEST_QUERIES = 128
"""Rules were measured from so many on. With fewer, work says little: at 4,096 keys and one query
flash attention took 17 us where SDPA's own choice took 9 (one H200, 32 heads of D128)."""
_CUDNN_ANY_LENGTH = 91501
"""cuDNN 9.15.1: before it, lengths that 128 does not divide could give wrong results."""

_lock = threading.Lock()
_answers = Tally()
_failed: set[tuple[object, ...]] = set()
"""Kinds of calls that cuDNN said it takes and then had no plan for."""


def answers() -> dict[str, int]:
    """Return calls per backend; ``sdpa:`` and a reason where the rule's choice did not answer."""
    return _answers.snapshot()


def reset() -> None:
    """Forget the counts."""
    _answers.reset()


@functools.cache
def device_class(device: torch.device) -> str:
    """Return the key of the tables: ``cpu``, or ``cuda-90`` and the like."""
    if device.type != "cuda":
        return "cpu"
    major, minor = torch.cuda.get_device_capability(device)
    return f"cuda-{major}{minor}"


def preferred(
    device_key: str, head_dim: int, work: float, table: dict[tuple[str, int], DenseRule] = DENSE
) -> str:
    """Return the backend that was measured to be the fastest; ``sdpa`` where nothing was.

    Args:
        device_key: Of :func:`device_class`.
        head_dim: The larger one of keys and values.
        work: batch x heads x q_len x k_len x (head dim + value dim).
        table: Rules by device class and head dim class.
    """
    rule = table.get((device_key, head_dim_class(head_dim)))
    if rule is None:
        return SDPA
    if work < rule.flash_below:
        return FLASH
    return CUDNN if work >= rule.cudnn_from else SDPA


def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool, scale: float
) -> Tensor:
    """Attend without a mask, or causally from the first key on, in 16 bits on a GPU.

    Args:
        query: ``Float[b h q d]``.
        key: ``Float[b g k d]``.
        value: ``Float[b g k v]``.
        is_causal: Whether query ``i`` reads keys up to ``i`` only.
        scale: Factor on the logits.

    Returns:
        ``Float[b h q v]``, laid out as the query.
    """
    batch, heads, q_len, dim = query.shape
    k_len, value_dim = key.shape[2], value.shape[3]
    work = float(batch * heads * q_len * k_len * (dim + value_dim))
    backend = SDPA
    if q_len >= _FEWEST_QUERIES:
        backend = preferred(device_class(query.device), max(dim, value_dim), work)
    if backend == FLASH:
        out, backend = _flash(query, key, value, is_causal, scale)
    elif backend == CUDNN:
        out, backend = _cudnn(query, key, value, is_causal, scale)
    else:
        out = None
    _answers.add(backend)
    if out is not None:
        return out
    is_grouped = key.shape[1] != heads
    return F.scaled_dot_product_attention(
        query, key, value, is_causal=is_causal, scale=scale, enable_gqa=is_grouped
    )


def _flash(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor | None, str]:
    # SDPA pads other head dims in front of the kernel.
    if query.shape[3] % 8 or not _takes(FLASH, query, key, value, is_causal):
        return None, "sdpa:flash does not take the call"
    operator = torch.ops.aten._scaled_dot_product_flash_attention.default
    return operator(query, key, value, 0.0, is_causal, scale=scale)[0], FLASH


def _cudnn(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor | None, str]:
    is_even = query.shape[2] % 128 == 0 and key.shape[2] % 128 == 0
    # Only causal calls of odd lengths are known to be right, and since 9.15.1 only.
    version = torch.backends.cudnn.version() or 0
    if not is_even and not (is_causal and version >= _CUDNN_ANY_LENGTH):
        return None, "sdpa:cudnn is not trusted with this length"
    kind = (query.device, query.dtype, query.shape[3], value.shape[3], is_causal)
    if kind in _failed:
        return None, "sdpa:cudnn failed"
    if not _takes(CUDNN, query, key, value, is_causal):
        return None, "sdpa:cudnn does not take the call"
    needs_lse = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    operator = torch.ops.aten._scaled_dot_product_cudnn_attention.default
    try:
        out = operator(query, key, value, None, needs_lse, 0.0, is_causal, scale=scale)[0]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        with _lock:
            _failed.add(kind)
        return None, "sdpa:cudnn failed"
    return out, CUDNN


def _takes(backend: str, query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> bool:
    is_grouped = key.shape[1] != query.shape[1]
    parameters = SDPAParams(query, key, value, None, 0.0, is_causal, is_grouped)
    if backend == FLASH:
        return torch.backends.cuda.can_use_flash_attention(parameters)
    return torch.backends.cuda.can_use_cudnn_attention(parameters)
