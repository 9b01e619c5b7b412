"""The `ckpt` command as a process of its own, and without one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from click.testing import CliRunner, Result

from ckpt_cli.main import cli

PROGRAM = [sys.executable, "-c", "from ckpt_cli.main import main; main()"]


def ckpt(
    *arguments: str | Path, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does; its output is no terminal."""
    return subprocess.run(
        [*PROGRAM, *map(str, arguments)], capture_output=True, text=True, check=False, cwd=cwd, env=env, timeout=120
    )


def here(*arguments: str | Path) -> Result:
    """Run the command within this process."""
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])
