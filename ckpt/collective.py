"""The few collective operations that saving and loading need: bytes gathered, scattered and broadcast.

Over a torch process group, or alone. Failures travel too: when a rank fails in a phase, every rank learns it at the end
of that phase and raises, so nobody waits for somebody who has given up. Waits end with the process group's own time
limit. Payloads are bytes of our own making; nothing is pickled.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import torch
import torch.distributed as dist

from ckpt_formats import errors
from ckpt_formats.errors import CheckpointError, RankError

ProcessGroup = dist.ProcessGroup

_OK = b"\0"
_FAILED = b"\1"
_POLL_S = (2e-5, 0.001)
"""Seconds between looks whether a collective is done, at first and later."""
_LOOK_S = 0.5
"""Seconds between looks whether a rank that it needs has died."""
_SHORT = 4096
"""Bytes of the first part of a broadcast."""


class Collective:
    """Ranks that act together; rank 0 coordinates.

    Attributes:
        rank: this process's rank.
        world_size: how many ranks there are.
        waiting: makes a context for every communication, in which this rank mostly waits for the others.
    """

    def __init__(self, group: ProcessGroup | None = None) -> None:
        if dist.is_available() and dist.is_initialized():
            self._group = group
            self.rank = dist.get_rank(group)
            self.world_size = dist.get_world_size(group)
            backend = str(dist.get_backend(group))
            self._device = torch.device("cuda" if backend == "nccl" else "cpu")
        else:
            self._group = None
            self.rank = 0
            self.world_size = 1
            self._device = torch.device("cpu")
        self.waiting: Callable[[], AbstractContextManager[None]] = nullcontext
        self._own: BaseException | None = None

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Make torch's error about a rank that is gone one of ours."""
        try:
            with self.waiting():
                yield
        except RankError:
            raise
        except RuntimeError as error:
            # what torch says, a place in its own sources, stays behind as the cause
            why = RankError(
                "another rank died, or did not answer within the process group's time limit, while ranks took part in "
                "the same save, load or training loop; start the ranks anew, and go on from the last committed "
                "checkpoint"
            )
            raise self.give_up(why) from error

    def gather(self, payload: bytes) -> list[bytes] | None:
        """Every rank's payload in rank order, on rank 0; None elsewhere."""
        if self.world_size == 1:
            return [payload]
        with self._together():
            sizes = self._sizes(len(payload))
            everyone = self._at_root(self._tensor(payload, max(sizes)))
        if everyone is None:
            return None
        return [self._bytes(tensor, size) for tensor, size in zip(everyone, sizes, strict=True)]

    def share(self, payload: bytes) -> list[bytes]:
        """Every rank's payload in rank order, everywhere; all have the same length."""
        if self.world_size == 1:
            return [payload]
        with self._together():
            everyone = self._everyone(self._tensor(payload, len(payload)))
        return [self._bytes(tensor, len(payload)) for tensor in everyone]

    def piece_together(self, part: bytes, at: int, total: int) -> bytes:
        """Bytes of which each rank has a part, from its byte `at` on; everybody gets all `total` of them."""
        if self.world_size == 1:
            return part
        parts = torch.zeros(total, dtype=torch.uint8, device=self._device)
        parts[at : at + len(part)] = self._tensor(part, len(part))
        with self._together():
            self._wait(dist.all_reduce(parts, dist.ReduceOp.SUM, group=self._group, async_op=True))
        return self._bytes(parts, total)

    def scatter(self, payloads: Sequence[bytes] | None) -> bytes:
        """Rank k gets payloads[k] of rank 0, which alone gives them."""
        if self.world_size == 1 and payloads is not None:
            return payloads[0]
        with self._together():
            sizes = torch.empty(self.world_size, dtype=torch.int64, device=self._device)
            if payloads is not None:
                sizes = torch.tensor([len(payload) for payload in payloads], dtype=torch.int64, device=self._device)
            self._spread(sizes)
            longest = int(sizes.max())
            mine = torch.empty(longest, dtype=torch.uint8, device=self._device)
            parts = None if payloads is None else [self._tensor(payload, longest) for payload in payloads]
            self._wait(dist.scatter(mine, parts, group=self._group, group_src=0, async_op=True))
        return self._bytes(mine, int(sizes[self.rank]))

    def broadcast(self, payload: bytes | None) -> bytes:
        """Everybody gets the payload of rank 0, which alone gives it."""
        if self.world_size == 1 and payload is not None:
            return payload
        data = payload or b""
        with self._together():
            # most answers are short, and then fit behind their length
            head = self._tensor(len(data).to_bytes(8, "little") + data[: _SHORT - 8], _SHORT)
            self._spread(head)
            begin = self._bytes(head, _SHORT)
            count = int.from_bytes(begin[:8], "little")
            if count <= _SHORT - 8:
                return begin[8 : 8 + count]
            rest = self._tensor(data[_SHORT - 8 :], count - (_SHORT - 8))
            self._spread(rest)
        return begin[8:] + self._bytes(rest, count - (_SHORT - 8))

    def exchange(self, payload: bytes, failure: BaseException | None, decide: Callable[[list[bytes]], bytes]) -> bytes:
        """End a phase: rank 0 decides from everybody's payload, and everybody gets its answer.

        Args:
            payload: what this rank reports.
            failure: why this rank failed in the phase, if it did.
            decide: called on rank 0 with all payloads in rank order, unless a rank failed.

        Raises, on every rank, if any rank failed or `decide` raised: the rank itself its own error, the others the same
        kind of CheckpointError with the rank's number, or RankError.
        """
        answers = self._collect(payload, failure, lambda payloads: [decide(payloads)])
        return self._opened(self.broadcast(None if answers is None else answers[0]))

    def exchange_each(
        self, payload: bytes, failure: BaseException | None, decide: Callable[[list[bytes]], list[bytes]]
    ) -> bytes:
        """The same with an answer of its own for each rank."""
        answers = self._collect(payload, failure, decide)
        if answers is not None and len(answers) == 1:
            answers *= self.world_size
        return self._opened(self.scatter(answers))

    def agree(self, failure: BaseException | None) -> None:
        """End a phase without a payload.

        Raises, on every rank, if any rank failed, as `exchange` does. Costs a few bytes there and back when none did.
        """
        self.tally(failure)

    def tally(self, failure: BaseException | None, *counts: int) -> list[int]:
        """End a phase with the sums of every rank's counts, at the same cost; raises as `agree` does."""
        if self.world_size == 1:
            if failure is not None:
                raise failure
            return list(counts)
        sums = torch.tensor([failure is not None, *counts], dtype=torch.int64, device=self._device)
        with self._together():
            sums = self._joined(sums, sums, lambda everyone: everyone.sum(0))
        failed, *totals = sums.tolist()
        if failed:
            self.exchange(b"", failure, lambda _: b"")
        return totals

    def give_up(self, why: RankError) -> RankError:
        """Have every rank that waits for the others here fail too: a rank that is needed has died.

        A collective fails soon only on ranks that are connected with the dead one; the others would wait for those.
        Returns what they hear: what was said first.
        """
        store = _store()
        with suppress(RuntimeError):
            first = self._heard()
            if first is not None:
                return first
            if store is not None:
                store.set(self._dead, json.dumps([why.rank, why.message]))
        return why

    def wait(self, work: dist.Work) -> None:
        """Wait for what the caller has begun, no longer than all ranks live. Raises RankError."""
        with self._together():
            self._wait(work)

    @contextmanager
    def needed(self) -> Iterator[None]:
        """A `with` block in which the others need this rank: if it is interrupted, they fail too."""
        try:
            yield
        except Exception:
            raise
        except BaseException as error:
            # by Ctrl-C, say: this process may live on, and would not be taken for dead
            self.give_up(
                RankError(
                    f"rank {self.rank} was interrupted ({type(error).__name__}) while ranks took part in the same save "
                    "or load; start the ranks anew",
                    rank=self.rank,
                )
            )
            raise

    def _everyone(self, mine: torch.Tensor) -> torch.Tensor:
        """Every rank's tensor, all of one form, in the order of the ranks."""
        return self._joined(mine, mine.new_empty((self.world_size, *mine.shape)), lambda everyone: everyone)

    def _joined(
        self, mine: torch.Tensor, answer: torch.Tensor, join: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """What rank 0 makes of everybody's tensors, all of one form, everywhere. `answer` has the form of that.

        On CPUs they go to rank 0 and back: all_gather and all_reduce of Gloo go round in a ring, one step after another
        for each rank, and each may have to wait for a core.
        """
        if self._device.type != "cpu":
            everywhere = mine.new_empty((self.world_size, *mine.shape))
            self._wait(dist.all_gather(list(everywhere), mine, group=self._group, async_op=True))
            return join(everywhere)
        everyone = self._at_root(mine)
        if everyone is not None:
            answer = join(everyone).contiguous()
        self._spread(answer)
        return answer

    def _spread(self, tensor: torch.Tensor) -> None:
        """Everybody gets what rank 0 has in it."""
        self._wait(dist.broadcast(tensor, group=self._group, group_src=0, async_op=True))

    def _at_root(self, mine: torch.Tensor) -> torch.Tensor | None:
        """Every rank's tensor, all of one form, in the order of the ranks, on rank 0; None elsewhere."""
        everyone = None if self.rank else mine.new_empty((self.world_size, *mine.shape))
        parts = None if everyone is None else list(everyone)
        self._wait(dist.gather(mine, parts, group=self._group, group_dst=0, async_op=True))
        return everyone

    def _wait(self, work: dist.Work | None) -> None:
        """Wait for what was begun, no longer than all ranks live."""
        pause, look = _POLL_S[0], time.monotonic() + _LOOK_S
        while work is not None and not work.is_completed():
            time.sleep(pause)
            pause = min(2 * pause, _POLL_S[1])
            if time.monotonic() > look:
                look = time.monotonic() + _LOOK_S
                why = self._heard()
                if why is not None:
                    raise why
        if work is not None:
            work.wait()

    def _heard(self) -> RankError | None:
        """Why a rank has given up, if one has."""
        store = _store()
        if store is None or not store.check([self._dead]):
            return None
        rank, why = json.loads(store.get(self._dead))
        return RankError(why, rank=rank)

    @property
    def _dead(self) -> str:
        """Where the store says that a rank of this group has given up; another group of the same ranks goes on."""
        group = dist.group.WORLD if self._group is None else self._group
        return f"ckpt/dead/{None if group is None else group.group_name}"

    def _collect(
        self, payload: bytes, failure: BaseException | None, decide: Callable[[list[bytes]], list[bytes]]
    ) -> list[bytes] | None:
        self._own = failure
        gathered = self.gather(_OK + payload if failure is None else self._failed(failure))
        if gathered is None:
            return None
        failed = [message for message in gathered if message[:1] != _OK]
        if failed:
            return failed[:1]
        try:
            return [_OK + answer for answer in decide([message[1:] for message in gathered])]
        except Exception as error:  # noqa: BLE001 - the others must not wait for an answer that never comes
            self._own = error
            return [self._failed(error)]

    def _failed(self, error: BaseException) -> bytes:
        kind = type(error).__name__ if isinstance(error, CheckpointError) else ""
        text = " ".join(str(error).split())
        return _FAILED + json.dumps([self.rank, kind, text if kind else f"{type(error).__name__}: {text}"]).encode()

    def _opened(self, answer: bytes) -> bytes:
        if answer[:1] == _OK:
            return answer[1:]
        if self._own is not None:
            raise self._own
        rank, kind, text = json.loads(answer[1:])
        known = getattr(errors, kind, RankError) if kind in errors.__all__ else RankError
        raise known(f"rank {rank}: {text}", rank=rank)

    def _sizes(self, size: int) -> list[int]:
        everyone: list[int] = self._everyone(torch.tensor(size, dtype=torch.int64, device=self._device)).tolist()
        return everyone

    def _tensor(self, payload: bytes, length: int) -> torch.Tensor:
        buffer = bytearray(length)
        buffer[: len(payload)] = payload
        if not length:
            return torch.empty(0, dtype=torch.uint8, device=self._device)
        return torch.frombuffer(buffer, dtype=torch.uint8).to(self._device)

    @staticmethod
    def _bytes(tensor: torch.Tensor, length: int) -> bytes:
        return tensor[:length].cpu().numpy().tobytes()


def _store() -> Any:
    """The store by which the ranks found each other, where torch still has it."""
    try:
        return dist.distributed_c10d._get_default_store()
    except (AttributeError, RuntimeError, ValueError):
        return None
