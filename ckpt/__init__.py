"""Checkpointing and fault tolerance for training large models on PyTorch.

ckpt.save(state, "runs/a/step_100")      # every rank, any parallelism
ckpt.load(state, "runs/a/step_100")      # in place, into whatever parallelism `state` has now
ckpt.open("runs/a/step_100")["model.embed.weight"][0:10]
with ckpt.Checkpointer("runs/a", state, every="10min", keep=3) as run: ...    # around a training loop

Names are imported when they are first used: the agent, a process on every node, is of this package too, and needs
neither torch's memory nor the seconds of its import.
"""

import typing
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ckpt import events
    from ckpt.agent.pending import PendingSave
    from ckpt.api import async_save, load, open, save
    from ckpt.levels.policies import Any, BestN, EveryN, LatestN
    from ckpt.levels.tiers import Disk, Remote
    from ckpt.loading.load import LoadResult
    from ckpt.loop.checkpointer import Checkpointer
    from ckpt.sampler import Sampler
    from ckpt.saving.replicas import check_replicas
    from ckpt.saving.save import SaveResult
    from ckpt.state import RNG, PerRank, Shard, Stages, mark, mark_layout
    from ckpt_formats import errors
    from ckpt_formats.checkpoint import Checkpoint
    from ckpt_formats.values import register_value

__all__ = [
    "RNG",
    "Any",
    "BestN",
    "Checkpoint",
    "Checkpointer",
    "Disk",
    "EveryN",
    "LatestN",
    "LoadResult",
    "PendingSave",
    "PerRank",
    "Remote",
    "Sampler",
    "SaveResult",
    "Shard",
    "Stages",
    "async_save",
    "check_replicas",
    "errors",
    "events",
    "load",
    "mark",
    "mark_layout",
    "open",
    "register_value",
    "save",
]

_HOMES = {
    "RNG": "ckpt.state",
    "Any": "ckpt.levels.policies",
    "BestN": "ckpt.levels.policies",
    "Checkpoint": "ckpt_formats.checkpoint",
    "Checkpointer": "ckpt.loop.checkpointer",
    "Disk": "ckpt.levels.tiers",
    "EveryN": "ckpt.levels.policies",
    "LatestN": "ckpt.levels.policies",
    "LoadResult": "ckpt.loading.load",
    "PendingSave": "ckpt.agent.pending",
    "PerRank": "ckpt.state",
    "Remote": "ckpt.levels.tiers",
    "Sampler": "ckpt.sampler",
    "SaveResult": "ckpt.saving.save",
    "Shard": "ckpt.state",
    "Stages": "ckpt.state",
    "async_save": "ckpt.api",
    "check_replicas": "ckpt.saving.replicas",
    "load": "ckpt.api",
    "mark": "ckpt.state",
    "mark_layout": "ckpt.state",
    "open": "ckpt.api",
    "register_value": "ckpt_formats.values",
    "save": "ckpt.api",
}


def __getattr__(name: str) -> typing.Any:
    if name == "errors":
        value: typing.Any = import_module("ckpt_formats.errors")
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
