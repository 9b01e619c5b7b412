"""How the native format names files and keys. Pure functions of strings."""

from __future__ import annotations

import os
import re
from typing import TypeGuard

from ckpt_formats.geometry import Box
from ckpt_formats.safetensors_file import PAD_PREFIX

MANIFEST = "manifest.json"
FACTS = "facts.json"
"""Mutable facts beside the manifest; never listed by it."""
DATA = "data"
INDEX = "index"
MAX_NAME = 255
"""Characters of a file's name; file systems allow no more bytes."""

_ATTEMPT = re.compile(r"[0-9a-f]{16}")
_OURS = re.compile(r"\d{3,}(?:\.\d+)?-([0-9a-f]{16})\.safetensors|\.[a-z]+-([0-9a-f]{16})\.tmp")
_STEP = re.compile(r"step[_-]?(\d+)")


def is_attempt(text: object) -> bool:
    """Whether text is an attempt id: 16 lower-case hexadecimal digits."""
    return isinstance(text, str) and _ATTEMPT.fullmatch(text) is not None


def temporary_manifest(attempt: str) -> str:
    """The root's name while it is written."""
    return f".manifest-{attempt}.tmp"


def temporary(what: str, attempt: str) -> str:
    """The name of a file of another kind while it is written: `what` is a lower-case word."""
    return f".{what}-{attempt}.tmp"


def attempt_of(name: str) -> str | None:
    """The attempt that a file's name bears; None when it is no name of this format (or is without, as the root's)."""
    match = _OURS.fullmatch(name)
    return match.group(1) or match.group(2) if match else None


def data_path(writer: int, part: int, attempt: str) -> str:
    """Relative path of the part-th data file of a writer."""
    return f"{DATA}/{writer:05d}{f'.{part}' if part else ''}-{attempt}.safetensors"


def index_path(page: int, attempt: str) -> str:
    """Relative path of a page."""
    return f"{INDEX}/{page:03d}-{attempt}.safetensors"


def is_safe(path: object, folder: str) -> TypeGuard[str]:
    """Whether a path from a file stays in `folder` of its checkpoint: relative, plain parts, one level deep."""
    if not isinstance(path, str):
        return False
    parts = path.split("/")
    return (
        len(parts) == 2
        and parts[0] == folder
        and parts[1] not in ("", ".", "..")
        and len(parts[1]) <= MAX_NAME
        and "\\" not in path
        # no control characters, which do things to terminals, and no lone surrogates, which no file system can store
        and path.isprintable()
    )


def chunk_key(name: str, box: Box, shape: tuple[int, ...]) -> str:
    """The key of a chunk in its data file: the tensor's name if it is whole and can't be misread, else with the box."""
    if box.sizes == shape and not name.endswith("]") and not name.startswith((PAD_PREFIX, "__metadata__")):
        return name
    return f"{name}{box}"


def step_folder(step: int) -> str:
    """The folder of a step in its run: step_00001200."""
    return f"step_{step:08d}"


def step_of(folder: str) -> int | None:
    """The step that a folder's name says, e.g. of step_00001200 or step-1200; None if it says none."""
    match = _STEP.fullmatch(folder)
    return int(match.group(1)) if match and len(match.group(1)) < 19 else None


def is_called_after(path: str, step: int | None) -> bool:
    """Whether the folder at a path is called after that step, as a Checkpointer calls its own."""
    return step is not None and step_of(os.path.basename(path)) == step
