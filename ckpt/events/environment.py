"""The sinks that the environment variable CKPT_EVENTS chooses, such as `log,jsonl:runs/a/events,trace:/tmp/traces`."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

from ckpt.events.chrome_trace import ChromeTraceSink
from ckpt.events.json_lines import JsonLinesSink
from ckpt.events.log import LogSink
from ckpt.events.registry import Sink
from ckpt_formats.errors import ConfigurationError

__all__ = ["VARIABLE", "parse", "sinks_from_environment"]

VARIABLE = "CKPT_EVENTS"


def sinks_from_environment() -> Sequence[Sink]:
    """See `parse`, which gets the variable's value."""
    sinks = parse(os.environ.get(VARIABLE, ""))
    if any(isinstance(sink, LogSink) for sink in sinks):
        _show_log()
    return sinks


def parse(text: str) -> list[Sink]:
    """The sinks of a list with commas: `log`, `jsonl:FOLDER`, `trace:FOLDER`. No folder is touched yet.

    Raises:
        ConfigurationError: a word is none of these, or a folder is missing.
    """
    sinks: list[Sink] = []
    for item in filter(None, (item.strip() for item in text.split(","))):
        kind, _, folder = item.partition(":")
        if item == "log":
            sinks.append(LogSink())
        elif kind == "jsonl" and folder:
            sinks.append(JsonLinesSink(folder))
        elif kind == "trace" and folder:
            sinks.append(ChromeTraceSink(folder))
        else:
            raise ConfigurationError(
                f"the environment variable {VARIABLE} is {text!r}, and {item!r} in it is none of log, jsonl:FOLDER, "
                "trace:FOLDER; correct it, or unset it"
            )
    return sinks


def _show_log() -> None:
    """Let the lines be seen that were asked for, also by a program that has not set up logging."""
    logger = logging.getLogger("ckpt")
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
        logger.addHandler(handler)
