"""Which kernel answers block-sparse attention on a GPU: chosen by name, counted, never guessed.

``portable`` is the Triton kernel for every GPU; ``hopper`` is built for compute capability 9.0 and
does not take every call. ``auto`` is :data:`AUTO_ENGINE`.

Example:
    >>> with attention_engine("portable"):
    ...     pass
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any

from torch import Tensor

from seer_compile.errors import SeerWarning, VersionUnsupportedError
from seer_compile.kernels.checks import check_choice
from seer_compile.kernels.counters import Tally

ENGINES = ("auto", "portable", "hopper")

AUTO_ENGINE = "hopper"
"""What ``auto`` means: the faster one where it was measured (one H200, ``benchmarks/engines.py``,
``backward_speed.py``). Calls that it does not take, and other GPUs, go to ``portable``, and
:func:`answers` says why."""

_chosen: ContextVar[str] = ContextVar("attention_engine", default="auto")
_answers = Tally()


class EngineFallbackWarning(SeerWarning):
    """A call went to the portable kernel although another was asked for; the text says why."""


@contextmanager
def attention_engine(name: str) -> Iterator[None]:
    """Choose the kernel of block-sparse attention for the calls of this thread inside the block.

    A choice, not a property of a graph: it holds for compiled graphs and for whole models too, as
    PyTorch's ``sdpa_kernel`` does for dense attention. On the CPU it changes nothing. A backward
    that autograd runs in a thread of its own, as it does on CUDA, follows ``auto``.

    Args:
        name: ``auto``, ``portable`` or ``hopper``.

    Raises:
        RangeError: Another name.
    """
    check_choice("engine", name, ENGINES)
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def answers() -> dict[str, int]:
    """Return calls per engine; ``portable:`` and a reason where ``hopper`` did not take one."""
    return _answers.snapshot()


def reset() -> None:
    """Forget the counts."""
    _answers.reset()


def forward(
    query: Tensor, key: Tensor, value: Tensor, *rest: Any, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Compute block-sparse attention; arguments as the operator's, without sinks.

    Raises:
        VersionUnsupportedError: ``hopper`` was chosen and this Triton lacks what it is written in.
    """
    from seer_compile.kernels.triton import attention_forward as portable

    def obstacle(engine: str) -> str | None:
        return _obstacle(engine, query, key, value, rest[0], *rest[3:5], softcap=softcap)

    if _goes_to_hopper("", obstacle):
        return _import_hopper().launch(query, key, value, *rest)
    return portable.launch(query, key, value, *rest, softcap=softcap)


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *rest: Any,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate block-sparse attention; arguments as ``attention_backward.launch``.

    Raises:
        VersionUnsupportedError: ``hopper`` was chosen and this Triton lacks what it is written in.
    """
    from seer_compile.kernels.triton import attention_backward as portable

    def obstacle(engine: str) -> str | None:
        reason = _obstacle(engine, query, key, value, rest[2], *rest[5:7], softcap=softcap)
        if reason is not None:
            return reason
        from seer_compile.kernels.triton import hopper_backward

        return hopper_backward.obstacle(grad_out, query)

    arguments = (grad_out, query, key, value, *rest)
    if _goes_to_hopper("backward ", obstacle):
        from seer_compile.kernels.triton import hopper_backward

        return hopper_backward.launch(*arguments)
    return portable.launch(*arguments, softcap=softcap)


def _goes_to_hopper(call: str, find_obstacle: Callable[[str], str | None]) -> bool:
    """Choose the engine of a call, count it, and warn where it is not the one asked for by name."""
    engine = _chosen.get()
    if (AUTO_ENGINE if engine == "auto" else engine) == "portable":
        _answers.add(f"{call}portable")
        return False
    reason = find_obstacle(engine)
    if reason is None:
        _answers.add(f"{call}hopper")
        return True
    _answers.add(f"{call}portable:{reason}")
    if engine != "auto":
        warnings.warn(
            f"The hopper engine does not take this call, the portable one does: {reason}",
            EngineFallbackWarning,
            stacklevel=3,
        )
    return False


def _obstacle(
    engine: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    query_block: int,
    key_block: int,
    softcap: float | None,
) -> str | None:
    """Return why the hopper engine does not take a call, or None."""
    try:
        hopper = _import_hopper()
    except VersionUnsupportedError:
        if engine != "auto":
            raise
        return "this Triton lacks what the engine is written in"
    return hopper.obstacle(query, key, value, indices, query_block, key_block, softcap)


def _import_hopper() -> ModuleType:
    """Import the Hopper engine, which is written in a part of Triton that still changes."""
    try:
        from seer_compile.kernels.triton import hopper_attention
    except (ImportError, AttributeError) as error:
        import triton

        raise VersionUnsupportedError(
            argument="triton",
            got=triton.__version__,
            expected="3.6 to 3.9, whose Gluon the hopper engine is written in",
            hint="Choose the portable engine.",
        ) from error
    return hopper_attention
