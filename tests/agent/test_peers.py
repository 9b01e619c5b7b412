"""Who may talk to an agent from outside: only agents of the same run, each proving the run's secret and its node."""

from __future__ import annotations

import secrets
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ckpt import network
from ckpt.agent import peers
from ckpt.agent.aftermath import Aftermath
from ckpt.agent.crew import Crew, ranks_text
from ckpt.agent.following import Follower
from ckpt.agent.leading import Leader
from ckpt.storage.files import Files
from ckpt_formats.errors import RankError

CREW = ["a", "b"]


@contextmanager
def leader(secret: bytes) -> Iterator[peers.Address]:
    """The agent of node a, as others see it."""
    leading = Leader(Crew("a", CREW), Files(), Aftermath())
    try:
        yield peers.Address("a", ["127.0.0.1"], leading.listen(secret, loopback=True))
    finally:
        leading.close()


def follow(address: peers.Address, secret: bytes) -> Follower:
    return Follower(Crew("b", CREW), address, secret, Files(), Aftermath(), lambda: None)


def test_who_knows_the_secret_is_let_in(caplog: pytest.LogCaptureFixture) -> None:
    secret = secrets.token_bytes(32)
    with leader(secret) as address:
        # the first of its addresses that leads there is taken
        follower = follow(address._replace(hosts=["host.invalid", *address.hosts]), secret)
        assert not follower.busy()
        follower.close()
    assert caplog.text == ""


def test_a_node_is_reached_at_one_of_the_addresses_that_it_says() -> None:
    secret = secrets.token_bytes(32)
    leading = Leader(Crew("a", CREW), Files(), Aftermath())
    try:
        port = leading.listen(secret, loopback=False)
        follow(peers.Address("a", network.own_hosts(), port), secret).close()
    finally:
        leading.close()


@pytest.mark.parametrize(("said", "first"), [("lo", True), ("=lo", True), ("=l", False), ("^lo", False), ("", False)])
def test_the_interface_that_the_training_uses_is_tried_first(
    said: str, first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "host.invalid")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", said)
    assert (network.own_hosts()[0] == "127.0.0.1") == first


def test_who_does_not_know_the_secret_is_refused_and_told_nothing(caplog: pytest.LogCaptureFixture) -> None:
    secret = secrets.token_bytes(32)
    with leader(secret) as address:
        with pytest.raises(RankError, match="no agent of this run"):
            follow(address, secrets.token_bytes(32))
        with socket.create_connection(("127.0.0.1", address.port)) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert stranger.recv(100) == b""
        # one that says nothing keeps nobody else out
        with socket.create_connection(("127.0.0.1", address.port)):
            follow(address, secret).close()
    assert "was refused" in caplog.text


def test_an_address_that_leads_to_another_node_is_noticed() -> None:
    secret = secrets.token_bytes(32)
    with leader(secret) as address, pytest.raises(RankError, match="can't reach the agent of node c"):
        follow(address._replace(node="c"), secret)


def test_an_agent_that_can_not_be_reached_is_named_with_what_to_do() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(RankError, match=r"node b can't reach the agent of node a at port \d+.*set GLOO_SOCKET_IFNAME"):
        follow(peers.Address("a", ["127.0.0.1"], port), b"secret")


def test_who_was_not_let_in_after_all_notices() -> None:
    secret = secrets.token_bytes(32)

    def cut(ends: socket.socket, port: int) -> None:
        """Let challenges through, but not the proof that answers the last of them."""
        inside, _ = ends.accept()
        with inside, socket.create_connection(("127.0.0.1", port)) as outside:
            outside.sendall(inside.recv(4096))
            inside.sendall(outside.recv(4096))
            inside.recv(4096)

    with leader(secret) as address, socket.create_server(("127.0.0.1", 0)) as ends:
        between = threading.Thread(target=cut, args=(ends, address.port))
        between.start()
        with pytest.raises(RankError, match=r"closed the connection|Connection reset"):
            peers.connect(address._replace(port=ends.getsockname()[1]), secret, "b", "requests")
        between.join(10)


def test_a_recorded_conversation_can_not_be_used_again() -> None:
    secret = secrets.token_bytes(32)
    heard: list[bytes] = []

    def listen_in(ends: socket.socket, port: int) -> None:
        inside, _ = ends.accept()
        with inside, socket.create_connection(("127.0.0.1", port)) as outside:
            answering = threading.Thread(target=pump, args=(outside, inside, []))
            answering.start()
            pump(inside, outside, heard)
            answering.join(10)

    with leader(secret) as address, socket.create_server(("127.0.0.1", 0)) as ends:
        between = threading.Thread(target=listen_in, args=(ends, address.port))
        between.start()
        peers.connect(address._replace(port=ends.getsockname()[1]), secret, "b", "requests").close()
        between.join(10)
        with socket.create_connection(("127.0.0.1", address.port)) as again:
            again.settimeout(15)
            again.sendall(b"".join(heard))
            answers = b""
            while part := again.recv(4096):
                answers += part
        # a challenge, and then nothing
        assert answers.count(b"challenge") == 1


def pump(source: socket.socket, target: socket.socket, heard: list[bytes]) -> None:
    try:
        while data := source.recv(4096):
            heard.append(data)
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        pass


@pytest.mark.parametrize(
    ("ranks", "text"),
    [({3}, "rank 3"), ({0, 1}, "ranks 0, 1"), ({5, 0, 1, 2}, "ranks 0 to 2, 5"), ({1, 3}, "ranks 1, 3")],
)
def test_ranks_are_told_briefly(ranks: set[int], text: str) -> None:
    assert ranks_text(ranks) == text
