"""Which kernels answer a sparse site on a GPU: chosen by name, counted, never guessed.

``portable`` are Triton kernels for every GPU; ``hopper`` are built for compute capability 9.0 and
do not take every call: of attention, of its backward, of block scores. ``auto`` is
:data:`AUTO_ENGINE`. ``flash-attn-4`` is the forward of an optional package
(:mod:`seer_compile.kernels.flash_attention_4`); all else is then as by ``auto``.

Example:
    >>> with attention_engine("portable"):
    ...     pass
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any

from torch import Tensor

from seer_compile.callers import warn_caller
from seer_compile.errors import SeerWarning, VersionUnsupportedError
from seer_compile.kernels import flash_attention_4
from seer_compile.kernels.call_recorder import active_recorder
from seer_compile.kernels.checks import check_choice
from seer_compile.kernels.counters import Tally
from seer_compile.kernels.geometry import Grid
from seer_compile.types import Visibility

_NO_GLUON = "this Triton lacks what the engine is written in"

ENGINES = ("auto", "portable", "hopper", flash_attention_4.NAME)

AUTO_ENGINE = "hopper"
"""What ``auto`` means: the faster one where it was measured (one H200, ``benchmarks/engines.py``,
``backward_speed.py``). Calls that it does not take, and other GPUs, go to ``portable``, and
:func:`answers` says why."""

_chosen: ContextVar[str] = ContextVar("attention_engine", default="auto")
_answers = Tally()


class EngineFallbackWarning(SeerWarning):
    """A call went to other kernels than those that were asked for; the text says why."""


@contextmanager
def attention_engine(name: str) -> Iterator[None]:
    """Choose the kernels of sparse sites for the calls of this thread inside the block.

    A choice, not a property of a graph: it holds for compiled graphs and for whole models too, as
    PyTorch's ``sdpa_kernel`` does for dense attention. On the CPU it changes nothing. A backward
    that autograd runs in a thread of its own, as it does on CUDA, follows ``auto``.

    Args:
        name: ``auto``, ``portable``, ``hopper`` or ``flash-attn-4``.

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
    """Return calls per engine; ``portable:`` and a reason where ``hopper`` did not take one.

    ``auto:`` and a reason is what ``flash-attn-4`` did not take, beside the engine that did.
    """
    return _answers.snapshot()


def chosen() -> str:
    """Return the name that calls of this thread ask for."""
    return _chosen.get()


def reset() -> None:
    """Forget the counts."""
    _answers.reset()


def forward(
    query: Tensor, key: Tensor, value: Tensor, *rest: Any, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Compute block-sparse attention; arguments as the operator's, without sinks.

    Raises:
        VersionUnsupportedError: The engine was chosen by name and what it is written in is not
            there, or too old.
        EngineMismatchError: See :func:`seer_compile.kernels.flash_attention_4.launch`.
    """

    def answer_by_default() -> tuple[Tensor, Tensor]:
        return _forward_by_triton(query, key, value, *rest, softcap=softcap)

    if _chosen.get() != flash_attention_4.NAME:
        return answer_by_default()
    _not_recorded("kernels of another package run")
    indices, counts, scale, query_block, key_block = rest[:5]
    visibility = Visibility.from_arguments(*rest[5:])
    tensors, blocks = (query, key, value), (query_block, key_block)
    reason = flash_attention_4.obstacle(*tensors, scale, blocks, visibility, softcap)
    if reason is not None:
        _count(f"auto:{reason}")
        _warn(flash_attention_4.NAME, "the default ones do", reason)
        return answer_by_default()
    answer = flash_attention_4.launch(
        *tensors, indices, counts, scale, blocks, visibility.upper, answer_by_default
    )
    _count(flash_attention_4.NAME)
    return answer


def _forward_by_triton(
    query: Tensor, key: Tensor, value: Tensor, *rest: Any, softcap: float | None
) -> tuple[Tensor, Tensor]:
    from seer_compile.kernels.triton import attention_forward as portable

    def obstacle(engine: str) -> str | None:
        return _obstacle(engine, query, key, value, *rest[3:5], softcap=softcap)

    if _goes_to_hopper("", obstacle):
        return _import("attention").launch(query, key, value, *rest)
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
        reason = _obstacle(engine, query, key, value, *rest[5:7], softcap=softcap)
        if reason is not None:
            return reason
        return _import("backward").obstacle(grad_out, query)

    arguments = (grad_out, query, key, value, *rest)
    if _goes_to_hopper("backward ", obstacle):
        return _import("backward").launch(*arguments)
    return portable.launch(*arguments, softcap=softcap)


def block_scores(
    query_features: Tensor,
    key_features: Tensor,
    scale: float,
    sub_blocks: tuple[int, int],
    grid: Grid,
    groups: int,
    visibility: Visibility,
) -> Tensor:
    """Score block pairs; see ``ops.block_scores``.

    Raises:
        VersionUnsupportedError: ``hopper`` was chosen and this Triton lacks what it is written in.
    """
    from seer_compile.kernels.triton import block_scores as portable

    blocks = (grid.query_unit, grid.key_unit)
    is_fine = visibility.key_padding is not None or visibility.query_documents is not None

    def obstacle(engine: str) -> str | None:
        module = _import_for(engine, "scores")
        if module is None:
            return _NO_GLUON
        features = (query_features, key_features)
        return module.obstacle(*features, sub_blocks, blocks, grid.k_len, is_fine=is_fine)

    sizes = (*sub_blocks, *blocks, grid.q_len, grid.k_len)
    arguments = (query_features, key_features, scale, *sizes, groups)
    if _goes_to_hopper("block scores ", obstacle):
        band = (visibility.upper, visibility.lower, visibility.offset)
        return _import("scores").launch(*arguments, *band)
    return portable.launch(*arguments, *visibility.as_arguments().values())


def _goes_to_hopper(call: str, find_obstacle: Callable[[str], str | None]) -> bool:
    """Choose the engine of a call, count it, and warn where it is not the one asked for by name."""
    engine = _chosen.get()
    if engine == flash_attention_4.NAME:
        engine = "auto"
    if (AUTO_ENGINE if engine == "auto" else engine) == "portable":
        _count(f"{call}portable")
        return False
    reason = find_obstacle(engine)
    if reason is None:
        _count(f"{call}hopper")
        return True
    _count(f"{call}portable:{reason}")
    if engine != "auto":
        _warn(engine, "the portable one does", reason)
    return False


def _count(answer: str) -> None:
    """Count an answer, also each time that it is played again."""
    _answers.add(answer)
    recorder = active_recorder()
    if recorder is not None:
        recorder.add_effect(_answers.add, answer)


def _not_recorded(reason: str) -> None:
    recorder = active_recorder()
    if recorder is not None:
        recorder.refuse(reason)


def _warn(engine: str, instead: str, reason: str) -> None:
    _not_recorded("a warning is given")
    warn_caller(
        f"The {engine} engine does not take this call, {instead}: {reason}",
        EngineFallbackWarning,
    )


def _obstacle(
    engine: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_block: int,
    key_block: int,
    softcap: float | None,
) -> str | None:
    """Return why the hopper engine does not take a call, or None."""
    module = _import_for(engine, "attention")
    if module is None:
        return _NO_GLUON
    return module.obstacle(query, key, value, query_block, key_block, softcap)


def _import_for(engine: str, part: str) -> ModuleType | None:
    """Import a part of the Hopper engine; None where it cannot be, unless it was asked for."""
    try:
        return _import(part)
    except VersionUnsupportedError:
        if engine != "auto":
            raise
        return None


def _import(part: str) -> ModuleType:
    """Import a part of the Hopper engine, written in a part of Triton that still changes."""
    try:
        from seer_compile.kernels.triton import hopper_attention, hopper_backward, hopper_scores
    except (ImportError, AttributeError) as error:
        import triton

        raise VersionUnsupportedError(
            argument="triton",
            got=triton.__version__,
            expected="3.6 to 3.9, whose Gluon the hopper engine is written in",
            hint="Choose the portable engine.",
        ) from error
    modules = {"attention": hopper_attention, "backward": hopper_backward, "scores": hopper_scores}
    return modules[part]
