"""Bytes of objects by plain HTTP with signed URLs: used where it can be, fsspec in its place where it can't."""

from __future__ import annotations

import datetime as dt
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest

import ckpt
from ckpt.storage.objects import ObjectStore
from ckpt.transfer.copy import copy
from ckpt_formats import backends
from ckpt_formats.errors import CorruptionError, StoreError
from ckpt_formats.plain_http import RECEIVED, PlainHttp
from ckpt_formats.remote import RemoteFile, Store, configure
from tests.crash.runs import loads
from tests.remote.conftest import options
from tests.remote.proxy import Proxy
from tests.remote.servers import rclone, web

DATA = os.urandom(100_000)


def _read(url: str, start: int = 7, stop: int = 90_007) -> bytes:
    into = bytearray(stop - start)
    RemoteFile(url).read(start, stop, memoryview(into))
    return bytes(into)


@pytest.fixture
def thing(s3: str, proxy: Proxy) -> str:
    """The URL of an object, behind the proxy."""
    ObjectStore(s3).put(f"{s3}/thing", DATA)
    return f"{s3}/thing"


def test_data_of_a_load_comes_by_plain_http_and_each_byte_once(s3: str, proxy: Proxy, saved: Path) -> None:
    copy(saved / "step_1", f"{s3}/step_1")
    proxy.got.clear()
    assert loads(f"{s3}/step_1", 1, thoroughly=False)  # type: ignore[arg-type]
    assert proxy.plain
    sizes = {file.name: file.stat().st_size for file in (saved / "step_1" / "data").iterdir()}
    for path, nbytes in proxy.got.items():
        assert nbytes <= sizes.get(os.path.basename(path), nbytes)


def test_a_file_that_many_threads_begin_to_read_is_looked_at_once(s3: str, proxy: Proxy, saved: Path) -> None:
    copy(saved / "step_1", f"{s3}/step_1")
    heads: list[str] = []
    proxy.fault = lambda method, path: heads.append(path) if method == "HEAD" and "/data/" in path else None
    assert loads(f"{s3}/step_1", 1, thoroughly=False)  # type: ignore[arg-type]
    assert len(heads) == len(set(heads)) >= 1


@pytest.mark.parametrize("kind", ["500", "503", "reset", "reset though done", "cut answer"])
def test_what_fails_once_is_tried_again_by_the_same_way(thing: str, proxy: Proxy, kind: str) -> None:
    faults = iter([kind, kind])
    proxy.fault = lambda *_: next(faults, None)
    assert _read(thing) == DATA[7:90_007]
    assert proxy.done[kind] == 2
    assert proxy.plain
    assert Store(thing).backend.plain is not None


def test_what_keeps_failing_is_told_with_the_object_and_without_its_signature(thing: str, proxy: Proxy) -> None:
    store = Store(thing, pauses=(0.001, 0.001))
    file = RemoteFile(thing)
    file._store = store
    proxy.fault = lambda *_: "503"
    with pytest.raises(StoreError, match=r"also after 3 attempts \(the server answers 503"):
        file.read(0, 10, memoryview(bytearray(10)))
    with pytest.raises(StoreError) as caught:
        file.read(0, 10, memoryview(bytearray(10)))
    assert thing in str(caught.value)
    assert "Signature" not in str(caught.value)


def test_a_url_that_is_denied_is_signed_anew(thing: str, proxy: Proxy) -> None:
    first: list[str] = []

    def deny_first(_: str, path: str) -> str | None:
        first.append(path)
        return "403" if path == first[0] else None

    assert _read(thing) == DATA[7:90_007]
    proxy.fault = deny_first
    # a signature is of a second
    time.sleep(1.1)
    assert _read(thing) == DATA[7:90_007]
    assert proxy.done["403"] == 1
    assert len(set(first)) == 2
    assert Store(thing).backend.plain is not None


def test_an_expired_signature_does_not_stop_a_reader(
    rclone_port: int, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(backends, "EXPIRES_S", 1)
    folder = f"s3://shelf/{request.node.name}"
    configure(folder, options(rclone_port))
    url = f"{folder}/thing"
    ObjectStore(folder).put(url, DATA)
    file, into = RemoteFile(url), bytearray(100)
    file.read(0, 100, memoryview(into))
    plain = Store(url).backend.plain
    assert plain is not None
    place = plain._places[Store(url).key(url)]
    deadline = time.monotonic() + 30
    while plain._ask(place, 0, 100, memoryview(into), None, deadline).status == RECEIVED:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    file.read(100, 200, memoryview(into))
    assert bytes(into) == DATA[100:200]
    assert Store(url).backend.plain is plain


def test_where_signed_urls_are_refused_fsspec_reads_and_they_are_left_alone_for_a_while(
    thing: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy.fault = lambda _, path: "403" if "X-Amz-Signature" in path else None
    assert _read(thing) == DATA[7:90_007]
    assert proxy.done["403"] == 1
    assert Store(thing).backend.plain is None
    assert _read(thing) == DATA[7:90_007]
    assert proxy.done["403"] == 1
    backend = Store(thing).backend
    monkeypatch.setattr(backend, "_detour", 0.0)
    proxy.calm()
    assert _read(thing) == DATA[7:90_007]
    assert proxy.plain == 1


def test_what_can_not_be_signed_is_read_by_fsspec(thing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise NotImplementedError

    monkeypatch.setattr(Store(thing).system, "_url", refuse)
    assert _read(thing) == DATA[7:90_007]


@pytest.mark.parametrize(
    "more",
    [
        {"requester_pays": True},
        {"s3_additional_kwargs": {"SSECustomerAlgorithm": "AES256"}},
        {"version_aware": True},
        {"config_kwargs": {"proxies": {"http": "http://127.0.0.1:1"}}},
    ],
)
def test_what_a_signed_url_does_not_say_is_read_by_fsspec(more: dict[str, Any]) -> None:
    configure("s3://particular", options(1) | more)
    assert Store("s3://particular").backend.plain is None


def test_a_proxy_in_the_environment_is_not_passed_by(thing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Store(thing).backend.plain
    assert plain is not None
    into, key = memoryview(bytearray(10)), Store(thing).key(thing)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert plain.get(key, 0, 10, into, tag=None, limit=30).status != RECEIVED
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert plain.get(key, 0, 10, into, tag=None, limit=30).status == RECEIVED
    assert bytes(into) == DATA[:10]


def test_credentials_that_are_wrong_or_a_bucket_or_object_that_is_not_there(rclone_port: int, moto_port: int) -> None:
    into = memoryview(bytearray(10))
    configure("s3://shelf/wrong", options(rclone_port, "not-the-secret"))
    with pytest.raises(StoreError, match="s3://shelf: the store does not accept the credentials"):
        RemoteFile("s3://shelf/wrong/thing").read(0, 10, into)
    configure("s3://nowhere", options(moto_port))
    with pytest.raises(StoreError, match="s3://nowhere: the store has no such bucket"):
        RemoteFile("s3://nowhere/thing").read(0, 10, into)
    with pytest.raises(CorruptionError, match="s3://bucket/no/thing: an object of the checkpoint is missing"):
        RemoteFile("s3://bucket/no/thing").read(0, 10, into)


def test_an_object_that_is_shorter_than_it_was(thing: str) -> None:
    with pytest.raises(CorruptionError, match="the object ends at byte 100000, but bytes up to 100001 are needed"):
        _read(thing, 99_990, 100_001)
    with pytest.raises(CorruptionError, match="the object ends at byte 100005, but bytes up to 100010 are needed"):
        _read(thing, 100_005, 100_010)


def test_an_object_that_is_replaced_while_it_is_read(thing: str) -> None:
    file, into = RemoteFile(thing), memoryview(bytearray(10))
    file.read(0, 10, into)
    ObjectStore(thing).put(thing, DATA[::-1])
    with pytest.raises(CorruptionError, match="thing: the object was replaced while it was read"):
        file.read(10, 20, into)
    assert _read(thing, 0, 10) == DATA[::-1][:10]


def test_a_connection_that_the_server_closed_meanwhile(thing: str, proxy: Proxy) -> None:
    assert _read(thing) == DATA[7:90_007]
    plain = Store(thing).backend.plain
    assert plain is not None
    (line,) = plain._idle
    line._socket.shutdown(socket.SHUT_RDWR)
    assert _read(thing) == DATA[7:90_007]
    assert proxy.plain == 2
    assert plain._idle != [line]


@contextmanager
def _answering(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that does this to each connection. Gives a URL."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    line, _ = listener.accept()
                except OSError:
                    return
                with line:
                    try:
                        line.recv(1 << 16)
                        answer(line)
                    except OSError:
                        pass

        thread = threading.Thread(target=serve, name="answering")
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/thing"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(60)


def test_an_answer_that_never_ends_is_given_up() -> None:
    def trickle(line: socket.socket) -> None:
        line.sendall(b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-999/1000\r\nContent-Length: 1000\r\n\r\n")
        while True:
            line.sendall(b"a")
            time.sleep(0.02)

    with _answering(trickle) as url:
        plain = PlainHttp(str, _no_tls)
        begin = time.monotonic()
        with pytest.raises(TimeoutError):
            plain.get(url, 0, 1000, memoryview(bytearray(1000)), tag=None, limit=0.5)
        # 1000 bytes would take 20 s
        assert time.monotonic() - begin < 15
        plain.close()


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n0123456789",
        b"HTTP/1.1 206 OK\r\nContent-Range: bytes 1-10/20\r\nContent-Length: 10\r\n\r\n0123456789",
        b"HTTP/1.1 206 OK\r\nContent-Range: bytes 0-9/20\r\nContent-Length: 11\r\n\r\n01234567890",
        b"HTTP/1.1 206 OK\r\nContent-Range: bytes 0-9/10\r\nContent-Encoding:x\r\nContent-Length: 10\r\n\r\n0123456789",
        b"HTTP/1.1 307 Elsewhere\r\nLocation: http://127.0.0.1/\r\nContent-Length: 0\r\n\r\n",
    ],
)
def test_only_the_very_bytes_that_were_asked_for_are_an_answer(answer: bytes) -> None:
    with _answering(lambda line: line.sendall(answer)) as url:
        plain = PlainHttp(str, _no_tls)
        assert plain.get(url, 0, 10, memoryview(bytearray(10)), tag=None, limit=30).status != RECEIVED
        assert not plain._idle
        plain.close()


def _no_tls() -> Any:
    raise AssertionError("http:// needs no TLS")


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate of this machine that it signed itself, and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    folder = tmp_path_factory.mktemp("certificate")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, "localhost")])
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return folder / "cert.pem", folder / "key.pem"


def test_tls_by_the_authority_that_the_options_name(
    certificate: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cert, key = certificate
    with rclone(tmp_path, "--cert", str(cert), "--key", str(key)) as port:
        (tmp_path / "objects" / "shelf" / "thing").write_bytes(DATA)
        given = options(port) | {"endpoint_url": f"https://127.0.0.1:{port}"}
        trusting = given | {"client_kwargs": {"region_name": "us-east-1", "verify": str(cert)}}
        configure("s3://shelf/thing", trusting)
        assert _read("s3://shelf/thing") == DATA[7:90_007]
        assert Store("s3://shelf/thing").backend.plain is not None
        # an authority that nobody knows
        configure("s3://shelf/thing", given)
        plain = Store("s3://shelf/thing").backend.plain
        assert plain is not None
        into = memoryview(bytearray(10))
        assert plain.get("shelf/thing", 0, 10, into, tag=None, limit=30).status != RECEIVED
        configure("s3://shelf/thing", {})


def test_a_checkpoint_on_a_web_server(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read-only, without listings; by what serves ranges."""
    with web(saved, tmp_path / "web.log") as port:
        url = f"http://127.0.0.1:{port}/step_2"
        # what it refuses is not asked for again
        monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("waits to try again"))
        with ckpt.open(url) as checkpoint:
            assert checkpoint.step == 2
        assert loads(url, 2, thoroughly=False)  # type: ignore[arg-type]
        assert Store(url).backend.plain is not None
        configure(url, {})
