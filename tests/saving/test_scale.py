"""Manifests of many ranks: made, opened and loaded from in processes of their own, in little time and memory.

The sizes are small; the targets, for 16,384 ranks, are what benchmarks/scale.py measures.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.scale import Simulated, run


@pytest.mark.parametrize(("cut", "chunks"), [("fsdp", 512 * 201), ("mesh", 512 * 26)])
def test_a_rank_of_hundreds_loads_its_part_with_a_part_of_the_index(tmp_path: Path, cut: str, chunks: int) -> None:
    measured = dict(run(Simulated(512, 200, cut), tmp_path / "step_1"))
    made = measured.pop("commit")
    assert made["chunks"] == chunks
    assert made["commit_cpu_s"] < 10
    # 81 bytes for each chunk, the digests of leaves, and some for each file
    assert made["index_mib"] * 2**20 < made["chunks"] * 83
    assert made["root_mib"] * 2**20 < 512 * 400 + 200 * 400
    for numbers in measured.values():
        assert numbers["load_cpu_s"] < 5
        assert numbers["load_mib"] < 60
