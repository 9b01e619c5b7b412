"""What places are called: paths of folders, and URLs of stores. Opens nothing."""

from __future__ import annotations

import os
import re

from ckpt_formats.errors import StoreError

__all__ = ["folder_of", "is_url", "normal", "tidy"]

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_LOCAL = ("file", "local")


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether a path names a place in a store: a URL of any scheme but file:// and local://."""
    match = _SCHEME.match(os.fspath(path))
    return match is not None and match.group(1).lower() not in _LOCAL


def tidy(path: str | os.PathLike[str]) -> str:
    """A path as it is, a file:// URL as a path, any other URL without slashes at its end."""
    text = os.fspath(path)
    match = _SCHEME.match(text)
    if match is None:
        return text
    if match.group(1).lower() in _LOCAL:
        return text[match.end() :]
    return match.group(0).lower() + text[match.end() :].rstrip("/")


def normal(path: str | os.PathLike[str]) -> str:
    """The same, with paths made absolute."""
    text = tidy(path)
    return text if is_url(text) else os.path.abspath(text)


def folder_of(path: str | os.PathLike[str]) -> str:
    """The same of what has to be a folder. Raises StoreError for a URL."""
    text = normal(path)
    if is_url(text):
        raise StoreError(
            f"{text}: a checkpoint is written to a folder first, and goes to a store from there; write it to a folder, "
            "then use `ckpt copy`, or tiers=[ckpt.Remote(URL)] of a Checkpointer",
            path=text,
        )
    return text
