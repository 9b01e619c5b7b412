"""Checkpoints that go to stores and come back: the same bytes, whole or absent, going on where they were cut."""

from __future__ import annotations

import filecmp
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import ckpt
from ckpt.levels.prune import prune
from ckpt.storage import objects
from ckpt.storage.facts import update_facts
from ckpt.storage.objects import PART, ObjectStore
from ckpt.transfer import uploading
from ckpt.transfer.copy import copy, copy_run
from ckpt.transfer.uploading import Uploading
from ckpt_formats.errors import CheckpointExistsError, CheckpointNotFoundError, CorruptionError, StoreError
from ckpt_formats.facts import read_facts
from ckpt_formats.remote import configure
from ckpt_formats.runs import State, find_checkpoints
from ckpt_formats.verify import verify
from tests.crash.runs import loads
from tests.remote.conftest import options
from tests.remote.proxy import Proxy


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose data file takes several parts."""
    folder = tmp_path_factory.mktemp("large") / "step_7"
    ckpt.save({"weight": torch.arange(9 << 20, dtype=torch.float32), "bias": torch.ones(7)}, folder)
    assert sum(file.stat().st_size > 4 * PART for file in folder.rglob("*")) == 1
    return folder


def _is_same(one: Path, other: Path) -> None:
    compared = filecmp.dircmp(one, other)
    assert not compared.left_only
    assert not compared.right_only
    files = [file.relative_to(one) for file in one.rglob("*") if file.is_file()]
    same, _, _ = filecmp.cmpfiles(one, other, map(str, files), shallow=False)
    assert len(same) == len(files)


def test_a_part_that_takes_long_does_not_keep_the_others_waiting(
    s3: str, large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploading, "SENDERS", 2)
    monkeypatch.setattr(uploading, "WAITING", 0)
    last_was_sent = threading.Event()
    send = objects._S3Upload.send

    def first_after_last(self: objects._S3Upload, number: int, data: bytes) -> bool:
        if self.size > self.part and number == 0:
            assert last_was_sent.wait(60), "the last part waits for the first"
        needed = send(self, number, data)
        if self.size > self.part and (number + 1) * self.part >= self.size:
            last_was_sent.set()
        return needed

    monkeypatch.setattr(objects._S3Upload, "send", first_after_last)
    copy(large, f"{s3}/large")
    assert last_was_sent.is_set()
    assert verify(f"{s3}/large").intact


def test_an_upload_keeps_to_its_bandwidth(s3: str, large: Path) -> None:
    begin = time.monotonic()
    result = copy(large, f"{s3}/large", bandwidth=20e6)
    assert time.monotonic() - begin >= 0.9 * result.copied / 20e6
    assert verify(f"{s3}/large").intact


def test_what_is_there_already_takes_nothing_of_the_bandwidth(
    s3: str, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = Uploading.commit
    monkeypatch.setattr(Uploading, "commit", lambda *_: False)
    with pytest.raises(CheckpointExistsError):
        copy(large, f"{s3}/large")
    monkeypatch.setattr(Uploading, "commit", commit)
    # a byte per second
    assert copy(large, f"{s3}/large", bandwidth=1.0).verified > 4 * PART


def test_there_and_back_it_is_the_same_byte_for_byte(any_store: str, saved: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(saved, tmp_path / "run"))
    update_facts(run / "step_2", lambda facts: facts.changed(tags=["best"], metrics={"loss": 0.5}))
    there = copy_run(run, any_store)
    assert [item.step for item in there.copies] == [1, 2, 3]
    assert not there.failed
    for step in (1, 2, 3):
        assert loads(f"{any_store}/step_{step}", step)  # type: ignore[arg-type]
    assert read_facts(f"{any_store}/step_2").tags == ("best",)
    elsewhere = any_store.replace("/run", "/copy")
    assert [item.copied > 0 for item in copy_run(any_store, elsewhere).copies] == [True] * 3
    back = copy_run(elsewhere, tmp_path / "back")
    assert [item.step for item in back.copies] == [1, 2, 3]
    _is_same(run, tmp_path / "back")
    assert all(item.present for item in copy_run(run, any_store).copies)


def test_another_checkpoint_is_never_overwritten(any_store: str, saved: Path) -> None:
    copy(saved / "step_1", f"{any_store}/step_1")
    with pytest.raises(CheckpointExistsError):
        copy(saved / "step_2", f"{any_store}/step_1")
    assert loads(f"{any_store}/step_1", 1)  # type: ignore[arg-type]


def test_parts_of_tensors_are_read_as_from_a_folder(any_store: str, large: Path) -> None:
    copy(large, f"{any_store}/step_7")
    with ckpt.open(f"{any_store}/step_7") as checkpoint:
        assert checkpoint.step == 7
        assert torch.equal(checkpoint["weight"][5_000_000:5_000_003], torch.tensor([5e6, 5e6 + 1, 5e6 + 2]))
        assert torch.equal(checkpoint["weight"][:], torch.arange(9 << 20, dtype=torch.float32))
        assert checkpoint["bias"][3] == 1


def test_an_upload_goes_on_with_the_parts_that_are_there(s3: str, proxy: Proxy, large: Path) -> None:
    # the third part and all that comes after it fail, for good
    proxy.fault = lambda _, path: "500" if any(f"partNumber={part}" in path for part in (3, 4, 5)) else None
    target = f"{s3}/step_7"
    ObjectStore(s3).exclusive  # noqa: B018 - probed, so that it is not counted below
    with pytest.raises(StoreError):
        _impatiently(large, target)
    assert not [entry for entry in ObjectStore(s3).walk(s3) if "data/" in entry.name]
    with pytest.raises(CheckpointNotFoundError):
        ckpt.open(target)
    (began,) = ObjectStore(s3).abandoned()
    assert began.startswith(f"{target}/data/")
    proxy.calm()
    before = proxy.sent
    again = copy(large, target)
    assert again.copied + again.verified == again.bytes
    size = next(file.stat().st_size for file in large.glob("data/*"))
    assert size - 2 * PART <= again.copied < size - 2 * PART + 100_000
    assert size - 2 * PART <= proxy.sent - before < size - 2 * PART + 100_000
    assert verify(target).intact
    assert not ObjectStore(s3).abandoned()


def _impatiently(source: Path, target: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ObjectStore.__init__, "__defaults__", ((0.01,), 60.0))
        copy(source, target)


def test_an_upload_whose_process_was_killed_goes_on(s3: str, proxy: Proxy, large: Path) -> None:
    target = f"{s3}/step_7"
    program = (
        "import sys\n"
        "from ckpt.transfer.copy import copy\nfrom ckpt_formats.remote import configure\n"
        f"configure({s3!r}, {options(proxy.port)!r})\n"
        f"copy({str(large)!r}, {target!r}, progress=lambda done, _: done > {PART * 2} and print(done, flush=True))\n"
    )
    proxy.delay = 0.05
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    proxy.delay = 0.0
    (found,) = find_checkpoints(s3) or [None]
    assert found is None or found.state is State.NOT_COMMITTED
    copy(large, target)
    (found,) = find_checkpoints(s3)
    assert found.state is State.WHOLE
    assert verify(target).intact


def test_files_that_are_there_are_not_sent_again(any_store: str, saved: Path) -> None:
    target = f"{any_store}/step_1"
    first = copy(saved / "step_1", target)
    store = ObjectStore(any_store)
    store.remove(f"{target}/manifest.json")
    again = copy(saved / "step_1", target)
    manifest = (saved / "step_1/manifest.json").stat().st_size
    assert (again.copied, again.verified) == (manifest, first.bytes - manifest)
    # a file of the right size whose bytes are other ones
    store.remove(f"{target}/manifest.json")
    (index,) = (entry.name for entry in store.walk(target) if entry.name.startswith("index/"))
    store.put(f"{target}/{index}", b"x" * (saved / "step_1" / index).stat().st_size)
    assert copy(saved / "step_1", target).copied > manifest
    assert verify(target).intact


def test_damage_is_not_copied_on(any_store: str, large: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "step_7"
    copy(large, damaged)
    (data,) = damaged.glob("data/*")
    with data.open("r+b") as file:
        file.seek(20 << 20)
        file.write(b"\xff")
    with pytest.raises(CorruptionError, match="the file is damaged"):
        copy(damaged, f"{any_store}/step_7")
    with pytest.raises(CheckpointNotFoundError):
        ckpt.open(f"{any_store}/step_7")
    assert not ObjectStore(any_store).abandoned()


def test_what_is_missing_or_cut_in_a_store_is_told(any_store: str, saved: Path) -> None:
    copy_run(saved, any_store)
    store = ObjectStore(any_store)
    data = {step: next(f"data/{file.name}" for file in (saved / f"step_{step}/data").iterdir()) for step in (1, 2)}
    store.remove(f"{any_store}/step_1/{data[1]}")
    bytes_of = store.read(f"{any_store}/step_2/{data[2]}")
    store.put(f"{any_store}/step_2/{data[2]}", bytes_of[:-10])
    states = {item.step: item.problem for item in find_checkpoints(any_store)}
    assert "files missing" in str(states[1])
    assert "of another size" in str(states[2])
    assert states[3] is None
    for step in (1, 2):
        report = verify(f"{any_store}/step_{step}")
        assert {damage.file for damage in report.damage} == {data[step]}
        with pytest.raises(CorruptionError), ckpt.open(f"{any_store}/step_{step}") as checkpoint:
            checkpoint["weight"][:]


def test_a_flipped_bit_in_a_store_is_found(s3: str, saved: Path) -> None:
    copy(saved / "step_1", f"{s3}/step_1")
    store = ObjectStore(s3)
    for entry in store.walk(f"{s3}/step_1"):
        whole = store.read(f"{s3}/step_1/{entry.name}")
        store.put(f"{s3}/step_1/{entry.name}", whole[:-1] + bytes([whole[-1] ^ 4]))
        assert not verify(f"{s3}/step_1").intact
        store.put(f"{s3}/step_1/{entry.name}", whole)
    assert verify(f"{s3}/step_1").intact


def test_a_store_that_is_down_says_nothing_of_the_checkpoint(s3: str, proxy: Proxy, saved: Path) -> None:
    copy(saved / "step_1", f"{s3}/step_1")
    proxy.fault = lambda _, path: "503" if "data/" in path else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ckpt_formats.remote.Store.__init__.__defaults__", ((0.01,), 60.0))
        with pytest.raises(StoreError, match="does not answer as it should"):
            verify(f"{s3}/step_1")
        with pytest.raises(StoreError, match="does not answer as it should"), ckpt.open(f"{s3}/step_1") as checkpoint:
            checkpoint["weight"][:]


def test_ranks_load_from_a_store(moto_port: int, s3: str, saved: Path) -> None:
    from tests.ranks import run_ranks

    copy(saved / "step_2", f"{s3}/step_2")
    run_ranks(_load_part, 2, moto_port, s3)
    assert not [entry.name for entry in ObjectStore(s3).walk(s3) if ".held" in entry.name]


def _load_part(rank: int, world_size: int, port: int, run: str) -> None:
    configure("s3://bucket", options(port))
    state = {"weight": ckpt.Shard(torch.zeros(15, 700), (30, 700), (15 * rank, 0)), "step": 0}
    ckpt.load(state, f"{run}/step_2", strict=False)
    generator = torch.Generator().manual_seed(2)
    assert torch.equal(state["weight"].local, torch.randn(30, 700, generator=generator)[15 * rank : 15 * (rank + 1)])  # type: ignore[attr-defined]
    assert state["step"] == 2


def test_prune_leaves_what_is_being_uploaded(s3: str, proxy: Proxy, large: Path) -> None:
    pruned = []

    def progress(done: int, total: int) -> None:
        if PART * 3 < done < total and not pruned:
            pruned.append(prune(s3, 1, grace=0))

    copy(large, f"{s3}/step_7", progress=progress)
    assert pruned
    assert not pruned[0].debris
    assert verify(f"{s3}/step_7").intact
    assert os.path.basename(f"{s3}/step_7") == "step_7"
