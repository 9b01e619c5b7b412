"""The memory that a rank captures into: slots of its arena at the agent, one of them taken ahead.

Knows no live state, and not what is put into a slot.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable
from numbers import Real

from ckpt.agent.arena import PAGE
from ckpt.agent.client import AgentClient, Slot
from ckpt_formats.errors import CheckpointError, ConfigurationError, RankError, SaveFailedError

SLOT_TIMEOUT = 600.0
"""Seconds that a save waits for an earlier one to be written before it fails."""
LEAST = 1 << 20
"""Bytes of the least memory for captures that can be declared."""
SAID = 1.0
"""Seconds of waiting after which it is said that a save waits."""

log = logging.getLogger("ckpt")


def require_memory(memory: object) -> int | None:
    """Bytes that captures may take, in whole pages, from any kind of whole number, 64e6 too; None for what they need.

    Raises:
        ConfigurationError: it is no whole number, or too little.
    """
    if memory is None:
        return None
    number = float(memory) if isinstance(memory, Real) else math.nan
    if not number.is_integer():
        raise ConfigurationError(f"memory={memory!r} is no number of bytes; give a whole number, or None")
    if number < LEAST:
        raise ConfigurationError(
            f"memory={memory} is too little for captures, whose pieces are a few pages long; give {LEAST} or more"
        )
    return int(number) // PAGE * PAGE


class Slots:
    """One saver's. A slot is taken ahead by the thread that copies, and used by the one that saves."""

    def __init__(self, memory: float | None = None) -> None:
        """`memory`: see `declare`."""
        self.memory: int | None = None
        self.problem: CheckpointError | None = None
        """Why the memory that was to be reserved can't be had."""
        self._spare: Slot | None = None
        """For the next save, so that it need not ask. Put here by one thread, and taken by another one."""
        self.declare(memory)

    def declare(self, memory: float | None) -> None:
        """Declare how many bytes captures may take, from the next one on; None for three times what one takes.

        Raises ConfigurationError.
        """
        self.memory = require_memory(memory)

    def reserve(self, client: AgentClient, nbytes: int) -> None:
        """Have the memory made before the first save, which will take about so much."""
        try:
            client.reserve(nbytes, self.memory)
            if self.memory is None:
                self.take_ahead(client, nbytes)
        except RankError as lost:
            # the first save starts another agent
            log.debug("memory for captures could not be made ahead: %s", lost)
        except CheckpointError as error:
            self.problem = error

    def take_ahead(self, client: AgentClient, nbytes: int) -> None:
        """Take a slot for the next save, which will probably take as much, if one is free."""
        if self._spare is None:
            with contextlib.suppress(CheckpointError):
                self._spare = client.slot(nbytes, self.memory, 0.0)

    def take(
        self, client: AgentClient, nbytes: int, folder: str, settle: Callable[[], object], *, said: bool = True
    ) -> Slot:
        """Memory for a capture of folder `folder`; waits for it if it must, and unless it is told otherwise, says so.

        Args:
            settle: returns when all that was captured is in the hands of the agent.

        Raises:
            SaveFailedError: none came free in time.
        """
        slot = self._use_spare(client, nbytes) or client.slot(nbytes, self.memory, 0.0)
        if slot is None:
            # what is captured, but not handed to the agent yet, would never be written while this waits
            settle()
            # nor would a slot that was taken ahead meanwhile come free
            slot = self._use_spare(client, nbytes) or client.slot(nbytes, self.memory, SAID)
        if slot is None:
            begin = time.monotonic()
            if said:
                log.warning("%s: waits for earlier saves to be written: the arena is full", folder)
            slot = client.slot(nbytes, self.memory, SLOT_TIMEOUT)
            if slot is None:
                raise SaveFailedError(
                    f"{folder}: earlier saves were not written within {SLOT_TIMEOUT:.0f} s, so there is no room to "
                    "capture this one; save less often, or to faster storage",
                    path=folder,
                )
            if said:
                log.warning("%s: waited %.1f s for the arena", folder, time.monotonic() - begin)
        return slot

    def _use_spare(self, client: AgentClient, nbytes: int) -> Slot | None:
        """The slot that was taken ahead, if it is large enough; else it is given back."""
        slot, self._spare = self._spare, None
        if slot is not None and len(slot.view) < nbytes:
            client.release(slot)
            slot = None
        return slot

    def forget(self) -> None:
        """The agent that gave the slot is left."""
        self._spare = None

    def give_back(self, client: AgentClient) -> None:
        """Give back what was taken ahead: pieces have another size."""
        slot, self._spare = self._spare, None
        if slot is not None:
            client.release(slot)
