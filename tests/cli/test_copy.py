"""`ckpt copy`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from ckpt_formats.diff import diff
from ckpt_formats.verify import verify
from tests.cli.command import ckpt, here
from tests.cli.conftest import data_file, flip


def test_a_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    done = ckpt("copy", checkpoint, tmp_path / "copy")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"Copied step_00000100 to {tmp_path / 'copy'}: 1.4 MiB, in ")
    assert verify(tmp_path / "copy").intact
    assert diff(checkpoint, tmp_path / "copy").equal
    again = here("copy", checkpoint, tmp_path / "copy")
    assert (again.exit_code, again.stdout) == (0, f"{tmp_path / 'copy'} is there already.\n")


def test_a_run(run: Path, tmp_path: Path) -> None:
    for name in ("data", "index"):
        (run / "step_00000300" / name).mkdir(parents=True)
    result = here("copy", run, tmp_path / "copy")
    assert result.exit_code == 0
    assert "Passed over 1 save that did not end" in result.stdout
    assert [verify(tmp_path / "copy" / name).intact for name in ("step_00000100", "step_00000200")] == [True, True]
    assert len(here("ls", tmp_path / "copy").stdout.splitlines()) == 3


def test_chosen_steps_of_a_run(run: Path, tmp_path: Path) -> None:
    assert here("copy", run, tmp_path / "copy", "--step", "200").exit_code == 0
    assert [path.name for path in (tmp_path / "copy").iterdir()] == ["step_00000200"]
    missing = here("copy", run, tmp_path / "copy", "--step", "7")
    assert missing.exit_code == 2
    assert "no checkpoint of step 7" in missing.stderr


def test_json(run: Path, tmp_path: Path) -> None:
    done = ckpt("copy", run, tmp_path / "copy", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    tree = json.loads(done.stdout)
    assert set(tree) == {"source", "target", "copies", "failed", "uncommitted"}
    assert [item["step"] for item in tree["copies"]] == [100, 200]
    assert set(tree["copies"][0]) == {
        *("source", "path", "step", "bytes", "copied", "verified", "present", "note", "seconds")
    }


def test_a_damaged_source_is_exit_1_and_not_committed(checkpoint: Path, tmp_path: Path) -> None:
    flip(data_file(checkpoint), 40_000)
    result = here("copy", checkpoint, tmp_path / "copy")
    assert result.exit_code == 1
    assert "do not fit their checksum" in result.stderr
    assert not (tmp_path / "copy/manifest.json").exists()


def test_a_damaged_checkpoint_of_a_run_is_exit_1_and_the_others_are_copied(run: Path, tmp_path: Path) -> None:
    flip(data_file(run / "step_00000100"), 40_000)
    result = here("copy", run, tmp_path / "copy")
    assert result.exit_code == 1
    assert "Not copied: " in result.stdout
    assert verify(tmp_path / "copy/step_00000200").intact


def test_wrong_requests_are_exit_2(run: Path, checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "step_00000200", tmp_path / "other")
    for arguments, message in (
        ((tmp_path / "nowhere", tmp_path / "copy"), "no such folder"),
        ((checkpoint, tmp_path / "other"), "never overwritten"),
        ((checkpoint, run), "a folder of its own"),
        ((checkpoint, tmp_path / "copy", "--step", "100"), "--step chooses from a run"),
    ):
        result = here("copy", *arguments)
        assert (result.exit_code, result.stdout) == (2, "")
        assert message in result.stderr
    assert verify(tmp_path / "other").intact
    assert not (tmp_path / "copy").exists()


def test_a_run_without_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    result = here("copy", tmp_path / "run", tmp_path / "copy")
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path / 'run'} holds no checkpoints.\n")
