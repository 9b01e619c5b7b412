"""Removing what a run need not keep: checkpoints by a policy, and what saves and copies that failed have left behind.

A checkpoint goes manifest first, so that nothing half removed is ever taken for one; whoever dies on the way leaves
debris, which the next prune removes. What is not recognised as this format's is never touched. A run lies in a folder
or below a URL.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from ckpt.levels.debris import FOLDERS, info_of, is_begun, is_data, is_ours, newest_change, ours
from ckpt.levels.owed import owed_elsewhere
from ckpt.levels.policies import EveryN, Policy, Saved, kept, metrics_of
from ckpt.levels.report import Kept, PruneReport, Removed, together
from ckpt.storage.files import Files
from ckpt.storage.objects import ObjectStore
from ckpt_formats.errors import CheckpointError, CheckpointNotFoundError, StoreError
from ckpt_formats.facts import Facts, read_facts
from ckpt_formats.leases import LEASE_S, is_lease
from ckpt_formats.locks import alone
from ckpt_formats.native import names
from ckpt_formats.native.node_folders import NODE, folders_of
from ckpt_formats.native.reader import read_root
from ckpt_formats.native.root import Root
from ckpt_formats.remote import Entry
from ckpt_formats.runs import Found, State, find_checkpoints
from ckpt_formats.urls import is_url, normal

__all__ = ["GRACE_S", "facts_of", "prune"]

GRACE_S = 3600.0
"""Seconds for which nothing must have changed in what is taken for debris: a save or copy may be under way."""
DELETERS = 8
"""Objects that are removed at once."""
_ALL = EveryN(1)


def prune(
    run: str | os.PathLike[str],
    keep: Policy | int | None = None,
    *,
    dry_run: bool = False,
    grace: float = GRACE_S,
    files: Files | None = None,
    begun: Policy | int | None = None,
    of_loop: bool = False,
    needed: Mapping[int, str] | None = None,
) -> PruneReport:
    """Remove the checkpoints of a run that a policy does not keep, and debris.

    Only whole checkpoints with a step go, and never the newest of them, one that is pinned or tagged, one whose facts
    can't be read, one that a link in the run's folder leads to, or one that somebody holds (ckpt_formats.locks).

    Args:
        run: the folder that holds the checkpoints, or its URL in a store; with `{node}` in it, the folders of all nodes
            that can be reached.
        keep: what to keep, such as LatestN(3) or 3; None removes debris only.
        dry_run: only tell.
        grace: seconds, see GRACE_S.
        files: what removes from folders.
        begun: where the folder has one node's part of each checkpoint, which of those without manifest to keep: this
            node may be the only one that could not get it. By default as `keep`, if that is seen to be so.
        of_loop: look only at checkpoints that are called after their step, as a Checkpointer calls its own.
        needed: steps that stay though `keep` does not keep them, and why; by default, where the folder is that of a run
            with further levels, those that are due on one and not there yet.

    Raises:
        CheckpointNotFoundError: there is no such folder, or it is a checkpoint itself. What can't be removed does not
            raise; the report says so.
        StoreError: the store can't be listed.
        FormatError: which levels the run has can't be read.
    """
    folder = normal(run)
    found = find_checkpoints(folder)
    if any(item.path == folder for item in found):
        raise CheckpointNotFoundError(
            f"{folder} is a checkpoint itself; name the folder of the run that holds it", path=folder
        )
    if NODE in folder:
        begun = _ALL if keep is None else keep
        one = partial(prune, keep=keep, dry_run=dry_run, grace=grace, files=files, begun=begun, of_loop=of_loop)
        return together(folder, [one(each, needed=needed) for each in folders_of(folder)])
    if of_loop:
        found = [item for item in found if item.of_loop]
    if needed is None:
        needed = {} if keep is None or is_url(folder) else owed_elsewhere(folder, found)
    if is_url(folder):
        return _StorePrune(folder, found, dry_run, grace).run(keep, needed)
    if begun is None and any(item.elsewhere for item in found):
        begun = _ALL if keep is None else keep
    return _FolderPrune(folder, found, dry_run, grace, files or Files(), begun).run(keep, needed)


class _Prune:
    """One call of `prune`: what goes. How it goes, and what is debris, is for folders and stores to say."""

    def __init__(self, folder: str, found: Sequence[Found], dry_run: bool, grace: float) -> None:
        self._folder = folder
        self._found = [item for item in found if not os.path.islink(item.path)]
        self._dry_run = dry_run
        self._before = time.time() - grace
        self._kept: list[Kept] = []
        self._removed: list[Removed] = []
        self._debris: list[Removed] = []
        self._recent: list[str] = []
        self._failed: list[tuple[str, str]] = []
        self._unmeasured: dict[str, str] = {}

    def _linked(self) -> dict[str, str]:
        """Paths that links in the run's folder lead to, and the links' names."""
        raise NotImplementedError

    def _take(self, path: str, listed: Sequence[str]) -> None:
        """Remove a checkpoint: its manifest, then the files that it lists, then what failed attempts left there."""
        raise NotImplementedError

    def _has_manifest(self, path: str) -> bool:
        raise NotImplementedError

    def _clear_committed(self, item: Found) -> None:
        """Remove what attempts that failed left in the folder of a checkpoint."""
        raise NotImplementedError

    def _keep_begun(self, steps: Sequence[int]) -> None:
        """Keep what may belong to checkpoints that are committed though that can't be seen here, beside these steps."""

    def _clear_uncommitted(self) -> None:
        """Remove the folders of saves or copies that never ended, or of checkpoints that were being removed."""
        raise NotImplementedError

    def run(self, keep: Policy | int | None, needed: Mapping[int, str]) -> PruneReport:
        whole: list[tuple[Found, int]] = []
        for item in self._found:
            # on node-local disks, each node prunes its own, which is as whole as it can be
            if (item.state is State.WHOLE or item.elsewhere) and item.step is not None:
                whole.append((item, item.step))
            elif item.state is not State.NOT_COMMITTED:
                why = "has no step" if item.state is State.WHOLE else item.state.value
                self._kept.append(Kept(item.path, item.step, why))
        self._by_policy(whole, keep, needed)
        self._keep_begun([step for _, step in whole])
        stays = {item.path for item in self._kept}
        for item, _ in whole:
            if item.path in stays:
                self._clear_committed(item)
        self._clear_uncommitted()
        return PruneReport(
            path=self._folder,
            dry_run=self._dry_run,
            kept=sorted(self._kept, key=lambda item: -1 if item.step is None else item.step),
            removed=self._removed,
            debris=self._debris,
            recent=self._recent,
            failed=self._failed,
            unmeasured=self._unmeasured if self._removed else {},
        )

    # checkpoints

    def _by_policy(
        self, whole: Sequence[tuple[Found, int]], keep: Policy | int | None, needed: Mapping[int, str]
    ) -> None:
        linked = self._linked()
        reasons: dict[str, str] = {}
        saved: list[Saved] = []
        for item, step in whole:
            facts, why = facts_of(item.path)
            if os.path.realpath(item.path) in linked:
                why = f"linked as {linked[os.path.realpath(item.path)]}"
            if why is not None:
                reasons[item.path] = why
            saved.append(Saved(step, facts.metrics, why is not None))
        if keep is not None:
            self._unmeasured = _unmeasured(keep, saved)
        stay = {item.step for item in saved} if keep is None else kept(keep, saved)
        newest = max((step for _, step in whole), default=None)
        for item, step in whole:
            if item.path in reasons:
                self._kept.append(Kept(item.path, step, reasons[item.path]))
            elif step == newest:
                self._kept.append(Kept(item.path, step, "newest"))
            elif step in stay:
                self._kept.append(Kept(item.path, step, "by the rule" if keep is not None else "no rule"))
            elif step in needed:
                self._kept.append(Kept(item.path, step, needed[step]))
            else:
                self._remove(item, step)

    def _remove(self, item: Found, step: int) -> None:
        """Remove a checkpoint unless it is in use now, or was pinned meanwhile."""
        path = item.path
        try:
            with alone(path) as free:
                why = facts_of(path)[1] if free else "in use"
                if why is not None:
                    self._kept.append(Kept(path, step, why))
                    return
                root = read_root(path)
                if not self._dry_run:
                    self._take(path, _listed(root))
                self._removed.append(Removed(path, step, item.bytes))
        except CheckpointNotFoundError:
            return  # somebody else removes it
        except OSError as error:
            self._fail(path, error)
            if self._has_manifest(path):
                self._kept.append(Kept(path, step, "could not be removed"))
        except CheckpointError as error:
            self._kept.append(Kept(path, step, str(error)))

    def _fail(self, path: str, error: OSError) -> None:
        self._failed.append((path, error.strerror or str(error)))


class _FolderPrune(_Prune):
    """Of a run on a mounted file system."""

    def __init__(
        self,
        folder: str,
        found: Sequence[Found],
        dry_run: bool,
        grace: float,
        files: Files,
        begun: Policy | int | None,
    ) -> None:
        super().__init__(folder, found, dry_run, grace)
        self._files = files
        self._begun = begun

    def _keep_begun(self, steps: Sequence[int]) -> None:
        if self._begun is None:
            return
        begun = [(item.path, item.step) for item in self._found if item.state is State.NOT_COMMITTED]
        steps = [*steps, *(step for _, step in begun if step is not None)]
        stay = kept(self._begun, [Saved(step) for step in steps])
        self._kept += [Kept(path, step, "other nodes may have its manifest") for path, step in begun if step in stay]

    def _linked(self) -> dict[str, str]:
        """What links in the run's folder lead to: a user's `best` or `latest`."""
        with os.scandir(self._folder) as entries:
            return {os.path.realpath(entry.path): entry.name for entry in entries if entry.is_symlink()}

    def _take(self, path: str, listed: Sequence[str]) -> None:
        self._files.remove(os.path.join(path, names.MANIFEST))
        # the files go only when the manifest is known to be gone, also after a power cut
        self._files.sync_folder(path)
        self._clear(path, listed)

    def _has_manifest(self, path: str) -> bool:
        return os.path.lexists(os.path.join(path, names.MANIFEST))

    def _clear_uncommitted(self) -> None:
        stays = {item.path for item in self._kept}
        for path in self._folders():
            if path not in stays and not self._has_manifest(path):
                self._clear_folder(path)

    def _folders(self) -> Iterator[str]:
        with os.scandir(self._folder) as entries:
            yield from sorted(entry.path for entry in entries if entry.is_dir(follow_symlinks=False))

    def _clear_committed(self, item: Found) -> None:
        try:
            listed = {names.MANIFEST, names.FACTS, *_listed(read_root(item.path))}
        except (CheckpointError, OSError):
            return
        for relative in ours(item.path):
            if relative in listed:
                continue
            path = os.path.join(item.path, relative)
            info = info_of(path)
            if info is None:
                continue
            if info.st_mtime > self._before:
                self._recent.append(path)
                continue
            if self._dry_run or self._unlink(path):
                self._debris.append(Removed(path, None, info.st_size))

    def _clear_folder(self, path: str) -> None:
        """Remove the folder of a save or copy that never ended, or of a checkpoint that was being removed."""
        mine = list(ours(path))
        if not (mine or is_begun(path)):
            return  # nothing of this format
        if newest_change(path) > self._before:
            self._recent.append(path)
            return
        sizes = [info.st_size for info in (info_of(os.path.join(path, relative)) for relative in mine) if info]
        if self._has_manifest(path):
            return  # committed this moment
        if not self._dry_run:
            failures = len(self._failed)
            self._clear(path, mine)
            if len(self._failed) > failures:
                return
        self._debris.append(Removed(path, names.step_of(os.path.basename(path)), sum(sizes)))

    def _clear(self, path: str, relatives: Collection[str]) -> None:
        """Remove files of a folder that has no manifest, then the folder unless there is something else in it."""
        for relative in sorted(relatives):
            self._unlink(os.path.join(path, relative))
        # what a save or copy left that failed here before the checkpoint was committed
        for relative in sorted(set(ours(path)) - set(relatives)):
            info = info_of(os.path.join(path, relative))
            if info is not None and info.st_mtime <= self._before:
                self._unlink(os.path.join(path, relative))
        for folder in (*(os.path.join(path, name) for name in FOLDERS), path):
            try:
                if not os.listdir(folder):
                    self._files.remove_folder(folder)
            except FileNotFoundError:
                continue
            except OSError as error:
                self._fail(folder, error)

    def _unlink(self, path: str) -> bool:
        if not os.path.lexists(path):
            return True
        try:
            self._files.remove(path)
        except OSError as error:
            self._fail(path, error)
            return False
        return True


class _StorePrune(_Prune):
    """Of a run in a store. What was sent of an object that was never finished is debris too, though nobody sees it."""

    def __init__(self, folder: str, found: Sequence[Found], dry_run: bool, grace: float) -> None:
        super().__init__(folder, found, dry_run, grace)
        self._store = ObjectStore(folder)

    def _linked(self) -> dict[str, str]:
        return {}

    def _take(self, path: str, listed: Sequence[str]) -> None:
        self._store.remove(os.path.join(path, names.MANIFEST))
        there = self._store.walk(path)
        self._delete(path, [entry.name for entry in there if entry.name in listed or self._is_old(entry)])

    def _has_manifest(self, path: str) -> bool:
        try:
            self._store.size(os.path.join(path, names.MANIFEST))
        except (FileNotFoundError, StoreError):
            return False
        return True

    def _clear_committed(self, item: Found) -> None:
        try:
            listed = {names.MANIFEST, *_listed(read_root(item.path))}
            debris = [entry for entry in self._store.walk(item.path) if is_ours(entry) and entry.name not in listed]
        except (CheckpointError, OSError):
            return
        old = [entry for entry in debris if self._is_old(entry)]
        self._recent += [
            os.path.join(item.path, entry.name)
            for entry in debris
            if not self._is_old(entry) and not is_lease(entry.name)
        ]
        if self._dry_run or self._delete(item.path, [entry.name for entry in old]):
            self._debris += [Removed(os.path.join(item.path, entry.name), None, entry.size) for entry in old]

    def _clear_uncommitted(self) -> None:
        began = self._store.abandoned()
        try:
            names_below = {entry.name for entry in self._store.ls(self._folder) if entry.folder}
        except FileNotFoundError:
            names_below = set()
        names_below |= {url[len(self._folder) + 1 :].partition("/")[0] for url in began}
        for name in sorted(names_below):
            path = os.path.join(self._folder, name)
            unfinished = {url: at for url, at in began.items() if url.startswith(path + "/") and is_data(url, path)}
            there = self._store.walk(path)
            if any(is_lease(entry.name) and not self._is_old(entry, LEASE_S) for entry in there):
                if not self._has_manifest(path):
                    self._recent.append(path)
                continue
            for url, at in unfinished.items():
                if at > self._before:
                    self._recent.append(url)
                elif self._dry_run or self._abandon(url):
                    self._debris.append(Removed(url, None, 0))
            if not self._has_manifest(path):
                self._clear_objects(path, [entry for entry in there if is_ours(entry)])

    def _clear_objects(self, path: str, mine: Sequence[Entry]) -> None:
        if not mine:
            return  # nothing of this format
        if not all(map(self._is_old, mine)):
            self._recent.append(path)
        elif self._dry_run or self._delete(path, [entry.name for entry in mine]):
            size = sum(entry.size for entry in mine)
            self._debris.append(Removed(path, names.step_of(os.path.basename(path)), size))

    def _is_old(self, entry: Entry, grace: float | None = None) -> bool:
        """Whether an object of this format has not changed for the grace time. What the store does not date is new."""
        before = self._before if grace is None else time.time() - grace
        return is_ours(entry) and entry.modified is not None and entry.modified <= before

    def _delete(self, path: str, relatives: Sequence[str]) -> bool:
        """Remove objects; whether all are gone."""
        failures = len(self._failed)

        def delete(relative: str) -> None:
            url = os.path.join(path, relative)
            try:
                self._store.remove(url)
            except StoreError as error:
                self._fail(url, error)

        with ThreadPoolExecutor(DELETERS, thread_name_prefix="ckpt-prune") as pool:
            list(pool.map(delete, relatives))
        return len(self._failed) == failures

    def _abandon(self, url: str) -> bool:
        try:
            self._store.abandon(url)
        except (FileNotFoundError, StoreError) as error:
            self._fail(url, error)
            return False
        return True


def facts_of(path: str) -> tuple[Facts, str | None]:
    """The facts of a checkpoint, and why it must not go, if there is a reason."""
    try:
        facts = read_facts(path)
    except CheckpointError as error:
        return Facts(), f"its facts can't be read, and it may be pinned: {error}"
    return facts, facts.protected


def _unmeasured(keep: Policy | int, saved: Sequence[Saved]) -> dict[str, str]:
    """Metrics by which a policy chooses and that no checkpoint has, and what is to be said of each."""
    measured = {name for item in saved for name in item.metrics}
    there = f"those that are: {', '.join(map(repr, sorted(measured)))}" if measured else "nor any other"
    return {
        name: f"BestN keeps nothing, since no checkpoint has the metric {name!r} ({there})"
        for name in sorted(metrics_of(keep) - measured)
    }


def _listed(root: Root) -> list[str]:
    """The files that belong to a checkpoint beside its manifest."""
    return [*(page.path for page in root.pages), *(file.path for file in root.files), names.FACTS]
