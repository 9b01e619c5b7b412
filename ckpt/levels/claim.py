"""One job at a time saves into a run: a lock on a file in the run's folder, and who holds it.

The lock belongs to the open file, which the agent inherits: it ends when the job's process on rank 0 has ended and its
agent has written what was captured, so that the next job finds that too. Where the file system has no locks, or keeps
them to each machine, the heartbeat that the holder gives the file tells.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import secrets
import socket
import threading
import time
import weakref
from datetime import UTC, datetime
from typing import Any

from ckpt_formats.errors import SaveFailedError

__all__ = ["NAME", "Claim", "held_by_another"]

NAME = ".lock"
"""Name of the file."""
BEAT_S = 2.0
"""Seconds between heartbeats of a holder."""
PATIENCE_S = 600.0
"""Seconds to wait for the agent of a job that has ended to write what was captured."""

log = logging.getLogger("ckpt")


class Claim:
    """The right to save into a run, until `release` or the end of the process.

    Attributes:
        fd: the open file, which has the lock; a process that inherits it keeps the run too.
        before: when the job before gave its last sign of life, in seconds by the file system's clock; None if it gave
            the run back, or there was none.
    """

    def __init__(self, run: str, fd: int) -> None:
        self.fd = fd
        self.before = os.fstat(fd).st_mtime if _holder(fd) else None
        self._path = os.path.join(run, NAME)
        self._key = secrets.token_hex(8)
        self._over = threading.Event()
        self._write({"host": socket.gethostname(), "pid": os.getpid(), "since": _now(), "key": self._key})
        _held.add(self)
        self._beating = threading.Thread(target=self._beat, name="ckpt-claim", daemon=True)
        self._beating.start()

    @classmethod
    def take(cls, run: str, patience: float = PATIENCE_S) -> Claim:
        """Take a run, whose folder exists.

        Waits for the agent of a job that has ended, for at most `patience` seconds.

        Raises:
            SaveFailedError: another job has it, or the file can't be made.
        """
        path = os.path.join(run, NAME)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise SaveFailedError(
                f"{run}: nothing can be saved there ({error.strerror}: {NAME}); make the folder writable, or choose "
                "another one",
                path=run,
            ) from error
        try:
            _wait_for(run, fd, time.monotonic() + patience)
            return cls(run, fd)
        except BaseException:
            os.close(fd)
            raise

    def release(self) -> None:
        """Give the run back. Does nothing the second time, or in a process that was forked off."""
        if self.fd < 0 or self._over.is_set():
            return
        self._over.set()
        self._beating.join()
        # says that nobody beats any more, also where locks mean nothing
        with contextlib.suppress(OSError):
            if _holder(self.fd).get("key") == self._key:
                os.ftruncate(self.fd, 0)
        _held.discard(self)
        os.close(self.fd)

    def _write(self, holder: dict[str, Any]) -> None:
        data = json.dumps(holder).encode("ascii")
        # shorter than a page, in one call: whoever reads it sees it whole
        os.pwrite(self.fd, data.ljust(512), 0)
        os.ftruncate(self.fd, 512)

    def _beat(self) -> None:
        while not self._over.wait(BEAT_S):
            with contextlib.suppress(OSError):
                holder = _holder(self.fd)
                if holder.get("key") != self._key:
                    log.error(
                        "%s: another job, %s, has begun to save into this run, and both can't; end one of them",
                        os.path.dirname(self._path),
                        _text(holder),
                    )
                    return
                os.utime(self.fd)


_held: weakref.WeakSet[Claim] = weakref.WeakSet()
"""The claims of this process."""


def _leave_to_parent() -> None:
    """In a process that was forked off, of a data loader, say: it would keep the run for as long as it lives."""
    for claim in list(_held):
        with contextlib.suppress(OSError):
            os.close(claim.fd)
        claim.fd = -1
    _held.clear()


os.register_at_fork(after_in_child=_leave_to_parent)


def held_by_another(run: str) -> bool:
    """Whether a job has the run now that this process has given back; for an agent that stayed for background work."""
    try:
        fd = os.open(os.path.join(run, NAME), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return _lock(fd) is False
    finally:
        os.close(fd)


def _wait_for(run: str, fd: int, deadline: float) -> None:
    """Wait until the run is ours. Raises SaveFailedError when somebody alive has it."""
    locked = _lock(fd)
    if locked:
        return
    begin = time.monotonic()
    holder, beat = _look(run)
    said = False
    while (locked := _lock(fd)) is not True:
        holder, now = _look(run)
        if now != beat and holder:
            raise SaveFailedError(
                f"{run}: another job saves into this run, {_text(holder)}; end that one first, or choose another "
                "folder",
                path=run,
            )
        if locked is None and (not holder or time.monotonic() > begin + 2 * BEAT_S):
            return  # no locks here, and nobody beats
        if time.monotonic() > deadline:
            raise SaveFailedError(
                f"{run}: the agent of the job before, {_text(holder)}, has not ended writing in time; end it, or save "
                "to another folder",
                path=run,
            )
        if not said and time.monotonic() > begin + 2 * BEAT_S:
            log.warning("%s: waits for the agent of the job before, %s, to write what was captured", run, _text(holder))
            said = True
        time.sleep(0.05)


def _lock(fd: int) -> bool | None:
    """Lock without waiting; whether that could be done, None where there are no locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _look(run: str) -> tuple[dict[str, Any], int]:
    """Who has the run, and when that one last beat."""
    # opened anew, so that a network file system asks its server
    fd = os.open(os.path.join(run, NAME), os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _holder(fd), os.fstat(fd).st_mtime_ns
    finally:
        os.close(fd)


def _holder(fd: int) -> dict[str, Any]:
    """Who has the run, as the file says; empty when nobody has, or it can't be understood."""
    try:
        holder = json.loads(os.pread(fd, 512, 0) or b"{}")
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _text(holder: dict[str, Any]) -> str:
    if not holder:
        return "which does not say who it is"
    return f"process {holder.get('pid')} on {holder.get('host')} since {holder.get('since')}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
