"""Checkpointing and fault tolerance for training large models on PyTorch.

ckpt.save(state, "runs/a/step_100")      # every rank, any parallelism
ckpt.load(state, "runs/a/step_100")      # in place, into whatever parallelism `state` has now
ckpt.open("runs/a/step_100")["model.embed.weight"][0:10]
"""

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
