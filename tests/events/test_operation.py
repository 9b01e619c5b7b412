"""The stopwatch: what it measures is what it tells, whatever is inside what."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt.events import (
    ChromeTraceSink,
    Event,
    Operation,
    OperationEnded,
    OperationStarted,
    PhaseEnded,
    PhaseStarted,
    WaitEnded,
    WaitStarted,
    add_sink,
)
from tests.events.reading import assert_matched, open_at_the_end, trace


def test_a_phase_tells_its_seconds_its_bytes_and_its_waits() -> None:
    told: list[Event] = []
    with add_sink(told.append), Operation("save", "/runs/a/step_7", step=7, rank=3, world_size=8) as operation:
        with operation.phase("write") as phase:
            with operation.waiting("a buffer"):
                pass
            phase.bytes = 100
        operation.bytes = 800
    assert [type(event) for event in told] == [
        OperationStarted,
        PhaseStarted,
        WaitStarted,
        WaitEnded,
        PhaseEnded,
        OperationEnded,
    ]
    wait, write, save = told[3:]
    assert isinstance(wait, WaitEnded)
    assert isinstance(write, PhaseEnded)
    assert isinstance(save, OperationEnded)
    assert (wait.reason, wait.phase) == ("a buffer", "write")
    assert (write.phase, write.bytes, write.error) == ("write", 100, None)
    assert (save.bytes, save.error) == (800, None)
    assert 0 < wait.seconds == write.waited == save.waited < write.seconds < save.seconds
    assert save.phases == {"write": write.seconds} == operation.seconds
    assert {(e.operation, e.path, e.step, e.rank, e.world_size) for e in told} == {("save", "/runs/a/step_7", 7, 3, 8)}
    assert len({event.id for event in told}) == 1
    assert {event.thread for event in told} == {threading.get_native_id()}
    assert_matched(told)


def test_what_is_raised_is_the_error_of_phase_and_operation() -> None:
    told: list[Event] = []
    with (
        add_sink(told.append),
        pytest.raises(OSError, match="disk"),
        Operation("load", "a") as operation,
        operation.phase("read"),
    ):
        raise OSError("no such\n  disk")
    assert [event.error for event in told if isinstance(event, PhaseEnded | OperationEnded)] == [
        "OSError: no such disk"
    ] * 2


def _fail_late() -> None:
    with Operation("save", "a") as operation:
        with operation.phase("write") as phase:
            phase.failure = ValueError("late")
        with operation.phase("commit"):
            raise phase.failure


def test_a_failure_that_travels_first_is_the_error_of_its_phase() -> None:
    told: list[Event] = []
    with add_sink(told.append), pytest.raises(ValueError, match="late"):
        _fail_late()
    errors = {event.phase: event.error for event in told if isinstance(event, PhaseEnded)}
    assert errors == {"write": "ValueError: late", "commit": "ValueError: late"}


def test_an_operation_ends_once() -> None:
    told: list[Event] = []
    with add_sink(told.append), Operation("save", "a") as operation:
        operation.end(ValueError("first"))
        operation.end()
    assert [event.error for event in told if isinstance(event, OperationEnded)] == ["ValueError: first"]


def test_the_end_is_told_after_the_phases_that_were_under_way() -> None:
    told: list[Event] = []
    with add_sink(told.append):
        operation = Operation("save", "a")
        with operation.phase("write"):
            operation.end(ValueError("in vain"))
    assert [type(event) for event in told] == [OperationStarted, PhaseStarted, PhaseEnded, OperationEnded]
    assert told[-1].error == "ValueError: in vain"  # type: ignore[attr-defined]


def test_threads_have_phases_of_their_own_and_may_work_for_other_ranks() -> None:
    told: list[Event] = []
    both = threading.Barrier(2, timeout=30)

    def write(rank: int) -> None:
        with operation.phase("write", rank=rank) as phase:
            both.wait()
            with operation.waiting():
                both.wait()
            phase.bytes = rank

    with add_sink(told.append), Operation("save", "a", world_size=3) as operation, ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(write, 1), pool.submit(write, 2)]:
            done.result(timeout=30)
    assert {(e.rank, e.bytes) for e in told if isinstance(e, PhaseEnded)} == {(1, 1), (2, 2)}
    assert {(e.rank, e.phase) for e in told if isinstance(e, WaitEnded)} == {(1, "write"), (2, "write")}
    assert_matched(told)


def test_a_sink_that_comes_in_the_middle_is_told_the_rest() -> None:
    told: list[Event] = []
    with Operation("save", "a") as operation:
        with operation.phase("plan"):
            pass
        with operation.phase("write"), add_sink(told.append):
            pass
        with add_sink(told.append), operation.phase("commit"):
            pass
    assert [(type(event), getattr(event, "phase", None)) for event in told] == [
        (PhaseStarted, "commit"),
        (PhaseEnded, "commit"),
    ]


_PROGRAMS: Any = st.recursive(
    st.just([]),
    lambda inner: st.lists(st.tuples(st.sampled_from(["plan", "write", "wait", "fail", "another"]), inner), max_size=4),
    max_leaves=12,
)


def _run(operation: Operation, program: list[tuple[str, Any]]) -> None:
    for word, inner in program:
        if word == "wait":
            with operation.waiting("somebody"):
                _run(operation, inner)
        elif word == "another":
            with Operation("load", "b") as another:
                _run(another, inner)
        elif word == "fail":
            with contextlib.suppress(ZeroDivisionError), operation.phase("fail"):
                _run(operation, inner)
                raise ZeroDivisionError
        else:
            with operation.phase(word):
                _run(operation, inner)


@given(_PROGRAMS)
def test_whatever_is_inside_what_everything_ends_and_nests(program: list[tuple[str, Any]]) -> None:
    told: list[Event] = []
    with TemporaryDirectory() as folder:
        with add_sink(told.append), add_sink(ChromeTraceSink(folder)), Operation("save", "a") as operation:
            _run(operation, program)
        (file,) = Path(folder).iterdir()
        entries = trace(file)
    # operations on one thread nest here, so one stack per thread does for all
    stack = []
    for event in told:
        if type(event).__name__.endswith("Started"):
            stack.append(event)
        else:
            assert type(event).__name__ == type(stack.pop()).__name__.replace("Started", "Ended")
    assert not stack
    assert open_at_the_end(entries) == []
    names = [event.phase for event in told if isinstance(event, PhaseStarted)]
    assert [entry["name"] for entry in entries if entry["ph"] == "B" and "wait" not in entry["name"]] == names
