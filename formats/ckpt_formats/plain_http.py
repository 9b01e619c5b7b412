"""Ranges of objects by plain HTTP GETs, received straight into the memory where they belong.

The libraries behind fsspec sign and parse each request, and copy what arrives, in one thread for all: several times
the CPU that receiving takes. Here a URL, signed in advance, serves for many requests, over connections that are kept.
Only the very bytes that were asked for count as an answer; with any other the caller asks in the general way, which
knows what it means. Knows no stores, and does not try again.
"""

from __future__ import annotations

import http.client
import io
import select
import socket
import ssl
import threading
import time
import urllib.request
import weakref
from collections.abc import Callable
from typing import NamedTuple
from urllib.parse import quote, urlsplit

__all__ = ["EXPIRES_S", "RECEIVED", "REPLACED", "Answer", "PlainHttp"]

CONNECT_TIMEOUT_S = 10
READ_TIMEOUT_S = 30
EXPIRES_S = 900
"""Seconds for which URLs are to be signed."""
_RENEW_S = 300.0
"""Seconds after which another one is made."""
_IDLE_S = 20.0
"""Seconds for which a connection is kept that nobody uses."""
_MOST_PLACES = 4096
"""URLs that are remembered."""

RECEIVED = 206
REPLACED = 412
_AGAIN = {408, 425, 429, 500, 502, 503, 504}
"""Statuses after which the same request may succeed."""
_DENIED = (400, 401, 403)
"""Statuses that a URL may get whose signature has expired."""
_IN_URLS = "%/:=&?~#+!$,;'@()*[]"
"""What a URL may have in it already."""
_OTHER = 0
"""Stands for the status where this client can't connect, or got something else than it asked for."""


class Answer(NamedTuple):
    """What became of a request."""

    status: int
    """RECEIVED: the bytes are in place. REPLACED: the object is not the one of that tag any more. Else they are to be
    asked for in another way."""
    tag: str | None
    """The object's entity tag, if the server told a strong one."""


class PlainHttp:
    """Receives ranges of what it is given signed URLs for. Safe to use from several threads."""

    def __init__(self, sign: Callable[[str], str], context: Callable[[], ssl.SSLContext]) -> None:
        """
        Args:
            sign: of an object's name, gives a URL that is good for EXPIRES_S.
            context: makes what https:// URLs are connected with.
        """
        self._sign = sign
        self._make_context = context
        self._context: ssl.SSLContext | None = None
        self._places: dict[str, _Place] = {}
        self._idle: list[_Line] = []
        self._lock = threading.Lock()
        self._signing = threading.Lock()
        self._closed = False
        # also when nobody uses it any more, and at the end of the process
        self._finish = weakref.finalize(self, _close, self._idle)

    def get(self, name: str, start: int, stop: int, into: memoryview, *, tag: str | None, limit: float) -> Answer:
        """Ask once for the bytes start..stop of an object, to be put into memory of that size.

        Args:
            name: as `sign` takes it.
            tag: the entity tag that the object has to have, if one is known.
            limit: seconds that it may take.

        Raises:
            OSError, http.client.HTTPException: the connection broke, the server did not answer in time, or says that
                it can't now. What `into` has then is undefined.
        """
        deadline = time.monotonic() + limit
        denied = None
        while True:
            try:
                place, fresh = self._place(name, denied)
            except Exception:  # noqa: BLE001 - each library has errors of its own; the general way tells what it is
                return Answer(_OTHER, None)
            answer = self._ask(place, start, stop, into, tag, deadline)
            if fresh or answer.status not in _DENIED:
                return answer
            denied = place

    def close(self) -> None:
        """Close the connections; those in use when they are given back."""
        with self._lock:
            self._closed = True
        self._finish()

    def _place(self, name: str, denied: _Place | None) -> tuple[_Place, bool]:
        """Where an object is, not by the URL that was denied, and whether that was found just now."""
        # one thread signs for all
        with self._signing:
            now = time.monotonic()
            place = self._places.get(name)
            if place is not None and place is not denied and now - place.since < _RENEW_S:
                return place, False
            place = _Place.of(self._sign(name), now)
            if len(self._places) >= _MOST_PLACES:
                self._places.clear()
            self._places[name] = place
            return place, True

    def _ask(self, place: _Place, start: int, stop: int, into: memoryview, tag: str | None, deadline: float) -> Answer:
        try:
            line = self._line(place)
        except OSError:
            line = None
        if line is None:
            return Answer(_OTHER, None)
        good = False
        try:
            answer, good = line.ask(place.request(start, stop, tag), start, stop, into, deadline)
        finally:
            if good:
                self._keep(line)
            else:
                line.close()
        return answer

    def _line(self, place: _Place) -> _Line | None:
        """A connection; None where one is not to be had directly. Raises OSError."""
        with self._lock:
            for at in reversed(range(len(self._idle))):
                if self._idle[at].server == place.server:
                    line = self._idle.pop(at)
                    if line.is_quiet():
                        return line
                    line.close()
            if place.scheme == "https" and self._context is None:
                self._context = self._make_context()
        if place.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(place.host):
            return None
        return _Line(place, self._context)

    def _keep(self, line: _Line) -> None:
        line.since = time.monotonic()
        with self._lock:
            if not self._closed:
                self._idle.append(line)
                # the oldest are first
                old = [idle for idle in self._idle if line.since - idle.since > _IDLE_S]
                del self._idle[: len(old)]
            else:
                old = [line]
        for dropped in old:
            dropped.close()


def _close(lines: list[_Line]) -> None:
    while lines:
        lines.pop().close()


class _Place(NamedTuple):
    """Where an object is, by a URL."""

    scheme: str
    host: str
    port: int
    authority: str
    target: str
    since: float
    """When the URL was made, by time.monotonic."""

    @classmethod
    def of(cls, url: str, since: float) -> _Place:
        parts = urlsplit(url)
        target = quote((parts.path or "/") + (f"?{parts.query}" if parts.query else ""), _IN_URLS)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        return cls(parts.scheme, parts.hostname or "", port, parts.netloc.rpartition("@")[2], target, since)

    @property
    def server(self) -> tuple[str, str, int]:
        return self.scheme, self.host, self.port

    def request(self, start: int, stop: int, tag: str | None) -> bytes:
        lines = [
            f"GET {self.target} HTTP/1.1",
            f"Host: {self.authority}",
            f"Range: bytes={start}-{stop - 1}",
            "Accept-Encoding: identity",
            "User-Agent: anyckpt",
        ]
        if tag is not None:
            lines.append(f"If-Match: {tag}")
        return "\r\n".join([*lines, "", ""]).encode("ascii")


class _Line:
    """A connection, for one request after the other.

    Attributes:
        server: scheme, host and port.
        since: when it was last used.
    """

    def __init__(self, place: _Place, context: ssl.SSLContext | None) -> None:
        """Connect. Raises OSError."""
        self.server = place.server
        self.since = 0.0
        self._socket = socket.create_connection((place.host, place.port), CONNECT_TIMEOUT_S)
        if place.scheme == "https" and context is not None:
            try:
                self._socket = context.wrap_socket(self._socket, server_hostname=place.host)
            except BaseException:
                self._socket.close()
                raise

    def is_quiet(self) -> bool:
        """Whether the server has not closed it, which is the one thing that it may say unasked."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return not poll.poll(0)

    def ask(self, request: bytes, start: int, stop: int, into: memoryview, deadline: float) -> tuple[Answer, bool]:
        """What became of a request, and whether the connection can be used again. Raises as PlainHttp.get."""
        self._socket.settimeout(READ_TIMEOUT_S)
        self._socket.sendall(request)
        # given a body's length, it reads from the buffer no more than that
        response = http.client.HTTPResponse(_Timed(self._socket, deadline), method="GET")  # type: ignore[arg-type]
        with response:
            response.begin()
            status, tag = response.status, response.getheader("ETag")
            if tag is not None and not tag.startswith('"'):
                tag = None  # a weak one can't be a condition
            if status in _AGAIN:
                raise OSError(f"the server answers {status} {response.reason}")
            said = response.getheader("Content-Range", "")
            # rclone's server says 200 with it
            if status not in (200, 206) or (
                response.length != stop - start
                or not said.startswith(f"bytes {start}-{stop - 1}/")
                or response.getheader("Content-Encoding", "identity") != "identity"
            ):
                return Answer(_OTHER if status == RECEIVED else status, tag), False
            if response.readinto(into[: stop - start]) != stop - start:
                raise http.client.IncompleteRead(b"")
            return Answer(RECEIVED, tag), not response.will_close

    def close(self) -> None:
        self._socket.close()


class _Timed(io.RawIOBase):
    """What a socket receives until a deadline, as http.client wants to have it."""

    def __init__(self, line: socket.socket, deadline: float) -> None:
        super().__init__()
        self._line = line
        self._deadline = deadline

    def makefile(self, mode: str) -> io.BufferedReader:  # noqa: ARG002 - http.client's own
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, into: memoryview) -> int:  # type: ignore[override]
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the answer does not come to an end")
        self._line.settimeout(min(left, READ_TIMEOUT_S))
        return self._line.recv_into(into)
