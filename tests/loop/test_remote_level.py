"""A level in an object store: a real S3 server on loopback, behind a proxy that makes it fail for a while."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ckpt
from ckpt.storage.objects import ObjectStore
from ckpt_formats.errors import CheckpointError, CheckpointNotFoundError
from ckpt_formats.remote import configure
from ckpt_formats.runs import State, find_checkpoints
from ckpt_formats.verify import verify
from tests.loop.test_levels import saved, train, until
from tests.remote.proxy import Proxy, proxied
from tests.remote.servers import KEY, SECRET, free_port, moto


@pytest.fixture(autouse=True)
def heard(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ckpt")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    with moto(tmp_path_factory.mktemp("moto")) as port, proxied(port) as proxy:
        configure("s3://box", options(proxy))
        ObjectStore("s3://box").call("s3://box", "create_bucket", Bucket="box")
        yield proxy


def options(server: Proxy) -> dict[str, Any]:
    return {
        "key": KEY,
        "secret": SECRET,
        "endpoint_url": f"http://127.0.0.1:{server.port}",
        "client_kwargs": {"region_name": "us-east-1"},
    }


def there(url: str) -> list[int]:
    try:
        return [item.step or 0 for item in find_checkpoints(url) if item.state is State.WHOLE]
    except CheckpointNotFoundError:
        return []


def test_a_run_flows_to_a_store_and_goes_on_from_there_when_the_disk_is_lost(server: Proxy, tmp_path: Path) -> None:
    tiers = [ckpt.Disk(every=1, keep=1), ckpt.Remote("s3://box/a", every=2, keep=2, options=options(server))]
    train(tmp_path / "run", 6, tiers=tiers)
    assert there("s3://box/a") == [4, 6]
    assert SECRET not in (tmp_path / "run" / "levels.json").read_text()
    shutil.rmtree(tmp_path / "run")
    assert train(tmp_path / "run", 7, tiers=tiers) == [7]
    assert there("s3://box/a") == [6, 7]


def test_what_is_damaged_in_a_store_is_moved_aside_and_its_step_is_saved_there_again(
    server: Proxy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiers = [ckpt.Disk(every=1, keep=1), ckpt.Remote("s3://box/c", every=2, options=options(server))]
    train(tmp_path / "run", 4, tiers=tiers)
    for again in range(2):
        shutil.rmtree(tmp_path / "run")
        store = ObjectStore("s3://box/c/step_00000004")
        (data,) = (entry.name for entry in store.walk(store.url) if entry.name.startswith("data/"))
        store.put(f"{store.url}/{data}", store.read(f"{store.url}/{data}")[:-5] + b"xxxxx")
        assert train(tmp_path / "run", 4, tiers=tiers) == [3, 4]
        assert there("s3://box/c") == [2, 4]
        assert verify("s3://box/c/step_00000004").intact
        # all that there was of it, for whoever wants to know what happened
        aside = f"s3://box/c/damaged/step_00000004.{again}"
        assert {damage.file for damage in verify(aside).damage} == {data}
        assert f"moved aside what is damaged: {aside}" in caplog.text


def test_a_store_that_fails_for_a_while_costs_the_training_nothing_and_gets_all_later(
    server: Proxy, tmp_path: Path
) -> None:
    during: list[int] = []

    def outage(loop: Any, step: int) -> None:
        if step == 3:
            until(lambda: there("s3://box/b") == [1, 2], "steps 1 and 2 to be there")
            server.fault = lambda *_: "503"
        if step == 8:
            # not always in the order of the steps; nothing that is due there was pruned
            until(lambda: {3, 4, 5, 6, 7} <= set(saved(tmp_path / "run")), "steps 3 to 7 to be committed")
            during.extend(saved(tmp_path / "run"))
            server.calm()

    tiers = [ckpt.Disk(every=1, keep=1), ckpt.Remote("s3://box/b", options=options(server))]
    try:
        train(tmp_path / "run", 9, outage, tiers=tiers)
    finally:
        server.calm()
    assert {3, 4, 5, 6, 7} <= set(during)
    assert there("s3://box/b") == list(range(1, 10))
    assert saved(tmp_path / "run") == [9]


@pytest.mark.parametrize("wrong", ["bucket", "endpoint"])
def test_a_store_that_can_not_be_used_is_an_error_before_the_training(
    wrong: str, server: Proxy, tmp_path: Path
) -> None:
    settings = options(server)
    if wrong == "endpoint":
        settings["endpoint_url"] = f"http://127.0.0.1:{free_port()}"
    url = "s3://nosuch/run" if wrong == "bucket" else "s3://box/run"
    steps: list[int] = []
    with pytest.raises(CheckpointError, match="s3://"):
        train(
            tmp_path / "run",
            2,
            lambda _, step: steps.append(step),
            tiers=[ckpt.Disk(every=1), ckpt.Remote(url, options=settings)],
        )
    assert steps == []
    # and the run is free again
    train(tmp_path / "run", 1, every=1)
