"""Levels: what was committed on the first goes on to the others, whoever dies when, and each is pruned by its rule."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ckpt
from ckpt.levels.prune import prune
from ckpt.levels.record import read_levels
from ckpt.levels.tiers import Level, levels_from_json, levels_to_json
from ckpt.loop import lead
from ckpt.loop.resume import resume
from ckpt.storage.facts import update_facts
from ckpt_formats.errors import SaveFailedError
from ckpt_formats.facts import read_facts
from ckpt_formats.runs import State, find_checkpoints
from tests.ranks import Killed, run_ranks


def saved(run: Path) -> list[int]:
    """The steps of the whole checkpoints of a run."""
    return [item.step or 0 for item in find_checkpoints(run) if item.state is State.WHOLE] if run.is_dir() else []


def until(true: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
    """Wait for a condition, for a limited time."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.01)


def break_place(place: Path) -> None:
    """Have a file instead: nothing can be brought there."""
    shutil.rmtree(place, ignore_errors=True)
    place.touch()


def train(run: Path, steps: int, each: Callable[[Any, int], object] = lambda *_: None, **options: Any) -> list[int]:
    state: dict[str, object] = {"w": torch.zeros(1000), "count": 0}
    made = []
    with ckpt.Checkpointer(run, state, **options) as loop:
        assert state["count"] == loop.step
        for step in loop.steps(steps):
            state["count"] = step
            loop.log(loss=abs(step - 4.5))
            each(loop, step)
            made.append(step)
    return made


def test_each_level_has_what_is_due_there_and_keeps_what_its_rule_says(tmp_path: Path) -> None:
    tiers = [
        ckpt.Disk(every=1, keep=2),
        ckpt.Disk(tmp_path / "far", every=2, keep=ckpt.Any(2, ckpt.EveryN(6), ckpt.BestN(1, "loss"))),
        ckpt.Disk(tmp_path / "all"),
    ]
    train(tmp_path / "run", 12, tiers=tiers)
    assert saved(tmp_path / "run") == [11, 12]
    # the two newest, the sixths, and step 4, whose loss is the least of the even steps
    assert saved(tmp_path / "far") == [4, 6, 10, 12]
    assert saved(tmp_path / "all") == list(range(1, 13))
    assert read_facts(tmp_path / "far" / "step_00000004").metrics == {"loss": 0.5}
    for name in ("run", "far", "all"):
        with ckpt.open(tmp_path / name / "step_00000012") as checkpoint:
            assert checkpoint.values["count"] == 12


def test_a_run_says_which_levels_it_has_but_not_their_secrets(tmp_path: Path) -> None:
    train(tmp_path / "run", 1, tiers=[ckpt.Disk(every="10min", keep=3), ckpt.Disk(tmp_path / "far", every=2)])
    levels = read_levels(tmp_path / "run")
    assert levels is not None
    assert [(level.name, level.place, str(level.every)) for level in levels] == [
        ("disk", str(tmp_path / "run"), "every 10 min"),
        ("disk2", str(tmp_path / "far"), "every 2 steps"),
    ]
    secret = ckpt.Remote("memory://bucket/run", options={"key": "secret"})
    assert "secret" not in repr(ckpt.Checkpointer(tmp_path, {}, tiers=[secret]).levels)


def test_what_the_agent_is_told_of_levels_is_what_they_are(tmp_path: Path) -> None:
    tiers = [
        ckpt.Disk(every="10min", keep=ckpt.Any(2, ckpt.EveryN(6), ckpt.BestN(1, "loss"))),
        ckpt.Remote("s3://bucket/a", every=500, options={"key": "k"}, bandwidth=50e6),
    ]
    levels = ckpt.Checkpointer(tmp_path, {}, tiers=tiers).levels
    assert levels_from_json(json.loads(json.dumps(levels_to_json(levels, options=True)))) == levels


def test_what_is_due_elsewhere_and_not_there_yet_is_not_pruned(tmp_path: Path) -> None:
    far = tmp_path / "far"

    def mend(loop: Any, step: int) -> None:
        if step == 1:
            break_place(far)
        if step == 8:
            # not always in the order of the steps
            until(lambda: {2, 4, 6, 7} <= set(saved(tmp_path / "run")), "steps 2 to 7 to be committed")
            far.unlink()

    train(tmp_path / "run", 9, mend, tiers=[ckpt.Disk(every=1, keep=1), ckpt.Disk(far, every=2)])
    # the last step goes everywhere
    assert saved(far) == [2, 4, 6, 8, 9]
    assert saved(tmp_path / "run") == [9]


def with_a_backlog(rank: int, world_size: int, folder: str) -> None:
    os.environ["CKPT_EVENTS"] = f"jsonl:{folder}/events"
    far = Path(folder, "far")

    def mend(loop: Any, step: int) -> None:
        if step == 1:
            break_place(far)
        if step == 8:
            until(lambda: saved(Path(folder, "run"))[-1:] == [7], "step 7 to be committed")
            far.unlink()

    train(Path(folder, "run"), 8, mend, tiers=[ckpt.Disk(every=1), ckpt.Disk(far, keep=2)])


def test_what_would_be_pruned_there_at_once_is_not_sent(tmp_path: Path) -> None:
    run_ranks(with_a_backlog, 1, str(tmp_path))
    assert saved(tmp_path / "far") == [7, 8]

    def copied() -> set[int]:
        lines = [json.loads(line) for file in (tmp_path / "events").iterdir() for line in file.read_text().splitlines()]
        ended = [line for line in lines if line["event"] == "operation_ended" and line["operation"] == "copy"]
        return {line["step"] for line in ended if line["error"] is None}

    until(lambda: 8 in copied(), "the agent's events")
    # but for one that was on its way when the place came back
    assert len(copied() - {6, 7, 8}) <= 1


def test_damage_on_the_first_level_does_not_travel(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    far = tmp_path / "far"

    def damage(loop: Any, step: int) -> None:
        if step == 1:
            break_place(far)
        if step == 3:
            until(lambda: saved(tmp_path / "run") == [1, 2], "step 2 to be committed")
            (data,) = (tmp_path / "run" / "step_00000002" / "data").iterdir()
            content = bytearray(data.read_bytes())
            content[-5] ^= 1
            data.write_bytes(content)
            far.unlink()

    train(tmp_path / "run", 4, damage, tiers=[ckpt.Disk(every=1), ckpt.Disk(far)])
    assert saved(far) == [1, 3, 4]
    assert "step 2 can't be had on disk2" in caplog.text


def test_what_is_owed_to_a_level_gets_there_when_others_were_left_out_or_come_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two, new = tmp_path / "one", tmp_path / "two", tmp_path / "new"
    monkeypatch.setattr(lead, "PATIENCE_S", 1.0)

    def broken(loop: Any, step: int) -> None:
        if step == 1:
            break_place(two)

    train(tmp_path / "run", 5, broken, tiers=[ckpt.Disk(every=4), ckpt.Disk(one, every=4), ckpt.Disk(two, every=2)])
    assert saved(one) == [4, 5]
    two.unlink()
    monkeypatch.undo()
    # as the second now, by its place; to one that is new goes what its rule says
    train(tmp_path / "run", 5, tiers=[ckpt.Disk(every=4), ckpt.Disk(two, every=4), ckpt.Disk(new, every=2)])
    assert saved(two) == [2, 4, 5]
    assert saved(new) == [2, 4]


def test_a_note_from_before_places_were_noted_says_levels_by_their_names(tmp_path: Path) -> None:
    run, far = tmp_path / "run", tmp_path / "far"
    for step in (1, 2, 3):
        note = {"levels": ["disk", "disk2"][:step], "metrics": {}}
        ckpt.save({"w": torch.zeros(1000), "count": step, "checkpointer": note}, run / f"step_{step:08d}", step=step)
    train(run, 3, tiers=[ckpt.Disk(), ckpt.Disk(far, every=10)])
    assert saved(far) == [2, 3]


def test_what_is_pinned_or_tagged_on_the_first_level_stays_on_the_others(tmp_path: Path) -> None:
    run, far = tmp_path / "run", tmp_path / "far"
    tiers = [ckpt.Disk(every=1), ckpt.Disk(far, keep=2)]
    train(run, 3, tiers=tiers)
    # after it was brought
    update_facts(run / "step_00000002", lambda facts: facts.changed(pinned=True))
    update_facts(run / "step_00000003", lambda facts: facts.changed(tags=["good"]))
    train(run, 6, tiers=tiers)
    assert saved(far) == [2, 3, 5, 6]
    update_facts(run / "step_00000002", lambda facts: facts.changed(pinned=False))
    train(run, 7, tiers=tiers)
    assert saved(far) == [3, 6, 7]


def test_what_a_user_puts_into_the_run_is_not_taken_for_one_of_its_steps(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, far = tmp_path / "run", tmp_path / "far"
    tiers = [ckpt.Disk(every=1, keep=1), ckpt.Disk(far, keep=2)]

    def export(loop: Any, step: int) -> None:
        ckpt.save({"model": torch.nn.Linear(2, 2)}, run / f"best_{step}", step=step)
        if step == 2:
            ckpt.save({"model": torch.nn.Linear(2, 2)}, far / "mine", step=step)

    # a later step than any of the run, too
    ckpt.save({"model": torch.nn.Linear(2, 2)}, run / "final", step=100)
    assert train(run, 4, export, tiers=tiers) == [1, 2, 3, 4]
    assert f"the run begins anew, though there are checkpoints: {run}/final" in caplog.text
    exports = ["best_1", "best_2", "best_3", "best_4", "final"]
    assert sorted(path.name for path in run.iterdir() if path.is_dir()) == [*exports, "step_00000004"]
    assert sorted(path.name for path in far.iterdir() if path.is_dir()) == ["mine", "step_00000003", "step_00000004"]
    for step in (3, 4):
        with ckpt.open(far / f"step_{step:08d}") as checkpoint:
            assert checkpoint.values["count"] == step
    shutil.rmtree(run / "step_00000004")
    assert train(run, 5, tiers=tiers) == [5]


def test_a_prune_by_hand_leaves_what_is_owed_to_a_further_level(tmp_path: Path) -> None:
    run, far = tmp_path / "run", tmp_path / "far"
    train(run, 7, tiers=[ckpt.Disk(every=1), ckpt.Disk(far, every=2, keep=ckpt.EveryN(2))])
    # as if the agent had died before it came to that
    for step in (2, 4):
        shutil.rmtree(far / f"step_{step:08d}")
    report = prune(run, 1)
    assert [(item.step, item.why) for item in report.kept] == [
        (2, "not on disk2 yet"),
        (4, "not on disk2 yet"),
        (7, "newest"),
    ]
    shutil.rmtree(far)
    far.touch()
    assert [item.step for item in prune(run, 1).kept] == [2, 4, 7]


def killed(rank: int, world_size: int, folder: str, steps: int, broken: bool = False) -> None:
    state = {"w": torch.zeros(1000), "count": 0}
    tiers = [ckpt.Disk(every=1, keep=1), ckpt.Disk(f"{folder}/far", every=2)]
    with ckpt.Checkpointer(f"{folder}/run", state, tiers=tiers) as loop:
        agent = loop._saver.agent
        assert agent is not None
        if rank == 0:
            Path(folder, "agent").write_text(os.path.dirname(agent.address))
        if broken:
            break_place(Path(folder, "far"))
        for step in loop.steps(steps + 1):
            state["count"] = step
            if step == steps + 1:
                # the save of the step before is captured by all; nobody waits for more
                loop._saver._worker.close(30)
                torch.distributed.barrier()
                os.kill(os.getpid(), signal.SIGKILL)


def test_the_flow_goes_on_although_all_trainers_are_killed(tmp_path: Path) -> None:
    results = run_ranks(killed, 2, str(tmp_path), 6, allow_death=True)
    assert all(isinstance(result, Killed) for result in results)
    agent = Path((tmp_path / "agent").read_text())
    until(lambda: not agent.exists(), "the agent to be done and leave nothing")
    assert saved(tmp_path / "far") == [2, 4, 6]
    assert saved(tmp_path / "run") == [6]


def test_a_start_goes_on_with_what_was_not_on_all_levels_when_everything_died(tmp_path: Path) -> None:
    far = tmp_path / "far"
    train(tmp_path / "run", 6, tiers=[ckpt.Disk(every=1), ckpt.Disk(far, every=2)])
    # as if the agent had died too
    shutil.rmtree(far)
    shutil.rmtree(tmp_path / "run" / "step_00000006")
    train(tmp_path / "run", 7, tiers=[ckpt.Disk(every=1, keep=1), ckpt.Disk(far, every=2)])
    assert saved(far) == [2, 4, 6, 7]
    assert saved(tmp_path / "run") == [7]


def test_the_agent_of_a_job_before_leaves_the_levels_to_the_next(tmp_path: Path) -> None:
    far = tmp_path / "far"
    run_ranks(killed, 1, str(tmp_path), 4, True, allow_death=True)
    old = Path((tmp_path / "agent").read_text())
    assert old.exists()
    # it would go on for an hour; it lets the next job have the run when everything that was captured is written
    until(lambda: saved(tmp_path / "run")[-1:] == [4], "the agent to commit")
    tiers = [ckpt.Disk(every=1, keep=1), ckpt.Disk(far, every=2)]

    def mend(loop: Any, step: int) -> None:
        if step == 5:
            # with what the old agent may have brought meanwhile
            far.rename(tmp_path / "aside")
            far.touch()
        if step == 8:
            until(lambda: not old.exists(), "the old agent to end")
            far.unlink()
            (tmp_path / "aside").rename(far)

    far.unlink()
    train(tmp_path / "run", 8, mend, tiers=tiers)
    assert saved(tmp_path / "run") == [8]
    assert saved(tmp_path / "far") == [2, 4, 6, 8]


def test_a_lost_disk_is_made_up_for_by_another_level(tmp_path: Path) -> None:
    tiers = [ckpt.Disk(every=1, keep=2), ckpt.Disk(tmp_path / "far", every=3)]
    train(tmp_path / "run", 7, tiers=tiers)
    shutil.rmtree(tmp_path / "run")
    assert train(tmp_path / "run", 9, tiers=tiers) == [8, 9]
    shutil.rmtree(tmp_path / "far" / "step_00000009")
    shutil.rmtree(tmp_path / "run")
    assert train(tmp_path / "run", 9, tiers=tiers) == [8, 9]
    assert saved(tmp_path / "far") == [3, 6, 7, 9]


def on_two_nodes(rank: int, world_size: int, folder: str, steps: int) -> tuple[int, str | None, int]:
    os.environ["CKPT_NODE"] = "ab"[rank * 2 // world_size]
    state: dict[str, object] = {
        "w": ckpt.Shard(torch.full((10,), float(rank)), (10 * world_size,), (10 * rank,)),
        "n": 0,
    }
    tiers = [ckpt.Disk(f"{folder}/{{node}}/run", every=1, keep=2), ckpt.Disk(f"{folder}/far", every=2)]
    with ckpt.Checkpointer(f"{folder}/run", state, tiers=tiers) as loop:
        first = loop.step
        assert state["n"] == first
        for step in loop.steps(steps):
            state["n"] = step
    return first, loop.resumed, loop.step


def test_nodes_with_disks_of_their_own_go_on_from_them_and_from_elsewhere_when_one_is_lost(tmp_path: Path) -> None:
    run_ranks(on_two_nodes, 4, str(tmp_path), 5)
    for node in "ab":
        # each prunes its own
        assert sorted(os.listdir(tmp_path / node / "run")) == ["step_00000004", "step_00000005"]
    assert saved(tmp_path / "far") == [2, 4, 5]
    results = run_ranks(on_two_nodes, 4, str(tmp_path), 7)
    assert results == [(5, f"{tmp_path}/{{node}}/run/step_00000005", 7)] * 4
    shutil.rmtree(tmp_path / "b")
    shutil.rmtree(tmp_path / "far" / "step_00000007")
    # step 7 is lost with the node; so are its files of step 6, which lies elsewhere too
    results = run_ranks(on_two_nodes, 4, str(tmp_path), 8)
    assert results == [(6, f"{tmp_path}/far/step_00000006", 8)] * 4
    assert sorted(os.listdir(tmp_path / "b" / "run")) == ["step_00000007", "step_00000008"]
    assert {"step_00000007", "step_00000008"} <= set(os.listdir(tmp_path / "a" / "run"))


def with_a_stale_node(rank: int, world_size: int, folder: str) -> tuple[object, float, list[str]]:
    for name, step in (("first", 1), ("stale", 2), ("second", 2)):
        ckpt.save({"w": torch.full((3,), float(step))}, f"{folder}/{name}", step=step)
    # a node sees its own disk
    own = f"{folder}/{rank}"
    for name, step in (("first", 1), (("stale", "second")[rank], 2)):
        shutil.copytree(f"{folder}/{name}", f"{own}/run/node{rank}/step_{step:08}")
    os.chdir(own)
    w = torch.zeros(3)
    resumed = resume({"w": w}, [Level(name="disk", place="run/{node}", every=None, keep=None)], None)
    return resumed, float(w[0]), sorted(os.listdir(f"run/node{rank}"))


def test_a_node_whose_disk_has_another_checkpoint_of_a_step_costs_that_step_and_mixes_nothing(tmp_path: Path) -> None:
    for resumed, loaded, left in run_ranks(with_a_stale_node, 2, str(tmp_path)):
        assert resumed == (1, "run/{node}/step_00000001")
        assert loaded == 1
        assert left == ["damaged", "step_00000001"]


@pytest.mark.parametrize("number", [0, 1])
def test_a_disk_that_can_not_be_written_is_an_error_before_the_training(number: int, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    tiers = [ckpt.Disk(tmp_path / "one"), ckpt.Disk(tmp_path / "two")]
    tiers[number] = ckpt.Disk(tmp_path / "file" / "run")
    with pytest.raises(SaveFailedError, match=r"file/run: nothing can be saved there \(Not a directory\)"):
        train(tmp_path / "run", 1, lambda *_: pytest.fail("it trains"), tiers=tiers)
    # and the others are free again
    train(tmp_path / "run", 1, tiers=[ckpt.Disk(tmp_path / "one"), ckpt.Disk(tmp_path / "two")])


def test_a_disk_belongs_to_one_job_at_a_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    # the run's own folder may be a further level, and one may be named by a link
    (tmp_path / "link").symlink_to(tmp_path / "shared")
    tiers = [ckpt.Disk(tmp_path / "fast"), ckpt.Disk(), ckpt.Disk(tmp_path / "shared"), ckpt.Disk(tmp_path / "link")]

    def second(loop: Any, step: int) -> None:
        for tier in (ckpt.Disk(tmp_path / "fast"), ckpt.Disk(tmp_path / "shared")):
            with pytest.raises(SaveFailedError, match=r"(fast|shared): another job saves into this run, process"):
                train(tmp_path / "other", 1, tiers=[tier, ckpt.Disk()])

    # what the user saved into the run's own folder is nobody else's
    ckpt.save({"model": torch.nn.Linear(2, 2)}, tmp_path / "by_hand" / "step_1")
    with ckpt.Checkpointer(tmp_path / "by_hand", {"model": torch.nn.Linear(2, 2)}, every=1) as run:
        assert run.step == 1
    train(tmp_path / "run", 1, second, tiers=tiers)
    # that the other job has ended does not make its checkpoints those of this run
    assert "is new" not in caplog.text
    train(tmp_path / "new", 1, tiers=[ckpt.Disk(), ckpt.Disk(tmp_path / "shared")])
    assert f"{tmp_path}/new is new, and goes on from {tmp_path}/shared/step_00000001; if that is an" in caplog.text


def test_a_run_that_goes_on_without_a_level_that_has_more_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, first, second = tmp_path / "run", tmp_path / "first", tmp_path / "second"
    train(run, 4, tiers=[ckpt.Disk(first)])
    train(run, 2, tiers=[ckpt.Disk(second)])
    assert f"{run} begins anew, though {first}, which is not among its levels any more, has step 4" in caplog.text
    train(run, 2, tiers=[ckpt.Disk(first)])
    assert "goes on after" not in caplog.text
    train(run, 2, tiers=[ckpt.Disk(second)])
    assert f"{run} goes on after step 2, though {first}, " in caplog.text


def refused(rank: int, world_size: int, folder: str) -> str:
    with pytest.raises(SaveFailedError) as caught:
        on_two_nodes(rank, world_size, folder, 1)
    return str(caught.value)


def test_a_node_that_can_not_write_to_its_own_disk_is_an_error_on_all_before_the_training(tmp_path: Path) -> None:
    (tmp_path / "b").touch()
    for message in run_ranks(refused, 2, str(tmp_path)):
        assert f"{tmp_path}/b/run: nothing can be saved there (Not a directory)" in message


def test_levels_that_can_not_be_understood_are_an_error_that_names_the_file(tmp_path: Path) -> None:
    assert read_levels(tmp_path) is None
    for text in ("{", "[]", '{"format": "ckpt-levels", "version": 9, "levels": []}', json.dumps({"format": 3})):
        (tmp_path / "levels.json").write_text(text)
        with pytest.raises(ValueError, match=r"levels\.json"):
            read_levels(tmp_path)


def test_only_a_remote_gets_a_disk_that_holds_what_is_on_its_way() -> None:
    levels = ckpt.Checkpointer("/runs/a", {}, tiers=[ckpt.Remote("s3://bucket/a", every=500, keep=5)]).levels
    assert [(level.name, level.place, str(level.every), level.keep) for level in levels] == [
        ("disk", "/runs/a", "every 500 steps", ckpt.LatestN(1)),
        ("remote", "s3://bucket/a", "every 500 steps", ckpt.LatestN(5)),
    ]


def test_what_the_checkpointer_says_is_for_the_first_disk() -> None:
    for tiers in (
        [ckpt.Remote("s3://b/a", every=500, keep=5)],
        [ckpt.Disk(), ckpt.Remote("s3://b/a", every=500, keep=5)],
    ):
        levels = ckpt.Checkpointer("/runs/a", {}, every=50, keep=3, tiers=tiers).levels
        assert [(str(level.every), level.keep) for level in levels] == [
            ("every 50 steps", ckpt.LatestN(3)),
            ("every 500 steps", ckpt.LatestN(5)),
        ]
