"""Object stores through fsspec: ranges, small objects, listings, with retries and errors that people read.

Whatever fsspec reaches is named by a URL, such as s3://bucket/run/step_100; credentials and endpoints come from where
the file system's own library looks for them (environment, its configuration files), or from `configure`. fsspec and
what stands behind it are imported when the first URL is used. A single request that fails is tried again; what can't
get better by that is told at once.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import re
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from typing import Any, NamedTuple, TypeVar

from ckpt_formats.errors import CorruptionError, StoreError
from ckpt_formats.plain_http import (
    CONNECT_TIMEOUT_S,
    EXPIRES_S,
    READ_TIMEOUT_S,
    RECEIVED,
    REPLACED,
    Answer,
    PlainHttp,
)

__all__ = ["PAUSES_S", "Entry", "RemoteFile", "Store", "configure", "folder_of", "is_url", "normal", "response", "tidy"]

T = TypeVar("T")

PAUSES_S = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4)
"""Seconds between attempts of one request, each give or take a half."""
REQUEST_TIMEOUT_S = 120.0
"""Seconds that an operation of one request may take; it moves a few MiB at most."""
LIST_TIMEOUT_S = 600.0
"""Seconds that a listing may take, which is a request per thousand objects."""
CONNECTIONS = 32
"""Most connections to one S3 endpoint."""
FIRST = 8 << 20
"""Bytes of a manifest and the like that are asked for at once."""
PIECE = 4 << 20
"""Bytes that a RemoteFile asks fsspec for at once, which has them in memory twice before they get to their place."""
DETOUR_S = 60.0
"""Seconds for which plain HTTP is left alone after it was refused what fsspec then got."""

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_LOCAL = ("file", "local")
_PACKAGES = {"s3": "anyckpt[s3]", "s3a": "anyckpt[s3]", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}
_BAD_CREDENTIALS = {
    "AuthorizationHeaderMalformed",
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidToken",
    "RequestTimeTooSkewed",
    "SignatureDoesNotMatch",
}
_AGAIN = {404, 408, 409, 412, 425, 429}
"""Statuses of the 400s after which the same request may succeed, or that say what is there."""
_BUGS = (AssertionError, AttributeError, MemoryError, NameError, NotImplementedError, RecursionError, TypeError)


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether a path names a place in a store: a URL of any scheme but file:// and local://."""
    match = _SCHEME.match(os.fspath(path))
    return match is not None and match.group(1).lower() not in _LOCAL


def tidy(path: str | os.PathLike[str]) -> str:
    """A path as it is, a file:// URL as a path, any other URL without slashes at its end."""
    text = os.fspath(path)
    match = _SCHEME.match(text)
    if match is None:
        return text
    if match.group(1).lower() in _LOCAL:
        return text[match.end() :]
    return match.group(0).lower() + text[match.end() :].rstrip("/")


def normal(path: str | os.PathLike[str]) -> str:
    """The same, with paths made absolute."""
    text = tidy(path)
    return text if is_url(text) else os.path.abspath(text)


def folder_of(path: str | os.PathLike[str]) -> str:
    """The same of what has to be a folder. Raises StoreError for a URL."""
    text = normal(path)
    if is_url(text):
        raise StoreError(
            f"{text}: a checkpoint is written to a folder first, and goes to a store from there; write it to a folder, "
            "then use `ckpt copy`, or tiers=[ckpt.Remote(URL)] of a Checkpointer",
            path=text,
        )
    return text


class Entry(NamedTuple):
    """An object, or what looks like a folder since objects' names begin with it."""

    name: str
    """Relative to what was listed."""
    size: int
    folder: bool
    modified: float | None
    """Seconds since the epoch by the store's clock; None where the store does not say."""


_options: dict[str, dict[str, Any]] = {}
_backends: dict[tuple[int, str, str], _Backend] = {}
_lock = threading.Lock()


def configure(url: str, options: Mapping[str, Any]) -> None:
    """Use these options of fsspec's file system, such as {"endpoint_url": …}, for all below a URL, in this process."""
    at = normal(url)
    with _lock:
        _options[at] = dict(options)
        dropped = [_backends.pop(key) for key in list(_backends) if key[2] == at]
    for backend in dropped:
        backend.close()


class _Backend:
    """How the objects of a store are reached: by fsspec's file system, and where that can be done by plain HTTP."""

    def __init__(self, url: str, scheme: str, options: Mapping[str, Any]) -> None:
        self.system = _make(url, scheme, options)
        sign = _signer(self.system, scheme, options)
        self._plain = None if sign is None else PlainHttp(sign, partial(_tls, self.system))
        self._detour = 0.0

    @property
    def plain(self) -> PlainHttp | None:
        """None where it can't be used, or was refused just now."""
        return self._plain if time.monotonic() >= self._detour else None

    def refused(self) -> None:
        """Plain HTTP was refused what fsspec then got: leave it alone for a while."""
        self._detour = time.monotonic() + DETOUR_S

    def close(self) -> None:
        if self._plain is not None:
            self._plain.close()


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
    def backend(self) -> _Backend:
        """How this process reaches it."""
        with _lock:
            found = max((at for at in _options if _below(self.url, at)), key=len, default="")
            # connections do not survive a fork
            key = (os.getpid(), self.scheme, found)
            backend = _backends.get(key)
            if backend is None:
                backend = _backends[key] = _Backend(self.url, self.scheme, _options.get(found, {}))
            return backend

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
                final = _final(error, url)
                if final is None and isinstance(error, (FileNotFoundError, FileExistsError)):
                    raise
                if final is None and pause is None:
                    final = StoreError(
                        f"{url}: the store does not answer as it should, also after {len(pauses)} attempts "
                        f"({_brief(error)}); check that its endpoint is up and can be reached from here",
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


def _below(url: str, prefix: str) -> bool:
    return url == prefix or url.startswith(prefix.rstrip("/") + "/")


def _make(url: str, scheme: str, options: Mapping[str, Any]) -> Any:
    """The file system for a scheme, without retries and caches of its own: a stale listing would hide a checkpoint."""
    try:
        import fsspec
        from fsspec.config import conf

        settings: dict[str, Any] = {**conf.get(scheme, {}), **options}
        settings["use_listings_cache"] = False
        settings["skip_instance_cache"] = True
        if scheme in ("s3", "s3a"):
            settings["config_kwargs"] = {
                "connect_timeout": CONNECT_TIMEOUT_S,
                "read_timeout": READ_TIMEOUT_S,
                "max_pool_connections": CONNECTIONS,
                "retries": {"mode": "standard", "total_max_attempts": 1},
                # what is read is verified by whoever reads it, and some stores answer with checksums of former bytes
                "response_checksum_validation": "when_required",
                **settings.get("config_kwargs", {}),
            }
        system = fsspec.filesystem(scheme, **settings)
    except ImportError as error:
        package = _PACKAGES.get(scheme, f"what fsspec needs for {scheme}://")
        why = f"{url}: {scheme}:// needs a package that is missing; pip install '{package}'"
        raise StoreError(why, path=url) from error
    except ValueError as error:
        raise StoreError(f"{url}: the URL or its options are wrong ({_brief(error)})", path=url) from error
    if scheme in ("s3", "s3a"):
        system.retries = 1
    return system


def _signer(system: Any, scheme: str, options: Mapping[str, Any]) -> Callable[[str], str] | None:
    """What makes a URL, good for EXPIRES_S, of an object's name; None where plain HTTP would not do as fsspec does."""
    if scheme in ("http", "https"):
        from fsspec.config import conf

        return None if options or conf.get(scheme) else str
    if scheme not in ("s3", "s3a"):
        return None
    # what goes with every request, and other ways to the server
    if system.s3_additional_kwargs or system.req_kw or system.version_aware:
        return None
    if {"proxies", "proxies_config", "client_cert"} & set(system.config_kwargs):
        return None

    def sign(key: str) -> str:
        from fsspec.asyn import sync

        sync(system.loop, system.set_session, timeout=READ_TIMEOUT_S)
        client = sync(system.loop, system.get_s3, system.split_path(key)[0], timeout=READ_TIMEOUT_S)
        # by default URLs are signed in a way that newer buckets do not take
        client.meta.events.register_first("choose-signer.s3.GetObject", _by_version_4, unique_id="anyckpt")
        return str(sync(system.loop, system._url, key, expires=EXPIRES_S, timeout=READ_TIMEOUT_S))

    return sign


def _by_version_4(signature_version: Any, **_: Any) -> str | None:
    """Keep what is about to be replaced by a former version."""
    return "s3v4-query" if signature_version in ("v4-query", "s3v4-query") else None


def _tls(system: Any) -> ssl.SSLContext:
    """What https:// is connected with, by the options of S3's file system."""
    verify = getattr(system, "client_kwargs", {}).get("verify")
    if verify is None and getattr(system, "session", None) is not None:
        verify = system.session.get_config_variable("ca_bundle")
    context = ssl.create_default_context(cafile=verify if isinstance(verify, str) else None)
    if verify is False:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


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


def _final(error: Exception, url: str) -> StoreError | None:
    """What an error means if trying again can't help, else None."""
    bucket = "/".join(url.split("/")[:3])
    status, code, message = response(error)
    kind = {item.__name__ for item in type(error).__mro__}
    if isinstance(error, StoreError):
        return error
    if code == "NoSuchBucket":
        why = f"{bucket}: the store has no such bucket; create it, or correct the URL"
    elif kind & {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "DefaultCredentialsError"}:
        why = (
            f"{bucket}: no credentials for the store were found ({_brief(error)}); set those that its library reads, "
            "for S3 AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or a role"
        )
    elif code in _BAD_CREDENTIALS:
        why = f"{bucket}: the store does not accept the credentials ({code}: {message}); correct them"
    elif status in (401, 403) or isinstance(error, PermissionError):
        why = (
            f"{url}: the store denies access ({code or _brief(error)}); check the credentials, and that they may read, "
            "write, list and delete there"
        )
    elif status is not None and (300 <= status < 500 or status == 501) and status not in _AGAIN:
        why = f"{url}: the store refuses the request ({code}: {message}); check the URL, region and endpoint"
    elif kind & {"ParamValidationError", "NoRegionError", "InvalidRegionError"} or isinstance(error, ValueError):
        why = f"{url}: the URL, or the configuration of the store, is wrong ({_brief(error)})"
    else:
        return None
    return StoreError(why, path=url)


def response(error: BaseException | None) -> tuple[int | None, str, str]:
    """Status, code and message of the store's answer that an error stands for."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict) and isinstance(response.get("Error"), dict):
            code = str(response["Error"].get("Code", ""))
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            if status is None and code.isdecimal():
                status = int(code)
            return status, code, str(response["Error"].get("Message", ""))
        if type(error).__name__ == "ClientResponseError":  # aiohttp's, of web servers
            return int(error.status), str(error.status), str(error.message)  # type: ignore[attr-defined]
        error = error.__cause__
    return None, "", ""


def _brief(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + "…"
