"""A multiprocessor played on the CPU: partitions of warps, barriers, and an engine that copies.

Everything that can happen next is listed, and chance picks: a partition goes on, or a copy lands.
So one seed is one order of events, and many seeds are many. The machine is strict where hardware
is silently wrong: memory that is being copied into holds NaN until the copy lands, a product that
was begun reads its operands as late as it may or at once, at random, and a state in which nothing
can happen is an error rather than a hang.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


class DeadlockError(AssertionError):
    """No partition can go on and no copy is under way."""


@dataclass(eq=False)
class Barrier:
    """A barrier of shared memory: phases that end once all arrived and all bytes landed."""

    name: str
    count: int = 0
    phase: int = 0
    pending: int = 0
    bytes: int = 0

    def init(self, count: int) -> None:
        """Begin phase 0."""
        assert self.count == 0, f"{self.name} is initialised twice"
        self.count = self.pending = count

    def arrive(self, count: int = 1) -> None:
        """Arrive ``count`` times."""
        assert self.count, f"{self.name} is not initialised"
        assert self.pending >= count, f"{self.name}: more arrivals than its {self.count}"
        self.pending -= count
        self._turn()

    def expect(self, size: int) -> None:
        """Announce bytes, which is an arrival too."""
        self.bytes += size
        self.arrive()

    def land(self, size: int) -> None:
        """Take note of bytes that landed."""
        assert self.bytes >= size, f"{self.name}: more bytes than announced"
        self.bytes -= size
        self._turn()

    def has_ended(self, parity: int) -> bool:
        """Whether the last phase that ended has this parity; the one before phase 0 has 1."""
        return (self.phase + 1) % 2 == parity

    def _turn(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase += 1
            self.pending = self.count


@dataclass(eq=False)
class _Partition:
    """A group of warps that runs one function."""

    name: str
    run: Callable[[], None]
    is_ready: Callable[[], bool] = lambda: True
    waits_for: str = ""
    done: bool = False
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    products: list[Product] = field(default_factory=list)


@dataclass(eq=False)
class Product:
    """A matrix product that was begun: its result exists once it is made."""

    left: Tensor | Callable[[], Tensor]
    right: Callable[[], Tensor]
    accumulator: Tensor | Product | None
    layout: object
    result: Tensor | None = None

    def make(self) -> Tensor:
        """Read the operands and compute, once."""
        if self.result is None:
            left = self.left() if callable(self.left) else self.left
            self.result = left.float() @ self.right().float()
            if isinstance(self.accumulator, Product):
                self.result = self.result + self.accumulator.make()
            elif self.accumulator is not None:
                self.result = self.result + self.accumulator
        return self.result


class Machine:
    """Runs the partitions of one program, one event at a time."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.partitions: list[_Partition] = []
        self.copies: list[Callable[[], None]] = []
        self.named: dict[int, Barrier] = {}
        self.current: _Partition | None = None
        self.error: BaseException | None = None
        self._home = threading.Semaphore(0)

    def run(self, functions: list[tuple[str, Callable[[], None]]]) -> None:
        """Run all functions beside one another until each has returned."""
        self.partitions = [_Partition(name, function) for name, function in functions]
        threads = [
            threading.Thread(target=self._play, args=(partition,), daemon=True)
            for partition in self.partitions
        ]
        for thread in threads:
            thread.start()
        while self.error is None and not all(partition.done for partition in self.partitions):
            self._step()
        if self.error is not None:
            raise self.error
        assert not self.copies, "a copy lands after the program ended"
        assert not any(partition.products for partition in self.partitions), "a product is left"

    def _step(self) -> None:
        ready = [part for part in self.partitions if not part.done and part.is_ready()]
        if not ready and not self.copies:
            waiting = [f"{part.name}: {part.waits_for}" for part in self.partitions]
            raise DeadlockError("; ".join(waiting))
        choice = self.random.randrange(len(ready) + len(self.copies))
        if choice >= len(ready):
            self.copies.pop(choice - len(ready))()
            return
        self.current = ready[choice]
        self.current.turn.release()
        self._home.acquire()

    def _play(self, partition: _Partition) -> None:
        partition.turn.acquire()
        try:
            partition.run()
        except BaseException as error:
            self.error = error
        partition.done = True
        self._home.release()

    def pause(self, is_ready: Callable[[], bool] = lambda: True, waits_for: str = "") -> None:
        """Let anything else happen; return once chance comes back and ``is_ready`` holds."""
        partition = self.current
        if partition is None:
            assert is_ready(), f"waits before the partitions start: {waits_for}"
            return
        partition.is_ready, partition.waits_for = is_ready, waits_for
        self._home.release()
        partition.turn.acquire()

    def wait(self, barrier: Barrier, parity: int) -> None:
        """Wait until the phase of this parity has ended."""
        assert parity in (0, 1), f"{barrier.name}: parity {parity}"
        self.pause(lambda: barrier.has_ended(parity), f"{barrier.name}, parity {parity}")

    def meet(self, number: int, threads: int, *, is_waiting: bool) -> None:
        """Come to a barrier of the hardware with 128 threads, and wait until it opens, or go on."""
        barrier = self.named.setdefault(number, Barrier(f"named barrier {number}"))
        if barrier.count == 0:
            barrier.init(threads)
        assert barrier.count == threads, f"{barrier.name}: {threads} threads, then {barrier.count}"
        self.pause()
        phase = barrier.phase
        barrier.arrive(128)
        if is_waiting:
            self.pause(lambda: barrier.phase > phase, barrier.name)

    def copy(self, source: Tensor, target: Tensor, barrier: Barrier) -> None:
        """Begin a copy; until it lands its target holds NaN."""
        target.fill_(float("nan"))

        def land() -> None:
            target.copy_(source)
            barrier.land(target.numel() * target.element_size())

        self.copies.append(land)
        self.pause()

    def begin(self, product: Product) -> Product:
        """Begin a product."""
        assert self.current is not None
        self.current.products.append(product)
        if self.random.random() < 0.5:
            product.make()
        self.pause()
        return product

    def finish(self, outstanding: int) -> None:
        """Make all but the last products of the current partition."""
        assert self.current is not None
        self.pause()
        keep = len(self.current.products) - outstanding
        for product in self.current.products[: max(keep, 0)]:
            product.make()
        self.current.products = self.current.products[max(keep, 0) :]


def empty_memory(shape: list[int], dtype: torch.dtype) -> Tensor:
    """Return memory that holds what nobody may use."""
    if dtype.is_floating_point:
        return torch.full(shape, float("nan"), dtype=dtype)
    return torch.full(shape, -(1 << 30), dtype=dtype)
