"""A disk that is full, read-only, closed or over quota for a while: clear errors, the training goes on, nothing lost.

The disk is a small file system of its own, mounted where only the processes of the test see it.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

import ckpt
from ckpt_formats.errors import CheckpointError, SaveFailedError
from ckpt_formats.runs import State, find_checkpoints
from tests.crash.agents import Agents
from tests.crash.operations import Watch
from tests.crash.syscalls import unwatch, watch_process
from tests.ranks import run_ranks

_NEW_NAMESPACE, _READ_ONLY, _REMOUNT, _PRIVATE = 0x00020000, 1, 32, 1 << 18 | 1 << 14
NOBODY = 65534
STEPS = 9


def _mount(disk: Path, options: str, flags: int = 0) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"none", str(disk).encode(), b"tmpfs", flags, options.encode()):
        raise OSError(ctypes.get_errno(), "mount")


def _own_disk(disk: Path) -> None:
    """A file system of 2 MB that this process and its children see. Raises OSError where that is not allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEW_NAMESPACE) or libc.mount(b"none", b"/", None, _PRIVATE, None):
        raise OSError(ctypes.get_errno(), "unshare")
    disk.mkdir()
    _mount(disk, "size=2m,nr_inodes=200,mode=777")


class _Refusing(Watch):
    """Refuses changes while there is a file that says so: what can't be had of a disk that is mounted for a test."""

    flag: Path
    code: int

    def step(self, kind: str, path: str, act: Callable[[], Any], half: Callable[[], Any] | None = None) -> Any:
        if kind in ("write", "mkdir", "create") and self.flag.exists():
            raise OSError(self.code, os.strerror(self.code), path)
        return super().step(kind, path, act, half)


class _Trouble:
    """What befalls a disk, and what the error says."""

    def __init__(self, kind: str, disk: Path, flag: Path) -> None:
        self.kind, self.disk, self.run = kind, disk, disk / "run"
        self.flag = flag
        self.refuses = {"quota": errno.EDQUOT, "turns read-only": errno.EROFS}.get(kind)
        self.says = {
            "full": "No space left on device",
            "no files left": "No space left on device",
            "read-only": "Read-only file system",
            "turns read-only": "Read-only file system",
            "no permission": "Permission denied",
            "quota": "Disk quota exceeded",
        }[kind]

    def begin(self) -> None:
        if self.kind == "full":
            with (self.disk / "filling").open("wb", buffering=0) as file:
                self._until_refused(lambda _: file.write(bytes(4096)))
        elif self.kind == "no files left":
            (self.disk / "many").mkdir()
            self._until_refused(lambda number: (self.disk / "many" / str(number)).touch())
        elif self.kind == "read-only":
            _mount(self.disk, "size=2m", _REMOUNT | _READ_ONLY)
        elif self.kind == "no permission":
            self.run.chmod(0o555)
        else:
            self.flag.touch()

    def end(self) -> None:
        if self.kind == "full":
            (self.disk / "filling").unlink()
        elif self.kind == "no files left":
            for path in (self.disk / "many").iterdir():
                path.unlink()
        elif self.kind == "read-only":
            _mount(self.disk, "size=2m", _REMOUNT)
        elif self.kind == "no permission":
            self.run.chmod(0o755)
        else:
            self.flag.unlink()

    @staticmethod
    def _until_refused(act: Callable[[int], object]) -> None:
        for number in range(10_000):
            try:
                act(number)
            except OSError:
                return


def _state() -> dict[str, Any]:
    model = torch.nn.Linear(100, 150)
    return {"model": model, "optimizer": torch.optim.SGD(model.parameters(), momentum=0.9)}


def _saved(run: Path) -> list[int | None]:
    found = find_checkpoints(run)
    assert all(item.state in (State.WHOLE, State.NOT_COMMITTED) for item in found), found
    return [item.step for item in found if item.state is State.WHOLE]


def _until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def _train(trouble: _Trouble) -> None:
    """Save at each of some steps; trouble comes at step 3 and goes at step 6."""
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("ckpt").addHandler(handler)
    state = _state()
    weights: list[torch.Tensor] = []
    with ckpt.Checkpointer(trouble.run, state, every=1) as loop:
        for step in loop.steps(STEPS):
            if step == 4:
                _until(lambda: loop._lead is not None and loop._lead.committed == 3)
                trouble.begin()
            if step == 7:
                _until(lambda: any("step 6" in text for text in heard))
                # what was there can be had, trouble or not
                assert _saved(trouble.run) == [1, 2, 3]
                with ckpt.open(trouble.run / "step_00000003") as checkpoint:
                    assert torch.equal(checkpoint["model.weight"][...], weights[2])
                with pytest.raises(SaveFailedError, match=trouble.says):
                    ckpt.save({"w": torch.zeros(50_000)}, trouble.run / "other")
                trouble.end()
            state["model"](torch.randn(100)).sum().backward()
            state["optimizer"].step()
            weights.append(state["model"].weight.detach().clone())
    assert _saved(trouble.run) == [1, 2, 3, 7, 8, 9], heard
    for step in (4, 5, 6):
        assert any(f"step {step} is not saved, and the training goes on" in text for text in heard), heard
    assert any(trouble.says in text for text in heard), heard
    for step in (1, 2, 3, 7, 8, 9):
        with ckpt.open(trouble.run / f"step_0000000{step}") as checkpoint:
            assert torch.equal(checkpoint["model.weight"][...], weights[step - 1]), step


def _begin_in_trouble(trouble: _Trouble) -> None:
    """A job that comes to a disk in trouble is told before it trains, or at its first save; and goes on later."""
    trouble.run.mkdir()
    ckpt.save(_state(), trouble.run / "step_00000001")
    trouble.begin()
    with (
        pytest.raises((CheckpointError, OSError), match=trouble.says) as told,
        ckpt.Checkpointer(trouble.run, _state(), every=1) as loop,
    ):
        for _ in loop.steps(2):
            pass
    assert str(trouble.disk) in str(told.value)
    assert _saved(trouble.run) == [1]
    trouble.end()
    with ckpt.Checkpointer(trouble.run, _state(), every=1) as loop:
        for _ in loop.steps(3):
            pass
    assert _saved(trouble.run) == [1, 2, 3]


def _in_trouble(_rank: int, _world_size: int, folder: str, kind: str, what: Callable[[_Trouble], None]) -> str:
    """In a fork, which may see disks that nobody else does. Returns why it could not, or the error."""
    distributed.destroy_process_group()
    answer = Path(folder, "answer")
    child = os.fork()
    if not child:
        try:
            try:
                _own_disk(Path(folder, "disk"))
            except OSError as error:
                answer.write_text(f"no mount: {error}")
                return ""
            if kind == "no permission":
                os.setresuid(NOBODY, NOBODY, NOBODY)
            trouble = _Trouble(kind, Path(folder, "disk"), Path(folder, "refused"))
            agents = Agents("")
            if trouble.refuses is not None:
                refusing = _Refusing(root=str(trouble.disk))
                refusing.flag, refusing.code = trouble.flag, trouble.refuses
                agents = Agents(str(trouble.disk), watch=refusing)
                watch_process(refusing)
            agents.install()
            what(trouble)
            agents.ended()
            unwatch()
        except BaseException:  # noqa: BLE001 - the parent tells
            answer.write_text(traceback.format_exc())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    return answer.read_text() if answer.exists() else ""


def _tried(tmp_path: Path, kind: str, what: Callable[[_Trouble], None]) -> None:
    tmp_path.chmod(0o777)
    (answer,) = run_ranks(_in_trouble, 1, str(tmp_path), kind, what)
    if answer.startswith("no mount"):
        pytest.skip("no file systems can be mounted here")
    assert not answer, answer


@pytest.mark.parametrize("kind", ["full", "no files left", "turns read-only", "no permission", "quota"])
def test_trouble_with_the_disk_is_told_and_costs_only_the_saves_of_that_while(tmp_path: Path, kind: str) -> None:
    _tried(tmp_path, kind, _train)


@pytest.mark.parametrize("kind", ["full", "no files left", "read-only", "no permission", "quota"])
def test_job_that_comes_to_a_disk_in_trouble_is_told_and_goes_on_later(tmp_path: Path, kind: str) -> None:
    _tried(tmp_path, kind, _begin_in_trouble)
