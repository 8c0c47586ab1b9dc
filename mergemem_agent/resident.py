# SPDX-License-Identifier: MIT
"""The resident pages of a mapping with their bytes, read in small steps while the process runs.

    pagemap (32 MiB of addresses) ─► mem, present pages only (1 MiB) ─► pagemap of these again

A page whose entry is another one afterwards may have been replaced between the looks, so that its
bytes and its frame would not belong together; it is counted and left out.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mergemem_agent.pagemap import (
    IDENTITY,
    PAGE_BYTES,
    PRESENT,
    SWAPPED,
    WORDS_PER_PAGE,
    AddressSpace,
    Words,
)
from mergemem_agent.procfs import Mapping

# One read of pagemap covers 32 MiB, and up to 4 GiB while nothing is there: runtimes reserve far
# more address space than they use.
WINDOW_PAGES = 8192
WIDEST_WINDOW_PAGES = 1 << 20
BATCH_PAGES = 256


@dataclass(frozen=True)
class Batch:
    """Up to BATCH_PAGES pages that were read, and how many there were that could not be.

    Arrays over the pages: `numbers` (address / 4096), `entries` (of pagemap, after reading), and
    `contents` of shape (n, 512).
    """

    numbers: Words
    entries: Words
    contents: Words
    failed_pages: int = 0
    changed_pages: int = 0


@dataclass(frozen=True)
class Window:
    """Pagemap entries of a stretch of addresses."""

    address: int
    entries: Words

    @property
    def present(self) -> NDArray[np.intp]:
        """Positions of the pages that are in memory."""
        return np.flatnonzero(self.entries & PRESENT)

    @property
    def swapped_pages(self) -> int:
        """Pages on swap, or on their way to another frame."""
        return int(np.count_nonzero(self.entries & SWAPPED))


def windows(space: AddressSpace, mapping: Mapping) -> Iterator[Window]:
    """Go through the pagemap entries of a mapping. Raises ProcessGone."""
    address, width = mapping.start, WINDOW_PAGES
    while address < mapping.end:
        pages = min(width, (mapping.end - address) // PAGE_BYTES)
        window = Window(address, space.entries(address, pages))
        yield window
        address += pages * PAGE_BYTES
        empty = not (window.entries & (PRESENT | SWAPPED)).any()
        width = min(width * 2, WIDEST_WINDOW_PAGES) if empty else WINDOW_PAGES


def batches(space: AddressSpace, window: Window) -> Iterator[Batch]:
    """Read the present pages of a window. Raises ProcessGone.

    Between two batches no lock of the process is held, and nothing of it is in use.
    """
    buffer = np.empty((BATCH_PAGES, WORDS_PER_PAGE), dtype=np.uint64)
    present = window.present
    for start in range(0, len(present), BATCH_PAGES):
        yield _batch(space, window, present[start : start + BATCH_PAGES], buffer)


def _batch(
    space: AddressSpace, window: Window, positions: NDArray[np.intp], buffer: Words
) -> Batch:
    read = np.zeros(len(positions), dtype=np.bool_)
    breaks = np.flatnonzero(np.diff(positions) != 1) + 1
    for run in np.split(np.arange(len(positions)), breaks):
        first, last = int(run[0]), int(run[-1])
        address = window.address + int(positions[first]) * PAGE_BYTES
        for offset in _readable(space, address, buffer[first : last + 1]):
            read[first + offset] = True
    lowest, highest = int(positions[0]), int(positions[-1])
    again = space.entries(window.address + lowest * PAGE_BYTES, highest - lowest + 1)
    again = again[positions - lowest]
    same = ((window.entries[positions] ^ again) & IDENTITY) == 0
    kept = np.flatnonzero(read & same)
    return Batch(
        numbers=(window.address // PAGE_BYTES + positions[kept]).astype(np.uint64),
        entries=again[kept],
        contents=buffer[: len(positions)] if len(kept) == len(positions) else buffer[kept],
        failed_pages=int(np.count_nonzero(~read)),
        changed_pages=int(np.count_nonzero(read & ~same)),
    )


def _readable(space: AddressSpace, address: int, pages: Words) -> Iterator[int]:
    """Fill `pages` from `address` on; yield the positions of those that could be read."""
    position = 0
    while position < len(pages):
        count = space.read(address + position * PAGE_BYTES, pages[position:])
        yield from range(position, position + count)
        # The read stopped at a page that refuses: go on behind it.
        position += count + (position + count < len(pages) and count == 0)
