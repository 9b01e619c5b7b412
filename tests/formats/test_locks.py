"""Holding a checkpoint: who uses it keeps it, who is killed lets go, and nobody waits for ever."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import signal
from pathlib import Path

import pytest

from ckpt_formats import locks
from ckpt_formats.checkpoint import open_checkpoint
from ckpt_formats.errors import CheckpointNotFoundError
from ckpt_formats.locks import alone, held
from tests.formats.native.whole import write_whole


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    write_whole(tmp_path / "step_3")
    return str(tmp_path / "step_3")


def test_many_hold_it_and_nobody_has_it_alone_meanwhile(checkpoint: str) -> None:
    with held(checkpoint):
        with held(checkpoint), alone(checkpoint) as free:
            assert not free
        with alone(checkpoint) as free:
            assert not free
    with alone(checkpoint) as free:
        assert free
        with alone(checkpoint) as second:
            assert not second


def test_who_comes_while_it_is_removed_is_told_that_it_is_not_there(checkpoint: str) -> None:
    with alone(checkpoint) as free:
        assert free
        os.unlink(f"{checkpoint}/manifest.json")
        with pytest.raises(CheckpointNotFoundError), held(checkpoint):
            pass
    with pytest.raises(CheckpointNotFoundError), held(checkpoint):
        pass
    with pytest.raises(CheckpointNotFoundError), alone(checkpoint):
        pass


def test_who_has_it_alone_for_long_is_not_waited_for_for_ever(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "PATIENCE_S", 0.05)
    with alone(checkpoint), pytest.raises(CheckpointNotFoundError, match="being removed"), held(checkpoint):
        pass
    with alone(checkpoint), pytest.raises(CheckpointNotFoundError, match="being removed"):
        open_checkpoint(checkpoint)


def test_what_is_open_is_held_until_it_is_closed_or_forgotten(checkpoint: str) -> None:
    with open_checkpoint(checkpoint), alone(checkpoint) as free:
        assert not free
    opened = open_checkpoint(checkpoint)
    with alone(checkpoint) as free:
        assert not free
    del opened
    gc.collect()
    with alone(checkpoint) as free:
        assert free


def test_a_killed_process_lets_go(checkpoint: str) -> None:
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        with held(checkpoint):
            os.write(writing, b"x")
            signal.pause()
        os._exit(1)
    assert os.read(reading, 1) == b"x"
    with alone(checkpoint) as free:
        assert not free
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reading)
    os.close(writing)
    with alone(checkpoint) as free:
        assert free


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_stands_in_nobody_s_way(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(fd: int, kind: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with held(checkpoint), alone(checkpoint) as free:
        assert free


def test_a_network_file_system_that_wants_files_open_for_writing(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock = fcntl.flock

    def like_nfs(fd: int, kind: int) -> None:
        writable = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
        if kind & fcntl.LOCK_EX and not writable:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(fd, kind)

    monkeypatch.setattr(fcntl, "flock", like_nfs)
    with alone(checkpoint) as free:
        assert free
        with alone(checkpoint) as second:
            assert not second
