"""Messages between trainers and agents: JSON objects with their length before them, and bytes behind, over sockets.

Knows no checkpoints, and not who may connect: the socket for trainers lies in a folder that only their user can enter,
and agents of other nodes authenticate (peers.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import weakref
from typing import Any

from ckpt_formats import errors
from ckpt_formats.errors import CheckpointError, RankError, SaveFailedError

SOCKET = "socket"
"""Name of an agent's socket for trainers, in the agent's folder."""
MAX_MESSAGE = 1 << 31
"""Bytes of the longest message, and of what is sent behind one."""
Message = dict[str, Any]
BLOBS = "blobs"
"""The member of a message with a list of bytes, which do not go through JSON."""


class Channel:
    """One end of a connection. A request and its answer belong together, so one thread at a time asks.

    Attributes:
        name: who is at the other end, for messages.
    """

    def __init__(self, connection: socket.socket, name: str = "the other end") -> None:
        self.name = name
        self._connection = connection
        self._lock = threading.Lock()

    @classmethod
    def connect(cls, address: str, timeout: float, name: str) -> Channel:
        """Connect to the listening Unix socket of an agent. Raises RankError if nobody answers there."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(timeout)
        try:
            connection.connect(address)
        except OSError as error:
            connection.close()
            raise gone(name, error) from error
        channel = cls(connection, name)
        _connected.add(channel)
        return channel

    def send(self, message: Message) -> None:
        """Send a message. Raises OSError."""
        blobs = message.get(BLOBS, ())
        if blobs:
            message = {**message, BLOBS: [len(blob) for blob in blobs]}
        data = json.dumps(message, separators=(",", ":")).encode("ascii")
        self._connection.sendall(b"".join([len(data).to_bytes(8, "little"), data, *blobs]))

    def receive(self, limit: int = MAX_MESSAGE) -> Message | None:
        """The next message, of at most `limit` bytes; None when the other end is closed. Raises OSError."""
        head = self._exactly(8)
        if head is None:
            return None
        data = self._exactly(_within(int.from_bytes(head, "little"), limit))
        if data is None:
            return None
        message: Message = json.loads(data)
        sizes = message.get(BLOBS, ())
        _within(sum(sizes), limit)
        blobs = [self._exactly(size) for size in sizes]
        if None in blobs:
            return None
        if blobs:
            message[BLOBS] = blobs
        return message

    def ask(self, message: Message, timeout: float) -> Message:
        """Send a request and return its answer.

        Raises RankError if the other end is gone or does not answer within `timeout` seconds; it is gone from then on,
        because a late answer would be taken for another one's.
        """
        with self._lock:
            try:
                self._connection.settimeout(timeout)
                self.send(message)
                answer = self.receive()
            except OSError as error:
                self.close()
                raise gone(self.name, error) from error
            except BaseException:
                # an interrupt (Ctrl-C): the answer that is still to come would be taken for the next one's
                self.close()
                raise
        if answer is None:
            self.close()
            raise gone(self.name, None)
        return answer

    def wait_at_most(self, seconds: float | None) -> None:
        """Let `receive` wait for so long; None for as long as the other end lives."""
        self._connection.settimeout(seconds)

    def fileno(self) -> int:
        """The connection's file descriptor, for those who poll."""
        return self._connection.fileno()

    def close(self) -> None:
        """Close this end, also for a thread that waits in `receive`."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _exactly(self, count: int) -> bytes | None:
        parts = bytearray()
        while len(parts) < count:
            part = self._connection.recv(min(count - len(parts), 1 << 20))
            if not part:
                return None
            parts += part
        return bytes(parts)


_connected: weakref.WeakSet[Channel] = weakref.WeakSet()
"""The channels of this process to agents."""


def _leave_to_parent() -> None:
    """In a process that was forked off, of a data loader, say: the agent must see when the trainer dies, though this
    one lives on; and what it closes, it must not close for the trainer.
    """
    for channel in list(_connected):
        # not shut down, which it would be for both
        channel._connection.close()
    _connected.clear()


os.register_at_fork(after_in_child=_leave_to_parent)


def _within(count: int, limit: int) -> int:
    if not 0 <= count <= limit:
        raise OSError(f"a message claims {count} bytes")
    return count


def gone(who: str, error: OSError | None) -> RankError:
    """What it means that an agent does not answer."""
    why = "" if error is None else f" ({error.strerror or error})"
    return RankError(
        f"{who} does not answer{why}: the process that writes checkpoints there has ended or hangs; saves that were "
        "under way may be lost, committed ones are not. The next save starts agents anew"
    )


def failure(answer: Message) -> CheckpointError:
    """The error that an answer tells of."""
    kind = answer.get("kind", "")
    known = getattr(errors, kind, RankError) if kind in errors.__all__ else SaveFailedError
    error: CheckpointError = known(answer["error"])
    return error
