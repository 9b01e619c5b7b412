"""What a store must be for checkpoints to lie there, and what is said, soon and in a sentence, when it is not."""

from __future__ import annotations

import socket
import sys
import threading
import time
from pathlib import Path

import pytest

import ckpt
from ckpt.storage import objects
from ckpt.storage.objects import PART, ObjectStore
from ckpt_formats.errors import ConfigurationError, StoreError
from ckpt_formats.remote import configure
from ckpt_formats.runs import find_checkpoints
from ckpt_formats.urls import is_url, normal
from tests.cli.command import here
from tests.remote.conftest import options
from tests.remote.proxy import Proxy
from tests.remote.servers import free_port

SOON_S = 20.0
"""Seconds within which a store that can't be used is found out; the machine may be busy."""


def _refused(url: str) -> str:
    begin = time.monotonic()
    with pytest.raises(StoreError) as caught:
        ObjectStore(url).check()
    assert time.monotonic() - begin < SOON_S
    message = str(caught.value)
    assert url.split("/")[2] in message
    assert "\n" not in message
    assert "Traceback" not in message
    return message


def test_a_store_is_tried_before_the_training_and_nothing_is_left(any_store: str) -> None:
    store = ObjectStore(any_store)
    # rclone's server takes conditional puts and overwrites all the same
    assert store.check() is ("shelf" not in any_store)
    assert store.exclusive is ("shelf" not in any_store)
    assert not store.walk(any_store)


def test_a_store_that_overwrites_silently_is_told_once(rclone_port: int, caplog: pytest.LogCaptureFixture) -> None:
    objects._known.pop("s3://shelf", None)
    for _ in range(2):
        assert not ObjectStore("s3://shelf/told").check()
    (told,) = [record.message for record in caplog.records if "conditional puts" in record.message]
    assert told.startswith("s3://shelf: the store does not honour conditional puts (If-None-Match)")


def test_a_bucket_that_is_missing(moto_port: int) -> None:
    configure("s3://nowhere", options(moto_port))
    assert "no such bucket; create it" in _refused("s3://nowhere/run")
    for look in (find_checkpoints, ckpt.open):
        with pytest.raises(StoreError, match="s3://nowhere: the store has no such bucket"):
            look("s3://nowhere/run")
    result = here("ls", "s3://nowhere/run")
    assert result.exit_code == 2
    assert result.stderr == "Error: s3://nowhere: the store has no such bucket; create it, or correct the URL\n"


def test_credentials_that_are_wrong(rclone_port: int) -> None:
    configure("s3://shelf/wrong", options(rclone_port, "not-the-secret"))
    assert "does not accept the credentials (SignatureDoesNotMatch" in _refused("s3://shelf/wrong")


def test_credentials_that_are_missing(moto_port: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    configure("s3://bucket/anonymous", {"endpoint_url": f"http://127.0.0.1:{moto_port}"})
    assert "no credentials for the store were found" in _refused("s3://bucket/anonymous")


def test_an_endpoint_that_is_down() -> None:
    configure("s3://down", options(free_port()))
    assert "check that its endpoint is up" in _refused("s3://down/run")


def test_an_endpoint_that_keeps_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "_SOON_LIMIT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        configure("s3://silent", options(silent.getsockname()[1]))
        silent.settimeout(1)
        assert "does not answer as it should, also after 3 attempts (no answer in time)" in _refused("s3://silent/run")
        # and to clear up is tried once
        for _ in range(4):
            silent.accept()[0].close()
        with pytest.raises(TimeoutError):
            silent.accept()


def test_an_option_that_the_library_of_a_store_does_not_know(moto_port: int) -> None:
    for number, wrong in enumerate(
        ({"nonsense": 1}, {"client_kwargs": {"nonsense": 1}}, {"config_kwargs": {"nonsense": 1}})
    ):
        configure(url := f"s3://box/options/{number}", options(moto_port) | wrong)
        with pytest.raises(ConfigurationError, match=f"{url}: its options are not all known .*'nonsense'"):
            ObjectStore(url).check()


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    assert "pip install 'anyckpt[s3]'" in _refused("s3://unpacked/run")


def test_a_scheme_that_nobody_knows() -> None:
    assert "Protocol not known" in _refused("nonsense://somewhere/run")


def test_saving_to_a_url_is_refused_and_says_how_to_get_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for save in (ckpt.save, ckpt.async_save):
        with pytest.raises(StoreError, match="ckpt copy"):
            save({"step": 1}, "s3://bucket/run/step_1")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("s3://bucket/run/", "s3://bucket/run"),
        ("S3://bucket/run", "s3://bucket/run"),
        ("file:///data/run", "/data/run"),
        ("local:///data/run/", "/data/run"),
        ("/data/run/", "/data/run"),
    ],
)
def test_what_is_a_url_and_what_a_path(given: str, expected: str) -> None:
    assert normal(given) == expected
    assert is_url(given) is (given[:2].lower() == "s3")


def test_of_many_that_commit_the_same_place_one_wins(s3: str) -> None:
    store = ObjectStore(s3)
    assert store.exclusive
    won: list[int] = []
    start = threading.Barrier(8)

    def commit(number: int) -> None:
        start.wait(30)
        if store.create(f"{s3}/manifest.json", b"%d" % number):
            won.append(number)

    threads = [threading.Thread(target=commit, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(won) == 1
    assert store.read(f"{s3}/manifest.json") == b"%d" % won[0]


def test_a_commit_whose_answer_was_lost_is_known_as_ours(s3: str, proxy: Proxy) -> None:
    store = ObjectStore(s3)
    assert store.exclusive
    for kind in ("500 though done", "reset though done"):
        lost = iter([kind])
        proxy.fault = lambda method, _, lost=lost: next(lost, None) if method == "PUT" else None  # type: ignore[misc]
        assert store.create(f"{s3}/{kind[0]}", b"ours")
        assert not store.create(f"{s3}/{kind[0]}", b"theirs")
        assert proxy.done[kind] == 1


def _damage(proxy: Proxy, method: str, part: str) -> None:
    """Damage the next request of this kind."""
    proxy.done.clear()
    proxy.fault = lambda verb, path: "damage" if verb == method and part in path and not proxy.done["damage"] else None


def test_what_was_damaged_on_its_way_is_sent_again(s3: str, proxy: Proxy) -> None:
    # moto takes damaged bytes with their checksum; a store that looks at it refuses, and they are sent again as well
    store = ObjectStore(s3)
    assert store.exclusive
    _damage(proxy, "PUT", "/small")
    store.put(f"{s3}/small", b"a" * 1000)
    assert store.read(f"{s3}/small") == b"a" * 1000
    assert proxy.done["damage"] == 1
    _damage(proxy, "PUT", "/new")
    assert store.create(f"{s3}/new", b"b" * 1000)
    assert store.read(f"{s3}/new") == b"b" * 1000
    assert proxy.done["damage"] == 1
    _damage(proxy, "PUT", "partNumber=2")
    upload = store.upload(f"{s3}/large", 2 * PART, "what it is")
    upload.begin()
    for number in range(2):
        assert upload.send(number, b"%d" % number * PART)
    upload.finish()
    assert proxy.done["damage"] == 1
    assert upload.is_there()
    assert store.read(f"{s3}/large", PART - 1, PART + 1) == b"01"
    assert store.read(f"{s3}/large", 2 * PART - 1) == b"1"
