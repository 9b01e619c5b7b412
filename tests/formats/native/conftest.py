"""The whole checkpoint that the hostile ones are made from."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.formats.native.whole import write_whole


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint; not to be changed."""
    folder = tmp_path_factory.mktemp("whole") / "step_3"
    write_whole(folder)
    return folder
