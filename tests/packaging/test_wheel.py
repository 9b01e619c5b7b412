"""The wheel, as a user gets it: built from the sources alone, installed in a clean environment, tried there.

Takes minutes (torch is installed once more), so it runs only when asked for: make wheel-check.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.packaging.imports import FORMATS_NEVER_IMPORT, IMPORT_CKPT_NEVER_IMPORTS, USE_CKPT, modules_after

pytestmark = [pytest.mark.wheel, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
SOURCES = {"ckpt": ROOT / "ckpt", "ckpt_formats": ROOT / "formats/ckpt_formats", "ckpt_cli": ROOT / "cli/ckpt_cli"}
# All that a build may read. Built from a copy, so that nothing an earlier build left behind gets in.
BUILT_FROM = ["pyproject.toml", "README.md", "LICENSE", "ckpt", "formats", "cli"]


@dataclass(frozen=True)
class Installed:
    """A clean environment with the wheel in it, and the top-level names that the wheel brought."""

    python: Path
    added: set[str]

    def run(self, *command: str) -> str:
        """Run a command of the environment, in a folder that holds no sources; return what it printed."""
        done = subprocess.run(
            [str(self.python.parent / command[0]), *command[1:]],
            cwd=self.python.parent,
            env=_clean_environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{' '.join(command)} exited with {done.returncode}:\n{done.stdout}{done.stderr}"
        return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(ROOT / name, source / name)
    _run([sys.executable, "-m", "build", "--wheel", "--outdir", str(target), str(source)])
    (built,) = target.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    folder = tmp_path_factory.mktemp("clean") / "venv"
    _run([sys.executable, "-m", "venv", str(folder)])
    python = folder / "bin/python"
    _run([str(python), "-m", "pip", "install", "-qq", str(wheel)])
    (site,) = (folder / "lib").glob("python*/site-packages")
    record = next(site.glob("anyckpt-*.dist-info/RECORD")).read_text()
    added = {line.partition(",")[0].partition("/")[0] for line in record.splitlines()}
    yield Installed(python, added)
    shutil.rmtree(folder)  # torch in it: a gigabyte


def test_the_wheel_holds_three_packages_and_nothing_else_at_top_level(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    (metadata,) = (top for top in tops if top.endswith(".dist-info"))
    assert tops - {metadata} == set(SOURCES)
    assert f"{metadata}/licenses/LICENSE" in names


def test_the_wheel_holds_every_source_file(wheel: Path) -> None:
    expected = {
        f"{package}/{path.relative_to(folder)}"
        for package, folder in SOURCES.items()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {f"{package}/py.typed" for package in SOURCES} <= expected
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.partition("/")[0] in SOURCES}
    assert held == expected


def test_installing_adds_the_three_packages_the_metadata_and_the_command(installed: Installed) -> None:
    packages = {name for name in installed.added if not name.endswith(".dist-info")}
    assert packages == {*SOURCES, ".."}  # "..": the command, in the environment's bin
    assert (installed.python.parent / "ckpt").exists()


def test_the_installed_requirements_agree(installed: Installed) -> None:
    installed.run("python", "-m", "pip", "check")


def test_import_ckpt_needs_and_imports_no_extra(installed: Installed) -> None:
    assert not modules_after(USE_CKPT, installed.run) & IMPORT_CKPT_NEVER_IMPORTS


def test_import_ckpt_formats_imports_no_torch(installed: Installed) -> None:
    assert not modules_after("import ckpt_formats", installed.run) & FORMATS_NEVER_IMPORT


def test_every_module_but_the_demo_imports_without_the_extras(installed: Installed) -> None:
    program = """
import importlib, json, pkgutil
names = []
for top in ("ckpt", "ckpt_formats", "ckpt_cli"):
    package = importlib.import_module(top)
    for found in pkgutil.walk_packages(package.__path__, top + "."):
        if not found.name.startswith("ckpt_cli.demo"):
            importlib.import_module(found.name)
            names.append(found.name)
print(json.dumps(names))
"""
    assert "ckpt_cli.main" in json.loads(installed.run("python", "-I", "-c", program))


def test_the_command_answers(installed: Installed) -> None:
    assert "Usage: ckpt" in installed.run("ckpt", "--help")


def _run(command: list[str]) -> None:
    environment = _clean_environment() | {"PIP_CONSTRAINT": str(ROOT / "constraints.txt")}
    environment["PIP_BUILD_CONSTRAINT"] = environment["PIP_CONSTRAINT"]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    assert done.returncode == 0, f"{' '.join(command)} exited with {done.returncode}:\n{done.stdout.decode()}"


def _clean_environment() -> dict[str, str]:
    """The caller's environment, less what would let Python find anything but the environment that is tried."""
    return {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}}
