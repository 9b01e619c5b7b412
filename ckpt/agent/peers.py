"""Connections between the agents of several nodes: over TCP, each end proving that it has the run's secret.

The secret is made by rank 0 and reaches the agents through the ranks' process group and their own socket, never through
a command line or an environment. Each end also proves which node it is, so that an address which leads somewhere else
is noticed. What follows is neither encrypted nor signed, as the training's own traffic is not. Knows no checkpoints.
"""

from __future__ import annotations

import hmac
import queue
import secrets
import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import NamedTuple

from ckpt.agent.wire import Channel, Message, gone
from ckpt.network import keep_alive
from ckpt_formats.errors import RankError

PING = 5.0
"""Seconds between two signs of life of the leading agent to each other one."""
SILENCE = 30.0
"""Seconds without an answer after which an agent counts as gone."""
HANDSHAKE = 10.0
"""Seconds within which a connection has to authenticate, or an address to answer."""
_GREETING = 4096
"""Bytes of the longest message of one that has not authenticated yet."""


class Address(NamedTuple):
    """Where an agent listens for other agents."""

    node: str
    hosts: Sequence[str]
    """To be tried in turn: a machine has several addresses, and which of them others reach is only known by trying."""
    port: int


# authentication: each end answers the other's random challenge


def connect(address: Address, secret: bytes, node: str, purpose: str) -> Channel:
    """Connect to the agent of another node, as the agent of `node`.

    Raises:
        RankError: none of its addresses leads to it.
    """
    failures = []
    for host in address.hosts:
        try:
            connection = socket.create_connection((host, address.port), HANDSHAKE)
        except OSError as error:
            failures.append(f"{host}: {error.strerror or error}")
            continue
        channel = Channel(connection, f"the agent of node {address.node}")
        try:
            connection.settimeout(HANDSHAKE)
            _introduce(channel, address.node, secret, node, purpose)
            keep_alive(connection)
            return channel
        except (OSError, RankError, KeyError, TypeError, ValueError) as error:
            channel.close()
            failures.append(f"{host}: {error}")
    raise RankError(
        f"node {node} can't reach the agent of node {address.node} at port {address.port} of any of its addresses "
        f"({'; '.join(failures)}); set GLOO_SOCKET_IFNAME to the interface that the nodes share, and let TCP pass "
        "between them"
    )


def _introduce(channel: Channel, other: str, secret: bytes, node: str, purpose: str) -> None:
    mine = secrets.token_hex(32)
    channel.send({"from": node, "to": other, "purpose": purpose, "challenge": mine})
    answer = channel.receive(_GREETING)
    if answer is None:
        raise OSError("it closed the connection")
    facts = (node, other, purpose, mine, str(answer["challenge"]))
    if not hmac.compare_digest(str(answer["proof"]), _proof(secret, "answers", facts)):
        raise OSError("whoever listens there is no agent of this run")
    channel.send({"proof": _proof(secret, "asks", facts)})
    if channel.receive(_GREETING) is None:
        raise OSError("it closed the connection")


def admit(connection: socket.socket, secret: bytes, node: str) -> tuple[Channel, str, str]:
    """Let somebody prove that it is an agent of this run. Returns the channel, its node, and what it connects for.

    Raises OSError if it does not; the connection is closed then.
    """
    channel = Channel(connection)
    try:
        connection.settimeout(HANDSHAKE)
        greeting = channel.receive(_GREETING)
        if greeting is None or greeting["to"] != node:
            raise OSError("it looks for somebody else")
        other, purpose = str(greeting["from"]), str(greeting["purpose"])
        mine = secrets.token_hex(32)
        facts = (other, node, purpose, str(greeting["challenge"]), mine)
        channel.send({"challenge": mine, "proof": _proof(secret, "answers", facts)})
        answer = channel.receive(_GREETING)
        if answer is None or not hmac.compare_digest(str(answer["proof"]), _proof(secret, "asks", facts)):
            raise OSError("it does not know the secret of this run")
        # until it hears this, it does not rely on being let in: the proof may have got lost
        channel.send({})
        keep_alive(connection)
    except (KeyError, TypeError, ValueError) as error:
        channel.close()
        raise OSError("it speaks another language") from error
    except OSError:
        channel.close()
        raise
    channel.name = f"the agent of node {other}"
    return channel, other, purpose


def _proof(secret: bytes, role: str, facts: Sequence[str]) -> str:
    text = "\0".join(["ckpt agent", role, *facts])
    return hmac.digest(secret, text.encode(), "sha256").hex()


class News:
    """What the leading agent tells another one, in order, each message acknowledged; a sign of life when there is none.

    Args:
        lost: called once, from the thread that finds that the other end is gone.
    """

    def __init__(self, channel: Channel, lost: Callable[[RankError], None]) -> None:
        self._channel = channel
        self._lost = lost
        self._queue: queue.SimpleQueue[tuple[Message, Future[Message]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="ckpt-agent-news", daemon=True)
        self._thread.start()

    def tell(self, message: Message) -> Future[Message]:
        """Send a message, after those before it; the future has the answer, or the error if it does not arrive."""
        future: Future[Message] = Future()
        self._queue.put((message, future))
        return future

    def end(self) -> None:
        """Say no more after what was told before, and close the connection; does not wait for that."""
        self._queue.put(None)

    def join(self, timeout: float) -> None:
        """Wait until the end, for at most so many seconds."""
        self._thread.join(timeout)

    def _run(self) -> None:
        error: RankError | None = None
        while True:
            try:
                item = self._queue.get(timeout=PING)
            except queue.Empty:
                item = ({"op": "ping"}, Future())
            if item is None:
                break
            message, future = item
            if error is not None:
                future.set_exception(error)
                continue
            try:
                future.set_result(self._channel.ask(message, SILENCE))
            except RankError as gone_now:
                error = gone_now
                self._channel.close()
                future.set_exception(error)
                self._lost(error)
        self._channel.close()


def hear(channel: Channel, answer: Callable[[Message], None]) -> RankError | None:
    """The other end of News: acknowledge every message, then act on it; returns why there will be no more.

    None when the other end closed in good order.
    """
    channel.wait_at_most(PING + SILENCE)
    try:
        while (message := channel.receive()) is not None:
            channel.send({})
            if message["op"] != "ping":
                answer(message)
    except OSError as error:
        return gone(channel.name, error)
    finally:
        channel.close()
    return None
