"""The levels of a run as a user names them, and as they are known once names, places and rules are settled.

    tiers=[ckpt.Disk(every=50, keep=3), ckpt.Remote("s3://bucket/a", every=500)]

Saves are committed on the first; from there they flow to the others. Knows no files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any as Anything

from ckpt.levels.every import Every, EveryLike, every
from ckpt.levels.policies import Any, BestN, EveryN, LatestN, Policy, policy
from ckpt.storage.throttle import require_bandwidth
from ckpt_formats.errors import ConfigurationError
from ckpt_formats.native.node_folders import NODE
from ckpt_formats.remote import configure
from ckpt_formats.urls import is_url, normal

__all__ = ["Disk", "Level", "Remote", "levels_from_json", "levels_to_json", "settle"]

_BUCKETS = ("s3", "s3a", "gs", "gcs")
"""Schemes of stores that have objects' names and no folders."""


@dataclass(frozen=True, slots=True)
class Disk:
    """A folder on a local or mounted file system."""

    path: str | os.PathLike[str] | None = None
    """Where the checkpoints lie; by default in the run's own folder. With `{node}` in it, each node has a disk of its
    own, and on it its part of each checkpoint."""
    every: EveryLike | None = None
    """How often; on the first level by default as often as the Checkpointer says, on a further one each checkpoint."""
    keep: Policy | int | None = None
    """Which checkpoints stay; on the first level by default as the Checkpointer says, on a further one all."""


@dataclass(frozen=True, slots=True)
class Remote:
    """An object store, or whatever else fsspec reaches."""

    url: str
    """Where the checkpoints lie, such as s3://bucket/run."""
    every: EveryLike | None = None
    """Which of the checkpoints on disk go there; by default each."""
    keep: Policy | int | None = None
    """Which checkpoints stay there; by default all."""
    options: Mapping[str, Anything] = field(default_factory=dict, repr=False)
    """For fsspec's file system, such as {"endpoint_url": …}. Handed to the agent in memory and written nowhere."""
    bandwidth: float | None = None
    """Bytes per second that are sent there at most, by each node; by default as many as it takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """A level, settled."""

    name: str
    """disk, remote; of a second one of a kind, disk2, remote2."""
    place: str
    """An absolute path or a URL."""
    every: Every | None
    """None: each checkpoint that is on the first level."""
    keep: Policy | None
    """None: all."""
    options: Mapping[str, Anything] = field(default_factory=dict, repr=False)
    bandwidth: float | None = None
    """Bytes per second that are sent there at most; None: as many as it takes."""

    @property
    def remote(self) -> bool:
        """Whether it is a store, which is reached by its URL."""
        return is_url(self.place)

    def configure(self) -> None:
        """Use its options in this process."""
        if self.options:
            configure(self.place, self.options)


def settle(
    run: str, tiers: Sequence[Disk | Remote], frequency: EveryLike | None, keep: Policy | int | None
) -> list[Level]:
    """The levels of a run, the one that saves are committed on first.

    That is the first disk. A run with remote levels only gets one, in its own folder, which saves as often as the first
    of them and keeps the newest checkpoint, unless something else is said.

    Args:
        run: the run's folder, absolute.
        tiers: as the user gave them; none means a disk.
        frequency, keep: what holds for the first level when it does not say.

    Raises:
        ConfigurationError: they contradict each other.
    """
    disks = [tier for tier in tiers if isinstance(tier, Disk)]
    if disks:
        first = disks[0]
    elif tiers:
        first = Disk(every=tiers[0].every if frequency is None else None, keep=1 if keep is None else None)
    else:
        first = Disk()
    levels: list[Level] = []
    for tier in (first, *(tier for tier in tiers if tier is not first)):
        place = _place(run, tier)
        bandwidth: float | None = None
        if isinstance(tier, Remote):
            bandwidth = require_bandwidth(tier.bandwidth, f"Remote({tier.url!r}): ")
        main = not levels
        said, stays = tier.every, tier.keep
        if main:
            _require_one("every", frequency, said)
            _require_one("keep", keep, stays)
            usual: EveryLike = "auto" if frequency is None else frequency
            said = usual if said is None else said
            stays = keep if stays is None else stays
        level = Level(
            name=_name(tier, levels),
            place=place,
            every=None if said is None else every(said),
            keep=None if stays is None else _known(policy(stays)),
            options=dict(tier.options) if isinstance(tier, Remote) else {},
            bandwidth=bandwidth,
        )
        if not main and level.every is not None and level.every.auto:
            raise ConfigurationError(
                f'{level.name}: every="auto" is for the level that saves are committed on, {levels[0].name}; give '
                "this one steps or a time"
            )
        if any(other.place == place for other in levels):
            raise ConfigurationError(f"two levels lie in {place}; give each a place of its own")
        levels.append(level)
    if any(NODE in level.place for level in levels[1:]):
        raise ConfigurationError(f"only the first level can be node-local disks ({NODE} in its path)")
    _require_json(levels)
    return levels


def _place(run: str, tier: Disk | Remote) -> str:
    if isinstance(tier, Disk):
        place = run if tier.path is None else os.fspath(tier.path)
        if is_url(place):
            raise ConfigurationError(
                f"Disk({place!r}) is a URL; name it as Remote({place!r}), beside a folder for the run"
            )
        return os.path.abspath(place)
    if "://" not in tier.url:
        raise ConfigurationError(f"Remote({tier.url!r}) is no URL; name a mounted folder as Disk({tier.url!r})")
    url = normal(tier.url)
    scheme, _, path = url.partition("://")
    if scheme in _BUCKETS and "" in path.split("/"):
        raise ConfigurationError(
            f"Remote({tier.url!r}) names no bucket, or has an empty part between slashes; write {scheme}://bucket/run"
        )
    return url


def _require_one(name: str, given: object, own: object) -> None:
    if given is not None and own is not None and given != own:
        raise ConfigurationError(
            f"{name}={given!r} of the Checkpointer contradicts {name}={own!r} of the first Disk, on which saves are "
            "committed; say it once"
        )


def _name(tier: Disk | Remote, before: Sequence[Level]) -> str:
    kind = "disk" if isinstance(tier, Disk) else "remote"
    count = sum(level.name.rstrip("0123456789") == kind for level in before)
    return kind if not count else f"{kind}{count + 1}"


def _known(rule: Policy) -> Policy:
    """A policy that can be told to another process: the agent prunes."""
    _policy_to_json(rule)
    return rule


def _require_json(levels: Sequence[Level]) -> None:
    for level in levels:
        try:
            json.dumps(dict(level.options), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ConfigurationError(
                f"the options of {level.name} can't be handed to the agent, which is another process ({error}); give "
                "text, numbers, lists and mappings"
            ) from None


# --- for the agent


def levels_to_json(levels: Sequence[Level], *, options: bool) -> list[dict[str, Anything]]:
    """Levels as JSON; with their options, which may have secrets in them, or without."""
    return [
        {
            "name": level.name,
            "place": level.place,
            "every": None if level.every is None else {"steps": level.every.steps, "seconds": level.every.seconds},
            "keep": None if level.keep is None else _policy_to_json(level.keep),
            "bandwidth": level.bandwidth,
            **({"options": dict(level.options)} if options else {}),
        }
        for level in levels
    ]


def levels_from_json(tree: Sequence[Mapping[str, Anything]]) -> list[Level]:
    """The inverse of levels_to_json. Raises KeyError, TypeError or ValueError for what it did not write."""
    return [
        Level(
            name=str(item["name"]),
            place=str(item["place"]),
            every=None if item["every"] is None else Every(item["every"]["steps"], item["every"]["seconds"]),
            keep=None if item["keep"] is None else _policy_from_json(item["keep"]),
            options=item.get("options", {}),
            bandwidth=item.get("bandwidth"),
        )
        for item in tree
    ]


def _policy_to_json(rule: Policy) -> dict[str, Anything]:
    match rule:
        case LatestN(n):
            return {"latest": n}
        case EveryN(steps):
            return {"every": steps}
        case BestN(n, metric, mode):
            return {"best": [n, metric, mode]}
        case Any():
            return {"any": [_policy_to_json(one) for one in rule.policies]}
    raise ConfigurationError(
        f"keep={rule!r}: the agent, which is another process, removes what is not kept, and can't be told this rule; "
        "give LatestN, EveryN, BestN, or Any of them"
    )


def _policy_from_json(tree: Mapping[str, Anything]) -> Policy:
    ((kind, value),) = tree.items()
    if kind == "latest":
        return LatestN(value)
    if kind == "every":
        return EveryN(value)
    if kind == "best":
        return BestN(*value)
    if kind == "any":
        return Any(*map(_policy_from_json, value))
    raise ValueError(f"no policy is called {kind!r}")
