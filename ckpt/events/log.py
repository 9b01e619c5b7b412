"""Events as lines of Python's logging: one per operation for people, the phases for who wants more."""

from __future__ import annotations

import logging

from ckpt.events.types import Event, OperationEnded, OperationStarted, PhaseEnded, PhaseStarted

__all__ = ["LogSink"]

_WORDS = {
    "capture": ("captured", "capturing", "for"),
    "copy": ("copied", "copying", "to"),
    "load": ("loaded", "loading", "from"),
    "reshard": ("resharded", "resharding", "to"),
    "save": ("saved", "saving", "to"),
}


class LogSink:
    """Logs to the logger `ckpt`, or the one given.

    INFO: one line per operation that succeeded, by rank 0. DEBUG: the same of the other ranks, and of captures, which
    are only a part of a save, and where every phase of every rank begins and ends. WARNING: every operation that
    failed, on every rank.
    """

    def __init__(self, logger: logging.Logger | None = None) -> None:
        self._logger = logger or logging.getLogger("ckpt")

    def __call__(self, event: Event) -> None:
        """Log it, or not."""
        done, doing, preposition = _WORDS.get(event.operation, (event.operation, event.operation, "of"))
        step = "" if event.step is None else f" step {event.step}"
        match event:
            case OperationEnded(error=None):
                self._logger.log(
                    logging.DEBUG if event.rank or event.operation == "capture" else logging.INFO,
                    "%s%s: %s in %s s%s %s %s%s",
                    done,
                    step,
                    size_text(event.bytes),
                    seconds_text(event.seconds),
                    _phases(event),
                    preposition,
                    event.path,
                    _rank(event) if event.rank else "",
                )
            case OperationEnded():
                self._logger.warning(
                    "%s%s %s %s failed%s after %s s%s: %s",
                    doing,
                    step,
                    preposition,
                    event.path,
                    _rank(event),
                    seconds_text(event.seconds),
                    _phases(event),
                    event.error,
                )
            case OperationStarted():
                self._logger.debug("%s%s %s %s%s", doing, step, preposition, event.path, _rank(event))
            case PhaseStarted():
                self._logger.debug("%s%s%s: %s …", doing, step, _rank(event), event.phase)
            case PhaseEnded():
                self._logger.debug(
                    "%s%s%s: %s took %s s%s%s%s",
                    doing,
                    step,
                    _rank(event),
                    event.phase,
                    seconds_text(event.seconds),
                    f", {seconds_text(event.waited)} of them waiting" if event.waited else "",
                    f", {size_text(event.bytes)}" if event.bytes else "",
                    f", and failed: {event.error}" if event.error else "",
                )
            case _:
                pass

    def __repr__(self) -> str:
        return f"LogSink({self._logger!r})"


def size_text(count: int) -> str:
    """Bytes for people: `3.2 GiB`."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if round(size, 1) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"


def seconds_text(seconds: float) -> str:
    """Seconds for people, with as many digits as tell something: `0.012`, `0.25`, `2.1`, `340`."""
    digits = 0 if seconds >= 100 else 1 if seconds >= 1 else 2 if seconds >= 0.1 else 3
    return f"{seconds:.{digits}f}"


def _rank(event: Event) -> str:
    return f" on rank {event.rank}" if event.world_size > 1 else ""


def _phases(event: OperationEnded) -> str:
    phases = ", ".join(f"{name} {seconds_text(seconds)}" for name, seconds in event.phases.items())
    waited = f"; {seconds_text(event.waited)} of them waiting" if event.waited else ""
    return f" ({phases}{waited})" if phases else ""
