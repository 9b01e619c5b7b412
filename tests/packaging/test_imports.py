"""What an import costs, where every extra is installed and could be imported by mistake."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

import ckpt
from tests.packaging.imports import FORMATS_NEVER_IMPORT, IMPORT_CKPT_NEVER_IMPORTS, USE_CKPT, modules_after


def test_import_ckpt_imports_no_extra() -> None:
    assert importlib.util.find_spec("ray") is not None
    loaded = modules_after(USE_CKPT, _run)
    assert loaded >= {"ckpt", "torch"}
    assert not loaded & IMPORT_CKPT_NEVER_IMPORTS


@pytest.mark.parametrize("program", ["ckpt.agent.main", "ckpt.levels.main"])
def test_the_agent_is_small(program: str) -> None:
    loaded = modules_after(f"import {program}", _run)
    assert "ckpt" in loaded
    assert not loaded & (IMPORT_CKPT_NEVER_IMPORTS | {"fsspec", "torch"})


def test_the_front_door_has_the_names_that_it_lists_and_no_others() -> None:
    assert set(dir(ckpt)) == set(ckpt.__all__)
    for name in ckpt.__all__:
        assert getattr(ckpt, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'sav'"):
        ckpt.sav  # noqa: B018


def test_import_ckpt_formats_imports_no_torch() -> None:
    loaded = modules_after("import ckpt_formats", _run)
    assert "ckpt_formats" in loaded
    assert not loaded & FORMATS_NEVER_IMPORT


def test_every_module_of_ckpt_formats_works_where_torch_is_missing() -> None:
    statement = """
import importlib, pkgutil
sys.modules["torch"] = None
import ckpt_formats
for found in pkgutil.walk_packages(ckpt_formats.__path__, "ckpt_formats."):
    importlib.import_module(found.name)
del sys.modules["torch"]
"""
    assert "ckpt_formats" in modules_after(statement, _run)


def test_the_command_s_help_imports_nothing_heavy() -> None:
    statement = """
from ckpt_cli import main
import contextlib, io
sys.argv = ["ckpt", "--help"]
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    main.main()
"""
    assert not modules_after(statement, _run) & {"matplotlib", "ray", "torch"}


def _run(program: str, *arguments: str) -> str:
    assert program == "python"
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
