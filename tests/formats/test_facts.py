"""Facts beside a checkpoint: what is recorded is read again, whatever dies when, and they never stand in its way."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt.storage.facts import update_facts
from ckpt_formats.checkpoint import open_checkpoint
from ckpt_formats.digest import hexdigest
from ckpt_formats.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptionError,
    FactsError,
    FormatError,
    SaveFailedError,
    UnknownVersionError,
)
from ckpt_formats.facts import Facts, decode, encode, read_facts
from ckpt_formats.verify import verify
from tests.crash.operations import Faulty, Watch, errors, kills
from tests.formats.native.whole import files_of, write_whole

_NAMES = st.text(st.characters(exclude_categories=("C", "Z"), exclude_characters=","), min_size=1, max_size=20)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write_whole(tmp_path / "step_3")
    return tmp_path / "step_3"


def _sealed(tree: object) -> bytes:
    body = json.dumps(tree, separators=(",", ":")).encode()[:-1]
    return body + f',"digest":"{hexdigest(body)}"}}\n'.encode()


@given(
    metrics=st.dictionaries(_NAMES, st.floats(allow_nan=False) | st.integers(-(2**50), 2**50), max_size=5),
    tags=st.sets(_NAMES, max_size=5),
    pinned=st.booleans(),
)
def test_what_is_recorded_is_read(metrics: dict[str, float], tags: set[str], pinned: bool) -> None:
    facts = Facts(metrics=metrics, tags=tuple(sorted(tags)), pinned=pinned)
    assert decode(encode(facts), "facts.json") == facts


def test_a_metric_that_is_not_a_number_is_recorded_as_such() -> None:
    read = decode(encode(Facts(metrics={"loss": math.nan, "up": math.inf, "down": -math.inf})), "facts.json")
    assert math.isnan(read.metrics["loss"])
    assert (read.metrics["up"], read.metrics["down"]) == (math.inf, -math.inf)


def test_any_flipped_bit_is_found() -> None:
    data = encode(Facts(metrics={"loss": 2.5}, tags=("best",), pinned=True))
    for position in range(len(data)):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[position] ^= 1 << bit
            with pytest.raises(CorruptionError, match=r"run/facts\.json: .*checkpoint itself is not touched"):
                decode(bytes(damaged), "run/facts.json")


@pytest.mark.parametrize("length", [0, 1, 45, 46, 100])
def test_a_truncated_file_is_found(length: int) -> None:
    with pytest.raises(CorruptionError):
        decode(encode(Facts(tags=("best",)))[:length], "facts.json")


@pytest.mark.parametrize(
    "change",
    [
        {"format": "ckpt"},
        {"metrics": [1]},
        {"metrics": {"loss": "2"}},
        {"metrics": {"loss": True}},
        {"metrics": {"loss": 10**400}},
        {"metrics": {"a\nb": 1}},
        {"tags": "best"},
        {"tags": [1]},
        {"tags": [""]},
        {"tags": ["\x1b[31m"]},
        {"pinned": 1},
        {"pinned": None},
    ],
)
def test_what_the_format_rules_out_is_refused(change: dict[str, object]) -> None:
    tree = {"format": "ckpt-facts", "version": 1, "metrics": {}, "tags": [], "pinned": False}
    assert decode(_sealed(tree), "facts.json") == Facts()
    with pytest.raises(FormatError, match=r"facts\.json"):
        decode(_sealed(tree | change), "facts.json")


def test_a_newer_version_is_refused_as_such() -> None:
    with pytest.raises(UnknownVersionError, match="this release reads 1"):
        decode(_sealed({"format": "ckpt-facts", "version": 2}), "facts.json")


def test_a_newer_release_s_additions_are_ignored() -> None:
    tree = {"format": "ckpt-facts", "version": 1, "metrics": {}, "tags": ["a"], "pinned": False, "color": "red"}
    assert decode(_sealed(tree), "facts.json") == Facts(tags=("a",))


@pytest.mark.parametrize("name", ["", " a", "a ", "a,b", "a\nb", "\x1b", "x" * 201, "\ud800"])
def test_a_name_that_can_t_be_recorded_is_refused(checkpoint: Path, name: str) -> None:
    with pytest.raises(FactsError):
        update_facts(checkpoint, lambda facts: facts.changed(tags=[name]))
    with pytest.raises(FactsError):
        update_facts(checkpoint, lambda facts: facts.changed(metrics={name: 1.0}))
    assert not (checkpoint / "facts.json").exists()


def test_no_file_of_facts_is_none(checkpoint: Path) -> None:
    assert read_facts(checkpoint) == Facts()
    assert not read_facts(checkpoint)


def test_recording_touches_nothing_else_and_is_no_debris(checkpoint: Path) -> None:
    before = {file: file.read_bytes() for file in files_of(checkpoint)}
    update_facts(checkpoint, lambda facts: facts.changed(tags=["best"], metrics={"loss": 1}))
    update_facts(checkpoint, lambda facts: facts.changed(tags=["v1"], pinned=True))
    update_facts(checkpoint, lambda facts: facts.changed(untag=["best"]))
    assert read_facts(checkpoint) == Facts(tags=("v1",), metrics={"loss": 1.0}, pinned=True)
    assert {file: file.read_bytes() for file in files_of(checkpoint) if file.name != "facts.json"} == before
    report = verify(checkpoint)
    assert report.intact
    assert not report.debris


@pytest.mark.parametrize("content", [b"", b"{}", b"\x00" * 100, b"x" * ((1 << 20) + 1)])
def test_damaged_facts_are_an_error_of_their_own_and_the_checkpoint_opens(checkpoint: Path, content: bytes) -> None:
    (checkpoint / "facts.json").write_bytes(content)
    with pytest.raises((CorruptionError, FormatError), match=r"step_3/facts\.json.*checkpoint itself is not touched"):
        read_facts(checkpoint)
    with open_checkpoint(checkpoint) as opened:
        assert opened["model.weight"][...].shape == (6, 8)
    assert verify(checkpoint).intact
    with pytest.raises((CorruptionError, FormatError)):
        update_facts(checkpoint, lambda facts: facts.changed(pinned=True))
    assert (checkpoint / "facts.json").read_bytes() == content


def test_a_pipe_in_the_place_of_facts_does_not_hang(checkpoint: Path) -> None:
    os.mkfifo(checkpoint / "facts.json")
    with pytest.raises(CorruptionError, match="plain file"):
        read_facts(checkpoint)


def test_facts_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError):
        update_facts(tmp_path / "step_9", lambda facts: facts.changed(pinned=True))
    (tmp_path / "step_9/data").mkdir(parents=True)
    (tmp_path / "step_9/index").mkdir()
    with pytest.raises(CheckpointNotFoundError):
        update_facts(tmp_path / "step_9", lambda facts: facts.changed(pinned=True))


def test_nobody_s_change_is_lost_when_many_record_at_once(checkpoint: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        done = [
            pool.submit(update_facts, checkpoint, lambda facts, k=k: facts.changed(tags=[f"tag{k}"])) for k in range(24)
        ]
        for one in done:
            one.result(timeout=60)
    assert len(read_facts(checkpoint).tags) == 24


# whatever fails or dies on the way


def _record(checkpoint: Path, watch: Watch) -> None:
    update_facts(checkpoint, lambda facts: facts.changed(tags=["new"]), files=Faulty(watch))


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_each_operation_fails_and_the_facts_are_those_of_before_or_after(checkpoint: Path, code: int) -> None:
    counting = Watch()
    _record(checkpoint, counting)
    for fault in errors(counting.seen, code):
        (checkpoint / "facts.json").unlink()
        update_facts(checkpoint, lambda facts: facts.changed(tags=["old"]))
        watch = Watch(fault)
        with pytest.raises(SaveFailedError, match=os.strerror(code)):
            _record(checkpoint, watch)
        assert read_facts(checkpoint).tags in (("old",), ("new", "old"))
        assert verify(checkpoint).intact
        assert not verify(checkpoint).debris, fault
        _record(checkpoint, Watch())
        assert read_facts(checkpoint).tags == ("new", "old")


def test_killed_at_each_operation_leaves_the_facts_of_before_or_after(checkpoint: Path) -> None:
    counting = Watch()
    _record(checkpoint, counting)
    seen = set()
    for fault in kills(counting.seen):
        (checkpoint / "facts.json").unlink()
        update_facts(checkpoint, lambda facts: facts.changed(tags=["old"]))
        child = os.fork()
        if not child:
            try:
                _record(checkpoint, Watch(fault))
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        seen.add(read_facts(checkpoint).tags)
        assert verify(checkpoint).intact
    assert seen == {("old",), ("new", "old")}


def test_errors_name_the_checkpoint(checkpoint: Path) -> None:
    (checkpoint / "facts.json").write_bytes(b"{}")
    with pytest.raises(CheckpointError) as caught:
        read_facts(checkpoint)
    assert caught.value.path == str(checkpoint / "facts.json")
