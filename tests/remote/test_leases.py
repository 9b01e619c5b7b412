"""Who uses a checkpoint in a store keeps it, and nobody keeps it for ever; what is recorded beside it is not lost."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

import ckpt
from ckpt.levels.policies import BestN
from ckpt.levels.prune import prune
from ckpt.storage.facts import update_facts
from ckpt.storage.objects import PART, ObjectStore
from ckpt.transfer.copy import copy, copy_run
from ckpt_formats import leases
from ckpt_formats.errors import CheckpointNotFoundError
from ckpt_formats.facts import read_facts
from ckpt_formats.locks import alone, held, hold
from ckpt_formats.runs import find_checkpoints
from tests.crash.runs import loads
from tests.remote.proxy import Proxy


@pytest.fixture
def run(a_store: str, saved: Path) -> str:
    copy_run(saved, a_store)
    return a_store


def _steps(run: str) -> list[int | None]:
    return [item.step for item in find_checkpoints(run)]


def _objects(run: str) -> set[str]:
    return {entry.name.rpartition("/")[2].partition("-")[0] for entry in ObjectStore(run).walk(run)}


def test_what_the_policy_does_not_keep_goes(run: str) -> None:
    report = prune(run, 1, dry_run=True)
    assert [item.step for item in report.removed] == [1, 2]
    assert _steps(run) == [1, 2, 3]
    freed = sum(item.bytes for item in find_checkpoints(run) if item.step != 3)
    report = prune(run, 1)
    assert [(item.step, item.why) for item in report.kept] == [(3, "newest")]
    assert report.bytes == freed
    assert not report.failed
    assert {entry.name.partition("/")[0] for entry in ObjectStore(run).walk(run)} == {"step_3"}
    assert loads(f"{run}/step_3", 3)  # type: ignore[arg-type]


def test_tags_pins_and_metrics_decide(run: str) -> None:
    update_facts(f"{run}/step_1", lambda facts: facts.changed(pinned=True))
    update_facts(f"{run}/step_2", lambda facts: facts.changed(metrics={"loss": 0.1}))
    prune(run, BestN(1, "loss"))
    assert _steps(run) == [1, 2, 3]
    update_facts(f"{run}/step_1", lambda facts: facts.changed(pinned=False))
    prune(run, 1)
    assert _steps(run) == [3]


def test_what_is_open_is_not_pruned(run: str) -> None:
    with ckpt.open(f"{run}/step_1") as checkpoint:
        assert [item.why for item in prune(run, 1).kept] == ["in use", "newest"]
        assert checkpoint["weight"].shape == (30, 700)
    prune(run, 1)
    assert _steps(run) == [3]


def test_many_hold_it_and_nobody_has_it_alone_meanwhile(run: str) -> None:
    path = f"{run}/step_1"
    with held(path), held(path), alone(path) as free:
        assert not free
    with alone(path) as free:
        assert free
        with alone(path) as second:
            assert not second
    assert not _objects(run) & {".held", ".going"}


def test_who_comes_while_it_is_removed_is_told_that_it_is_not_there(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "PATIENCE_S", 0.3)
    with alone(f"{run}/step_1") as free:
        assert free
        with pytest.raises(CheckpointNotFoundError), held(f"{run}/step_1"):
            pass
        with pytest.raises(CheckpointNotFoundError, match="being removed"):
            ckpt.open(f"{run}/step_1")
        ObjectStore(run).remove(f"{run}/step_1/manifest.json")
        with pytest.raises(CheckpointNotFoundError), held(f"{run}/step_1"):
            pass
    assert not _objects(run) & {".held", ".going"}


def test_between_users_and_pruners_at_once_nothing_is_read_that_goes(s3: str, saved: Path) -> None:
    copy_run(saved, s3)
    failures: list[Exception] = []
    start = threading.Barrier(5)

    def read() -> None:
        start.wait(30)
        try:
            with ckpt.open(f"{s3}/step_1") as checkpoint:
                for _ in range(5):
                    checkpoint["weight"][:]
        except CheckpointNotFoundError:
            pass  # it was gone before it was used
        except Exception as error:  # noqa: BLE001 - told by the test
            failures.append(error)

    def clear() -> None:
        start.wait(30)
        prune(s3, 1)

    threads = [threading.Thread(target=work) for work in (read, read, read, clear, clear)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not failures
    prune(s3, 1)
    assert _steps(s3) == [3]


def test_a_user_that_died_counts_no_more_after_a_while(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # as a killed process leaves it: a lease that nobody renews or removes
    with ExitStack() as stack:
        monkeypatch.setattr(leases, "_renew", lambda *_: None)
        hold(f"{run}/step_1")
        stack.callback(monkeypatch.undo)
        assert [item.step for item in prune(run, 1).removed] == [2]
        # the store's clock counts whole seconds
        monkeypatch.setattr(leases, "LEASE_S", 1.0)
        deadline = time.monotonic() + 30
        while _steps(run) != [3] and time.monotonic() < deadline:
            prune(run, 1, grace=0)
            time.sleep(0.2)
    assert _steps(run) == [3]


def test_a_lease_is_renewed_as_long_as_it_is_needed(s3: str, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy(saved / "step_1", f"{s3}/step_1")
    monkeypatch.setattr(leases, "LEASE_S", 2.0)
    with held(f"{s3}/step_1"):
        deadline = time.monotonic() + 4.5
        while time.monotonic() < deadline:
            with alone(f"{s3}/step_1") as free:
                assert not free
            time.sleep(0.5)


def test_who_may_not_write_reads_all_the_same(s3: str, proxy: Proxy, saved: Path) -> None:
    copy(saved / "step_1", f"{s3}/step_1")
    proxy.fault = lambda method, _: "403" if method in ("PUT", "DELETE") else None
    assert loads(f"{s3}/step_1", 1)  # type: ignore[arg-type]
    assert proxy.done["403"]


def test_facts_that_many_record_at_once_are_all_there(s3: str, saved: Path) -> None:
    copy(saved / "step_1", f"{s3}/step_1")

    def tag(number: int) -> None:
        update_facts(f"{s3}/step_1", lambda facts: facts.changed(tags=[f"tag{number}"]))

    threads = [threading.Thread(target=tag, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert read_facts(f"{s3}/step_1").tags == tuple(f"tag{number}" for number in range(6))


def test_debris_goes_when_nobody_has_touched_it_for_a_while(run: str) -> None:
    store = ObjectStore(run)
    store.remove(f"{run}/step_2/manifest.json")
    store.put(f"{run}/step_3/data/00009-0123456789abcdef.safetensors", b"left by an attempt")
    store.put(f"{run}/step_3/notes.txt", b"mine")
    store.put(f"{run}/mine/notes.txt", b"mine")
    report = prune(run)
    assert not report.debris
    assert len(report.recent) == 2
    report = prune(run, grace=-5)
    assert len(report.debris) == 2
    assert _steps(run) == [1, 3]
    names = {entry.name for entry in store.walk(run)}
    assert {"step_3/notes.txt", "mine/notes.txt"} <= names
    assert not any("0123456789abcdef" in name or name.startswith("step_2") for name in names)
    assert loads(f"{run}/step_3", 3)  # type: ignore[arg-type]


def test_parts_of_uploads_that_never_ended_go_too(s3: str, saved: Path) -> None:
    copy_run(saved, s3)
    store = ObjectStore(s3)
    for step in (3, 4):
        upload = store.upload(f"{s3}/step_{step}/data/00000-0123456789abcdef.safetensors", 2 * PART, "")
        upload.begin()
        upload.send(0, bytes(PART))
    assert len(store.abandoned()) == 2
    # moto says of all of them that they began in 2010
    assert len(prune(s3, dry_run=True).debris) == 2
    assert len(prune(s3).debris) == 2
    assert not store.abandoned()
    assert _steps(s3) == [1, 2, 3]
