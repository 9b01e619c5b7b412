"""Messages between trainers and their agent: JSON objects with their length before them, over Unix stream sockets.

Knows no checkpoints. Only processes of the same user can reach the socket: it lies in a folder that only they can
enter.
"""

from __future__ import annotations

import json
import socket
import threading
from typing import Any

from ckpt_formats.errors import RankError

MAX_MESSAGE = 1 << 31
"""Bytes of the longest message."""
Message = dict[str, Any]


class Channel:
    """One end of a connection. A request and its answer belong together, so one thread at a time asks."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    @classmethod
    def connect(cls, address: str, timeout: float) -> Channel:
        """Connect to a listening socket. Raises RankError if nobody answers there."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(timeout)
        try:
            connection.connect(address)
        except OSError as error:
            connection.close()
            raise _gone(address, error) from error
        return cls(connection)

    def send(self, message: Message) -> None:
        """Send a message. Raises OSError."""
        data = json.dumps(message, separators=(",", ":")).encode("ascii")
        self._connection.sendall(len(data).to_bytes(8, "little") + data)

    def receive(self) -> Message | None:
        """The next message; None when the other end is closed. Raises OSError."""
        head = self._exactly(8)
        if head is None:
            return None
        length = int.from_bytes(head, "little")
        if length > MAX_MESSAGE:
            raise OSError(f"a message claims {length} bytes")
        data = self._exactly(length)
        return None if data is None else json.loads(data)

    def ask(self, message: Message, timeout: float) -> Message:
        """Send a request and return its answer. Raises RankError if the agent is gone or does not answer in time."""
        with self._lock:
            self._connection.settimeout(timeout)
            try:
                self.send(message)
                answer = self.receive()
            except OSError as error:
                raise _gone("its agent", error) from error
        if answer is None:
            raise _gone("its agent", None)
        return answer

    def wait_forever(self) -> None:
        """Let `receive` wait as long as the other end lives."""
        self._connection.settimeout(None)

    def close(self) -> None:
        """Close this end."""
        self._connection.close()

    def _exactly(self, count: int) -> bytes | None:
        parts = bytearray()
        while len(parts) < count:
            part = self._connection.recv(min(count - len(parts), 1 << 20))
            if not part:
                return None
            parts += part
        return bytes(parts)


def _gone(what: str, error: OSError | None) -> RankError:
    why = "" if error is None else f" ({error.strerror or error})"
    return RankError(
        f"{what} does not answer{why}: the process that writes checkpoints on this node has ended; saves that were "
        "under way are lost, committed ones are not. The next save starts another agent"
    )
