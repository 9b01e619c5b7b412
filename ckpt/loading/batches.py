"""What several ranks need: which blocks those are, who reads them, in which portions, and who passes them on to whom.

A block that several nodes need is read by one of them, and travels from node to node, so that nobody sends or receives
it twice. Every rank computes the same from the same needs, so nobody has to be told. Knows neither how ranks talk nor
how bytes are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ckpt_formats.arrays import Int64Array
from ckpt_formats.pieces import Piece

MOST = 32
"""Ranks that share memory at most: a node with more of them counts as several."""
COLUMNS = 6
"""Of what `needs_of` makes: page, row, first, last, source, start."""


class Extent(NamedTuple):
    """Whole blocks of one chunk."""

    page: int
    row: int
    first: int
    """Position in the chunk, in bytes, of the first; a multiple of the block size."""
    last: int
    """The same of the byte after the last."""


class Batch(NamedTuple):
    """Extents that move together, as a node sees it: one of its ranks gets them for all that need them."""

    taker: int
    """The rank of this node that gets them; it needs them itself."""
    readers: frozenset[int]
    """The ranks of this node that need them."""
    origin: int | None
    """The rank of another node that passes them on to the taker; None where the taker reads them."""
    onward: int | None
    """The rank of another node that the taker passes them on to."""
    extents: list[Extent]

    @property
    def nbytes(self) -> int:
        return sum(extent.last - extent.first for extent in self.extents)


def needs_of(pieces: Iterable[Piece]) -> Int64Array:
    """What a rank needs, as others have to know it: int64 [n, 6] of page, row, first, last, source, start."""
    rows = [(p.meta.page, p.row, p.first, p.first + p.stop - p.start, p.source, p.start) for p in pieces]
    return merged(np.array(rows, dtype=np.int64).reshape(-1, COLUMNS))


def merged(needs: Int64Array) -> Int64Array:
    """The same needs sorted by chunk and position, what touches or overlaps as one row."""
    if not len(needs):
        return needs
    needs = needs[np.lexsort((needs[:, 2], needs[:, 1], needs[:, 0]))]
    chunk = np.cumsum(np.r_[0, np.any(needs[1:, :2] != needs[:-1, :2], axis=1)])
    # the furthest end so far within the chunk: chunks are set far apart on one line for that
    line = chunk * (int(needs[:, 3].max()) + 1)
    reach = np.maximum.accumulate(line + needs[:, 3])
    begins = np.flatnonzero(np.r_[True, line[1:] + needs[1:, 2] > reach[:-1]])
    whole = needs[begins]
    whole[:, 3] = reach[np.r_[begins[1:] - 1, len(needs) - 1]] - line[begins]
    return whole


def make_batches(
    needs: Sequence[Int64Array],
    holders: Sequence[Sequence[int]],
    nodes: Sequence[Sequence[int]],
    node: int,
    size: int,
) -> list[Batch]:
    """The blocks that a node needs and at least two ranks need, in batches of at most `size` bytes.

    Nodes that need the same divide it into as many stretches, one after the other in the files, as devices and file
    systems like it best; and each node its stretch among its ranks. The order of the batches is the same for every node
    that has them, first those that every rank reads first. Whoever gets and passes on batches in this order can wait
    for nobody who waits for him: the first that is not yet where it belongs can always go on.

    Args:
        needs: different ones, as `needs_of` makes them.
        holders: of each of them, the ranks that have it.
        nodes: of each node its ranks; no rank is in two.
        node: whose batches are wanted, by its position in `nodes`.
        size: a multiple of the block size.
    """
    everything = np.concatenate([np.empty((0, COLUMNS), np.int64), *needs])
    if not len(everything):
        return []
    need = np.repeat(np.arange(len(needs)), [len(rows) for rows in needs])
    # all chunks one after the other on one line
    chunks, first_seen, chunk = np.unique(everything[:, :2], axis=0, return_index=True, return_inverse=True)
    chunk = chunk.reshape(-1)
    length = np.zeros(len(chunks), np.int64)
    np.maximum.at(length, chunk, everything[:, 3])
    base = np.concatenate(([0], np.cumsum(length)))
    low, high = base[chunk] + everything[:, 2], base[chunk] + everything[:, 3]
    points = np.unique(np.concatenate((low, high, base)))
    # which needs cover a stretch, as the sum of a random number for each
    marks = np.random.default_rng(0).integers(1, 1 << 63, len(needs), dtype=np.uint64)
    edges = np.zeros(len(points) + 1, np.uint64)
    np.add.at(edges, np.searchsorted(points, low), marks[need])
    np.subtract.at(edges, np.searchsorted(points, high), marks[need])
    covered = np.cumsum(edges)[: len(points)]
    of_chunk = np.searchsorted(base, points, side="right") - 1
    # stretches of one chunk that the same ranks need
    begins = np.flatnonzero(np.r_[True, (covered[1:] != covered[:-1]) | (of_chunk[1:] != of_chunk[:-1])])
    nbytes = np.diff(np.r_[points[begins], points[-1]])
    kept = (nbytes > 0) & (covered[begins] != 0)
    begins, nbytes = begins[kept], nbytes[kept]
    in_chunk = points[begins] - base[of_chunk[begins]]
    source, origin = everything[first_seen, 4], everything[first_seen, 5] - everything[first_seen, 2]
    at = of_chunk[begins]
    in_files = np.lexsort((origin[at] + in_chunk, source[at]))
    # who needs them: looked up once for each set
    _, examples, kind = np.unique(covered[begins], return_index=True, return_inverse=True)
    by_chunk = np.argsort(chunk, kind="stable")
    bounds = np.searchsorted(chunk[by_chunk], [at[examples], at[examples] + 1])
    node_of = {rank: number for number, ranks in enumerate(nodes) for rank in ranks}
    sets: dict[int, dict[int, list[int]]] = {}
    for number, example in enumerate(examples.tolist()):
        rows = by_chunk[bounds[0][number] : bounds[1][number]]
        point = points[begins[example]]
        covering = need[rows[(low[rows] <= point) & (point < high[rows])]]
        ranks = sorted(rank for one in covering.tolist() for rank in holders[one] if rank in node_of)
        if len(ranks) > 1:
            members: dict[int, list[int]] = {}
            for rank in ranks:
                members.setdefault(node_of[rank], []).append(rank)
            if node in members:
                sets[number] = members
    ours = in_files[np.isin(kind.reshape(-1)[in_files], list(sets))]
    columns = (kind.reshape(-1)[ours], chunks[at[ours]], in_chunk[ours], nbytes[ours])
    cut: dict[int, list[list[Extent]]] = {number: [] for number in sets}
    filled = dict.fromkeys(sets, size)
    for number, (page, row), begin, count in zip(*(column.tolist() for column in columns), strict=True):
        for first in range(begin, begin + count, size):
            last = min(first + size, begin + count)
            if filled[number] + last - first > size:
                cut[number].append([])
                filled[number] = 0
            cut[number][-1].append(Extent(page, row, first, last))
            filled[number] += last - first
    ordered: list[tuple[int, int, int, Batch]] = []
    for number, portions in cut.items():
        for turn, owner, batch in _assigned(portions, sets[number], node):
            ordered.append((turn, int(examples[number]), owner, batch))
    ordered.sort(key=lambda entry: entry[:3])
    return [batch for *_, batch in ordered]


def _assigned(
    portions: list[list[Extent]], members: Mapping[int, list[int]], node: int
) -> Iterable[tuple[int, int, Batch]]:
    """Who reads each portion of what the same ranks need: (its turn at its reader, its reader, the batch)."""
    nodes = list(members)
    sizes = [sum(extent.last - extent.first for extent in portion) for portion in portions]
    total, before = sum(sizes), 0
    turns: dict[int, int] = {}
    for portion, nbytes in zip(portions, sizes, strict=True):
        place, rest = divmod(before * len(nodes), total)
        before += nbytes
        # as many ranks of each node in turn as it has: each passes on to one rank of the next, if nodes are alike
        index = rest * len(members[nodes[place]]) // total
        takers = [ranks[index % len(ranks)] for ranks in members.values()]
        owner = takers[place]
        turn = turns[owner] = turns.get(owner, -1) + 1
        here = nodes.index(node)
        after = (here + 1) % len(nodes)
        yield (
            turn,
            owner,
            Batch(
                takers[here],
                frozenset(members[node]),
                None if here == place else takers[here - 1],
                None if after == place else takers[after],
                portion,
            ),
        )
