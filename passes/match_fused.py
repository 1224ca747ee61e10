"""``aten.scaled_dot_product_attention``, taken at its word.

The fused call defines its axes; what remains is to find the keys behind ``repeat_kv``. Two to six
dimensions, broadcast batch dimensions and grouped heads are all read the way the operator does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import SymInt
from torch.fx import Node

from seer_compile.passes.attention_axes import Products
from seer_compile.passes.axes import AxisBook, Layout, shape_of
from seer_compile.passes.dataflow import varies_with
from seer_compile.passes.fx_utils import bound_arguments, is_known
from seer_compile.passes.matches import Match
from seer_compile.passes.peel_layouts import peel
from seer_compile.types import MaskTerm, SkipCode

Number = Callable[[Any], float | None]


def match_fused(node: Node, number: Number) -> Match:
    """Return the attention of a ``scaled_dot_product_attention`` call.

    Args:
        node: The call.
        number: Returns the value of a constant.
    """
    arguments = bound_arguments(node)
    operands = (arguments["query"], arguments["key"], arguments["value"])
    match = Match("sdpa", node, node, node, AxisBook(), operands=operands)
    match.is_causal = bool(arguments["is_causal"])
    scale = arguments["scale"]
    lengths = [shape_of(operand)[-2] for operand in operands[:2]]
    is_fixed = scale is not None and not varies_with(scale, lengths)
    match.scale = number(scale) if is_fixed else None
    if scale is not None and match.scale is None:
        match.refuse(SkipCode.SCALE, f"`{scale}`")
    match.dropout = number(arguments["dropout_p"]) or 0.0
    match.products = products_of(match, operands, bool(arguments.get("enable_gqa", False)))
    if arguments["attn_mask"] is not None:
        axes = logit_axes(len(shape_of(operands[0])))
        match.mask_terms.append(MaskTerm("attn_mask", arguments["attn_mask"], axes=axes))
    return match


def logit_axes(rank: int) -> Layout:
    """Return the letters of the logits of a fused call."""
    return (*((letter,) for letter in "abcd"[: rank - 2]), ("q",), ("k",))


def products_of(
    match: Match, operands: tuple[Node, Node, Node], is_grouped: bool
) -> Products | None:
    """Return the products of a fused call; None, and an obstacle, where its axes do not fit."""
    query, key, value = operands
    rank = len(shape_of(query))
    if not 3 <= rank <= 6 or {len(shape_of(key)), len(shape_of(value))} != {rank}:
        match.refuse(SkipCode.RANK, f"{rank} dimensions")
        return None
    batch = logit_axes(rank)[:-2]
    book = match.book
    for letter, size in zip((*batch, ("q",), ("d",)), shape_of(query), strict=True):
        book.sizes[letter[0]] = size
    if is_grouped:
        if rank == 3 and any(_is_product(shape_of(operand)[0]) for operand in operands):
            match.refuse(SkipCode.HEADS, "groups of heads merged with a symbolic batch")
            return None
        # Groups are counted: symbolic head counts become constants, and guards.
        book.sizes[batch[-1][0]] = int(book.sizes[batch[-1][0]])
    book.sizes["k"], book.sizes["v"] = shape_of(key)[-2], shape_of(value)[-1]
    states = []
    for tensor, last in ((key, "d"), (value, "v")):
        found = _key_layout(tensor, batch, book, is_grouped)
        if found is None:
            match.refuse(SkipCode.HEADS, "batch or heads of keys and queries do not fit")
            return None
        layout, repeated = found
        states.append(peel(tensor, (*layout, ("k",), (last,)), repeated, book))
    return Products(
        query=peel(query, (*batch, ("q",), ("d",)), frozenset(), book),
        key=states[0],
        value=states[1],
        batch=batch,
        query_tokens=("q",),
        key_tokens=("k",),
        head_dim=("d",),
        value_dim=("v",),
        output=(*batch, ("q",), ("v",)),
    )


def _is_product(size: Any) -> bool:
    """Whether a symbolic size is made of others, such as batch * heads; it must stay free."""
    return isinstance(size, SymInt) and not size.node.expr.is_Atom


def _key_layout(
    tensor: Node, batch: Layout, book: AxisBook, is_grouped: bool
) -> tuple[Layout, frozenset[str]] | None:
    """Return the letters of a key's or value's batch dimensions, and which of them repeat."""
    layout: list[tuple[str, ...]] = []
    repeated: set[str] = set()
    for (letter,), length in zip(batch, shape_of(tensor), strict=False):
        whole = book.sizes[letter]
        size = int(length) if is_grouped and letter == batch[-1][0] else length
        if is_known(size == whole):
            layout.append((letter,))
        elif is_known(size == 1):
            layout.append(())
            repeated.add(letter)
        elif is_grouped and letter == batch[-1][0] and is_known(whole % size == 0):
            groups = book.regroup(((letter,),), (size, whole // size))
            if groups is None:
                return None
            layout.append(groups[0])
            repeated |= set(groups[1])
        else:
            return None
    return tuple(layout), frozenset(repeated)
