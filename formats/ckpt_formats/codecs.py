"""Codecs: how the stored bytes of a chunk become its bytes.

A codec is found by name in this table and nowhere else; nothing that a file names is imported. Version 1 of the format
knows `raw`; compression joins here.
"""

from __future__ import annotations

from ckpt_formats.errors import UnknownCodecError

RAW = "raw"
KNOWN = (RAW,)


def require_known(name: str, *, where: str, path: str) -> None:
    """Raise UnknownCodecError unless this release can decode chunks stored with codec `name`."""
    if name not in KNOWN:
        raise UnknownCodecError(
            f"{path}: {where} is stored with the codec {name!r}, which this release does not know "
            f"(it knows {', '.join(KNOWN)}); a newer release of anyckpt may read it",
            path=path,
        )
