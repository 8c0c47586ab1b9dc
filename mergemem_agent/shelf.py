# SPDX-License-Identifier: MIT
"""The page records of processes that may share pages with each other, until they are counted.

Memory: 24 bytes a page, and the working space of one part at a time while they are counted: about
180 bytes for each page of the part. A part is a Mi pages, so 180 MiB; from 64 parts on (256 GiB of
resident pages) it grows, by 2.8 bytes for each page of all. No content can be spread over parts,
except zeros.
"""

import numpy as np
from numpy.typing import NDArray

from mergemem_agent import tally
from mergemem_agent.pagemap import Words
from mergemem_agent.tally import Pages, Tally

PART_PAGES = 1 << 20
MAX_PARTS = 64


class Shelf:
    """The records of the processes that may share pages with each other."""

    # Small arrays are joined to larger ones: each costs microseconds when parts are picked.
    _LOOSE = 512

    def __init__(self) -> None:
        """Hold nothing yet."""
        self.pids: list[int] = []
        self.zero_page_mappings = 0
        self._joined: list[Pages] = []
        self._loose: list[Pages] = []
        self._next_frame = 0

    def put(self, pages: Pages) -> None:
        """Add records, in any amount."""
        self._loose.append(pages)
        if len(self._loose) >= self._LOOSE:
            self._join()

    def _join(self) -> None:
        if self._loose:
            self._joined.append(np.concatenate(self._loose))
            self._loose = []

    def _chunks(self) -> list[Pages]:
        self._join()
        return self._joined

    def shared_frames(self) -> Words:
        """Return the numbers of all frames that have more than one mapping, each once."""
        found = [tally.shared_frames(pages) for pages in self._chunks()]
        return np.unique(np.concatenate([np.empty(0, dtype=np.uint64), *found]))

    def count(self, counts: tally.MappingCounts | None) -> tuple[Tally, Tally]:
        """Count pages of zeros, and all others, in parts that hold equal contents together."""
        chunks = self._chunks()
        parts = min(MAX_PARTS, sum(map(len, chunks)) // PART_PAGES + 1)
        zeros = others = Tally()
        for part in range(parts):
            picked = [pages[_part_of(pages, parts) == part] for pages in chunks]
            pages = np.concatenate([np.empty(0, dtype=tally.PAGE), *picked])
            zero = tally.is_zero(pages)
            zeros += tally.count(pages[zero], counts)
            others += tally.count(pages[~zero], counts)
        return zeros, others

    def stand_in_frames(self, page_numbers: Words, exclusive: tally.Flags) -> Words:
        """Make up frame numbers where pagemap hides them.

        A page that is its frame's only mapping gets a number of its own. One that has others, so
        by fork, goes by its address: equal bytes at equal addresses are taken for one frame.
        """
        shared_bit = np.uint64(1 << (tally.FRAME_BITS - 1))
        frames = (page_numbers & (shared_bit - np.uint64(1))) | shared_bit
        alone = int(exclusive.sum())
        frames[exclusive] = np.arange(self._next_frame, self._next_frame + alone, dtype=np.uint64)
        self._next_frame += alone
        return frames


def _part_of(pages: Pages, parts: int) -> NDArray[np.uint64]:
    # Zeros are often the most frequent content by far; of them only frames are counted, so they
    # can be told apart by these.
    where = np.where(tally.is_zero(pages), tally.frames_of(pages), pages["low"] >> np.uint64(32))
    part: NDArray[np.uint64] = where % np.uint64(parts)
    return part
