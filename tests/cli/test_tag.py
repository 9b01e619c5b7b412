"""`ckpt tag`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ckpt_formats.facts import Facts, read_facts
from ckpt_formats.verify import verify
from tests.cli.command import ckpt, here


def test_tags_pin_and_metrics(checkpoint: Path) -> None:
    done = ckpt("tag", checkpoint, "best", "paper", "--pin", "--metric", "loss=1.25", "--metric", "val=acc=0.5")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{checkpoint}: pinned\n  tags: best, paper\n  loss = 1.25\n  val=acc = 0.5\n"
    assert read_facts(checkpoint) == Facts(tags=("best", "paper"), pinned=True, metrics={"loss": 1.25, "val=acc": 0.5})
    assert verify(checkpoint).intact
    assert not verify(checkpoint).debris
    here("tag", checkpoint, "--remove", "best", "--unpin")
    assert read_facts(checkpoint) == Facts(tags=("paper",), metrics={"loss": 1.25, "val=acc": 0.5})
    assert here("tag", checkpoint).stdout == f"{checkpoint}\n  tags: paper\n  loss = 1.25\n  val=acc = 0.5\n"


def test_nothing_recorded(checkpoint: Path) -> None:
    result = here("tag", checkpoint)
    assert (result.exit_code, result.stdout) == (0, f"{checkpoint} has no tags, no pin and no metrics.\n")
    assert not (checkpoint / "facts.json").exists()


def test_json(checkpoint: Path) -> None:
    tree = json.loads(here("tag", checkpoint, "best", "--metric", "loss=nan", "--json").stdout)
    assert tree == {"path": str(checkpoint), "tags": ["best"], "pinned": False, "metrics": {"loss": "nan"}}


def test_taking_off_a_tag_that_is_not_there_is_exit_1(checkpoint: Path) -> None:
    result = here("tag", checkpoint, "--remove", "best")
    assert result.exit_code == 1
    assert "Not there: the tag best" in result.stdout


@pytest.mark.parametrize(
    "options", [("a,b",), ("",), ("--metric", "loss"), ("--metric", "loss=low"), ("--metric", "=1")]
)
def test_what_can_t_be_recorded_is_exit_2(checkpoint: Path, options: tuple[str, ...]) -> None:
    result = here("tag", checkpoint, *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "bug" not in result.stderr
    assert not (checkpoint / "facts.json").exists()


def test_no_checkpoint_is_exit_2(run: Path, tmp_path: Path) -> None:
    assert here("tag", tmp_path / "nowhere", "best").exit_code == 2
    result = here("tag", run, "best")
    assert result.exit_code == 2
    assert "name one of them" in result.stderr


def test_damaged_facts_are_exit_1_and_name_the_file(checkpoint: Path) -> None:
    (checkpoint / "facts.json").write_text("{}")
    for options in ((), ("best",)):
        result = here("tag", checkpoint, *options)
        assert result.exit_code == 1
        assert str(checkpoint / "facts.json") in result.stderr
    assert (checkpoint / "facts.json").read_text() == "{}"
    assert here("verify", checkpoint).exit_code == 0
