"""The command as a whole: help, errors, exit codes, interruption."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import ckpt as library
from ckpt_cli.main import VERBS
from tests.cli.command import PROGRAM, ckpt, here
from tests.formats.native.tampering import Tampered, seal_root
from tests.formats.native.whole import write_whole


def test_help_lists_the_verbs_and_the_exit_codes() -> None:
    done = ckpt("--help")
    assert done.returncode == 0
    assert "Exit codes" in done.stdout
    for verb in VERBS:
        assert f"\n  {verb} " in done.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_tells_its_exit_codes(verb: str) -> None:
    result = here(verb, "--help")
    assert result.exit_code == 0
    assert "Exit codes" in result.output


def test_help_imports_nothing_that_takes_time() -> None:
    program = "import sys; from ckpt_cli.main import cli; cli(['--help'], standalone_mode=False); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.splitlines()[-1].split()}
    assert "ckpt_cli" in loaded
    assert not loaded & {"ckpt", "ckpt_formats", "ml_dtypes", "numpy", "rich", "torch"}


@pytest.mark.parametrize(
    "arguments", [("ls", "."), ("show", "."), ("verify", "."), ("diff", ".", "."), ("show", ".", "epoch")]
)
def test_reading_works_where_torch_is_missing(checkpoint: Path, arguments: tuple[str, ...]) -> None:
    program = "import sys; sys.modules['torch'] = None; from ckpt_cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False, cwd=checkpoint
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


def test_version() -> None:
    assert ckpt("--version").stdout == f"ckpt {version('anyckpt')}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("nosuchverb",),
        ("verify",),
        ("verify", "a", "b"),
        ("verify", "--nosuchoption", "a"),
        ("verify", "nosuchfolder"),
        ("ls", "nosuchfolder"),
        ("show", "nosuchfolder"),
        ("diff", "nosuchfolder", "nosuchfolder"),
        ("diff", ".", ".", "--rtol", "-1"),
        ("reshard", "nosuchfolder", "target", "--mesh", "dp=2"),
        ("reshard", "nosuchfolder", "target"),
        ("copy", "nosuchfolder", "target"),
        ("prune", "nosuchfolder"),
        ("tag", "nosuchfolder", "best"),
    ],
)
def test_a_wrong_request_is_a_sentence_on_stderr_and_exit_2(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = ckpt(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Error: " in done.stderr
    assert "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("verb", ["show", "verify"])
def test_a_run_in_the_place_of_a_checkpoint_names_those_in_it(run: Path, verb: str) -> None:
    result = here(verb, run)
    assert result.exit_code == 2
    assert "step_00000100, step_00000200; name one of them" in result.stderr


def test_an_error_of_the_file_system_is_a_sentence_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("ckpt_cli.ls.find_checkpoints", fail)
    result = here("ls", tmp_path)
    assert (result.exit_code, result.stderr) == (2, f"Error: {tmp_path}: Permission denied\n")


def test_values_that_no_writer_makes_are_told_as_such(tmp_path: Path) -> None:
    write_whole(tmp_path / "whole")
    huge = Tampered(tmp_path / "whole")
    huge.root["provenance"]["loss"] = "HUGE"
    deep: object = 1
    for _ in range(500):
        deep = [deep]
    huge.root["values"]["deep"] = deep
    huge.write(tmp_path / "huge")
    text = (tmp_path / "huge/manifest.json").read_bytes().partition(b',"digest":')[0].replace(b'"HUGE"', b"1e999")
    (tmp_path / "huge/manifest.json").write_bytes(seal_root(text))
    for arguments in (("show", "huge"), ("show", "huge", "--json"), ("verify", "huge"), ("diff", "huge", "whole")):
        done = ckpt(*arguments, cwd=tmp_path)
        assert done.returncode == 1
        assert "bug" not in done.stderr


def test_debug_shows_the_traceback_and_keeps_the_exit_code(tmp_path: Path) -> None:
    done = ckpt("--debug", "verify", tmp_path / "nowhere")
    assert done.returncode == 2
    assert "Traceback (most recent call last)" in done.stderr
    assert done.stderr.rstrip().endswith("no such folder; check the path")


def test_a_bug_is_a_sentence_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(path: str) -> None:
        raise ZeroDivisionError("by \x1b[31mnothing")

    monkeypatch.setattr("ckpt_cli.ls.find_checkpoints", fail)
    result = here("ls", tmp_path)
    assert result.exit_code == 2
    assert result.stderr.startswith(r"Error: ZeroDivisionError: by \x1b[31mnothing. This is a bug")
    assert "Traceback" not in result.stderr


def test_control_c_ends_it_with_130_and_no_traceback(tmp_path: Path) -> None:
    program = """
import threading
import ckpt_cli.ls
def block(path):
    print("ready", flush=True)
    threading.Event().wait(60)
ckpt_cli.ls.find_checkpoints = block
from ckpt_cli.main import main
main()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program, "ls", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell may have started the tests with the signal ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509 - no threads here
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr == "Interrupted.\n"


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path: Path) -> None:
    library.save({f"tensor{k}": library.Shard.__doc__ for k in range(5000)}, tmp_path / "many")
    command = " ".join(f"'{part}'" for part in [*PROGRAM, "show", str(tmp_path / "many"), "--values"])
    done = subprocess.run(["bash", "-c", f"{command} | head -1"], capture_output=True, text=True, check=False)
    assert done.stdout.startswith(str(tmp_path / "many"))
    assert done.stderr == ""


def test_names_that_the_terminal_s_encoding_lacks_are_escaped(tmp_path: Path) -> None:
    library.save({"gewicht_重": library.PerRank(1)}, tmp_path / "named")
    done = ckpt("show", tmp_path / "named", env={**os.environ, "PYTHONIOENCODING": "latin-1"})
    assert (done.returncode, done.stderr) == (0, "")
    assert r"gewicht_\u91cd" in done.stdout


def on_terminal(*arguments: str | Path, columns: int) -> str:
    """What the command shows on a terminal of that width."""
    master, slave = pty.openpty()
    env = {**os.environ, "COLUMNS": str(columns), "TERM": "xterm"}
    with subprocess.Popen([*PROGRAM, *map(str, arguments)], stdout=slave, stderr=slave, env=env) as process:
        os.close(slave)
        output = b""
        while select.select([master], [], [], 60)[0]:
            try:
                chunk = os.read(master, 65536)
            except OSError:  # the other end is closed
                break
            output += chunk
        process.wait(60)
    os.close(master)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.decode().replace("\r\n", "\n"))


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_on_a_terminal_no_line_is_too_long_and_no_name_is_broken(checkpoint: Path, columns: int) -> None:
    output = on_terminal("show", checkpoint, columns=columns)
    assert max(map(len, output.splitlines())) <= columns
    for name in ("model.layers.1.weight", "optimizer.state.layers.0.weight.exp_avg_sq"):
        assert f"  {name}" in output


def test_elsewhere_every_tensor_is_one_line(tmp_path: Path) -> None:
    name = "very_long_name." * 30
    library.save({name: 1.5, **{f"{name}{k}": library.Shard.__name__ for k in range(3)}}, tmp_path / "long")
    done = ckpt("show", tmp_path / "long")
    assert sum(line.startswith(f"  {name}") for line in done.stdout.splitlines()) == 8
    assert not any(line.endswith(" ") for line in done.stdout.splitlines())


def test_a_bar_shows_progress_on_a_terminal_and_leaves_no_trace(checkpoint: Path) -> None:
    output = on_terminal("verify", checkpoint, columns=80)
    assert "Verifying" in output
    # what stays is the result
    assert " ".join(output.rpartition("\r")[2].split()).startswith(f"{checkpoint} is intact. Checked ")
