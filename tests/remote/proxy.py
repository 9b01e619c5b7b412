"""A proxy before an S3 server that does to requests what networks and stores do: errors, resets, cuts, damage."""

from __future__ import annotations

import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KINDS = ("500", "503", "500 though done", "reset", "reset though done", "cut request", "cut answer", "slow")
"""What may happen: errors and resets before the server hears of a request, and after it did what was asked."""
SLOW_S = 0.2


class Proxy:
    """Requests that passed, and what is to be done to the next ones.

    Attributes:
        port: where it listens.
        fault: of (method, path), gives one of KINDS, "damage", "403", or None; called for each request.
        done: kinds of faults -> how often; "none" for requests that nothing was done to.
        sent: bytes of request bodies that the server got.
        plain: requests that came by plain HTTP, of those that passed.
        got: paths of objects -> bytes of them that were answered.
        delay: seconds before each request is passed on.
    """

    def __init__(self, upstream: int) -> None:
        self.upstream = upstream
        self.port = 0
        self.fault: Callable[[str, str], str | None] = _nothing
        self.done: Counter[str] = Counter()
        self.sent = 0
        self.plain = 0
        self.got: Counter[str] = Counter()
        self.delay = 0.0
        self.lock = threading.Lock()

    @property
    def faults(self) -> int:
        """How many requests something was done to."""
        return self.done.total() - self.done["none"]

    def random_faults(self, seed: int, rate: float) -> None:
        """From now on, do something to this share of requests."""
        rng = random.Random(seed)
        self.fault = lambda *_: rng.choice(KINDS) if rng.random() < rate else None

    def calm(self) -> None:
        """Let everything pass."""
        self.fault = _nothing


def _nothing(method: str, path: str) -> None:
    return None


class _Handler(BaseHTTPRequestHandler):
    """One connection of a client."""

    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        pass

    def _do(self) -> None:
        proxy = self.server.proxy
        with proxy.lock:
            kind = proxy.fault(self.command, self.path)
            proxy.done[kind or "none"] += 1
        time.sleep(proxy.delay + (SLOW_S if kind == "slow" else 0))
        if kind == "cut request":
            self._reset()
            return
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if kind in ("403", "500", "503"):
            self._error(int(kind))
        elif kind == "reset":
            self._reset()
        else:
            if kind == "damage":
                body = body[:-1] + bytes([body[-1] ^ 1])
            status, headers, data = self._pass(body)
            with proxy.lock:
                proxy.sent += len(body)
                proxy.plain += self.headers["User-Agent"] == "anyckpt"
                if self.command == "GET":
                    proxy.got[self.path.partition("?")[0]] += len(data)
            if kind == "500 though done":
                self._error(500)
            elif kind == "reset though done":
                self._reset()
            else:
                self._answer(status, headers, data, cut=kind == "cut answer")

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _do  # noqa: N815 - the base class's names

    def _pass(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.proxy.upstream, timeout=60)
        try:
            headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
            connection.request(self.command, self.path, body or None, headers)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes, *, cut: bool = False) -> None:
        self.send_response_only(status)
        length = str(len(data))
        for name, value in headers:
            if name.lower() == "content-length" and self.command == "HEAD":
                length = value
            elif name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if cut else data)
        self.wfile.flush()
        if cut:
            self._reset()

    def _error(self, status: int) -> None:
        code = {403: "AccessDenied", 500: "InternalError", 503: "SlowDown"}[status]
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
        self._answer(status, [("Content-Type", "application/xml")], b"" if self.command == "HEAD" else body)

    def _reset(self) -> None:
        # no lingering: the other side sees a reset
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    # what clients do to their connections is their own affair

    def handle(self) -> None:
        with suppress(OSError, ValueError):
            super().handle()

    def finish(self) -> None:
        with suppress(OSError, ValueError):
            super().finish()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    proxy: Proxy

    def shutdown_request(self, request: Any) -> None:
        with suppress(OSError):
            super().shutdown_request(request)


@contextmanager
def proxied(upstream: int) -> Iterator[Proxy]:
    """A proxy before the server at a port."""
    with _Server(("127.0.0.1", 0), _Handler) as server:
        server.proxy = Proxy(upstream)
        server.proxy.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, name="proxy")
        thread.start()
        try:
            yield server.proxy
        finally:
            server.shutdown()
            thread.join()
