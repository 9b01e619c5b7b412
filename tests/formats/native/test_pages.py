"""An index of several pages: read page by page, and held to the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ckpt.storage import publish
from ckpt_formats.checkpoint import open_checkpoint
from ckpt_formats.digest import digest
from ckpt_formats.errors import CorruptionError, FormatError
from ckpt_formats.native.reader import read_root
from ckpt_formats.verify import verify
from tests.formats.native.hostile import found_by_verify, load_all, read_all, refused_everywhere
from tests.formats.native.tampering import Tampered
from tests.formats.native.whole import bitwise_equal, write_whole


@pytest.fixture
def paged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The whole checkpoint with pages of at most three rows, or of one tensor that has more."""
    monkeypatch.setattr(publish, "PAGE_ROWS", 3)
    write_whole(tmp_path / "paged")
    return tmp_path / "paged"


def test_many_pages_read_as_one(whole: Path, paged: Path) -> None:
    root = read_root(str(paged))
    assert [page.rows for page in root.pages] == [3, 3, 3, 4]
    assert bitwise_equal(read_all(paged), read_all(whole))
    assert bitwise_equal(load_all(paged), load_all(whole))
    assert verify(paged).intact


def test_only_the_pages_that_are_needed_are_read(paged: Path) -> None:
    root = read_root(str(paged))
    for page in root.pages[:-1]:
        (paged / page.path).unlink()
    with open_checkpoint(paged) as checkpoint:
        assert checkpoint["model.weight"][...].shape == (6, 8)
        with pytest.raises(CorruptionError, match="index/001-"):
            checkpoint["model.bias"][...]


def test_bytes_that_chunks_of_two_pages_claim_are_found(paged: Path, tmp_path: Path) -> None:
    """Reading a page does not know of the others, and needs not: both claims fit their digests."""
    tampered = Tampered(paged)
    first, last = tampered.pages[1], tampered.pages[3]
    same = int(np.flatnonzero(first["file"] == last["file"][0])[0])
    last["start"][0] = first["start"][same]
    start, length = int(last["start"][0]), int(last["length"][0])
    data = bytes(tampered.data[int(last["file"][0])][start : start + length])
    last["digest"][0] = np.frombuffer(digest(data), np.uint8)
    found_by_verify(tampered.write(tmp_path / "step_3"))


def test_pages_in_another_order_are_refused(paged: Path, tmp_path: Path) -> None:
    tampered = Tampered(paged)
    tampered.pages[0], tampered.pages[1] = tampered.pages[1], tampered.pages[0]
    refused_everywhere(tampered, tmp_path / "step_3", FormatError, "index/000-")


def test_tensor_that_skips_a_page_is_refused(paged: Path, tmp_path: Path) -> None:
    tampered = Tampered(paged)
    for name, meta in tampered.root["tensors"].items():
        if meta["page"] == 3:
            meta["page"] = 2 if name == "x" else 4
    refused_everywhere(tampered, tmp_path / "step_3", FormatError, "'model.weight' has a page that does not follow")
