"""S3 servers on loopback, as processes of their own: moto's, and rclone's over a folder."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

START_S = 60.0
"""Seconds that a server may take to answer; the machine may be busy."""
KEY = "training"
SECRET = "a-secret-of-the-test"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextmanager
def _serving(command: list[str], port: int, log: Path, env: dict[str, str] | None = None) -> Iterator[int]:
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env={**os.environ, **(env or {})}
        )
        try:
            deadline = time.monotonic() + START_S
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                except OSError:
                    if process.poll() is not None or time.monotonic() > deadline:
                        raise RuntimeError(f"the server did not start: {log.read_text()}") from None
                    time.sleep(0.05)
            yield port
        finally:
            process.kill()
            process.wait()


@contextmanager
def moto(folder: Path) -> Iterator[int]:
    """moto's S3, which accepts any credentials, and honours conditional puts. Gives its port."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    # parts as small as tests want them
    with _serving(command, port, folder / "moto.log", {"S3_UPLOAD_PART_MIN_SIZE": "4096"}):
        yield port


@contextmanager
def rclone(folder: Path, *more: str) -> Iterator[int]:
    """rclone's S3 over a folder, which accepts one key. Gives its port; `folder/objects` has a folder per bucket.

    It verifies signatures, those in URLs too, and when they expire. `more` are its own options, such as --cert.
    """
    port = free_port()
    (folder / "objects" / "shelf").mkdir(parents=True)
    command = [_rclone(), "serve", "s3", "--addr", f"127.0.0.1:{port}", "--auth-key", f"{KEY},{SECRET}", *more]
    command += ["--config", str(folder / "rclone.conf"), "--vfs-cache-mode", "off", str(folder / "objects")]
    with _serving(command, port, folder / "rclone.log"):
        yield port


@contextmanager
def web(folder: Path, log: Path) -> Iterator[int]:
    """rclone's web server over a folder, read-only. Gives its port."""
    port = free_port()
    command = [_rclone(), "serve", "http", "--addr", f"127.0.0.1:{port}", str(folder)]
    with _serving(command, port, log):
        yield port


def _rclone() -> str:
    program = shutil.which("rclone", path=os.path.dirname(sys.executable))
    assert program is not None
    return program
