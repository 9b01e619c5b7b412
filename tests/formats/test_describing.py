"""Words about parts of a checkpoint: bounded, and made of whatever a manifest says without trusting it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ckpt_formats.describing import mesh_text, value_text, writers_text
from ckpt_formats.values import Opaque


@pytest.mark.parametrize(
    ("layout", "text"),
    [
        ({}, "1 rank"),
        ({"world_size": 8, "meshes": [{"names": ["dp", "tp"], "shape": [2, 4]}]}, "8 ranks (dp=2,tp=4)"),
        ({"world_size": 2, "meshes": [7, {"names": 3}, {"names": ["a"], "shape": []}, {}]}, "2 ranks"),
        ({"world_size": 2, "meshes": None}, "2 ranks"),
    ],
)
def test_who_wrote_it(layout: dict[str, Any], text: str) -> None:
    assert writers_text(layout) == text


def test_a_mesh_that_is_none_has_no_text() -> None:
    assert mesh_text({"names": [], "shape": []}) is None


class Bad:
    def __repr__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.1, "0.1"),
        ({"a": (1, None)}, "{'a': (1, None)}"),
        (np.arange(3), "array([0, 1, 2])"),
        (np.zeros((20, 2)), "<array of float64 [20, 2]>"),
        (b"x" * 100, "<bytes of length 100>"),
        (Opaque("torch.dtype", "float32"), "<torch.dtype 'float32'>"),
        (Opaque("per_rank", "rng"), "<each rank's own>"),
        ("line\nline\x1b[31m", r"'line\nline\x1b[31m'"),
    ],
)
def test_values(value: object, text: str) -> None:
    assert value_text(value) == text


@pytest.mark.parametrize("value", [list(range(10**6)), "x" * 10**6, {str(k): "y" * 99 for k in range(99)}, Bad()])
def test_values_of_any_size_take_one_short_line(value: object) -> None:
    assert len(value_text(value)) <= 120
    assert "\n" not in value_text(value)
