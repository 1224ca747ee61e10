"""Position numbers inside a packed document, turned into token indices.

A packed batch numbers its tokens from 0 in each document and compares numbers, not indices:
``position[k] <= position[q]``. Its documents are ``cumsum(diff(position) != 1)``. Where that sum is
the same at two tokens, every step between them was 1, so their numbers differ by exactly as much as
their indices: inside a document the comparison is ``k <= q``.
"""

from __future__ import annotations

from collections.abc import Sequence

import sympy
import torch
from torch.fx import Node

from seer_compile.passes.fx_utils import bound_arguments, packet_of, tensor_shape
from seer_compile.passes.interpret_masks import MaskInterpreter
from seer_compile.passes.mask_domain import Read, Same

aten = torch.ops.aten
_CASTS = (aten.to, aten._to_copy, aten.contiguous, aten.clone, aten.alias)


def positions_within_documents(
    documents: Same, bounds: Sequence[sympy.Expr], interpreter: MaskInterpreter
) -> list[sympy.Expr]:
    """Return the bounds with differences of position numbers replaced by index differences.

    Args:
        documents: The condition under which the bounds are read.
        bounds: Expressions that are at most 0.
        interpreter: Of the site.
    """
    numbers = _numbers_at(documents.left, interpreter), _numbers_at(documents.right, interpreter)
    if documents.left.node is not documents.right.node or None in numbers:
        return list(bounds)
    places = documents.left.index[-1], documents.right.index[-1]
    replaced: list[sympy.Expr] = []
    for bound in bounds:
        slopes = [bound.coeff(number) for number in numbers]
        # Only a difference is known; a number alone starts anywhere.
        is_difference = slopes[0] == -slopes[1] and slopes[0].is_Integer
        moved = bound.subs(dict(zip(numbers, places, strict=True))) if is_difference else bound
        replaced.append(sympy.expand(moved))
    return replaced


def _numbers_at(document: Read, interpreter: MaskInterpreter) -> sympy.Symbol | None:
    """Return the symbol of the position number at the token of ``document``, if it has one."""
    cumsum = _uncast(document.node)
    if packet_of(cumsum) is not aten.cumsum:
        return None
    rank = len(tensor_shape(cumsum) or ())
    changed = _uncast(cumsum.args[0])
    if packet_of(changed) is not aten.ne or changed.args[1] != 1:
        return None
    steps = _uncast(changed.args[0])
    if packet_of(steps) is not aten.diff:
        return None
    arguments = bound_arguments(steps)
    is_last = arguments["dim"] in (-1, rank - 1)
    is_last = is_last and bound_arguments(cumsum)["dim"] in (-1, rank - 1)
    prepended = tensor_shape(arguments["prepend"])
    has_head = prepended is not None and prepended[-1] == 1
    if not is_last or not has_head or arguments["append"] is not None or arguments["n"] != 1:
        return None
    source = steps.args[0]
    if not isinstance(source, Node):
        return None
    number = interpreter.read(steps, source, document.index)
    return number if isinstance(number, sympy.Symbol) else None


def _uncast(node: object) -> Node:
    assert isinstance(node, Node)
    while packet_of(node) in _CASTS and isinstance(node.args[0], Node):
        node = node.args[0]
    return node
