"""Sinks: each event once and whole, in files that nobody shares, and never the reason why a save fails."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import ckpt
from ckpt.events import ChromeTraceSink, Event, JsonLinesSink, LogSink, Operation, PhaseEnded, add_sink
from ckpt.events.environment import parse
from ckpt.events.log import seconds_text, size_text
from ckpt_formats.errors import CheckpointExistsError, ConfigurationError
from tests.events.reading import json_lines, open_at_the_end, trace

STATE = {"w": torch.arange(1000.0)}


# logging


def test_a_save_is_one_line_and_a_load_another(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ckpt")
    with add_sink(LogSink()):
        ckpt.save(STATE, tmp_path / "step_1200")
        ckpt.load(dict(STATE), tmp_path / "step_1200")
    saved, loaded = (record.getMessage() for record in caplog.records)
    number = r"\d+(\.\d+)?"
    phases = ", ".join(f"{name} {number}" for name in ("describe", "plan", "write", "commit"))
    folder = f"{tmp_path}/step_1200"
    _assert_matches(saved, rf"saved step 1200: 3\.9 KiB in {number} s \({phases}\) to {folder}")
    _assert_matches(
        loaded, rf"loaded step 1200: 3\.9 KiB in {number} s \(plan .*, agree .*, read .*, apply .*\) from {folder}"
    )


def test_phases_are_lines_for_who_asks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "ckpt")
    with add_sink(LogSink()):
        ckpt.save(STATE, tmp_path / "a")
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.DEBUG]
    for phase in ("describe", "plan", "write", "commit"):
        assert any(line.startswith(f"saving: {phase} took ") for line in lines)


def test_a_failure_is_a_warning_that_says_how_far_it_came(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ckpt.save(STATE, tmp_path / "step_3")
    with add_sink(LogSink()), pytest.raises(CheckpointExistsError):
        ckpt.save(STATE, tmp_path / "step_3")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    _assert_matches(
        record.getMessage(),
        rf"saving step 3 to {tmp_path}/step_3 failed after \S+ s \(describe \S+, plan \S+\): CheckpointExistsError: .+",
    )


def test_sizes_and_times_are_for_people() -> None:
    assert [size_text(n) for n in (0, 1023, 1024, 3435973837, 1 << 62)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "3.2 GiB",
        "4,194,304.0 TiB",
    ]
    assert [seconds_text(s) for s in (0.0, 0.0123, 0.25, 2.1, 99.94, 340.4)] == [
        "0.000",
        "0.012",
        "0.25",
        "2.1",
        "99.9",
        "340",
    ]


# files


def test_json_lines_have_every_field_of_every_event(tmp_path: Path) -> None:
    told: list[Event] = []
    with add_sink(told.append), add_sink(JsonLinesSink(tmp_path / "events")):
        ckpt.save(STATE, tmp_path / "step_5")
    lines = json_lines(tmp_path / "events")
    assert [line["event"].replace("_", "") for line in lines] == [type(event).__name__.lower() for event in told]
    for line, event in zip(lines, told, strict=True):
        assert {name: getattr(event, name) for name in line if name != "event"} == {
            k: v for k, v in line.items() if k != "event"
        }
    assert {line["step"] for line in lines} == {5}


def test_a_line_is_there_as_soon_as_its_event_happened(tmp_path: Path) -> None:
    with add_sink(JsonLinesSink(tmp_path)), Operation("save", "a") as operation, operation.phase("write"):
        assert [line["event"] for line in json_lines(tmp_path)] == ["operation_started", "phase_started"]


def test_no_file_is_made_before_there_is_an_event_and_none_written_twice(tmp_path: Path) -> None:
    with add_sink(JsonLinesSink(tmp_path / "none")), add_sink(ChromeTraceSink(tmp_path / "none")):
        pass
    assert not (tmp_path / "none").exists()
    for _ in range(3):
        with add_sink(JsonLinesSink(tmp_path / "some")), Operation("save", "a", rank=12):
            pass
    names = sorted(path.name for path in (tmp_path / "some").iterdir())
    assert len(names) == 3
    assert all(name.startswith("rank00012-") and f"-{os.getpid()}" in name for name in names)
    assert len(json_lines(tmp_path / "some")) == 6


def test_a_sink_that_was_removed_writes_nothing_more(tmp_path: Path) -> None:
    sink = JsonLinesSink(tmp_path)
    told: list[Event] = []
    with add_sink(told.append), add_sink(sink), Operation("save", "a"):
        pass
    before = json_lines(tmp_path)
    sink(told[0])
    assert json_lines(tmp_path) == before


def test_a_sink_may_be_removed_while_many_threads_write(tmp_path: Path) -> None:
    registration = add_sink(JsonLinesSink(tmp_path))
    begun = threading.Barrier(5, timeout=30)

    def work() -> None:
        begun.wait()
        for _ in range(200):
            with Operation("save", "a") as operation, operation.phase("write"):
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    begun.wait()
    registration.remove()
    # a file of somebody else's now has the descriptor's number: nothing of the sink's may get into it
    other = tmp_path / "other"
    with other.open("w") as file:
        for thread in threads:
            thread.join()
        file.write("mine")
    assert other.read_text() == "mine"
    assert all(line["operation"] == "save" for line in json_lines(tmp_path))


def test_a_forked_child_has_a_file_of_its_own(tmp_path: Path) -> None:
    code = f"""
import os
from ckpt.events import ChromeTraceSink, JsonLinesSink, Operation, add_sink
add_sink(JsonLinesSink({str(tmp_path)!r}))
add_sink(ChromeTraceSink({str(tmp_path)!r}))
Operation("save", "parent").end()
child = os.fork()
if not child:
    Operation("save", "child").end()
    os._exit(0)
os.waitpid(child, 0)
Operation("save", "parent").end()
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    paths = [[json.loads(line)["path"] for line in file.read_text().splitlines()] for file in tmp_path.glob("*.jsonl")]
    assert sorted(paths) == [["child"] * 2, ["parent"] * 4]
    traces = [trace(path) for path in tmp_path.glob("*.trace.json")]
    assert sorted(sum(entry["ph"] == "b" for entry in entries) for entries in traces) == [1, 2]
    assert all("thread_name" in {entry["name"] for entry in entries} for entries in traces)


def test_a_trace_is_json_whose_phases_and_waits_nest(tmp_path: Path) -> None:
    with add_sink(ChromeTraceSink(tmp_path / "traces")):
        ckpt.save(STATE, tmp_path / "step_1")
        ckpt.save({"a": torch.zeros(50), "b": 1}, tmp_path / "step_2")
        ckpt.load(dict(STATE), tmp_path / "step_1")
    (file,) = (tmp_path / "traces").iterdir()
    entries = json.loads(file.read_text())
    assert open_at_the_end(entries) == []
    assert [entry["name"] for entry in entries if entry["ph"] == "b"] == ["save", "save", "load"]
    assert {e["args"]["name"] for e in entries if e["name"] in {"process_name", "thread_name"}} == {
        "rank 0",
        "MainThread",
    }
    counts = [entry["args"]["bytes"] for entry in entries if entry["ph"] == "C" and entry["name"] == "save"]
    assert len(counts) == 2
    assert 4000 <= counts[0] < counts[1]
    assert [entry["args"]["bytes"] for entry in entries if entry["ph"] == "C" and entry["name"] == "load"] == [4000]


def test_saves_of_many_threads_nest_in_the_trace(tmp_path: Path) -> None:
    def work(number: int) -> None:
        for step in range(5):
            ckpt.save(STATE, tmp_path / f"{number}" / f"step_{step}")

    with add_sink(ChromeTraceSink(tmp_path / "traces")):
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    (file,) = (tmp_path / "traces").iterdir()
    entries = trace(file)
    assert open_at_the_end(entries) == []
    assert sum(entry["ph"] == "e" for entry in entries) == 20


def test_the_trace_of_a_process_that_died_shows_what_it_was_at(tmp_path: Path) -> None:
    code = f"""
import os, signal
from ckpt.events import ChromeTraceSink, Operation, add_sink
add_sink(ChromeTraceSink({str(tmp_path)!r}))
with Operation("save", "a", step=3) as operation:
    with operation.phase("plan"):
        pass
    with operation.phase("write"), operation.waiting("the disk"):
        os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    (file,) = tmp_path.iterdir()
    assert file.read_text().startswith('[\n{"')
    assert file.read_text().endswith("},\n")
    assert sorted(open_at_the_end(trace(file))) == ["save", "wait for the disk", "write"]


# sinks that fail


def test_a_sink_that_raises_is_dropped_and_the_save_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    told: list[Event] = []

    class Broken:
        calls = 0
        closed = False

        def __call__(self, event: Event) -> None:
            self.calls += 1
            if isinstance(event, PhaseEnded):
                raise OSError("full")

        def close(self) -> None:
            self.closed = True
            raise RuntimeError("still full")

    broken = Broken()
    with add_sink(broken), add_sink(told.append):
        ckpt.save(STATE, tmp_path / "a")
    assert (broken.calls, broken.closed) == (3, True)
    assert [event.phase for event in told if isinstance(event, PhaseEnded)] == ["describe", "plan", "write", "commit"]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "OSError: full" in record.getMessage()
    with ckpt.open(tmp_path / "a") as checkpoint:
        assert torch.equal(checkpoint["w"][:], STATE["w"])


@pytest.mark.parametrize("sink", [JsonLinesSink, ChromeTraceSink])
def test_a_folder_that_can_not_be_written_costs_a_warning(
    sink: type[JsonLinesSink | ChromeTraceSink], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with add_sink(sink(tmp_path / "file" / "events")):
        ckpt.save(STATE, tmp_path / "a")
    (record,) = caplog.records
    assert str(tmp_path / "file" / "events") in record.getMessage()


def test_a_log_handler_that_raises_does_not_break_a_save(tmp_path: Path) -> None:
    class Broken(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:  # noqa: ARG002 - as in logging
            raise RuntimeError("broken")

    handler = Broken()
    logger = logging.getLogger("ckpt")
    logger.addHandler(handler)
    try:
        with add_sink(LogSink()):
            with pytest.raises(CheckpointExistsError):
                ckpt.save(STATE, _saved(tmp_path))
            ckpt.save(STATE, tmp_path / "b")
    finally:
        logger.removeHandler(handler)


def _saved(tmp_path: Path) -> Path:
    ckpt.save(STATE, tmp_path / "a")
    return tmp_path / "a"


# the environment variable


def test_the_environment_chooses_sinks(tmp_path: Path) -> None:
    done = _with_environment(f"log, jsonl:{tmp_path}/lines,trace:{tmp_path}/traces", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "saved step 1: 40 B in " in done.stderr
    assert "Warning" not in done.stderr
    assert {line["phase"] for line in json_lines(tmp_path / "lines") if line["event"] == "phase_ended"} == {
        "describe",
        "plan",
        "write",
        "commit",
    }
    (file,) = (tmp_path / "traces").iterdir()
    assert open_at_the_end(json.loads(file.read_text())) == []


def test_without_the_variable_nothing_is_told(tmp_path: Path) -> None:
    done = _with_environment("", tmp_path)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")
    assert os.listdir(tmp_path) == ["step_1"]


def test_a_word_that_means_nothing_is_an_error_before_anything_is_saved(tmp_path: Path) -> None:
    done = _with_environment("log,yaml:there", tmp_path)
    assert done.returncode == 1
    assert "ConfigurationError" in done.stderr
    assert "'yaml:there' in it is none of log, jsonl:FOLDER, trace:FOLDER" in done.stderr
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("text", ["jsonl", "jsonl:", "trace", "log:x", "LOG", "log;trace:a"])
def test_words_are_what_they_are(text: str) -> None:
    with pytest.raises(ConfigurationError):
        parse(text)


def test_empty_words_are_no_words() -> None:
    assert parse(" ,, ") == []


def _with_environment(value: str, folder: Path) -> subprocess.CompletedProcess[str]:
    code = f"import ckpt, torch; ckpt.save({{'w': torch.zeros(10)}}, {str(folder / 'step_1')!r})"
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"CKPT_EVENTS": value},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def _assert_matches(text: str, pattern: str) -> None:
    assert re.fullmatch(pattern, text), text
