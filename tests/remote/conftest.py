"""Real S3 servers, one of each kind for all tests, and a proxy before moto's."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ckpt.storage.objects import ObjectStore
from ckpt_formats.remote import configure
from tests.crash.runs import saver, state
from tests.remote.proxy import Proxy, proxied
from tests.remote.servers import KEY, SECRET, moto, rclone


def options(port: int, secret: str = SECRET) -> dict[str, Any]:
    """For s3fs and a server on this machine."""
    return {
        "endpoint_url": f"http://127.0.0.1:{port}",
        "key": KEY,
        "secret": secret,
        "client_kwargs": {"region_name": "us-east-1"},
    }


@pytest.fixture(scope="session")
def moto_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with moto(tmp_path_factory.mktemp("moto")) as port:
        configure("s3://bucket", options(port))
        ObjectStore("s3://bucket").call("s3://bucket", "create_bucket", Bucket="bucket")
        yield port


@pytest.fixture(scope="session")
def rclone_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with rclone(tmp_path_factory.mktemp("rclone")) as port:
        configure("s3://shelf", options(port))
        yield port


@pytest.fixture(params=["moto", "rclone", "memory"])
def any_store(request: pytest.FixtureRequest) -> str:
    """The URL of a new run, on each kind of store in turn."""
    return _new_run(request)


@pytest.fixture(params=["moto", "memory"])
def a_store(request: pytest.FixtureRequest) -> str:
    """The same for S3 and what is not S3."""
    return _new_run(request)


def _new_run(request: pytest.FixtureRequest) -> str:
    if request.param == "memory":
        return f"memory://bucket/{uuid.uuid4().hex}/run"
    request.getfixturevalue(f"{request.param}_port")
    return f"s3://{'bucket' if request.param == 'moto' else 'shelf'}/{uuid.uuid4().hex}/run"


@pytest.fixture
def s3(moto_port: int) -> str:
    """The URL of a new run, on the server that honours conditional puts."""
    return f"s3://bucket/{uuid.uuid4().hex}/run"


@pytest.fixture
def proxy(moto_port: int, s3: str) -> Iterator[Proxy]:
    """What the requests for `s3` go through."""
    with proxied(moto_port) as proxy:
        configure(s3, options(proxy.port))
        yield proxy


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with steps 1, 2 and 3."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    for step in (1, 2, 3):
        saver().save(state(step), folder / f"step_{step}")
    return folder
