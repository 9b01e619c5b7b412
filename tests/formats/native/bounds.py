"""Limits that opening a hostile file has to keep: of time, of memory, and of what it touches."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy.ma  # noqa: F401 - numpy imports it when it is first needed, which executes code

SECONDS = 2.0
MEMORY = 1 << 30
"""Bytes of address space that may be taken: threads and their heaps reserve some hundred MiB, claims are of TiB."""

_EXECUTING = frozenset(
    ("exec", "compile", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pickle.find_class")
)
_CHANGING = frozenset(
    ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "os.link", "os.symlink", "os.chmod")
)

_seen: list[str] | None = None
_allowed = ""


@contextmanager
def bounded(folder: Path) -> Iterator[None]:
    """Fail what is done inside if it takes too long, reserves memory without limit (MemoryError), executes anything,
    changes a file, or opens one outside of `folder`."""
    global _seen, _allowed
    _install()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
    _allowed, _seen = str(folder), []
    begin = time.perf_counter()
    try:
        yield
    finally:
        took = time.perf_counter() - begin
        seen, _seen = _seen, None
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert took < SECONDS, f"took {took:.1f} s"
    assert not seen, seen


def _install() -> None:
    if not _installed:
        _installed.append(True)
        sys.addaudithook(_hook)


_installed: list[bool] = []


def _hook(event: str, args: tuple[object, ...]) -> None:
    if _seen is None:
        return
    if event in _EXECUTING or event in _CHANGING:
        _seen.append(f"{event}{args!r:.200}")
    elif event == "open":
        path, mode, flags = args
        # a descriptor was opened by its name before
        inside = isinstance(path, int) or (isinstance(path, str) and os.path.abspath(path).startswith(_allowed))
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)
        if writes or not (inside or _is_python(path)):
            _seen.append(f"open({path!r}, {mode!r})")


def _is_python(path: object) -> bool:
    """Whether a path is of Python's own: source that a traceback quotes, a module that is imported late."""
    return isinstance(path, str) and path.endswith((".py", ".pyc", ".so"))
