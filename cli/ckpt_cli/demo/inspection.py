"""The demo's last checkpoint in other hands: the `ckpt` command, and plain safetensors. Knows no job and no Ray."""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from ckpt_cli.demo.interruption import Interruptions

_LIMIT_S = 60.0


@dataclass(frozen=True, slots=True)
class Ran:
    """A command that has run: as one would type it, seconds, exit code, and all that it said."""

    line: str
    seconds: float
    code: int
    output: str


def run_ckpt(interruptions: Interruptions, *arguments: str | Path) -> Ran:
    """Run the `ckpt` command in a process of its own, as a person would. Raises Interrupted."""
    script = Path(sys.executable).with_name("ckpt")
    program = [str(script)] if script.exists() else [sys.executable, "-c", "from ckpt_cli.main import main; main()"]
    line = shlex.join(["ckpt", *map(str, arguments)])
    began = time.monotonic()
    with subprocess.Popen(  # noqa: S603 - our own program
        [*program, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"COLUMNS": "110"},
    ) as process:
        try:
            while True:
                interruptions.check()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    output, _ = process.communicate(timeout=interruptions.INTERVAL_S)
                    return Ran(line, time.monotonic() - began, process.returncode, output)
                if time.monotonic() - began > _LIMIT_S:
                    return Ran(line, time.monotonic() - began, -1, f"not done after {_LIMIT_S:.0f} s")
        finally:
            process.kill()


@dataclass(frozen=True, slots=True)
class Opened:
    """A data file as plain safetensors sees it."""

    file: Path
    names: list[str]
    name: str
    dtype: str
    shape: list[int]


def open_with_safetensors(checkpoint: Path, beginning: str) -> Opened:
    """Open a checkpoint's first data file with safetensors alone, and look at the tensor whose name begins so."""
    from safetensors import safe_open

    file = min(checkpoint.glob("data/*.safetensors"))
    with safe_open(file, framework="numpy") as tensors:
        names = sorted(tensors.keys())
        name = next((name for name in names if name.startswith(beginning)), names[0])
        part = tensors.get_slice(name)
        return Opened(file, names, name, part.get_dtype(), part.get_shape())
