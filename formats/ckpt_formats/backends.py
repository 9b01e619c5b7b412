"""The file systems behind URLs: how each of fsspec's libraries is set up, and what its errors mean.

What is particular about a library stands here. fsspec and what stands behind it are imported when the first URL is
used.
"""

from __future__ import annotations

import os
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from ckpt_formats.errors import StoreError
from ckpt_formats.plain_http import CONNECT_TIMEOUT_S, EXPIRES_S, READ_TIMEOUT_S, PlainHttp
from ckpt_formats.urls import normal

__all__ = ["Backend", "backend_of", "brief", "configure", "final_error", "response"]

CONNECTIONS = 32
"""Most connections to one S3 endpoint."""
DETOUR_S = 60.0
"""Seconds for which plain HTTP is left alone after it was refused what fsspec then got."""

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

_options: dict[str, dict[str, Any]] = {}
_backends: dict[tuple[int, str, str], Backend] = {}
_lock = threading.Lock()


def configure(url: str, options: Mapping[str, Any]) -> None:
    """Use these options of fsspec's file system, such as {"endpoint_url": …}, for all below a URL, in this process."""
    at = normal(url)
    with _lock:
        _options[at] = dict(options)
        dropped = [_backends.pop(key) for key in list(_backends) if key[2] == at]
    for backend in dropped:
        backend.close()


class Backend:
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


def backend_of(url: str) -> Backend:
    """How this process reaches what is at a URL in its normal form; made at the first call."""
    with _lock:
        found = max((at for at in _options if _below(url, at)), key=len, default="")
        scheme = url.partition("://")[0]
        # connections do not survive a fork
        key = (os.getpid(), scheme, found)
        backend = _backends.get(key)
        if backend is None:
            backend = _backends[key] = Backend(url, scheme, _options.get(found, {}))
        return backend


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
    except (ValueError, TypeError) as error:
        raise StoreError(f"{url}: the URL or its options are wrong ({brief(error)})", path=url) from error
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


def final_error(error: Exception, url: str) -> StoreError | None:
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
            f"{bucket}: no credentials for the store were found ({brief(error)}); set those that its library reads, "
            "for S3 AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or a role"
        )
    elif code in _BAD_CREDENTIALS:
        why = f"{bucket}: the store does not accept the credentials ({code}: {message}); correct them"
    elif status in (401, 403) or isinstance(error, PermissionError):
        why = (
            f"{url}: the store denies access ({code or brief(error)}); check the credentials, and that they may read, "
            "write, list and delete there"
        )
    elif status is not None and (300 <= status < 500 or status == 501) and status not in _AGAIN:
        why = f"{url}: the store refuses the request ({code}: {message}); check the URL, region and endpoint"
    elif kind & {"ParamValidationError", "NoRegionError", "InvalidRegionError"} or isinstance(error, ValueError):
        why = f"{url}: the URL, or the configuration of the store, is wrong ({brief(error)})"
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


def brief(error: Exception) -> str:
    text = " ".join(str(error).split())
    text = text or ("no answer in time" if isinstance(error, TimeoutError) else type(error).__name__)
    return text if len(text) <= 200 else text[:200] + "…"
