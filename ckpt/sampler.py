"""The order in which a dataset's samples are trained on, and how many of them have been, for all ranks together.

The order depends on the seed and the epoch alone, and the state is a handful of plain values, the same on every rank,
so any number of ranks goes on where any other number stopped. What has been drawn (by a loader's workers, ahead of the
training) and what has been consumed (by the training) are two things here; only the second is state. This module knows
nothing of checkpoints, of loaders, or of what a sample is. docs/sampler.md has the rules.
"""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch.distributed as dist

from ckpt_formats.errors import ConfigurationError, StateError

__all__ = ["Sampler"]

_Batch = TypeVar("_Batch")
_Places = npt.NDArray[np.uint64]

_ROUNDS = 12
# What a state says of how its order was made. A permutation made otherwise gets another name: going on in the midst of
# an epoch in another order would repeat some samples and skip others.
_SHUFFLED = f"feistel-{_ROUNDS}"
_IN_SEQUENCE = "sequential"


class Sampler:
    """The `batch_sampler` of a `torch.utils.data.DataLoader`: this rank's share of each global batch, as indices.

        sampler = ckpt.Sampler(dataset, batch_size=512, seed=1)
        loader = DataLoader(dataset, batch_sampler=sampler, num_workers=4)
        state = {"model": model, "optimizer": optimizer, "sampler": sampler}
        while sampler.epoch < 3:
            for batch in loader:
                ...  # forward, backward, optimizer.step()
                sampler.step()  # this batch is consumed; a state saved from here on has it behind it

    Iterating begins after the last consumed batch and goes to the end of the epoch. It changes nothing: only `step` (or
    `consume`, which calls it) moves the sampler on, so what a loader fetched ahead is not lost by a crash.

    Args:
        dataset: what has the samples, or how many there are.
        batch_size: samples of a global batch, of all ranks together; at least one per rank.
        shuffle: whether each epoch goes over the samples in a new random order, or always in that of the dataset.
        seed: makes the orders, with the epoch's number. Equal on all ranks.
        drop_last: whether the samples that do not fill a last batch are left out of the epoch, or make a smaller one.
        rank: this process's place among those that share a batch: its data-parallel rank. Ranks of one model-parallel
            group pass the same. Without it and `world_size`, those of the default process group, if there is one.
        world_size: how many shares a batch is cut into.

    Attributes:
        epoch: the epoch, from 0, that the next batch is of.
        consumed: samples of this epoch that were consumed, by all ranks together.

    Raises ConfigurationError if what has to be an integer, of any kind, is none, and StateError if the arguments
    contradict each other or an epoch would have no batch.
    """

    def __init__(
        self,
        dataset: Sized | int,
        *,
        batch_size: int,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = True,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        self.length = _length(dataset)
        # plain integers, whatever kind was given: they are saved, and compared with those of other samplers
        self.batch_size = _integer("batch_size", batch_size)
        self.drop_last = drop_last
        self.seed = _integer("seed", seed)
        self.rank, self.world_size = _place(rank, world_size)
        self.epoch = 0
        self.consumed = 0
        self._order = _SHUFFLED if shuffle else _IN_SEQUENCE
        self._loads = 0
        if self.batch_size < self.world_size:
            raise StateError(
                f"a global batch of {self.batch_size} samples has none for some of the {self.world_size} ranks; "
                "batch_size is that of all ranks together"
            )
        if self._batches(self.length) < 1:
            # a loop until some epoch would go round for ever without a batch
            raise StateError(
                f"{self.length} samples make no batch of {self.batch_size}; give "
                f"{'a smaller batch_size, or drop_last=False' if self.length > 0 else 'a dataset that has samples'}"
            )

    def __len__(self) -> int:
        """How many batches a whole epoch has, wherever in it the sampler stands."""
        return self._batches(self.length)

    def __iter__(self) -> Iterator[list[int]]:
        """This rank's share of each batch from the first that is not consumed to the epoch's end, as indices.

        The share may be empty in a last batch of fewer samples than ranks. Raises StateError if a state is loaded
        before the end.
        """
        # Where to begin is read now, not when the first batch is asked for.
        return self._draw(self.epoch, self.consumed, self._loads)

    def step(self) -> None:
        """Count the next batch as consumed: call it once for each batch the training used, before the state is saved.

        After the epoch's last batch, the next epoch begins.
        """
        self.consumed = min(self.consumed + self.batch_size, self.length)
        self._end_epoch()

    def consume(self, loader: Iterable[_Batch]) -> Iterator[_Batch]:
        """The batches of `loader`, which draws from this sampler, each counted as it is handed to the loop.

        A batch counts for the whole body of the loop that it is given to. So a state that is saved in the body holds
        the batch just trained if it is saved after the optimizer's step, and a body that calls `step` counts twice.

        Raises StateError if a state is loaded before the loop's end.
        """
        loads = self._loads
        for batch in loader:
            self._require_same(loads)
            self.step()
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Plain values, equal on all ranks: where the training stands, and what tells one order from another."""
        return {
            "epoch": self.epoch,
            "consumed": self.consumed,
            "length": self.length,
            "batch_size": self.batch_size,
            "order": self._order,
            "seed": self.seed,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where the state was taken, over any number of ranks and with any batch size.

        Raises StateError, and changes nothing, if the state is of another dataset, seed or order, or is none.
        """
        epoch, consumed = _position(state_dict)
        own = self.state_dict()
        for name, what in (("length", "number of samples"), ("order", "order of samples"), ("seed", "seed")):
            if state_dict[name] != own[name]:
                raise StateError(
                    f"the sampler's state has the {what} {state_dict[name]!r}, this sampler has {own[name]!r}: going "
                    "on would repeat some samples and skip others; make the sampler as it was, or, to begin anew on "
                    "purpose, leave the sampler out of the state that is loaded"
                )
        self.epoch, self.consumed = epoch, consumed
        self._loads += 1
        self._end_epoch()  # with a larger batch, what is left may not make one

    def __repr__(self) -> str:
        return (
            f"Sampler(epoch {self.epoch}: {self.consumed} of {self.length} consumed, {self.batch_size} a batch, "
            f"rank {self.rank} of {self.world_size})"
        )

    def _draw(self, epoch: int, start: int, loads: int) -> Iterator[list[int]]:
        keys = _keys(self.seed, epoch)
        for index in range(self._batches(self.length - start)):
            self._require_same(loads)
            first = start + index * self.batch_size
            size = min(self.batch_size, self.length - first)
            begin = first + size * self.rank // self.world_size
            end = first + size * (self.rank + 1) // self.world_size
            if self._order == _IN_SEQUENCE:
                yield list(range(begin, end))
            else:
                yield _permute(np.arange(begin, end, dtype=np.uint64), self.length, keys).tolist()

    def _batches(self, samples: int) -> int:
        return samples // self.batch_size if self.drop_last else -(-samples // self.batch_size)

    def _end_epoch(self) -> None:
        """Begin the next epoch if this one has no batch left."""
        if not self._batches(self.length - self.consumed):
            self.epoch += 1
            self.consumed = 0

    def _require_same(self, loads: int) -> None:
        if loads != self._loads:
            raise StateError(
                "a state was loaded into the sampler while a loop over its batches ran, and that loop's next batch is "
                "no longer the sampler's; load first, then begin the loop"
            )


def _place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    if rank is None and world_size is None:
        if dist.is_available() and dist.is_initialized():
            return dist.get_rank(), dist.get_world_size()
        return 0, 1
    if rank is not None and world_size is not None:
        rank, world_size = _integer("rank", rank), _integer("world_size", world_size)
    if rank is None or world_size is None or not 0 <= rank < world_size:
        raise StateError(f"rank {rank} of world size {world_size} is no place; give both, or neither")
    return rank, world_size


def _length(dataset: Sized | int) -> int:
    try:
        return len(dataset)  # type: ignore[arg-type]
    except TypeError:
        return _integer("dataset", dataset, "something that has a length, or the number of its samples")


def _integer(name: str, value: object, wanted: str = "an integer") -> int:
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise ConfigurationError(f"{name}={value!r}: give {wanted}") from None


def _position(state: Mapping[str, Any]) -> tuple[int, int]:
    """Epoch and consumed samples of a state that has the form of one."""
    given = [state.get(name) for name in ("epoch", "consumed", "length")]
    try:
        # a batch size of another kind of integer once made such of what is counted by it
        epoch, consumed, length = [operator.index(number) for number in given]  # type: ignore[arg-type]
    except TypeError:
        epoch = consumed = length = -1
    if min(epoch, consumed, length) < 0 or bool in map(type, given) or not {"order", "seed"} <= state.keys():
        raise StateError(f"this is no state of a ckpt.Sampler: {dict(state)}")
    if consumed > length:
        raise StateError(f"this is no state of a ckpt.Sampler: {consumed} of {length} samples are consumed")
    return epoch, consumed


# --- the permutation of an epoch
#
# A Feistel network over a grid of about sqrt(length) squared places: any part of the permutation costs time and memory
# for that part alone, whatever the length, and it is made of integer operations that are the same everywhere, where
# torch.randperm holds 8 bytes a sample on every rank and promises no order across releases and devices. The grid has a
# few places too many; one that leads out of range is led on until it is in range (cycle walking). Both are from Black
# and Rogaway, "Ciphers with Arbitrary Finite Domains" (CT-RSA 2002), where the network over a grid is the generalized
# Feistel cipher. The mixing function is the finalizer of SplitMix64 (Steele, Lea and Flood, "Fast Splittable
# Pseudorandom Number Generators", OOPSLA 2014). It shuffles; it keeps nothing secret.


def _keys(seed: int, epoch: int) -> _Places:
    """A key per round; other seeds and epochs have unrelated ones."""
    digest = hashlib.shake_256(f"{seed}/{epoch}".encode()).digest(8 * _ROUNDS)
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def _permute(places: _Places, length: int, keys: _Places) -> _Places:
    """What is at each of these places of the permutation of `range(length)`; both are 1-d, places are below length."""
    if not places.size:
        return places
    rows = math.isqrt(length - 1) + 1
    columns = -(-length // rows)
    found = places.copy()
    outside = np.arange(found.size)
    while outside.size:
        found[outside] = _encipher(found[outside], rows, columns, keys)
        outside = outside[found[outside] >= length]
    return found


def _encipher(places: _Places, rows: int, columns: int, keys: _Places) -> _Places:
    row, column = np.divmod(places, np.uint64(columns))
    for index, key in enumerate(keys):
        if index % 2:
            column = (column + _mix(row + key)) % np.uint64(columns)
        else:
            row = (row + _mix(column + key)) % np.uint64(rows)
    return row * np.uint64(columns) + column


def _mix(values: _Places) -> _Places:
    """63 well mixed bits: one less than there are, so that adding a row or a column does not wrap around."""
    mixed = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (mixed ^ (mixed >> np.uint64(31))) >> np.uint64(1)
