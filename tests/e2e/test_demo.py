"""`ckpt demo` as a person runs it: a process of its own, real Ray, real workers, real signals.

Each run is in a session of its own, which is how what it leaves behind is found.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from ckpt_cli.demo.command import demo
from ckpt_cli.demo.text import Sampler, Text

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="the processes left are found in /proc")

STEPS = 24
DEMO = [sys.executable, "-c", "from ckpt_cli.main import main; main()", "demo", "--steps", str(STEPS)]
LIMIT_S = 240.0
END_LIMIT_S = 120.0


@dataclass
class Run:
    """A running demo and what it has said so far."""

    process: subprocess.Popen[str]
    out: Path
    lines: list[str] = field(default_factory=list)

    def listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)

    def wait_for(self, words: str) -> None:
        """Wait until it has said something."""
        deadline = time.monotonic() + LIMIT_S
        while not any(words in line for line in self.lines):
            assert self.process.poll() is None, f"it ended before it said '{words}':\n{self.said}"
            assert time.monotonic() < deadline, f"it has not said '{words}':\n{self.said}"
            time.sleep(0.02)

    def end(self) -> int:
        """Wait for its end; its exit code."""
        return self.process.wait(END_LIMIT_S)

    @property
    def said(self) -> str:
        return "".join(self.lines)

    @property
    def processes(self) -> dict[int, str]:
        return processes_of(self.process.pid)


def processes_of(session: int) -> dict[int, str]:
    """Every living process of a session, by process id, with its command line."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its_session = stat.read_text().rpartition(")")[2].split()[:4]
            if int(its_session) == session and state not in "ZX":
                found[int(stat.parent.name)] = (stat.parent / "cmdline").read_text().replace("\0", " ").strip()
        except OSError:  # it has just ended
            continue
    return found


@contextmanager
def started(out: Path) -> Iterator[Run]:
    """A demo that has been started; whatever it leaves behind is killed at the end, so that no test harms another."""
    process = subprocess.Popen(
        [*DEMO, "--out", str(out)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    run = Run(process, out)
    listener = threading.Thread(target=run.listen, name="listener")
    listener.start()
    try:
        yield run
    finally:
        for pid in run.processes:
            os.kill(pid, signal.SIGKILL)
        process.wait(END_LIMIT_S)
        listener.join(END_LIMIT_S)
        assert process.stdout is not None
        process.stdout.close()


def test_the_whole_story_holds(tmp_path: Path) -> None:
    command = [*DEMO, "--out", str(tmp_path / "out"), "--json"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True) as process:
        try:
            printed, told = process.communicate(timeout=LIMIT_S)
            assert processes_of(process.pid) == {}
        finally:
            process.terminate()
    assert process.returncode == 0, told
    assert "Traceback" not in told
    facts = json.loads(printed)
    assert facts["ok"]
    assert all(proof["holds"] for proof in facts["proofs"])

    assert [life["workers"] for life in facts["lives"]] == [4, 2, 4]
    assert all(life["threads_per_worker"] == 1 for life in facts["lives"])
    assert all(len(set(life["rows"])) > 1 for life in facts["lives"]), "no shard is uneven"
    first, second, third = (life["losses"] for life in facts["lives"])
    reached = first | second | third
    uninterrupted = facts["uninterrupted"]["losses"]
    assert sorted(map(int, reached)) == list(range(1, STEPS + 1))
    assert max(abs(reached[step] - uninterrupted[step]) for step in reached) <= facts["tolerance"]
    assert {step: uninterrupted[step] for step in first} == first, "the same mesh gave other bits"
    assert uninterrupted[str(STEPS)] < uninterrupted["1"] - 1, "nothing was learnt"

    kill = facts["kill"]
    assert (kill["rank"], str(kill["after_step"])) == (3, max(first, key=int))
    assert str(kill["recovered_from_step"] + 1) == min(second, key=int)
    assert facts["same_mesh"]["bit_equal"] == facts["same_mesh"]["steps"] > 0
    assert [command["code"] for command in facts["commands"]] == [0, 0, 0]
    assert facts["text"].startswith("The ")
    assert Path(facts["picture"]).read_bytes().startswith(b"\x89PNG\r\n")


def test_ctrl_c_in_mid_run_leaves_no_process_behind(tmp_path: Path) -> None:
    with started(tmp_path / "out") as run:
        run.wait_for("saved:")
        assert len(run.processes) > 8, "Ray, two servers and four workers should be running"
        os.killpg(run.process.pid, signal.SIGINT)  # as a terminal does: to every process of the group
        assert run.end() == 130
        assert run.processes == {}
    assert "Stopped; no process is left behind." in run.said
    assert "Traceback" not in run.said


def test_sigterm_while_ray_starts_leaves_no_process_behind(tmp_path: Path) -> None:
    with started(tmp_path / "out") as run:
        run.wait_for("Getting ready")
        while len(run.processes) < 3:  # Ray's first processes
            assert run.process.poll() is None, run.said
        os.kill(run.process.pid, signal.SIGTERM)
        assert run.end() == 128 + signal.SIGTERM
        assert run.processes == {}
    assert "Traceback" not in run.said


def test_when_a_node_dies_the_demo_says_so_and_its_workers_die_too(tmp_path: Path) -> None:
    with started(tmp_path / "out") as run:
        run.wait_for("saved:")
        node = next(pid for pid, command in run.processes.items() if command.startswith("ray::Node"))
        os.kill(node, signal.SIGKILL)
        assert run.end() == 1
        assert run.processes == {}
    assert "a node of the cluster died" in run.said
    assert "Traceback" not in run.said


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    result = CliRunner().invoke(demo, ["--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "is not empty; name another folder with --out" in result.output
    assert (tmp_path / "mine").read_text() == "precious"


def test_without_its_packages_the_demo_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ray" else object())
    result = CliRunner().invoke(demo, [])
    assert result.exit_code == 2
    assert "the demo needs ray: pip install 'anyckpt[demo]'" in result.output


@pytest.mark.parametrize("parts", [2, 4])
def test_the_order_of_the_data_does_not_depend_on_the_number_of_ranks(parts: int) -> None:
    text = Text()
    alone = Sampler(text, seed=3)
    ranks = [Sampler(text, seed=3) for _ in range(parts)]
    for _ in range(3):
        together = [
            torch.cat(columns) for columns in zip(*(r.batch(8, i, parts) for i, r in enumerate(ranks)), strict=True)
        ]
        for whole, joined in zip(alone.batch(8, 0, 1), together, strict=True):
            assert torch.equal(whole, joined)
    assert {sampler.samples_drawn for sampler in ranks} == {24}


def test_a_sampler_goes_on_from_its_saved_number() -> None:
    text = Text()
    first, second = Sampler(text, seed=3), Sampler(text, seed=3)
    first.batch(40, 0, 1)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.batch(4, 0, 1)[0], second.batch(4, 0, 1)[0])
