"""Events as JSON, one object per line, in a file per process."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from typing import Any

from ckpt.events.process_file import ProcessFile
from ckpt.events.types import Event

__all__ = ["JsonLinesSink", "as_json"]


def as_json(event: Event) -> dict[str, Any]:
    """An event as plain values: its kind, `phase_ended` for PhaseEnded, and every field."""
    kind = re.sub(r"(?<!^)(?=[A-Z])", "_", type(event).__name__).lower()
    fields = {field.name: getattr(event, field.name) for field in dataclasses.fields(event)}
    return {"event": kind, **fields}


class JsonLinesSink:
    """Appends each event at once to `FOLDER/rank00003-HOST-PID.jsonl`; see ProcessFile for what that promises."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._file = ProcessFile(folder, ".jsonl")

    def __call__(self, event: Event) -> None:
        """Write one line. Raises OSError."""
        self._file.write(event.rank, json.dumps(as_json(event), separators=(",", ":")) + "\n")

    def close(self) -> None:
        """Write nothing more."""
        self._file.close()

    def __repr__(self) -> str:
        return f"JsonLinesSink({self._file.folder!r})"
