"""The ranks of one node, found by the process group: who they are, lines between them, and memory that they share.

Lines are Unix sockets in the abstract namespace, and memory has no name either (memfd), so nothing is left behind
however a rank ends; and a rank that ends is noticed at once, since its lines close. Only processes of the same user
are let in. Knows nothing of checkpoints.
"""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import select
import socket
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Self

from ckpt.collective import Collective
from ckpt_formats.digest import DIGEST_SIZE, digest
from ckpt_formats.errors import ConfigurationError, RankError
from ckpt_formats.memory import scratch, shared

NODE = "CKPT_NODE"
"""The environment variable that names a node; by default its host name does."""
MEET_S = 30.0
"""Seconds in which ranks of a node connect."""
PATIENCE = "CKPT_PATIENCE_S"
"""The environment variable that says for how many seconds ranks that wait for each other in a load may get nothing."""
PATIENCE_S = 180.0
"""The same by default: longer than the answer of a store may take."""
_TOKEN = 16
_SIZES = struct.Struct("<QQ")
_MESSAGE = struct.Struct("<BIQ")


@dataclass(slots=True)
class Mate:
    """Another rank of this node."""

    rank: int
    line: socket.socket
    memory: int
    """Descriptor of what it shares."""
    size: int
    """Bytes of it; behind them is what it said when ranks met."""
    received: bytearray = field(default_factory=bytearray)
    unsent: bytearray = field(default_factory=bytearray)
    finished: bool = False
    mapped: memoryview | None = None

    def shared(self) -> memoryview:
        """What it shares."""
        if self.mapped is None:
            self.mapped = shared(self.memory, self.size)
        return self.mapped


class Node:
    """The ranks of this node, in rank order, connected with each other.

    Attributes:
        index: this rank's position among them.
        mates: the others, by their positions.
        said: what each said when they met, by position.
        patience: seconds after which a rank that is waited for is given up.
    """

    def __init__(self, index: int, mates: dict[int, Mate], said: list[bytes], own: memoryview) -> None:
        self.patience = patience_s()
        self.index = index
        self.mates = mates
        self.said = said
        self._own = own
        self._poll = select.poll()
        self._wake, self._woken = socket.socketpair()
        self._wake.setblocking(False)
        self._by_line = {mate.line.fileno(): number for number, mate in mates.items()}
        for mate in mates.values():
            mate.line.setblocking(True)
            mate.line.settimeout(self.patience)
            self._poll.register(mate.line, select.POLLIN)
        self._poll.register(self._woken, select.POLLIN)

    def own(self) -> memoryview:
        """The memory that this rank shares."""
        return self._own

    def send(self, to: int, kind: int, number: int, more: int = 0) -> None:
        """Tell another rank something short, when it is next listened to, or at `flush`."""
        self.mates[to].unsent += _MESSAGE.pack(kind, number, more)

    def flush(self) -> None:
        """Send what has been said: all of it to one rank at once, since what is sent may wake that rank.

        One that is gone is noticed when it is listened to.
        """
        for mate in self.mates.values():
            if mate.unsent:
                with contextlib.suppress(OSError):
                    mate.line.sendall(mate.unsent)
                mate.unsent.clear()

    def tell_all(self, kind: int) -> None:
        """Tell everybody something without more to it, at once."""
        for number in self.mates:
            self.send(number, kind, 0)
        self.flush()

    def wake(self) -> None:
        """End a `listen` of another thread."""
        with contextlib.suppress(BlockingIOError):
            self._wake.send(b"\0")

    def listen(self, timeout: float) -> Iterator[tuple[int, int, int, int]]:
        """What others have said: (who, kind, number, more); waits for something, or for `wake`, up to so many seconds.

        Raises:
            RankError: a rank's process ended, and it had not finished.
        """
        self.flush()
        for fd, _ in self._poll.poll(timeout * 1000):
            number = self._by_line.get(fd)
            if number is None:
                self._woken.recv(4096)
                continue
            mate = self.mates[number]
            try:
                data = mate.line.recv(65536)
            except OSError:
                data = b""
            if not data:
                self._poll.unregister(fd)
                if not mate.finished:
                    raise RankError(
                        f"rank {mate.rank}, which reads a part for the other ranks of its node, died during the load; "
                        "start the ranks anew",
                        rank=mate.rank,
                    )
                continue
            mate.received += data
            whole = len(mate.received) // _MESSAGE.size * _MESSAGE.size
            messages = list(_MESSAGE.iter_unpack(bytes(mate.received[:whole])))
            del mate.received[:whole]
            for kind, what, more in messages:
                yield number, kind, what, more

    def close(self) -> None:
        for mate in self.mates.values():
            mate.line.close()
            os.close(mate.memory)
        self._wake.close()
        self._woken.close()


class Meeting:
    """All ranks find out who is on which node. Collective; a context, which ends when the ranks of nodes have met.

    Attributes:
        nodes: of each node its ranks, in rank order; who can't share memory with others is alone.
        node: this rank's, by its position there.
        said: what each rank said, by rank.
        tokens: of each rank, a secret that the ranks know and nobody else.
    """

    def __init__(self, group: Collective, say: bytes, most: int) -> None:
        """`say` has the same length on all ranks; at most `most` ranks are connected with each other."""
        self._group = group
        self._stack = contextlib.ExitStack()
        token = secrets.token_bytes(_TOKEN)
        self._listener = self._stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        try:
            # other systems have neither such sockets nor such memory
            can = sys.platform.startswith("linux")
            if can:
                self._listener.bind(_address(token))
                self._listener.listen(most)
            home = _identity() if can else secrets.token_bytes(DIGEST_SIZE)
            told = group.share(home + token + say)
        except BaseException:
            self._stack.close()
            raise
        self.tokens = [text[DIGEST_SIZE : DIGEST_SIZE + _TOKEN] for text in told]
        self.said = [text[DIGEST_SIZE + _TOKEN :] for text in told]
        homes: dict[bytes, list[int]] = {}
        for rank, text in enumerate(told):
            homes.setdefault(text[:DIGEST_SIZE], []).append(rank)
        self.nodes = [ranks[at : at + most] for ranks in homes.values() for at in range(0, len(ranks), most)]
        self.node = next(number for number, ranks in enumerate(self.nodes) if group.rank in ranks)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def connect(self, say: bytes, size: int) -> Node | None:
        """Connect the ranks of each node.

        Args:
            say: what this rank tells the others of its node.
            size: bytes of memory that it shares with them.

        Returns None, everywhere, if ranks of any node can't connect.
        """
        ranks = self.nodes[self.node]
        node: Node | None = None
        if sys.platform.startswith("linux"):
            with contextlib.suppress(OSError):
                # containers that share a machine but not its namespaces, no memory: everybody reads for itself
                node = _connect(self._listener, ranks, ranks.index(self._group.rank), self.tokens, say, size)
        if self._group.tally(None, node is None)[0] and node is not None:
            node.close()
            node = None
        return node


def patience_s() -> float:
    """Seconds without anything from a rank that is waited for, until it is given up. Raises ConfigurationError."""
    said = os.environ.get(PATIENCE, "")
    try:
        seconds = float(said or PATIENCE_S)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise ConfigurationError(
            f"the environment variable {PATIENCE} is {said!r}, which is no number of seconds; set it to a positive one"
        )
    return seconds


def boot() -> str:
    """What tells two machines with the same name apart; empty where the system does not say."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as stream:
            return stream.read().strip()
    except OSError:
        return ""


def _identity() -> bytes:
    """What ranks have in common that can share memory."""
    parts = [os.environ.get(NODE, ""), socket.gethostname(), str(os.getuid()), boot()]
    with contextlib.suppress(OSError):
        # abstract sockets are seen within one
        parts.append(os.readlink("/proc/self/ns/net"))
    return digest("\n".join(parts).encode())


def _address(token: bytes) -> str:
    return f"\0ckpt-load-{token.hex()}"


def _connect(listener: socket.socket, ranks: list[int], index: int, tokens: list[bytes], say: bytes, size: int) -> Node:
    """Raises OSError."""
    if len(ranks) == 1:
        # nobody to share memory with: the quicker kind
        return Node(0, {}, [say], scratch(size))
    deadline = time.monotonic() + MEET_S
    memory = os.memfd_create("ckpt-load", os.MFD_CLOEXEC)
    lines: dict[int, socket.socket] = {}
    mates: dict[int, Mate] = {}
    try:
        os.ftruncate(memory, size)
        own = shared(memory, size, fresh=True)
        os.pwrite(memory, say, size)
        for number in range(index):
            line = lines[number] = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            line.settimeout(max(0.01, deadline - time.monotonic()))
            line.connect(_address(tokens[ranks[number]]))
            # who knows the other's token, and shows its own, was told them by the process group
            line.sendall(tokens[ranks[index]])
        expected = {tokens[ranks[number]]: number for number in range(index + 1, len(ranks))}
        while expected:
            listener.settimeout(max(0.01, deadline - time.monotonic()))
            line, _ = listener.accept()
            line.settimeout(max(0.01, deadline - time.monotonic()))
            number_of = expected.pop(_exactly(line, _TOKEN), None) if _same_user(line) else None
            if number_of is None:
                line.close()
            else:
                lines[number_of] = line
        for line in lines.values():
            socket.send_fds(line, [_SIZES.pack(len(say), size)], [memory])
        said = [say] * len(ranks)
        for number, line in lines.items():
            data, descriptors, _, _ = socket.recv_fds(line, _SIZES.size, 1)
            if len(data) != _SIZES.size or len(descriptors) != 1:
                raise ConnectionError("the other end closed")
            length, lent = _SIZES.unpack(data)
            mates[number] = Mate(ranks[number], line, descriptors[0], lent)
            said[number] = os.pread(descriptors[0], length, lent)
    except OSError:
        for line in lines.values():
            line.close()
        for mate in mates.values():
            os.close(mate.memory)
        raise
    finally:
        os.close(memory)
    return Node(index, mates, said, own)


def _same_user(line: socket.socket) -> bool:
    _, user, _ = struct.unpack("3i", line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return bool(user == os.getuid())


def _exactly(line: socket.socket, count: int) -> bytes:
    data = line.recv(count, socket.MSG_WAITALL)
    if len(data) != count:
        raise ConnectionError("the other end closed")
    return data
