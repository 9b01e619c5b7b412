"""A save, load or reshard on one rank while it runs: a stopwatch that tells sinks what it measures.

It measures whether anybody listens or not, because results say how long each phase took. With no sink a phase costs
about two microseconds. Knows no process groups: whoever waits says so.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self, TypedDict

from ckpt.events.environment import sinks_from_environment
from ckpt.events.registry import REGISTRY
from ckpt.events.types import Event, OperationEnded, OperationStarted, PhaseEnded, PhaseStarted, WaitEnded, WaitStarted

__all__ = ["Operation", "Phase"]

OTHER_RANKS = "other ranks"

_numbers = itertools.count(1)


def next_number() -> int:
    """The number of an operation of this process."""
    return next(_numbers)


class _Facts(TypedDict):
    """What all events say; see Event."""

    operation: str
    id: int
    path: str
    step: int | None
    rank: int
    world_size: int
    thread: int
    thread_name: str
    time: float
    monotonic: float


class Operation:
    """One operation, from when it is made until `end`, which leaving its `with` block calls.

    Its phases may run on several threads. Each of them is a `with` block:

        with Operation("save", path, step=100, rank=rank, world_size=world_size) as operation:
            with operation.phase("write") as phase:
                phase.bytes += ...
            operation.bytes = ...

    Attributes:
        step: the training step, once it is known.
        bytes: what OperationEnded says of them.
        seconds: seconds by phase, in the order in which phases first began.
        waited: seconds in waits, on all threads together.

    Raises:
        ConfigurationError: CKPT_EVENTS says nothing that can be understood.
    """

    def __init__(
        self,
        name: str,
        path: str,
        *,
        step: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        also: Callable[[Event], object] | None = None,
    ) -> None:
        """`also` is told every event of this operation, as sinks are."""
        REGISTRY.prepare(sinks_from_environment)
        self.step = step
        self.bytes = 0
        self.seconds: dict[str, float] = {}
        self.waited = 0.0
        self._also = also
        self._name = name
        self._id = next_number()
        self._path = path
        self._rank = rank
        self._world_size = world_size
        self._lock = threading.Lock()
        self._current: dict[int, Phase] = {}
        self._ended = False
        self._end_is_due = False
        self._error: BaseException | None = None
        self._begin = time.monotonic()
        if self._is_heard:
            self._tell(OperationStarted(**self._facts(self._begin, rank)))

    @property
    def total(self) -> float:
        """Seconds since this was made."""
        return time.monotonic() - self._begin

    def phase(self, name: str, *, rank: int | None = None) -> Phase:
        """A phase, as a `with` block; of another rank's, where one process works for several."""
        return Phase(self, name, self._rank if rank is None else rank)

    @contextmanager
    def waiting(self, reason: str = OTHER_RANKS) -> Iterator[None]:
        """A `with` block in which this thread's phase waits for somebody else."""
        phase = self._current.get(threading.get_ident())
        name, rank = (None, self._rank) if phase is None else (phase.name, phase.rank)
        begin = time.monotonic()
        if self._is_heard:
            self._tell(WaitStarted(**self._facts(begin, rank), phase=name, reason=reason))
        try:
            yield
        finally:
            end = time.monotonic()
            with self._lock:
                self.waited += end - begin
            if phase is not None:
                phase.waited += end - begin
            if self._is_heard:
                self._tell(WaitEnded(**self._facts(end, rank), phase=name, reason=reason, seconds=end - begin))

    def end(self, error: BaseException | None = None) -> None:
        """It is over, with an error or without; does nothing the second time. It is told when the last phase that is
        still under way, on whatever thread, has ended too.
        """
        with self._lock:
            if self._ended:
                return
            self._ended = True
            self._error = error
            self._end_is_due = under_way = bool(self._current)
        if not under_way:
            self._tell_end()

    @property
    def _is_heard(self) -> bool:
        return bool(REGISTRY.registrations) or self._also is not None

    def _tell(self, event: Event) -> None:
        REGISTRY.tell(event)
        if self._also is not None:
            self._also(event)

    def _tell_end(self) -> None:
        if self._is_heard:
            now = time.monotonic()
            self._tell(
                OperationEnded(
                    **self._facts(now, self._rank),
                    seconds=now - self._begin,
                    waited=self.waited,
                    bytes=self.bytes,
                    phases=dict(self.seconds),
                    error=_text(self._error),
                )
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end(error)

    def _enter(self, phase: Phase) -> Phase | None:
        """Make it this thread's phase; returns the one around it."""
        thread = threading.get_ident()
        with self._lock:
            outer = self._current.get(thread)
            self._current[thread] = phase
            self.seconds.setdefault(phase.name, 0.0)
        if self._is_heard:
            self._tell(PhaseStarted(**self._facts(phase.begin, phase.rank), phase=phase.name))
        return outer

    def _leave(self, phase: Phase, outer: Phase | None, end: float) -> None:
        thread = threading.get_ident()
        with self._lock:
            if outer is None:
                del self._current[thread]
            else:
                self._current[thread] = outer
            self.seconds[phase.name] += end - phase.begin
            last = self._end_is_due and not self._current
            if last:
                self._end_is_due = False
        if self._is_heard:
            self._tell(
                PhaseEnded(
                    **self._facts(end, phase.rank),
                    phase=phase.name,
                    seconds=end - phase.begin,
                    waited=phase.waited,
                    bytes=phase.bytes,
                    error=_text(phase.failure),
                )
            )
        if last:
            self._tell_end()

    def _facts(self, monotonic: float, rank: int) -> _Facts:
        return {
            "operation": self._name,
            "id": self._id,
            "path": self._path,
            "step": self.step,
            "rank": rank,
            "world_size": self._world_size,
            "thread": threading.get_native_id(),
            "thread_name": threading.current_thread().name,
            "time": time.time(),
            "monotonic": monotonic,
        }


class Phase:
    """A phase of an operation on one thread, as a `with` block.

    Attributes:
        bytes: what this rank wrote or read in it.
        failure: what went wrong in it, where that is not raised at once: failures travel to the other ranks first.
        waited: seconds in waits.
    """

    __slots__ = ("_operation", "_outer", "begin", "bytes", "failure", "name", "rank", "waited")

    def __init__(self, operation: Operation, name: str, rank: int) -> None:
        self._operation = operation
        self._outer: Phase | None = None
        self.name = name
        self.rank = rank
        self.begin = 0.0
        self.bytes = 0
        self.failure: BaseException | None = None
        self.waited = 0.0

    def __enter__(self) -> Self:
        self.begin = time.monotonic()
        self._outer = self._operation._enter(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        end = time.monotonic()
        if error is not None:
            self.failure = error
        self._operation._leave(self, self._outer, end)


def _text(error: BaseException | None) -> str | None:
    return None if error is None else f"{type(error).__name__}: {' '.join(str(error).split())}"
