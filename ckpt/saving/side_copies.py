"""Copies from GPUs into a slot on streams of their own, beside what the training computes.

The copies of a save wait for what the training had enqueued when the save began; what it enqueues once it has called
`hold` waits for the copies. The host waits for neither, so that it may run as far ahead of the GPU as before
(DataStates-LLM, HPDC'24, copies in this way under forward and backward). The memory they go to is to be page-locked,
else the driver copies through a buffer of its own, and slowly.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Iterable, Sequence

import torch

log = logging.getLogger("ckpt")

_streams: dict[torch.device, torch.cuda.Stream] = {}


def on_gpu(tensor: torch.Tensor) -> bool:
    """Whether a tensor's copies can run on a stream."""
    return tensor.device.type == "cuda"


def finish_gpus(tensors: Iterable[torch.Tensor]) -> None:
    """Wait until GPUs have computed these: threads that read them have streams of their own, which would not wait."""
    if torch.cuda.is_initialized():
        for device in {tensor.device for tensor in tensors if on_gpu(tensor)}:
            torch.cuda.synchronize(device)


class SideCopies:
    """The copies of one save. Made on the training's thread, in the moment whose values are wanted."""

    def __init__(self, sources: Sequence[torch.Tensor]) -> None:
        """Args: `sources`: tensors on GPUs, all that will be copied."""
        self._ready = {device: torch.cuda.Event() for device in {source.device for source in sources}}
        for device, event in self._ready.items():
            event.record(torch.cuda.current_stream(device))
        self._copied: dict[torch.device, torch.cuda.Event] = {}
        self._kept: list[torch.Tensor] = []
        self._lock = threading.Lock()

    @torch.no_grad()
    def enqueue(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Have pairs (room, source) copied; on any thread. Never waits for the GPU if the rooms are page-locked."""
        for device, ready in self._ready.items():
            if device not in _streams:
                _streams[device] = torch.cuda.Stream(device)
            stream = _streams[device]
            stream.wait_event(ready)
            with torch.cuda.stream(stream):
                for room, source in pairs:
                    if source.device == device:
                        room.copy_(source, non_blocking=True)
                        # its memory must not be used again before it is copied
                        self._kept.append(source)
            copied = torch.cuda.Event()
            copied.record(stream)
            with self._lock:
                self._copied[device] = copied

    def hold(self) -> None:
        """Have what the training enqueues from now on wait for the copies; on the training's thread."""
        with self._lock:
            for device, copied in self._copied.items():
                torch.cuda.current_stream(device).wait_event(copied)

    def done(self) -> bool:
        """Whether all that was enqueued is copied. Never waits."""
        with self._lock:
            return all(copied.query() for copied in self._copied.values())

    def wait(self) -> None:
        """Wait until all that was enqueued is copied; the GPU's driver bounds how long that may take."""
        with self._lock:
            events = list(self._copied.values())
        for copied in events:
            copied.synchronize()
        self._kept.clear()


class Pinned:
    """Memory that is page-locked for GPUs, while this process uses any; one range at a time."""

    def __init__(self) -> None:
        self._address = 0
        self._memory: memoryview | None = None

    def pin(self, memory: memoryview) -> None:
        """Page-lock this range instead of the one before. Where that is refused, copies are only slower: it is told."""
        if not torch.cuda.is_initialized():
            return
        self.release()
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        code = int(torch.cuda.cudart().cudaHostRegister(address, memory.nbytes, 0))
        if code:
            log.warning(
                "the memory for captures can't be page-locked (CUDA error %d), so that copies from the GPU are slow; "
                "raise the limit on locked memory (ulimit -l)",
                code,
            )
            return
        self._address, self._memory = address, memory

    def release(self) -> None:
        """Let go of the range, once nothing is being copied to it."""
        if self._memory is not None:
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaHostUnregister(self._address)
            self._address, self._memory = 0, None
