"""Lines between ranks of different nodes, on which blocks that one node has read are passed on to others.

A line goes one way. What comes on it, and in which order, both ends know beforehand, so that memory for it is ready;
whoever has none to spare lets the sender wait. A thread sends and receives while others read. A rank that ends without
a word is noticed, since its lines close. Each end proves that it is of the run; what follows is neither encrypted nor
signed, as the training's own traffic is not: the receiver verifies it. Knows no checkpoints.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from ckpt.loading.node import NODE
from ckpt.network import keep_alive, own_hosts
from ckpt_formats.errors import RankError

CONNECT_S = 10.0
"""Seconds in which ranks of different nodes connect."""
FLUSH_S = 10.0
"""Seconds that a rank which failed takes at most to tell those at the other ends."""
_HOST_S = 3.0
"""Seconds in which an address answers."""
_BATCH, _FAILED = 1, 2
_HEAD = struct.Struct("<BIQ")
_HELLO = struct.Struct("<I32s")
_NONCE = 32
_PROOF = 32


class ElsewhereError(Exception):
    """Another rank failed; it says why to all ranks."""


@dataclass(slots=True)
class _Line:
    rank: int
    """At the other end."""
    connection: socket.socket
    incoming: bool
    left: int
    """Batches that have yet to come, or to be sent."""
    todo: deque[tuple[int, memoryview]] = field(default_factory=deque)
    """Batches to send; or those that come next, with memory for them."""
    head: bytearray = field(default_factory=bytearray)
    """What has come of the head of a message."""
    rest: memoryview | None = None
    """What has yet to come, or to be sent, of the first of `todo`."""
    since: float = 0.0
    """When something of `todo` was last taken, or there began to be something."""


class Lines:
    """The lines of one rank, and a thread that moves what goes over them.

    Args:
        incoming, outgoing: connections, by the rank at the other end.
        coming, going: how many batches come on each, and how many go.
        wake: called when `news` has something.
        patience: seconds in which each that gets batches has to take some bytes.
        homes: the nodes of ranks, by rank.
    """

    def __init__(
        self,
        incoming: Mapping[int, socket.socket],
        outgoing: Mapping[int, socket.socket],
        coming: Mapping[int, int],
        going: Mapping[int, int],
        wake: Callable[[], None],
        patience: float,
        homes: Mapping[int, str],
    ) -> None:
        self._in = {rank: _Line(rank, line, True, coming[rank]) for rank, line in incoming.items()}
        self._out = {rank: _Line(rank, line, False, going[rank]) for rank, line in outgoing.items()}
        self._by_fd = {line.connection.fileno(): line for line in (*self._in.values(), *self._out.values())}
        self._wake = wake
        self._patience = patience
        self.homes = homes
        self._news: deque[tuple[bool, int]] = deque()
        self._asked: deque[tuple[_Line, int, memoryview]] = deque()
        self._error: Exception | None = None
        self._until: float | None = None
        """When to end; None while there is no reason to."""
        self.moved = 0
        """Bytes sent and received so far: whether anything goes on."""
        self._watched: dict[int, int] = {}
        self._poll = select.poll()
        self._bell, self._rung = socket.socketpair()
        for connection in (self._bell, self._rung, *(line.connection for line in self._by_fd.values())):
            connection.setblocking(False)
        self._poll.register(self._rung, select.POLLIN)
        self._thread = threading.Thread(target=self._run, name="ckpt-exchange", daemon=True)
        self._thread.start()

    def receive(self, origin: int, number: int, into: memoryview) -> None:
        """Let the next batch that comes from a rank, which is this one, come into this memory."""
        self._ask(self._in[origin], number, into)

    def send(self, to: int, number: int, data: memoryview) -> None:
        """Send a batch after those before it. Its memory is in use until `news` says that it went."""
        self._ask(self._out[to], number, data)

    def news(self) -> list[tuple[bool, int]]:
        """What is new since the last call: batches, and whether each came (else it went).

        Raises:
            RankError: a rank at the other end of a line died.
            ElsewhereError: one failed otherwise.
        """
        if self._error is not None:
            raise self._error
        new = []
        while self._news:
            new.append(self._news.popleft())
        return new

    def close(self, *, failed: bool) -> None:
        """End the lines. Those at their other ends are told, if this rank failed."""
        self._until = time.monotonic() + FLUSH_S if failed else 0.0
        self._ring()
        self._thread.join()
        for connection in (self._bell, self._rung, *(line.connection for line in self._by_fd.values())):
            connection.close()

    def _ask(self, line: _Line, number: int, memory: memoryview) -> None:
        self._asked.append((line, number, memory))
        self._ring()

    def _ring(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._bell.send(b"\0")

    # in the thread

    def _run(self) -> None:
        try:
            for line in self._by_fd.values():
                self._watch(line)
            while self._until is None:
                self._look_for_frozen()
                for fd, _ in self._poll.poll(1000 * min(1.0, self._patience / 4)):
                    if fd in self._by_fd:
                        line = self._by_fd[fd]
                        self._come(line) if line.incoming else self._go(line)
                        self._watch(line)
                        continue
                    with contextlib.suppress(BlockingIOError):
                        self._rung.recv(4096)
                    while self._asked:
                        line, number, memory = self._asked.popleft()
                        if not line.todo:
                            line.since = time.monotonic()
                        line.todo.append((number, memory))
                        self._watch(line)
        except Exception as error:  # noqa: BLE001 - `news` raises it
            self._error = error
            self._wake()
            # whoever asks `news` learns it, and closes
            self._rung.setblocking(True)
            while self._until is None:
                self._rung.recv(4096)
        if self._until:
            self._tell_failure(self._until)

    def _look_for_frozen(self) -> None:
        """Give up a rank that takes nothing. That a process is frozen, or a node switched off, its end does not say."""
        now = time.monotonic()
        for line in self._out.values():
            if line.todo and now - line.since > self._patience:
                raise RankError(
                    f"rank {line.rank} on node {self.homes[line.rank]} has taken nothing of what this node passes on "
                    f"to it for {self._patience:g} s: its process is frozen, its node is switched off, or it waits for "
                    "another; start the ranks anew",
                    rank=line.rank,
                )

    def _watch(self, line: _Line) -> None:
        """Poll a line for what it can go on with."""
        events = 0
        if line.left and line.incoming:
            events = select.POLLIN if line.todo or len(line.head) < _HEAD.size else 0
        elif line.left:
            events = select.POLLIN | (select.POLLOUT if line.todo else 0)
        fd = line.connection.fileno()
        if events != self._watched.get(fd, 0):
            self._watched[fd] = events
            if events:
                self._poll.register(fd, events)
            else:
                self._poll.unregister(fd)

    def _come(self, line: _Line) -> None:
        """Receive what is there."""
        try:
            while line.left:
                if len(line.head) < _HEAD.size:
                    data = line.connection.recv(_HEAD.size - len(line.head))
                    line.head += data
                    if not data:
                        raise _died(line)
                    if len(line.head) == _HEAD.size and line.head[0] == _FAILED:
                        raise ElsewhereError
                    continue
                if not line.todo:
                    return
                number, into = line.todo[0]
                if line.rest is None:
                    if _HEAD.unpack(line.head)[1:] != (line.left, len(into)):
                        raise RuntimeError(f"rank {line.rank} passes on something else than batch {number}")
                    line.rest = into
                count = line.connection.recv_into(line.rest)
                if not count:
                    raise _died(line)
                self.moved += count
                line.rest = line.rest[count:]
                if not line.rest:
                    line.rest = None
                    line.head.clear()
                    self._done(line)
        except BlockingIOError:
            return
        except OSError as error:
            raise _died(line) from error

    def _go(self, line: _Line) -> None:
        """Send what can be sent, and hear whether the other end has failed."""
        with contextlib.suppress(BlockingIOError):
            try:
                said = line.connection.recv(1)
            except BlockingIOError:
                raise
            except OSError as error:
                raise _died(line) from error
            if said:
                raise ElsewhereError
            raise _died(line)
        try:
            while line.todo:
                self._push(line)
        except BlockingIOError:
            return
        except OSError as error:
            # it may have said why before it went
            with contextlib.suppress(OSError):
                if line.connection.recv(1):
                    raise ElsewhereError from error
            raise _died(line) from error

    def _push(self, line: _Line) -> None:
        """Send some of the first batch of a line."""
        _, data = line.todo[0]
        if line.rest is None:
            head = _HEAD.pack(_BATCH, line.left, len(data))
            # small, and everything before it has left: it goes whole, or not at all
            if line.connection.send(head, socket.MSG_MORE) != len(head):
                raise OSError("a message was cut")
            line.rest = data
        count = line.connection.send(line.rest)
        line.since = time.monotonic()
        self.moved += count
        line.rest = line.rest[count:]
        if not line.rest:
            line.rest = None
            self._done(line)

    def _done(self, line: _Line) -> None:
        number, _ = line.todo.popleft()
        line.left -= 1
        self._news.append((line.incoming, number))
        self._wake()

    def _tell_failure(self, until: float) -> None:
        """Tell all other ends that this rank failed, and wait until they know: what is closed too early is lost."""
        telling = {fd: line for fd, line in self._by_fd.items() if line.left}
        for line in telling.values():
            if line.incoming:
                self._last_word(line, b"\1")
        while telling and time.monotonic() < until:
            poll = select.poll()
            for fd, line in telling.items():
                poll.register(fd, select.POLLIN | (0 if line.incoming or line.left < 0 else select.POLLOUT))
            for fd, events in poll.poll(100):
                line = telling[fd]
                try:
                    if events & select.POLLOUT and line.rest is not None:
                        self._push(line)
                    elif events & select.POLLOUT:
                        line.left = -1
                        self._last_word(line, _HEAD.pack(_FAILED, 0, 0))
                    elif not line.connection.recv(1 << 16):
                        del telling[fd]
                except BlockingIOError:
                    pass
                except OSError:
                    del telling[fd]

    @staticmethod
    def _last_word(line: _Line, word: bytes) -> None:
        with contextlib.suppress(OSError):
            line.connection.send(word)
            line.connection.shutdown(socket.SHUT_WR)


def _died(line: _Line) -> RankError:
    how = "passes on blocks to" if line.incoming else "gets blocks from"
    return RankError(
        f"rank {line.rank} of another node, which {how} this one, died during the load; start the ranks anew",
        rank=line.rank,
    )


# finding each other


def listen_address(listener: socket.socket) -> bytes:
    """How ranks of other nodes reach a listener, for `connect`."""
    home = os.environ.get(NODE) or socket.gethostname()
    return json.dumps([own_hosts(), listener.getsockname()[1], home]).encode()


def home_of(address: bytes) -> str:
    """The name of the node that has an address."""
    return str(json.loads(address)[2])


def connect(
    rank: int,
    listener: socket.socket,
    tokens: Sequence[bytes],
    addresses: Mapping[int, bytes],
    senders: Collection[int],
    receivers: Collection[int],
) -> tuple[dict[int, socket.socket], dict[int, socket.socket]]:
    """Connect with the ranks that send to this one, and with those that receive from it. Returns both, by rank.

    Args:
        rank: this one.
        listener: of this rank.
        tokens: by rank, a secret that each rank of the run knows.
        addresses: by rank, of `listen_address`.
        senders, receivers: ranks.

    Raises:
        OSError: somebody can't be reached, or did not come.
    """
    deadline = time.monotonic() + CONNECT_S
    incoming: dict[int, socket.socket] = {}
    outgoing: dict[int, socket.socket] = {}
    accepting = threading.Thread(
        target=_accept, args=(rank, listener, tokens, set(senders), incoming, deadline), name="ckpt-exchange-accept"
    )
    accepting.start()
    try:
        for other in receivers:
            outgoing[other] = _reach(rank, other, tokens, addresses[other], deadline)
    except OSError:
        accepting.join()
        for connection in (*incoming.values(), *outgoing.values()):
            connection.close()
        raise
    accepting.join()
    if len(incoming) < len(senders):
        for connection in (*incoming.values(), *outgoing.values()):
            connection.close()
        raise TimeoutError(f"ranks {sorted(set(senders) - set(incoming))} did not connect")
    for connection in (*incoming.values(), *outgoing.values()):
        keep_alive(connection)
    return incoming, outgoing


def _accept(
    rank: int,
    listener: socket.socket,
    tokens: Sequence[bytes],
    senders: set[int],
    incoming: dict[int, socket.socket],
    deadline: float,
) -> None:
    while len(incoming) < len(senders) and time.monotonic() < deadline:
        try:
            listener.settimeout(max(0.01, deadline - time.monotonic()))
            connection, _ = listener.accept()
        except OSError:
            continue
        try:
            connection.settimeout(_HOST_S)
            other, nonce = _HELLO.unpack(_exactly(connection, _HELLO.size))
            if other not in senders or other in incoming:
                raise ConnectionError("it is not one of those that send")
            mine = secrets.token_bytes(_NONCE)
            connection.sendall(_proof(tokens[rank], nonce, other) + mine)
            if not hmac.compare_digest(_exactly(connection, _PROOF), _proof(tokens[other], mine, rank)):
                raise ConnectionError("it is not of this run")
            incoming[other] = connection
        except OSError:
            connection.close()


def _reach(rank: int, other: int, tokens: Sequence[bytes], address: bytes, deadline: float) -> socket.socket:
    hosts, port, _ = json.loads(address)
    failure = OSError(f"rank {other} has no address")
    for host in hosts:
        left = deadline - time.monotonic()
        if left <= 0:
            break
        try:
            connection = socket.create_connection((host, port), min(_HOST_S, left))
        except OSError as error:
            failure = error
            continue
        try:
            nonce = secrets.token_bytes(_NONCE)
            connection.sendall(_HELLO.pack(rank, nonce))
            # it may have others to let in first
            connection.settimeout(max(0.01, deadline - time.monotonic()))
            answer = _exactly(connection, _PROOF + _NONCE)
            if not hmac.compare_digest(answer[:_PROOF], _proof(tokens[other], nonce, rank)):
                raise ConnectionError("whoever listens there is not of this run")
            connection.sendall(_proof(tokens[rank], answer[_PROOF:], other))
            return connection
        except OSError as error:
            connection.close()
            failure = error
    raise failure


def _proof(token: bytes, nonce: bytes, asked: int) -> bytes:
    return hmac.digest(token, b"ckpt load\0" + nonce + asked.to_bytes(4, "little"), "sha256")


def _exactly(connection: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        more = connection.recv(count - len(data))
        if not more:
            raise ConnectionError("the other end closed")
        data += more
    return bytes(data)
