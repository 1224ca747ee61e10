"""Two groups of four warps begin their products in turn: whose turn it is.

A turn orders work and guards no memory. Named barriers of the hardware keep it, since the four
warps of a group would have to meet before one of them arrives at a barrier in shared memory. Such
a barrier opens once all 256 threads have come: those whose turn it becomes wait at it, the others
only leave word. (One H200, attention at 10 % of 32,768 tokens, one selection per group: 1.57 ms
instead of 1.58 at head dim 128, 1.04 instead of 1.14 at 64.)
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon

_FIRST_BARRIER = gl.constexpr(14)
"""The last two of sixteen; Triton takes its own from 0, and one more per partition of a program."""


@gluon.constexpr_function
def _instruction(kind, consumer):
    return f"bar.{kind} {int(_FIRST_BARRIER) + int(consumer)}, 256; mov.b32 $0, $1;"


@gluon.jit
def _issue(instruction: gl.constexpr):
    """Issue an instruction once per thread; what it is given and gives back means nothing."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    gl.inline_asm_elementwise(
        instruction, "=r,r", [gl.arange(0, 128, layout)], gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def begin_turns(CONSUMER: gl.constexpr):
    """Let the first consumer begin."""
    if CONSUMER == 1:
        _issue(_instruction("arrive", 0))


@gluon.jit
def await_turn(CONSUMER: gl.constexpr):
    """Wait until it is this consumer's turn."""
    _issue(_instruction("sync", CONSUMER))


@gluon.jit
def end_turn(CONSUMER: gl.constexpr):
    """Give the turn to the other consumer."""
    _issue(_instruction("arrive", 1 - CONSUMER))
