"""What is promised of the way to the disk: never faster than asked, and compressed where that pays."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import ckpt
from ckpt.agent import link
from ckpt.agent.link import Link
from ckpt.storage.files import File, Files
from ckpt_formats.errors import ConfigurationError
from ckpt_formats.verify import verify
from tests.agent.test_async_save import agent_here

MIB = 1 << 20


class Slowed(Files):
    """A disk that takes so many bytes per second."""

    def __init__(self) -> None:
        super().__init__()
        self.speed = 1e12

    def create(self, path: str, *, direct: bool) -> File:
        file = super().create(path, direct=direct)
        write = file.write

        def slowly(data: memoryview, at: int) -> None:
            time.sleep(len(data) / self.speed)
            write(data, at)

        file.write = slowly  # type: ignore[method-assign]
        return file


def weights(seed: int) -> dict[str, torch.Tensor]:
    """As compressible as trained ones: their exponents are alike."""
    torch.manual_seed(seed)
    return {"w": torch.randn(MIB) / 100}


WHOLE = 4 * MIB
"""Bytes of them."""


def stored(path: Path) -> int:
    return sum(file.stat().st_size for file in (path / "data").iterdir())


def test_the_agent_writes_no_faster_than_it_was_asked_to(tmp_path: Path) -> None:
    with agent_here(tmp_path, Files()) as saver:
        saver.save(weights(0), tmp_path / "a").wait(60)
        begin = time.monotonic()
        saver.save(weights(0), tmp_path / "b", bandwidth=2 * MIB).wait(60)
        assert time.monotonic() - begin > 1.9
        # and as fast as it can again, on a slow disk of a busy machine too
        begin = time.monotonic()
        saver.save(weights(0), tmp_path / "c").wait(60)
        assert time.monotonic() - begin < 1.9
        saver.save(weights(0), tmp_path / "d", bandwidth=np.float32(1e12)).wait(60)
        for wrong in (0, -1.0, "fast", float("nan"), True):
            with pytest.raises(ConfigurationError, match=f"bandwidth={wrong!r}"):
                saver.save(weights(0), tmp_path / "e", bandwidth=wrong)  # type: ignore[arg-type]


def test_compression_comes_with_a_slow_link_and_goes_with_a_fast_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # slow enough that no disk, however busy, is taken for it
    monkeypatch.setattr(link, "SLOW", 15e6)
    monkeypatch.setattr(link, "MEASURED", MIB)
    disk = Slowed()
    with agent_here(tmp_path, disk) as saver:
        for k in range(2):
            saver.save(weights(k), tmp_path / str(k), compress="auto").wait(60)
        disk.speed = 5e6
        for k in range(2, 6):
            saver.save(weights(k), tmp_path / str(k), compress="auto").wait(60)
    assert stored(tmp_path / "1") >= WHOLE
    assert stored(tmp_path / "5") < 0.95 * WHOLE
    for k in (1, 5):
        assert verify(tmp_path / str(k)).intact
        with ckpt.open(tmp_path / str(k)) as checkpoint:
            assert torch.equal(checkpoint["w"][:], weights(k)["w"])


def test_a_link_that_becomes_fast_is_known_to_be() -> None:
    it = Link()
    assert not it.slow
    it.do(lambda: time.sleep(0.2), 16 * MIB)
    assert it.slow
    it.do(lambda: time.sleep(0.05), 1 << 30)
    assert not it.slow


def test_a_link_that_is_never_idle_is_known_to_be_slow() -> None:
    """As it is where saves follow each other faster than they are written."""
    it = Link()
    over = threading.Event()
    first = threading.Thread(target=it.do, args=(lambda: over.wait(60), 1))
    first.start()
    it.do(lambda: time.sleep(0.2), 16 * MIB)
    assert it.slow
    over.set()
    first.join()


def test_what_was_asked_for_is_compressed_whatever_the_link(tmp_path: Path) -> None:
    state = weights(0) | {"small": torch.arange(5), "half": torch.randn(100_000).bfloat16()}
    with agent_here(tmp_path, Files()) as saver:
        saver.save(state, tmp_path / "a", compress=True).wait(60)
    assert verify(tmp_path / "a").intact
    assert stored(tmp_path / "a") < 0.95 * WHOLE
    with ckpt.open(tmp_path / "a") as checkpoint:
        for name, tensor in state.items():
            assert torch.equal(checkpoint[name][...], tensor)
