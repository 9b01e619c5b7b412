"""One job at a time has a run."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ckpt.levels import claim
from ckpt.levels.claim import NAME, Claim, held_by_another
from ckpt_formats.errors import SaveFailedError


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "BEAT_S", 0.1)


def test_a_run_that_somebody_has_is_refused_with_who_and_free_when_given_back(tmp_path: Path) -> None:
    first = Claim.take(str(tmp_path))
    assert held_by_another(str(tmp_path))
    with pytest.raises(SaveFailedError, match=f"process {os.getpid()} on {socket.gethostname()} since 20"):
        Claim.take(str(tmp_path))
    first.release()
    first.release()
    assert not held_by_another(str(tmp_path))
    Claim.take(str(tmp_path)).release()


HOLD = """
import subprocess, sys, time
from ckpt.levels.claim import Claim
claim = Claim.take(sys.argv[1])
# an agent that writes what was captured
subprocess.Popen(["sleep", sys.argv[2]], stdout=subprocess.DEVNULL, pass_fds=[claim.fd])
print("held", flush=True)
time.sleep(60)
"""


def test_a_job_that_was_killed_keeps_its_run_until_its_agent_has_written(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path), "2"], stdout=subprocess.PIPE) as job:
        assert job.stdout is not None
        assert job.stdout.readline() == b"held\n"
        begin = time.monotonic()
        job.send_signal(signal.SIGKILL)
        job.wait()
        # its heartbeat has stopped, so this waits; it is not refused
        Claim.take(str(tmp_path), patience=30).release()
        assert time.monotonic() - begin > 1


def test_a_forked_process_neither_keeps_a_run_nor_gives_it_back(tmp_path: Path) -> None:
    first = Claim.take(str(tmp_path))
    lives, says = os.pipe()
    child = os.fork()
    if not child:
        # a data loader's worker that lives on, and one that unwinds its parent's stack
        first.release()
        os.write(says, b"1")
        time.sleep(60)
        os._exit(0)
    try:
        # what has not run yet since it was forked off still has all of its parent's
        assert select.select([lives], [], [], 60)[0]
        with pytest.raises(SaveFailedError, match=f"another job saves into this run, process {os.getpid()}"):
            Claim.take(str(tmp_path), patience=10)
        first.release()
        Claim.take(str(tmp_path), patience=0.0).release()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(lives)
        os.close(says)


def test_an_agent_that_never_ends_is_told_and_not_waited_for_without_limit(tmp_path: Path) -> None:
    fd = os.open(tmp_path / NAME, os.O_RDWR | os.O_CREAT)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with pytest.raises(SaveFailedError, match="has not ended writing in time"):
        Claim.take(str(tmp_path), patience=0.5)
    os.close(fd)


def test_where_there_are_no_locks_the_heartbeat_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "_lock", lambda _: None)
    first = Claim.take(str(tmp_path))
    with pytest.raises(SaveFailedError, match="another job saves into this run"):
        Claim.take(str(tmp_path))
    # it dies: nobody beats any more
    first._over.set()
    first._beating.join()
    Claim.take(str(tmp_path)).release()


def test_who_is_overrun_where_locks_mean_nothing_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(claim, "_lock", lambda _: True)
    first, second = Claim.take(str(tmp_path)), Claim.take(str(tmp_path))
    deadline = time.monotonic() + 30
    while "another job" not in caplog.text:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert first._key != second._key
    second.release()
    first.release()
