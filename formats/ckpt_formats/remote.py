"""Object stores through fsspec: ranges, small objects, listings, with retries and errors that people read.

Whatever fsspec reaches is named by a URL, such as s3://bucket/run/step_100; credentials and endpoints come from where
the file system's own library looks for them (environment, its configuration files), or from `configure`. fsspec and
what stands behind it are imported when the first URL is used. A single request that fails is tried again; what can't
get better by that is told at once.
"""

from __future__ import annotations

import contextlib
import errno
import random
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple, TypeVar

from ckpt_formats.backends import Backend, backend_of, brief, configure, final_error, response
from ckpt_formats.errors import CorruptionError, StoreError
from ckpt_formats.plain_http import RECEIVED, REPLACED, Answer, PlainHttp
from ckpt_formats.urls import normal

__all__ = ["PAUSES_S", "Entry", "RemoteFile", "Store", "configure", "response"]

T = TypeVar("T")

PAUSES_S = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4)
"""Seconds between attempts of one request, each give or take a half."""
REQUEST_TIMEOUT_S = 120.0
"""Seconds that an operation of one request may take; it moves a few MiB at most."""
LIST_TIMEOUT_S = 600.0
"""Seconds that a listing may take, which is a request per thousand objects."""
FIRST = 8 << 20
"""Bytes of a manifest and the like that are asked for at once."""
PIECE = 4 << 20
"""Bytes that a RemoteFile asks fsspec for at once, which has them in memory twice before they get to their place."""

_BUGS = (AssertionError, AttributeError, MemoryError, NameError, NotImplementedError, RecursionError, TypeError)


class Entry(NamedTuple):
    """An object, or what looks like a folder since objects' names begin with it."""

    name: str
    """Relative to what was listed."""
    size: int
    folder: bool
    modified: float | None
    """Seconds since the epoch by the store's clock; None where the store does not say."""


class Store:
    """The file system behind a URL. Cheap to make; safe to use from several threads. Large objects are written by
    ckpt.storage.objects.

    Every method takes whole URLs of this store, and raises StoreError when the store can't be reached, refuses, or
    keeps failing.

    Attributes:
        url: the URL that it was made for.
        scheme: of that URL.
        pauses: see PAUSES_S; fewer for whoever wants to know soon.
        limit: see REQUEST_TIMEOUT_S.
    """

    def __init__(self, url: str, pauses: tuple[float, ...] = PAUSES_S, limit: float = REQUEST_TIMEOUT_S) -> None:
        self.url = normal(url)
        self.scheme = self.url.partition("://")[0]
        self.pauses = pauses
        self.limit = limit

    @property
    def backend(self) -> Backend:
        """How this process reaches it."""
        return backend_of(self.url)

    @property
    def system(self) -> Any:
        """fsspec's file system."""
        return self.backend.system

    def key(self, url: str) -> str:
        """A URL as fsspec's file system names it: bucket/key."""
        return str(self.system._strip_protocol(url))

    def attempt(self, url: str, call: Callable[[], T]) -> T:
        """What `call` returns, called again with back-off as long as that may help.

        Raises:
            FileNotFoundError, FileExistsError: as `call` does.
            StoreError: it failed for good; the message says what about `url` and what to do.
        """
        pauses = [*self.pauses, None]
        for pause in pauses:
            try:
                return call()
            except _BUGS:
                raise
            except Exception as error:  # each library behind fsspec has errors of its own
                final = final_error(error, url)
                if final is None and isinstance(error, (FileNotFoundError, FileExistsError)):
                    raise
                if final is None and pause is None:
                    final = StoreError(
                        f"{url}: the store does not answer as it should, also after {len(pauses)} attempts "
                        f"({brief(error)}); check that its endpoint is up and can be reached from here",
                        path=url,
                    )
                if final is not None:
                    raise final from error
            if pause is not None:
                time.sleep(pause * random.uniform(0.5, 1.5))  # noqa: S311 - only spreads those who wait
        raise AssertionError("the last attempt returns or raises")

    def do(self, name: str, *arguments: Any, limit: float | None = None, **options: Any) -> Any:
        """An operation of fsspec's file system, such as "ls", which takes no more than `limit` seconds (by default
        the store's) where that can be said.

        Some libraries wait without limit for a server that takes no request's body.
        """
        system = self.system
        if not getattr(system, "async_impl", False):
            return getattr(system, name)(*arguments, **options)
        from fsspec.asyn import sync

        timeout = self.limit if limit is None else limit
        return sync(system.loop, getattr(system, f"_{name}"), *arguments, timeout=timeout, **options)

    def size(self, url: str) -> int:
        """Bytes of an object. Raises FileNotFoundError if there is none."""
        info = self.attempt(url, lambda: self.do("info", self.key(url)))
        if info.get("type") == "directory":
            raise FileNotFoundError(errno.ENOENT, "it is a folder", url)
        return int(info["size"])

    def read(self, url: str, start: int | None = None, stop: int | None = None) -> bytes:
        """Bytes start..stop of an object, or all; fewer where it ends before. Raises FileNotFoundError."""

        def call() -> bytes:
            try:
                return bytes(self.do("cat_file", self.key(url), start=start, end=stop))
            except Exception as error:
                if response(error)[0] == 416:
                    return b""  # the object ends before the range begins
                raise

        return self.attempt(url, call)

    def read_small(self, url: str, limit: int) -> bytes | None:
        """All bytes of an object; None if it has more than `limit`. Raises FileNotFoundError."""
        # one request for most; the size is asked for only when this is not all of it
        data = self.read(url, 0, FIRST)
        if len(data) == FIRST:
            size = self.size(url)
            if size > limit:
                return None
            data += b"".join(self.read(url, at, min(at + FIRST, size)) for at in range(FIRST, size, FIRST))
        return None if len(data) > limit else data

    def ls(self, url: str) -> list[Entry]:
        """What lies directly below a URL, sorted by name. Raises FileNotFoundError when nothing does."""
        key = self.key(url)

        def call() -> Any:
            return self.do("ls", key, detail=True, limit=LIST_TIMEOUT_S)

        return _entries(key, self.attempt(url, call))

    def walk(self, url: str) -> list[Entry]:
        """All objects below a URL, however deep, sorted by name; none when there are none."""
        key = self.key(url)

        def call() -> Any:
            return list(self.do("find", key, detail=True, limit=LIST_TIMEOUT_S).values())

        try:
            found = self.attempt(url, call)
        except FileNotFoundError:
            return []
        return [entry for entry in _entries(key, found) if not entry.folder]

    def put(self, url: str, data: bytes) -> None:
        """Have a small object, in place of one that is there; atomic where the store is one of objects."""
        self.attempt(url, lambda: self.do("pipe_file", self.key(url), data))

    def remove(self, url: str) -> None:
        """Remove an object, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self.attempt(url, lambda: self.do("rm_file", self.key(url)))


class RemoteFile:
    """An object of a store as a byte source."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._store = Store(url)
        self._tag: str | None = None
        """Entity tag of the object that was read first, which all that is read has to be of."""

    @property
    def name(self) -> str:
        return self._url

    def size(self) -> int:
        try:
            return self._store.size(self._url)
        except FileNotFoundError as error:
            raise self._missing() from error

    def read(self, start: int, stop: int, into: memoryview) -> None:
        if start == stop:
            return
        backend = self._store.backend
        plain = backend.plain
        if plain is None:
            self._read_by_fsspec(start, stop, into)
        elif not self._received(plain, start, stop, into):
            # says what is wrong if anything is
            self._read_by_fsspec(start, stop, into)
            backend.refused()

    def _received(self, plain: PlainHttp, start: int, stop: int, into: memoryview) -> bool:
        """Whether the bytes came by plain HTTP."""
        store, key = self._store, self._store.key(self._url)

        def call() -> Answer:
            return plain.get(key, start, stop, into, tag=self._tag, limit=store.limit)

        status, tag = store.attempt(self._url, call)
        if status == REPLACED or (status == RECEIVED and None not in (tag, self._tag) and tag != self._tag):
            raise CorruptionError(
                f"{self._url}: the object was replaced while it was read; read the checkpoint anew, or use another one",
                path=self._url,
            )
        if status == RECEIVED:
            self._tag = self._tag or tag
        return status == RECEIVED

    def _read_by_fsspec(self, start: int, stop: int, into: memoryview) -> None:
        for low in range(start, stop, PIECE):
            high = min(low + PIECE, stop)
            try:
                data = self._store.read(self._url, low, high)
            except FileNotFoundError as error:
                raise self._missing() from error
            if len(data) != high - low:
                raise CorruptionError(
                    f"{self._url}: the object ends at byte {low + len(data)}, but bytes up to {stop} are needed; it "
                    "was truncated: restore it or use another checkpoint",
                    path=self._url,
                )
            into[low - start : high - start] = data

    def _missing(self) -> CorruptionError:
        return CorruptionError(
            f"{self._url}: an object of the checkpoint is missing; restore it or use another checkpoint", path=self._url
        )

    def close(self) -> None:
        pass


def _entries(key: str, infos: Any) -> list[Entry]:
    prefix = key.strip("/") + "/"
    entries = []
    for info in infos:
        name = str(info["name"]).strip("/")
        folder = info.get("type") == "directory"
        # stores also list a folder's own placeholder, or the object of the very name
        if (name + "/").startswith(prefix) and name + "/" != prefix:
            entries.append(Entry(name[len(prefix) :], int(info.get("size") or 0), folder, _modified(info)))
    return sorted(entries)


def _modified(info: Mapping[str, Any]) -> float | None:
    for field in ("LastModified", "last_modified", "mtime", "updated", "modified", "created"):
        value = info.get(field)
        if isinstance(value, str):
            try:
                value = datetime.fromisoformat(value)
            except ValueError:
                continue
        if isinstance(value, datetime):
            return (value if value.tzinfo is not None else value.replace(tzinfo=UTC)).timestamp()
        if isinstance(value, (int, float)):
            return float(value)
    return None
