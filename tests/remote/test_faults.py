"""Hundreds of faults at random, in uploads, downloads, loads and prunes: nothing is lost, nothing is half visible."""

from __future__ import annotations

import filecmp
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import pytest

from ckpt.levels.prune import prune
from ckpt.storage import objects
from ckpt.storage.facts import update_facts
from ckpt.storage.objects import ObjectStore
from ckpt.transfer.copy import copy, copy_run
from ckpt_formats.errors import CheckpointNotFoundError, StoreError
from ckpt_formats.facts import read_facts
from ckpt_formats.remote import Store, configure
from ckpt_formats.runs import State, find_checkpoints
from ckpt_formats.verify import verify
from tests.crash.runs import loads
from tests.remote import proxy as module
from tests.remote.conftest import options
from tests.remote.proxy import KINDS, Proxy


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short pauses, and parts as small as the server allows."""
    monkeypatch.setattr(Store.__init__, "__defaults__", ((0.002, 0.005, 0.01), 60.0))
    monkeypatch.setattr(ObjectStore.__init__, "__defaults__", ((0.002, 0.005, 0.01), 60.0))
    monkeypatch.setattr(objects, "PART", 1 << 15)
    monkeypatch.setattr(module, "SLOW_S", 0.02)


class _Watcher:
    """Looks at a run all the time, past the proxy: each checkpoint must be whole or none."""

    def __init__(self, url: str, port: int) -> None:
        # another scheme for the same bucket, so that its requests go another way
        self.url = url.replace("s3://", "s3a://")
        configure(self.url, options(port))
        self.looks = 0
        self.wrong: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watcher")

    def _run(self) -> None:
        while not self._stop.wait(0.02):
            try:
                found = find_checkpoints(self.url)
            except CheckpointNotFoundError:
                continue
            for item in found:
                self.looks += 1
                if item.state is State.WHOLE and not self._is_whole(item.path):
                    self.wrong.append(f"{item.path} can't be read")
                elif item.state not in (State.WHOLE, State.NOT_COMMITTED) and not self._is_being_removed(item.path):
                    self.wrong.append(f"{item.path}: {item.problem}")

    def _is_whole(self, path: str) -> bool:
        try:
            return verify(path).intact or self._is_being_removed(path)
        except CheckpointNotFoundError:
            return True  # nothing is half visible

    def _is_being_removed(self, path: str) -> bool:
        """Its manifest went between two looks."""
        try:
            Store(path).size(f"{path}/manifest.json")
        except FileNotFoundError:
            return True
        return False

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def _until_done(work: Callable[[], object], failures: Counter[str]) -> None:
    """Again and again, as the flow between levels does."""
    deadline = time.monotonic() + 120
    while True:
        try:
            work()
            return
        except StoreError:
            failures[work.__name__] += 1
            if time.monotonic() > deadline:
                raise


def _rounds(s3: str, proxy: Proxy, saved: Path, folder: Path, seeds: Iterator[int], until: int) -> Counter[str]:
    """Move the run back and forth until there were so many faults. Returns how often something had to be repeated."""
    failures: Counter[str] = Counter()
    for seed in seeds:
        proxy.random_faults(seed, rate=0.35)
        run = f"{s3}/{seed}"

        def upload(run: str = run) -> None:
            result = copy_run(saved, run)
            assert not result.failed

        def load(run: str = run) -> None:
            for step in (1, 2, 3):
                assert loads(f"{run}/step_{step}", step, thoroughly=False)  # type: ignore[arg-type]

        def tag(run: str = run) -> None:
            update_facts(f"{run}/step_2", lambda facts: facts.changed(tags=["best"]))

        def download(run: str = run, seed: int = seed) -> None:
            copy(f"{run}/step_2", folder / f"{seed}")

        def clear(run: str = run) -> None:
            assert len(prune(run, 1).kept) >= 2

        with _Watcher(run, proxy.upstream) as watcher:
            for work in (upload, load, tag, download, clear):
                _until_done(work, failures)
        proxy.calm()
        assert watcher.looks
        assert not watcher.wrong
        assert not prune(run, 1).failed
        assert [item.step for item in find_checkpoints(run)] == [2, 3]
        assert read_facts(f"{run}/step_2").tags == ("best",)
        for step in (2, 3):
            assert loads(f"{run}/step_{step}", step)  # type: ignore[arg-type]
        for name in ("manifest.json", "facts.json"):
            assert (folder / f"{seed}" / name).exists()
        (data,) = (folder / f"{seed}" / "data").iterdir()
        assert filecmp.cmp(data, saved / "step_2" / "data" / data.name, shallow=False)
        shutil.rmtree(folder / f"{seed}")
        assert proxy.plain
        if proxy.faults >= until and all(proxy.done[kind] for kind in KINDS):
            break
    return failures


def test_hundreds_of_faults(s3: str, proxy: Proxy, saved: Path, tmp_path: Path) -> None:
    failures = _rounds(s3, proxy, saved, tmp_path, iter(range(100)), 150)
    print(f"{proxy.faults} faults in {proxy.done.total()} requests: {dict(proxy.done)}; repeated: {dict(failures)}")


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_thousands_of_faults(s3: str, proxy: Proxy, saved: Path, tmp_path: Path) -> None:
    failures = _rounds(s3, proxy, saved, tmp_path, iter(range(1000, 9000)), 3000)
    print(f"{proxy.faults} faults in {proxy.done.total()} requests: {dict(proxy.done)}; repeated: {dict(failures)}")
