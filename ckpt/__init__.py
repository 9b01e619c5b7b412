"""Checkpointing and fault tolerance for training large models on PyTorch.

ckpt.save(state, "runs/a/step_100")      # every rank, any parallelism
ckpt.load(state, "runs/a/step_100")      # in place, into whatever parallelism `state` has now
ckpt.open("runs/a/step_100")["model.embed.weight"][0:10]

Names are imported when they are first used: the agent, a process on every node, is of this package too, and needs
neither torch's memory nor the seconds of its import.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ckpt import events
    from ckpt.agent.saver import PendingSave
    from ckpt.api import async_save, load, open, save
    from ckpt.loading.load import LoadResult
    from ckpt.sampler import Sampler
    from ckpt.saving.save import SaveResult
    from ckpt.state import RNG, PerRank, Shard
    from ckpt_formats import errors
    from ckpt_formats.checkpoint import Checkpoint
    from ckpt_formats.values import register_value

__all__ = [
    "RNG",
    "Checkpoint",
    "LoadResult",
    "PendingSave",
    "PerRank",
    "Sampler",
    "SaveResult",
    "Shard",
    "async_save",
    "errors",
    "events",
    "load",
    "open",
    "register_value",
    "save",
]

_HOMES = {
    "RNG": "ckpt.state",
    "Checkpoint": "ckpt_formats.checkpoint",
    "LoadResult": "ckpt.loading.load",
    "PendingSave": "ckpt.agent.saver",
    "PerRank": "ckpt.state",
    "Sampler": "ckpt.sampler",
    "SaveResult": "ckpt.saving.save",
    "Shard": "ckpt.state",
    "async_save": "ckpt.api",
    "load": "ckpt.api",
    "open": "ckpt.api",
    "register_value": "ckpt_formats.values",
    "save": "ckpt.api",
}


def __getattr__(name: str) -> Any:
    if name == "errors":
        value: Any = import_module("ckpt_formats.errors")
    elif name == "events":
        value = import_module("ckpt.events")
    elif name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module 'ckpt' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
