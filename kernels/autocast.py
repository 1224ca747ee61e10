"""Autocast does not reach into the operators: each computes in the dtypes that it is given.

PyTorch would cast the products inside of a kernel, whose steps rely on their dtypes. What autocast
asks of attention as a whole, 16-bit operands, is a cast in front of the operator; the passes insert
it where the original call had it. Importing this module registers the rule for every operator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._C import DispatchKey, DispatchKeySet, _ExcludeDispatchKeyGuard
from torch._ops import OpOverload

from seer_compile.kernels import attention_contracts, contracts, gated_contracts

_KEYS = (DispatchKey.AutocastCPU, DispatchKey.AutocastCUDA)
_AUTOCAST = DispatchKeySet(_KEYS[0]) | DispatchKeySet(_KEYS[1])
_LIBRARY = torch.library.Library(contracts.NAMESPACE, "FRAGMENT")
OPERATORS = (
    contracts.pool_blocks,
    contracts.pool_features,
    contracts.block_scores,
    contracts.select_blocks,
    contracts.attention_mass,
    attention_contracts.block_sparse_attention,
    attention_contracts.block_sparse_attention_backward,
    gated_contracts.gated,
    gated_contracts.gated_backward,
)


def _leave_autocast(operator: OpOverload) -> None:
    def call(*args: Any, **kwargs: Any) -> Any:
        with _ExcludeDispatchKeyGuard(_AUTOCAST):
            return operator(*args, **kwargs)

    for key in _KEYS:
        _LIBRARY.impl(operator, call, key.name)


for definition in OPERATORS:
    _leave_autocast(definition._opoverload)
