"""How often a run fails, as it has seen it itself: over jobs that were killed, that failed, and that ended well."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

import ckpt
from ckpt.levels.claim import Claim
from ckpt.levels.tiers import settle
from ckpt.loop.lead import Lead
from ckpt.loop.lives import NAME, Lives
from ckpt.planning.interval import expected_mtbf
from tests.loop.test_levels import train
from tests.ranks import run_ranks

LIVED_S = 3.0
"""Longer than the claim's heart takes from one beat to the next."""


def state() -> dict[str, object]:
    return {"w": torch.zeros(1000), "count": 0}


def seen(run: Path) -> tuple[int, float]:
    """How often the run was interrupted, and for how many node-seconds it was trained, as the next job sees it."""
    claim = Claim.take(str(run))
    try:
        lives = Lives(str(run), claim, nodes=4)
        assert lives.mtbf() == expected_mtbf(4, lives.failures, lives.node_seconds)
        return lives.failures, lives.node_seconds
    finally:
        claim.release()


def killed(rank: int, world_size: int, folder: str) -> None:
    with ckpt.Checkpointer(folder, state(), every=1) as loop:
        for _ in loop.steps(10):
            time.sleep(LIVED_S)
            os.kill(os.getpid(), signal.SIGKILL)


def test_jobs_that_were_killed_or_failed_count_and_those_that_ended_well_do_not(tmp_path: Path) -> None:
    train(tmp_path, 2)
    assert seen(tmp_path)[0] == 0
    run_ranks(killed, 1, str(tmp_path), allow_death=True)
    failures, node_seconds = seen(tmp_path)
    assert failures == 1
    assert LIVED_S - 2.5 < node_seconds < 60

    def fail(*_: object) -> None:
        raise RuntimeError("a node is lost")

    with pytest.raises(RuntimeError, match="a node is lost"):
        train(tmp_path, 4, fail)
    assert seen(tmp_path)[0] == 2

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, 4, interrupt)
    train(tmp_path, 4, lambda loop, _: loop.stop())
    failures, more = seen(tmp_path)
    assert failures == 2
    assert more > node_seconds


def test_a_run_that_fails_often_is_saved_oftener(tmp_path: Path) -> None:
    intervals = []
    for failures in (0, 100):
        (tmp_path / NAME).write_text(
            json.dumps({"format": "ckpt-lives", "version": 1, "failures": failures, "node_seconds": 1.0, "nodes": 0})
        )
        with Lead(str(tmp_path), settle(str(tmp_path), (), "auto", None), nodes=4, mtbf=None) as lead:
            lead._costs.append(0.01)
            lead._writes.append(0.01)
            intervals.append(lead.interval() or 0.0)
    assert intervals[0] / intervals[1] == pytest.approx(101**0.5, rel=0.01)


def test_what_can_not_be_understood_counts_as_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    known = '"format": "ckpt-lives", "version": 1'
    impossible = f'{{{known}, "failures": 1, "nodes": 0, "node_seconds": NaN}}'
    for text in ("{", "[]", f"{{{known}}}", known.replace("1", "9"), impossible):
        (tmp_path / NAME).write_text(text)
        assert seen(tmp_path) == (0, 0.0)
        assert "lives.json: how often the run was interrupted can't be read" in caplog.text
        caplog.clear()
