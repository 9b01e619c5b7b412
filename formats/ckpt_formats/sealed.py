"""JSON documents that end with their own digest: manifest.json and facts.json. docs/format.md, "The root".

Knows nothing of what they say.
"""

from __future__ import annotations

import re

from ckpt_formats.digest import hexdigest

TAIL_SIZE = 46
"""Bytes of the end: the member "digest", the closing brace and a newline."""
_TAIL = re.compile(rb',"digest":"([0-9a-f]{32})"\}\n')


def seal(document: bytes) -> bytes:
    """A JSON object without members after it, such as json.dumps makes, with its digest as the last member."""
    body = document[:-1]
    return body + f',"digest":"{hexdigest(body)}"}}\n'.encode("ascii")


def is_whole(data: bytes) -> bool:
    """Whether a sealed document fits the digest at its end."""
    tail = _TAIL.fullmatch(data[-TAIL_SIZE:])
    return tail is not None and hexdigest(memoryview(data)[:-TAIL_SIZE]).encode("ascii") == tail.group(1)
