"""What all verbs print alike."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_cli import progress
from ckpt_cli.output import age_text, count_text, plain, size_text
from ckpt_cli.progress import reporting


@given(st.text(st.characters()))
def test_plain_text_is_printable_and_leaves_printable_text_alone(text: str) -> None:
    assert plain(text).isprintable()
    assert not text.isprintable() or plain(text) == text
    assert plain(text, lines=True).replace("\n", "").isprintable()


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (2**20 - 1, "1.0 MiB"),
        (2**30, "1.0 GiB"),
        (2**40 * 1000, "1000.0 TiB"),
        (2**60, "1,024.0 PiB"),
    ],
)
def test_sizes(count: int, text: str) -> None:
    assert size_text(count) == text


def test_counts() -> None:
    assert [count_text(count, "file") for count in (0, 1, 12345)] == ["0 files", "1 file", "12,345 files"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-3600, "in the future"),
        (-5, "0 s ago"),
        (59, "59 s ago"),
        (60, "1 min ago"),
        (7300, "2 h ago"),
        (86400 * 9, "9 days ago"),
    ],
)
def test_ages(seconds: int, text: str) -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    assert age_text(now - timedelta(seconds=seconds), now) == text


def test_where_there_is_no_terminal_progress_is_a_line_every_few_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with reporting("Verifying") as report:
        assert report is not None
        for second in range(20):
            now = 100.0 + second
            report(second << 20, 20 << 20)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "Verifying: 5.0 MiB of 20.0 MiB (25 %)",
        "Verifying: 10.0 MiB of 20.0 MiB (50 %)",
        "Verifying: 15.0 MiB of 20.0 MiB (75 %)",
    ]


def test_progress_that_is_not_wanted_is_none() -> None:
    with reporting("Verifying", wanted=False) as report:
        assert report is None
