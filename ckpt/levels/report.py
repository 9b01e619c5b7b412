"""What `prune` tells of what it did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["Kept", "PruneReport", "Removed", "together"]


class Kept(NamedTuple):
    """A checkpoint that stays."""

    path: str
    step: int | None
    why: str
    """For people: newest, by the rule, pinned, tagged best, in use, or what is wrong with it."""


class Removed(NamedTuple):
    """Something that was removed, or would be in a dry run."""

    path: str
    """A checkpoint's folder; of debris, the folder or the file."""
    step: int | None
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneReport:
    """What `prune` did, or in a dry run would do."""

    path: str
    """The run's folder."""
    dry_run: bool
    kept: Sequence[Kept]
    """By step, the oldest first."""
    removed: Sequence[Removed]
    """Checkpoints, by step, the oldest first."""
    debris: Sequence[Removed]
    """What saves and copies that failed had left."""
    recent: Sequence[str]
    """What looks like debris but changed within the grace time; a save or copy may be under way there."""
    failed: Sequence[tuple[str, str]]
    """Path and reason: what should have gone and could not be removed, or not all of it."""

    unmeasured: Mapping[str, str]
    """Metrics by which the rule chooses and that no checkpoint has, though some went; of each, a sentence about it."""

    @property
    def bytes(self) -> int:
        """Bytes that became free."""
        return sum(item.bytes for item in (*self.removed, *self.debris))


def together(run: str, reports: Sequence[PruneReport]) -> PruneReport:
    """What was done on the disks of several nodes."""
    return PruneReport(
        path=run,
        dry_run=any(report.dry_run for report in reports),
        kept=[item for report in reports for item in report.kept],
        removed=[item for report in reports for item in report.removed],
        debris=[item for report in reports for item in report.debris],
        recent=[item for report in reports for item in report.recent],
        failed=[item for report in reports for item in report.failed],
        unmeasured={name: why for report in reports for name, why in report.unmeasured.items()},
    )
