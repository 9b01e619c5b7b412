"""Every verb of the command on checkpoints in stores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ckpt.transfer.copy import copy_run
from tests.cli.command import here
from tests.remote.proxy import Proxy


@pytest.fixture
def run(s3: str, saved: Path) -> str:
    copy_run(saved, s3)
    return s3


def test_ls_show_verify_diff(run: str, saved: Path) -> None:
    listed = here("ls", run)
    assert listed.exit_code == 0, listed.output
    assert [line.split()[0] for line in listed.stdout.splitlines()[1:4]] == ["step_1", "step_2", "step_3"]
    assert listed.stdout.count("whole") == 3
    facts = json.loads(here("ls", run, "--json").stdout)
    assert facts["path"] == run
    assert facts["checkpoints"][0]["path"] == f"{run}/step_1"
    shown = here("show", f"{run}/step_1")
    assert shown.exit_code == 0, shown.output
    assert "weight" in shown.stdout
    assert here("verify", f"{run}/step_1").stdout.startswith(f"{run}/step_1 is intact.")
    assert here("diff", f"{run}/step_1", saved / "step_1").exit_code == 0
    assert here("diff", f"{run}/step_1", f"{run}/step_2").exit_code == 1


def test_copy_both_ways_and_file_urls(run: str, saved: Path, tmp_path: Path) -> None:
    result = here("copy", f"{run}/step_2", f"file://{tmp_path}/step_2")
    assert result.exit_code == 0, result.output
    assert here("verify", tmp_path / "step_2").exit_code == 0
    result = here("copy", f"file://{tmp_path}/step_2", f"{run}/again/step_2")
    assert result.exit_code == 0, result.output
    assert here("diff", f"{run}/again/step_2", saved / "step_2").exit_code == 0
    result = here("copy", run, tmp_path / "run", "--step", "3")
    assert result.exit_code == 0, result.output
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["step_3"]


def test_reshard_from_a_store(run: str, tmp_path: Path) -> None:
    result = here("reshard", f"{run}/step_2", tmp_path / "resharded", "--mesh", "dp=2")
    assert result.exit_code == 0, result.output
    assert here("diff", f"{run}/step_2", tmp_path / "resharded").exit_code == 0
    refused = here("reshard", f"{run}/step_2", f"{run}/resharded", "--mesh", "dp=2")
    assert refused.exit_code == 2
    assert "ckpt copy" in refused.stderr


def test_tag_and_prune(run: str) -> None:
    assert here("tag", f"{run}/step_1", "first", "--metric", "loss=0.5").exit_code == 0
    assert "tags: first" in here("tag", f"{run}/step_1").stdout
    told = here("prune", run, "--keep", "1", "--dry-run")
    assert told.exit_code == 0, told.output
    assert "would go" in told.stdout
    assert here("prune", run, "--keep", "1").exit_code == 0
    facts = json.loads(here("ls", run, "--json").stdout)
    assert [item["step"] for item in facts["checkpoints"]] == [1, 3]


def test_what_is_not_there_is_one_sentence(run: str) -> None:
    for verb in ("ls", "show", "verify", "tag"):
        result = here(verb, f"{run}/nothing")
        assert result.exit_code == 2, result.output
        assert result.stderr == f"Error: {run}/nothing: there is nothing at that URL; check it\n"
    result = here("show", run)
    assert result.exit_code == 2
    assert "holds some: step_1, step_2, step_3; name one of them" in result.stderr


def test_a_store_that_fails_is_no_damage(s3: str, proxy: Proxy, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_run(saved, s3)
    monkeypatch.setattr("ckpt_formats.remote.Store.__init__.__defaults__", ((0.01,), 60.0))
    proxy.fault = lambda _, path: "500" if "data/" in path else None
    result = here("verify", f"{s3}/step_1")
    assert result.exit_code == 2
    assert "does not answer as it should, also after 2 attempts" in result.stderr
