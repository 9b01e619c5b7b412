"""`ckpt prune`."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from ckpt_formats.locks import held
from tests.cli.command import ckpt, here


def _begun(run: Path) -> Path:
    """A save that died long ago."""
    for name in ("data", "index"):
        (run / "step_00000300" / name).mkdir(parents=True)
    file = run / "step_00000300/data/00000-00112233445566aa.safetensors"
    file.write_bytes(bytes(2048))
    then = time.time() - 7200
    for path in (file, file.parent, run / "step_00000300/index", run / "step_00000300"):
        os.utime(path, (then, then))
    return run / "step_00000300"


def test_old_checkpoints_and_debris_go(run: Path) -> None:
    begun = _begun(run)
    dry = ckpt("prune", run, "--keep", "1", "--dry-run")
    assert (dry.returncode, dry.stderr) == (0, "")
    assert [line.split() for line in dry.stdout.splitlines()[:3]] == [
        ["checkpoint", "step", "why"],
        ["step_00000100", "100", "would", "go"],
        ["step_00000200", "200", "kept", "newest"],
    ]
    assert "Debris to be removed: 2.0 KiB\n  step_00000300\n" in dry.stdout
    assert len(os.listdir(run)) == 3
    done = ckpt("prune", run, "--keep", "1")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("Freed 1.4 MiB: 1 checkpoint of 2.\n")
    assert os.listdir(run) == ["step_00000200"]
    assert not begun.exists()


def test_without_a_rule_only_debris_goes(run: Path) -> None:
    _begun(run)
    result = here("prune", run)
    assert result.exit_code == 0
    assert sorted(os.listdir(run)) == ["step_00000100", "step_00000200"]


def test_debris_that_is_fresh_stays(run: Path) -> None:
    begun = _begun(run)
    os.utime(begun)
    result = here("prune", run)
    assert "a save or copy may be under way: 1 item\n  step_00000300" in result.stdout
    assert begun.exists()
    assert here("prune", run, "--grace", "0").exit_code == 0
    assert not begun.exists()


def test_rules_keep_what_any_of_them_keeps(run: Path, checkpoint: Path) -> None:
    here("tag", checkpoint, "--metric", "loss=0.5")
    for rule in (("--best", "1", "loss", "min"), ("--every", "50"), ("--keep", "2")):
        assert here("prune", run, *rule).exit_code == 0
        assert checkpoint.exists()
    without = here("prune", run, "--best", "1", "accuracy", "max", "--every", "200", "--keep", "1")
    assert without.exit_code == 0
    assert "no checkpoint has the metric 'accuracy' (those that are: 'loss')" in without.stdout
    assert os.listdir(run) == ["step_00000200"]


def test_tagged_pinned_and_used_ones_stay(run: Path, checkpoint: Path) -> None:
    with held(str(checkpoint)):
        assert "in use" in here("prune", run, "--keep", "1").stdout
    here("tag", checkpoint, "good")
    assert "tagged good" in here("prune", run, "--keep", "1").stdout
    here("tag", checkpoint, "--remove", "good", "--pin")
    assert "pinned" in here("prune", run, "--keep", "1").stdout
    assert checkpoint.exists()


def test_json(run: Path) -> None:
    _begun(run)
    tree = json.loads(ckpt("prune", run, "--keep", "1", "--json").stdout)
    assert set(tree) == {"path", "dry_run", "removed", "kept", "debris", "recent", "failed", "unmeasured", "bytes"}
    assert [item["step"] for item in tree["removed"]] == [100]
    assert [(item["step"], item["why"]) for item in tree["kept"]] == [(200, "newest")]
    assert tree["debris"] == [{"path": str(run / "step_00000300"), "bytes": 2048}]


def test_what_can_t_be_removed_is_exit_1_and_told(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("ckpt.storage.files.os.unlink", refuse)
    result = here("prune", run, "--keep", "1")
    assert result.exit_code == 1
    assert f"Could not be removed: {run / 'step_00000100'}: Permission denied" in result.stdout


@pytest.mark.parametrize(
    "options", [("--keep", "0"), ("--every", "x"), ("--best", "1", "loss", "best"), ("--grace", "-1")]
)
def test_wrong_rules_are_exit_2_and_remove_nothing(run: Path, options: tuple[str, ...]) -> None:
    result = here("prune", run, *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert len(os.listdir(run)) == 2


def test_a_checkpoint_in_the_place_of_a_run_is_exit_2(checkpoint: Path) -> None:
    result = here("prune", checkpoint, "--keep", "1")
    assert result.exit_code == 2
    assert "is a checkpoint itself" in result.stderr
    assert checkpoint.exists()
