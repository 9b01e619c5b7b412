"""Who uses a checkpoint in a store, which has no locks: small objects beside the manifest that say so for a while.

Whoever uses it puts a lease there and renews it; one that was not renewed for LEASE_S counts no more. Whoever removes
it puts a mark there first and then looks for leases; a user puts its lease first and then looks for marks. So at least
one of the two sees the other, on stores that list what was put (all large ones do). Times are the store's own.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from ckpt_formats.errors import CheckpointNotFoundError, StoreError
from ckpt_formats.native import names
from ckpt_formats.remote import Entry, Store

__all__ = ["LEASE_S", "Lease", "alone", "busy", "hold", "is_lease"]

LEASE_S = 300.0
"""Seconds for which a lease counts after it was last renewed."""
PATIENCE_S = 5.0
"""Seconds that a user waits for somebody who is about to remove the checkpoint, or leaves it after all."""
_HELD = "held"
_GOING = "going"


def is_lease(name: str) -> bool:
    """Whether an object in a checkpoint's folder is a lease or a mark."""
    return names.attempt_of(name) is not None and name.startswith((f".{_HELD}-", f".{_GOING}-"))


class Lease:
    """A lease on the checkpoint below a URL, renewed by a thread of its own until it is released.

    Whoever may not write there gets none, and is not protected.
    """

    def __init__(self, url: str) -> None:
        self._store = Store(url)
        self._url = url
        self._lease = os.path.join(url, names.temporary(_HELD, secrets.token_hex(8)))
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        try:
            self._store.put(self._lease, b"")
        except StoreError:
            return
        arguments = (self._store, self._lease, self._stop)
        self._thread = threading.Thread(target=_renew, args=arguments, name="ckpt-lease", daemon=True)
        self._thread.start()

    def release(self, *, wait: bool = True) -> None:
        """Give it back; with `wait`, return when that is known in the store."""
        self._stop.set()
        if wait and self._thread is not None:
            self._thread.join()

    def require_checkpoint(self) -> None:
        """Return when nobody is about to remove the checkpoint, and it is there.

        Raises:
            CheckpointNotFoundError: it is not there, or is being removed.
            StoreError: the store can't be read.
        """
        if self._thread is None:
            # whoever may not write may not list either, perhaps
            try:
                self._store.size(os.path.join(self._url, names.MANIFEST))
            except FileNotFoundError:
                raise _gone(self._url) from None
            return
        deadline = time.monotonic() + PATIENCE_S
        while True:
            beside = _beside(self._store, self._url)
            if not any(entry.name == names.MANIFEST for entry in beside):
                raise _gone(self._url)
            if not _live(beside, _GOING, self._lease):
                return
            if time.monotonic() > deadline:
                raise _gone(self._url)
            time.sleep(0.1)


def hold(url: str) -> Lease:
    """Use the checkpoint below a URL until the lease is released: nobody prunes it meanwhile.

    Raises:
        CheckpointNotFoundError: it is not there, or it is being removed now.
        StoreError: the store can't be read.
    """
    lease = Lease(url)
    try:
        lease.require_checkpoint()
    except BaseException:
        lease.release()
        raise
    return lease


@contextmanager
def busy(url: str) -> Iterator[None]:
    """Write a checkpoint below a URL within the block: what is there already is nobody's debris meanwhile."""
    lease = Lease(url)
    try:
        yield
    finally:
        lease.release()


@contextmanager
def alone(url: str) -> Iterator[bool]:
    """Whether nobody else uses the checkpoint below a URL; if so, nobody begins to within the block.

    Raises:
        CheckpointNotFoundError: it is not there any more.
        StoreError: the store can't be read or written.
    """
    store = Store(url)
    mark = os.path.join(url, names.temporary(_GOING, secrets.token_hex(8)))
    try:
        store.put(mark, b"")
        beside = _beside(store, url)
        if not any(entry.name == names.MANIFEST for entry in beside):
            raise _gone(url)
        yield not (_live(beside, _HELD, mark) or _live(beside, _GOING, mark))
    finally:
        with suppress(StoreError):
            store.remove(mark)


def _renew(store: Store, lease: str, stop: threading.Event) -> None:
    while not stop.wait(LEASE_S / 5):
        with suppress(StoreError):
            store.put(lease, b"")
    with suppress(StoreError):
        store.remove(lease)


def _beside(store: Store, url: str) -> list[Entry]:
    try:
        return store.ls(url)
    except FileNotFoundError:
        return []


def _live(beside: list[Entry], kind: str, own: str) -> bool:
    """Whether there are leases or marks of others that count, by the time of one's own, just put."""
    mine = os.path.basename(own)
    now = next((entry.modified for entry in beside if entry.name == mine), None)
    return any(
        now is None or entry.modified is None or entry.modified > now - LEASE_S
        for entry in beside
        if entry.name.startswith(f".{kind}-") and is_lease(entry.name) and entry.name != mine
    )


def _gone(url: str) -> CheckpointNotFoundError:
    return CheckpointNotFoundError(f"{url}: no checkpoint is there, or it is being removed; use another one", path=url)
