"""Every error that the project raises on purpose, in one place.

Each is a `CheckpointError` and also the builtin that callers already catch for that kind of trouble, names the
checkpoint, tensor or rank it is about in its attributes, and says in its message what to do about it.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "CheckpointExistsError",
    "CheckpointNotFoundError",
    "ConfigurationError",
    "CorruptionError",
    "CoverageError",
    "DtypeMismatchError",
    "FactsError",
    "FormatError",
    "LayoutError",
    "MissingTensorError",
    "RankError",
    "RenameError",
    "SaveFailedError",
    "ShapeMismatchError",
    "StateError",
    "StateMismatchError",
    "StoreError",
    "UnknownCodecError",
    "UnknownDtypeError",
    "UnknownVersionError",
    "UnsupportedValueError",
    "ValuesDifferError",
]


class CheckpointError(Exception):
    """Base of every error of this project.

    Attributes:
        path: the checkpoint or file it is about, if any.
        tensor: the name of the tensor or value it is about, if any.
        step: the training step it is about, if any.
        rank: the rank it is about, if any.
    """

    def __init__(
        self,
        message: str,
        *,
        path: str | None = None,
        tensor: str | None = None,
        step: int | None = None,
        rank: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.path = path
        self.tensor = tensor
        self.step = step
        self.rank = rank

    def __str__(self) -> str:
        # KeyError's own __str__ would print the repr of the message
        return self.message


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """No committed checkpoint lies at the path."""


class CheckpointExistsError(CheckpointError, FileExistsError):
    """A committed checkpoint lies at the path already; it is never overwritten in place."""


class FormatError(CheckpointError, ValueError):
    """A file of a checkpoint does not follow the format; what it says can't be trusted."""


class UnknownVersionError(FormatError):
    """The checkpoint was written in a version of the format that this release does not know."""


class UnknownCodecError(FormatError):
    """A chunk is stored with a codec that this release does not know."""


class UnknownDtypeError(FormatError):
    """A tensor has a dtype that this release does not know."""


class CoverageError(FormatError):
    """The boxes of a tensor overlap, leave a hole, or leave its shape."""


class CorruptionError(CheckpointError, OSError):
    """Stored bytes differ from their checksum, or are not there: the checkpoint is damaged."""


class StoreError(CheckpointError, OSError):
    """An object store can't be reached, refuses, or keeps failing. Says nothing of the checkpoints in it."""


class MissingTensorError(CheckpointError, KeyError):
    """A tensor or value of that name is not in the checkpoint."""


class StateError(CheckpointError, ValueError):
    """A training state can't be named or described: colliding names, unknown parameters, unusable objects."""


class StateMismatchError(CheckpointError, ValueError):
    """The names in the state and in the checkpoint differ; the message lists them."""


class ShapeMismatchError(StateMismatchError):
    """A tensor has another shape in the checkpoint than in the state."""


class DtypeMismatchError(StateMismatchError, TypeError):
    """A tensor has another dtype in the checkpoint than in the state, and no cast was asked for."""


class UnsupportedValueError(CheckpointError, TypeError):
    """A value of this type can't be saved without a pickle."""


class ValuesDifferError(CheckpointError, ValueError):
    """A plain value differs between ranks and is not marked as per-rank."""


class FactsError(CheckpointError, ValueError):
    """A tag or metric that can't be recorded beside a checkpoint."""


class ConfigurationError(CheckpointError, ValueError):
    """An argument or an environment variable has a value that means nothing, or contradicts another."""


class LayoutError(CheckpointError, ValueError):
    """A mesh or a layout rule is wrong, ambiguous, unused, or not enough."""


class RenameError(CheckpointError, ValueError):
    """A rule that renames is wrong or unused, or gives two things one name."""


class SaveFailedError(CheckpointError, RuntimeError):
    """A save failed on some rank: unless the message says otherwise, nothing was committed. Earlier checkpoints are
    untouched."""


class RankError(CheckpointError, RuntimeError):
    """Another rank failed while this one took part in the same collective operation."""
