"""What sinks wrote, read back as others would read it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ckpt.events import Event, OperationEnded, OperationStarted, PhaseEnded, PhaseStarted, WaitEnded, WaitStarted

ENDS = {PhaseStarted: PhaseEnded, WaitStarted: WaitEnded, OperationStarted: OperationEnded}


def json_lines(folder: Path) -> list[dict[str, Any]]:
    """Every event of every file, file after file."""
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]


def trace(path: Path) -> list[dict[str, Any]]:
    """The entries of a trace, whose array may lack its end, as the format allows."""
    text = path.read_text()
    entries = json.loads(text if text.endswith("]\n") else text.rstrip().rstrip(",") + "]")
    assert isinstance(entries, list)
    return entries


def open_at_the_end(entries: Iterable[dict[str, Any]]) -> list[str]:
    """What began and did not end. Fails if something on a thread, or of an operation, does not nest or goes back."""
    stacks: dict[object, list[str]] = {}
    last: dict[object, int] = {}
    for entry in entries:
        if entry["ph"] not in "BEbe":
            continue
        key = (entry["pid"], entry["tid"]) if entry["ph"] in "BE" else (entry["pid"], entry["id"])
        assert entry["ts"] >= last.get(key, 0)
        last[key] = entry["ts"]
        stack = stacks.setdefault(key, [])
        if entry["ph"] in "Bb":
            stack.append(entry["name"])
        else:
            assert stack.pop() == entry["name"]
    return [name for stack in stacks.values() for name in stack]


def assert_matched(events: Iterable[Event]) -> None:
    """Whatever started, ended: phases and waits on the same thread, last in first out, operations where they may."""
    stacks: dict[tuple[int, int], list[Event]] = {}
    for event in events:
        anywhere = isinstance(event, OperationStarted | OperationEnded)
        stack = stacks.setdefault((event.id, 0 if anywhere else event.thread), [])
        if type(event) in ENDS:
            stack.append(event)
            continue
        start = stack.pop()
        assert type(event) is ENDS[type(start)]  # type: ignore[index]
        assert event.rank == start.rank
        assert getattr(event, "phase", None) == getattr(start, "phase", None)
        seconds = event.seconds  # type: ignore[attr-defined]
        assert abs(event.monotonic - start.monotonic - seconds) < 1e-6
    assert not any(stacks.values())
