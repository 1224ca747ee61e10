"""Count the attention computations of a running model, without any of the package's finders.

Watches what the dispatcher executes: fused attention kernels, and softmaxes whose result (through
casts, layout changes and elementwise factors) becomes a factor of a matrix product. A router's
softmax, or one over classes, ends in no product and is not counted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

FUSED = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_native_multi_head_attention",
    "_transformer_encoder_layer_fwd",
)
SOFTMAXES = ("_softmax", "_safe_softmax")
PRODUCTS = ("bmm", "mm", "baddbmm", "addmm", "matmul")
CARRIERS = (
    *("view", "_unsafe_view", "reshape", "expand", "permute", "transpose", "t", "slice", "select"),
    *(
        "unsqueeze",
        "squeeze",
        "split",
        "split_with_sizes",
        "alias",
        "detach",
        "clone",
        "contiguous",
    ),
    *("_to_copy", "to", "mul", "div", "where", "masked_fill", "nan_to_num", "native_dropout"),
    *("as_strided", "copy", "copy_", "lift_fresh", "view_as", "unflatten", "flatten", "narrow"),
    *("add", "bernoulli"),
)


class CountAttention(TorchDispatchMode):
    """Counts in ``sites`` while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.sites = 0
        self._softmax_of: dict[int, int] = {}
        self._kept: list[Tensor] = []
        self._used: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in FUSED:
            self.sites += 1
        elif name in SOFTMAXES:
            self._mark(result, len(self._kept))
        else:
            self._follow(name, args, kwargs or {}, result)
        return result

    def _follow(self, name: str, args: Any, kwargs: Any, result: Any) -> None:
        tensors = [
            a for a in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(a, Tensor)
        ]
        sources = {self._softmax_of[id(t)] for t in tensors if id(t) in self._softmax_of}
        if name in PRODUCTS:
            for source in sources - self._used:
                self._used.add(source)
                self.sites += 1
        elif sources and name in CARRIERS:
            for leaf in torch.utils._pytree.tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self._mark(leaf, min(sources))

    def _mark(self, tensor: Tensor, source: int) -> None:
        # Kept alive, so that no other tensor gets its identity.
        self._kept.append(tensor)
        self._softmax_of[id(tensor)] = source


def count_attention(run: Any) -> int:
    """Return how many attention computations a callable executes, without gradients."""
    with torch.no_grad(), CountAttention() as counted:
        run()
    return counted.sites
