"""Index symbols, their ranges, and what is known of expressions over them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from seer_compile.passes.fx_utils import is_known


def as_expression(size: Any) -> sympy.Expr:
    """Return a size (``int`` or ``SymInt``) as an expression over shape symbols."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(int(size))


class IndexRanges:
    """One symbol per axis letter of a site, running from 0 to the size of the axis.

    Args:
        sizes: ``int`` or ``SymInt`` per letter; ``q`` and ``k`` are the tokens, ``b`` the batch.
        shape_env: Of the symbolic sizes; None where all sizes are static.
    """

    def __init__(self, sizes: Mapping[str, Any], shape_env: ShapeEnv | None = None) -> None:
        self.sizes = dict(sizes)
        self.symbols = {
            letter: sympy.Symbol(f"index_{letter}", integer=True, nonnegative=True)
            for letter in sizes
        }
        self._last = {
            self.symbols[letter]: as_expression(size) - 1 for letter, size in sizes.items()
        }
        self._shape_env = shape_env

    def __contains__(self, symbol: object) -> bool:
        """Whether the symbol is an index."""
        return symbol in self._last

    @property
    def query(self) -> sympy.Symbol:
        """The query's position."""
        return self.symbols["q"]

    @property
    def key(self) -> sympy.Symbol:
        """The key's position."""
        return self.symbols["k"]

    @property
    def key_side(self) -> frozenset[sympy.Symbol]:
        """The symbols that key padding may depend on."""
        return frozenset(self.symbols[letter] for letter in ("b", "k") if letter in self.symbols)

    @property
    def query_side(self) -> frozenset[sympy.Symbol]:
        """The symbols that the document of a query may depend on."""
        return frozenset(self.symbols[letter] for letter in ("b", "q") if letter in self.symbols)

    @property
    def has_one_query(self) -> bool:
        """Whether there is exactly one query token."""
        return "q" in self.symbols and self._last[self.query] == 0

    def fresh(self, size: Any) -> sympy.Symbol:
        """Return a new symbol running from 0 to ``size``."""
        symbol = sympy.Symbol(f"index_{len(self._last)}", integer=True, nonnegative=True)
        self._last[symbol] = as_expression(size) - 1
        return symbol

    def is_at_most_zero(self, expression: sympy.Expr) -> bool:
        """Whether ``expression <= 0`` at every index and for all sizes of the graph."""
        return self._never_positive(sympy.expand(expression))

    def is_at_least(self, expression: sympy.Expr, bound: int) -> bool:
        """Whether ``expression >= bound`` at every index and for all sizes of the graph."""
        return self._never_positive(sympy.expand(bound - expression))

    def as_size(self, expression: sympy.Expr) -> Any:
        """Return an expression over shape symbols as ``int`` or ``SymInt``; None if it is none."""
        if expression.is_Integer:
            return int(expression)
        env = self._shape_env
        if env is None or not expression.free_symbols <= set(env.var_to_range):
            return None
        return env.create_symintnode(expression, hint=None)

    def _never_positive(self, expression: sympy.Expr) -> bool:
        largest = expression
        for symbol, last in self._last.items():
            if not largest.has(symbol):
                continue
            slope = largest.coeff(symbol, 1)
            rest = sympy.expand(largest - slope * symbol)
            if rest.has(symbol) or not slope.is_Integer:
                return False
            largest = sympy.expand(rest + (slope * last if slope > 0 else 0))
        size = self.as_size(largest)
        return size is not None and is_known(size <= 0)
