"""Location maps: where the bytes of chunks lie.

A manifest says what the bytes are and never changes; a location map says where to get them now, one or more places per
chunk in order of preference. Whoever reads takes the first place that answers with bytes that fit the digest. Knows no
tensors: chunks are rows of the manifest's pages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ckpt_formats.arrays import Int64Array, UInt8Array
from ckpt_formats.sources import ByteSource


@dataclass(frozen=True, slots=True)
class Places:
    """One place for each chunk of a page, column by column; row k is the place of chunk k of that page."""

    source: Int64Array
    """[n]: position in `LocationMap.sources`; -1 where this has no place for the chunk."""
    start: Int64Array
    """[n]: the first byte, counted from the beginning of the source."""
    length: Int64Array
    """[n]: stored bytes."""
    codec: UInt8Array
    """[n]: position in `LocationMap.codecs`."""


class LocationMap:
    """Places of all chunks of a checkpoint.

    `places(page)` gives alternatives for a whole page at once, the preferred first, because chunks are many: a table of
    objects per chunk would cost more than reading them.

    Attributes:
        far: reads from some of its sources wait for answers over a network: few and large ones, many at once, are best.
    """

    def __init__(
        self,
        sources: Sequence[ByteSource],
        codecs: Sequence[str],
        places: Callable[[int], Sequence[Places]],
        *,
        far: bool = False,
    ) -> None:
        self.sources = list(sources)
        self.codecs = list(codecs)
        self._places = places
        self.far = far

    def places(self, page: int) -> Sequence[Places]:
        """Alternative places for the chunks of a page, in order of preference."""
        return self._places(page)

    def close(self) -> None:
        """Close every source."""
        for source in self.sources:
            source.close()
