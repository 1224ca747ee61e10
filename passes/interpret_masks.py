"""Abstract interpretation of the calls that make a mask, one element at a time.

``MaskInterpreter.element(node, index)`` answers what ``node[index]`` is, where the index is made of
symbols: query ``i``, key ``j``, batch item. It is evaluated backwards, from the mask to its
inputs: a layout call turns the index of its result into an index of its argument, a gather
evaluates its indices first, ``arange`` returns the index itself. Whatever is not understood is an
opaque element (:class:`Read`), still useful as key padding or document number.

Nothing is run on data. Buffers whose values matter (nanoGPT's triangle) are compared with a band.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Graph, Node

from seer_compile.passes.constant_tensors import constant_element
from seer_compile.passes.fx_utils import fake_value, tensor_shape
from seer_compile.passes.index_ranges import IndexRanges, as_expression
from seer_compile.passes.mask_domain import (
    FALSE,
    TRUE,
    AllOf,
    AtMost,
    Flag,
    Formula,
    Read,
    Real,
    Value,
    as_number,
    lift,
)
from seer_compile.passes.mask_dtypes import fits
from seer_compile.passes.mutation import Mutations

Index = tuple[sympy.Expr, ...]
Rule = Callable[["MaskInterpreter", Node, Index], Value | None]
ZERO = sympy.Integer(0)
# Longer chains of calls are no masks; below Python's own limit.
_DEEPEST = 120


class MaskInterpreter:
    """Evaluates mask elements symbolically.

    Args:
        rules: What each call does to an element, by operator.
        ranges: The index symbols and their sizes.
        mutations: Of the graph that holds the mask.
        constants: Real tensors of nodes that keep their values (buffers).
    """

    def __init__(
        self,
        rules: Mapping[Any, Rule],
        ranges: IndexRanges,
        mutations: Mutations,
        constants: Mapping[Node, Tensor],
    ) -> None:
        self.ranges = ranges
        self.constants_read: set[str] = set()
        self.read_of: dict[sympy.Symbol, Read] = {}
        self._symbol_of: dict[Read, sympy.Symbol] = {}
        self._rules = rules
        self._mutations = mutations
        self._constants = constants
        self._known: dict[tuple[Node, Index], Value] = {}
        self._depth = 0
        self._is_literal = False
        self._inputs: Mapping[Node, Value | tuple[MaskInterpreter, Node]] = {}

    def literal(self) -> MaskInterpreter:
        """Return an interpreter that takes no condition on a key for an element of a tensor.

        Two of its answers are equal only where two programs compute the same.
        """
        other = MaskInterpreter(self._rules, self.ranges, self._mutations, self._constants)
        other.read_of, other._symbol_of = self.read_of, self._symbol_of
        other._is_literal = True
        return other

    def of_function(self, body: Graph, inputs: Sequence[Value | Node]) -> MaskInterpreter:
        """Return a literal interpreter of a function's body, given values or nodes of this one."""
        inner = MaskInterpreter(self._rules, self.ranges, Mutations(body), {}).literal()
        inner.read_of, inner._symbol_of = self.read_of, self._symbol_of
        given = ((self, each) if isinstance(each, Node) else each for each in inputs)
        placeholders = (node for node in body.nodes if node.op == "placeholder")
        inner._inputs = dict(zip(placeholders, given, strict=True))
        return inner

    def operand(self, reader: Node, argument: Any, index: Index) -> Value | None:
        """Return the element of an argument that enters element ``index`` of the reader's result.

        The argument broadcasts to the result; numbers are themselves.
        """
        if not isinstance(argument, Node):
            return _scalar(argument)
        shape = tensor_shape(argument)
        if shape is None:
            return _scalar(fake_value(argument))
        return self.read(reader, argument, broadcast_index(index, shape))

    def read(self, reader: Node, tensor: Node, index: Index) -> Value | None:
        """Return ``tensor[index]`` as ``reader`` sees it; None if it was changed in between."""
        if self._mutations.writer_between(tensor, tensor, reader) is not None:
            return None
        return self.element(tensor, index)

    def operand_read(self, argument: Node, index: Index) -> Read:
        """Return the element itself that an argument contributes to ``index`` of a result."""
        return Read(argument, broadcast_index(index, tensor_shape(argument) or ()))

    def element(self, node: Node, index: Index) -> Value:
        """Return what ``node[index]`` is."""
        key = (node, index)
        if key not in self._known:
            self._depth += 1
            value = self._apply_rule(node, index) if self._depth <= _DEEPEST else None
            self._depth -= 1
            self._known[key] = self._settle(node, index, value)
        return self._known[key]

    def dependence(self, expression: Any) -> frozenset[sympy.Symbol]:
        """Return the index symbols that an expression, or an index, depends on."""
        parts = expression if isinstance(expression, tuple) else (expression,)
        found: set[sympy.Symbol] = set()
        for part in parts:
            for symbol in sympy.sympify(part).free_symbols:
                if symbol in self.read_of:
                    found |= self.dependence(self.read_of[symbol].index)
                elif symbol in self.ranges:
                    found.add(symbol)
        return frozenset(found)

    def symbol(self, read: Read) -> sympy.Symbol:
        """Return the symbol that stands for an integer element in expressions."""
        if read not in self._symbol_of:
            symbol = sympy.Symbol(f"read{len(self._symbol_of)}", integer=True)
            self._symbol_of[read] = symbol
            self.read_of[symbol] = read
        return self._symbol_of[read]

    def _apply_rule(self, node: Node, index: Index) -> Value | None:
        if node in self._inputs:
            given = self._inputs[node]
            return given[0].element(given[1], index) if isinstance(given, tuple) else given
        constant = self._constants.get(node)
        if constant is not None and not self._mutations.is_written(node):
            value = constant_element(constant, index)
            if value is not None:
                self.constants_read.add(node.name)
            return value
        target = getattr(node.target, "overloadpacket", node.target)
        rule = self._rules.get(target) if node.op == "call_function" else None
        return rule(self, node, index) if rule is not None else None

    def _opaque(self, node: Node, index: Index) -> Value:
        read, dtype = Read(node, index), _dtype(node)
        if dtype is None or dtype.is_floating_point or dtype.is_complex:
            return Real(read)
        return Flag(read) if dtype == torch.bool else self.symbol(read)

    def _settle(self, node: Node, index: Index, value: Value | None) -> Value:
        """Keep a rule's answer where it is of use, and take the element itself otherwise."""
        dtype = _dtype(node)
        if value is None or dtype is None:
            return self._opaque(node, index)
        if dtype == torch.bool:
            formula = value if isinstance(value, Formula) else lift(_is_nonzero(self), value)
            return self._settle_formula(node, index, formula)
        number = as_number(value)
        return number if fits(number, dtype) else self._opaque(node, index)

    def _settle_formula(self, node: Node, index: Index, formula: Formula | None) -> Formula:
        flag = Flag(Read(node, index))
        if formula is None:
            return flag
        if self._is_literal or formula in (TRUE, FALSE):
            return formula
        if self.dependence(index) - self.ranges.key_side:
            return formula
        # Depends on the key alone: any condition, however odd, is a row of key padding.
        parts = formula.parts if isinstance(formula, AllOf) else {formula}
        if all(isinstance(part, Flag) and self.is_plain(part.read) for part in parts):
            return formula
        is_band = self.ranges.has_one_query and all(isinstance(part, AtMost) for part in parts)
        return formula if is_band or not self.is_plain(flag.read) else flag

    def is_plain(self, read: Read) -> bool:
        """Whether the element lies at constants, index symbols, or one token index plus a shift."""
        return all(self._is_plain_position(part) for part in read.index)

    def _is_plain_position(self, position: sympy.Expr) -> bool:
        symbols = self.dependence(position)
        if any(symbol in self.read_of for symbol in position.free_symbols) or len(symbols) > 1:
            return False
        return not symbols or not (position - next(iter(symbols))).has(*symbols)


def broadcast_index(index: Index, shape: Sequence[Any]) -> Index:
    """Return the index of an operand of this shape that broadcasts to a result at ``index``."""
    aligned = index[len(index) - len(shape) :]
    return tuple(
        ZERO if isinstance(size, int) and size == 1 else part
        for part, size in zip(aligned, shape, strict=True)
    )


def _is_nonzero(interpreter: MaskInterpreter) -> Any:
    def test(value: Any) -> Formula | None:
        if isinstance(value, float):
            return TRUE if value != 0 else FALSE
        if isinstance(value, sympy.Expr) and value.is_number:
            return TRUE if value != 0 else FALSE
        return None

    return test


def _scalar(value: Any) -> Value | None:
    if isinstance(value, bool):
        return TRUE if value else FALSE
    if isinstance(value, (int, torch.SymInt)):
        return as_expression(value)
    if isinstance(value, float):
        return value
    return None


def _dtype(node: Node) -> torch.dtype | None:
    fake = fake_value(node)
    return fake.dtype if isinstance(fake, Tensor) else None
