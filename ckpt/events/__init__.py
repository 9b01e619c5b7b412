"""What saves, loads and reshards do, as typed events, for whoever wants to know.

with ckpt.events.add_sink(ckpt.events.ChromeTraceSink("traces")):
    ckpt.save(state, "runs/a/step_100")
"""

from ckpt.events.chrome_trace import ChromeTraceSink
from ckpt.events.json_lines import JsonLinesSink
from ckpt.events.log import LogSink
from ckpt.events.operation import Operation, Phase
from ckpt.events.registry import Registration, Sink, add_sink
from ckpt.events.types import (
    Event,
    OperationEnded,
    OperationStarted,
    PhaseEnded,
    PhaseStarted,
    WaitEnded,
    WaitStarted,
)

__all__ = [
    "ChromeTraceSink",
    "Event",
    "JsonLinesSink",
    "LogSink",
    "Operation",
    "OperationEnded",
    "OperationStarted",
    "Phase",
    "PhaseEnded",
    "PhaseStarted",
    "Registration",
    "Sink",
    "WaitEnded",
    "WaitStarted",
    "add_sink",
]
