"""Checkpointing and fault tolerance for training large models on PyTorch.

ckpt.save(state, "runs/a/step_100")      # every rank, any parallelism
ckpt.load(state, "runs/a/step_100")      # in place, into whatever parallelism `state` has now
ckpt.open("runs/a/step_100")["model.embed.weight"][0:10]
"""

from ckpt.api import load, open, save
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
    "PerRank",
    "Sampler",
    "SaveResult",
    "Shard",
    "errors",
    "load",
    "open",
    "register_value",
    "save",
]
