"""Live training state -> named local views of the global model, and back.

`flatten` takes a state apart for saving; `build_target` says what loading has to fill, and puts it back. Nothing in
here knows files, processes or how checkpoints are stored.
"""

from ckpt.state import tensor_values as _tensor_values  # noqa: F401 - torch's types become values
from ckpt.state.flatten import flatten
from ckpt.state.marking import mark_layout
from ckpt.state.modules import Stages, mark
from ckpt.state.rng import RNG
from ckpt.state.target import Target, build_target
from ckpt.state.types import (
    LocalState,
    LocalTensor,
    PerRank,
    PerRankRef,
    Piece,
    SavedState,
    SavedTensor,
    Shard,
    TensorRef,
)

__all__ = [
    "RNG",
    "LocalState",
    "LocalTensor",
    "PerRank",
    "PerRankRef",
    "Piece",
    "SavedState",
    "SavedTensor",
    "Shard",
    "Stages",
    "Target",
    "TensorRef",
    "build_target",
    "flatten",
    "mark",
    "mark_layout",
]
