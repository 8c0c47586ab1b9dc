# SPDX-License-Identifier: MIT
"""What the agent remembers of the pages that it has scanned: one 64-bit word for each.

A region is a window of 2 MiB of one process's address space, aligned to 2 MiB: what one page
table maps, and so what the kernel module can handle under one lock. Of a region the agent keeps
one row of a table, and one word per page that had a checksum when it was last looked at:

     63                    22 21        13 12         5 4     0
    +------------------------+------------+------------+-------+
    | checksum, upper 42 bit | page 0-511 | map count  | flags |
    +------------------------+------------+------------+-------+

The word holds all that is needed between two looks (is the checksum still the same?), for the
index (which pages have the same checksum?) and for nominating (how many frames would that free?).

- 42 bits of checksum: among n pages, n * n / 2 / 2**42 pairs look equal and are not. That is
  0.1 pairs among a million pages, 1,140 among 100 million (400 GB). Each costs one comparison in
  the kernel.
- Map counts of 255 and more are kept as 255, which means "many".
- Words of a region are kept in ascending order of pages, and pages without a word were absent,
  swapped, or of a kind that is never merged; so are, where the policy does not want them merged,
  pages of huge pages and pages filled with zeros.

Memory, for each region with n words: 8 * n, 33 bytes of Python's for the `bytes` that holds them,
on average 8 more to align it, 8 in a list, and 48 in the table: 8.2 bytes per page in a full
region, 9.1 in one with a hundred pages. A numpy array in place of the `bytes` would cost 112 more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from mergemem_agent.contract import PAGE_BYTES, RECORD, State

Array = np.ndarray[Any, np.dtype[Any]]

REGION_PAGES: Final = 512
REGION_SHIFT: Final = 21
REGION_BYTES: Final = 1 << REGION_SHIFT

CHECKSUM_SHIFT: Final = 22
CHECKSUM_BITS: Final = 64 - CHECKSUM_SHIFT
_PAGE_SHIFT: Final = 13
_MAP_COUNT_SHIFT: Final = 5
MANY_MAPPINGS: Final = 255

# Flags of a word.
SETTLED: Final = 1 << 0  # two looks, far enough apart, saw the same checksum
MERGED: Final = 1 << 1  # a merged page: others can join it
FULL: Final = 1 << 2  # ... but its frame has as many mappings as it may have
HUGE: Final = 1 << 3  # part of a huge page or large folio, which must be split first
ZERO: Final = 1 << 4  # filled with zeros: equal to nobody's page but the kernel's own

_WORD: Final = np.dtype(np.uint64)
_CHECKSUM_MASK: Final = np.uint64(((1 << CHECKSUM_BITS) - 1) << CHECKSUM_SHIFT)

# One row of the table of a process's regions. Times are seconds of time.monotonic().
ROW: Final = np.dtype(
    [
        ("number", np.uint64),  # address >> REGION_SHIFT; rows are sorted by it
        ("looked", np.float64),  # when it was scanned last
        ("due", np.float64),  # when to scan it next; 0: as soon as possible
        ("interval", np.float32),  # seconds between the last look and the next
        ("looks", np.uint32),  # how often it was scanned
        ("changed", np.bool_),  # the last look saw pages that the one before had not
        ("zero", np.uint16),  # pages filled with zeros
        ("huge", np.uint16),  # pages that are part of a huge page
        ("merged", np.uint16),  # merged pages
        ("saved_bytes", np.float32),  # what they save: 4096 * (1 - 1 / map count) for each
        ("order", np.uint8),  # of the largest folio with pages here; 9: a huge page
        ("split", np.float32),  # when a huge page was split here; 0: never
    ]
)

# A region is never left alone for longer, whatever the yield.
MAX_INTERVAL_SECONDS: Final = 1800.0


def page_of(words: Array) -> Array:
    """Return the page numbers within their regions, 0 to 511."""
    return (words >> np.uint64(_PAGE_SHIFT)) & np.uint64(REGION_PAGES - 1)


def map_count_of(words: Array) -> Array:
    """Return the map counts, of which 255 means 255 or more."""
    return (words >> np.uint64(_MAP_COUNT_SHIFT)) & np.uint64(MANY_MAPPINGS)


@dataclass(frozen=True)
class Wanted:
    """Which pages to remember beside ordinary ones: those that a policy wants merged, too."""

    huge: bool = False
    zero: bool = False


@dataclass(frozen=True)
class Look:
    """What one scan of some regions saw, in pages."""

    scanned: int  # that are there, whatever their state
    checksummed: int
    settled: int  # of those, newly settled: worth a look at the index
    settled_zero: int  # and those that only the zero page is equal to
    zero: int
    huge: int


class Regions:
    """The regions of one process: a table of ROW, and beside it the words of each row."""

    def __init__(self) -> None:
        """Know nothing of the process yet."""
        self.rows: Array = np.zeros(0, dtype=ROW)
        self.words: list[bytes] = []

    def replace(self, numbers: Array) -> bool:
        """Keep what is known of the regions in `numbers`, sorted; forget all others.

        Returns whether any came or went.
        """
        if np.array_equal(numbers, self.rows["number"]):
            return False
        rows = np.zeros(len(numbers), dtype=ROW)
        rows["number"] = numbers
        _, new, old = np.intersect1d(
            numbers, self.rows["number"], assume_unique=True, return_indices=True
        )
        rows[new] = self.rows[old]
        words = [b""] * len(rows)
        for to, source in zip(new.tolist(), old.tolist(), strict=True):
            words[to] = self.words[source]
        self.rows, self.words = rows, words
        return True

    @property
    def pages(self) -> int:
        """How many pages have a word."""
        return sum(map(len, self.words)) // _WORD.itemsize

    def find(self, number: int) -> int | None:
        """Return the index of a region's row, or None when it is not (or no longer) known."""
        index = int(np.searchsorted(self.rows["number"], np.uint64(number)))
        found = index < len(self.rows) and int(self.rows["number"][index]) == number
        return index if found else None

    def look(
        self,
        first: int,
        count: int,
        records: Array,
        now: float,
        settle: float,
        max_mappings: int,
        wanted: Wanted = Wanted(),
    ) -> Look:
        """Take in what the kernel saw in `count` neighbouring regions from row `first` on.

        `records` has 512 contract.RECORD for each of them, all zero where nothing is mapped.
        """
        rows = self.rows[first : first + count]
        new = _words(records, count, max_mappings, wanted)
        old = self._spread(first, count)
        present = new != 0
        same = present & (old != 0) & ((new ^ old) & _CHECKSUM_MASK == 0)
        # A page that is no longer merged was written to, though it may look the same again.
        same &= (old & ~new & np.uint64(MERGED)) == 0
        settled_before = same & (old & np.uint64(SETTLED) != 0)
        apart = now - rows["looked"] >= settle * _CLOCK_TOLERANCE
        settled = settled_before | (same & np.repeat(apart, REGION_PAGES))
        new |= settled.astype(_WORD) * np.uint64(SETTLED)
        # What was part of a huge page and is no more can be merged only now.
        newly = settled & (~settled_before | (old & ~new & np.uint64(HUGE) != 0))
        newly &= new & np.uint64(MERGED) == 0
        small_zero = new & np.uint64(ZERO | HUGE) == ZERO

        self._store(first, count, new, present)
        _account(rows, records)
        _schedule(rows, _per_region(present & ~same) > 0, now, settle)
        return Look(
            scanned=int(np.count_nonzero(records["state"] != State.ABSENT)),
            checksummed=int(np.count_nonzero(records["checksum"])),
            settled=int(np.count_nonzero(newly & ~small_zero)),
            settled_zero=int(np.count_nonzero(newly & small_zero)),
            zero=int(rows["zero"].sum()),
            huge=int(rows["huge"].sum()),
        )

    def settle(self) -> None:
        """Take one look for enough, for all pages: who asks for a merge by hand may know."""
        for row, blob in enumerate(self.words):
            words = np.frombuffer(blob, dtype=_WORD) | np.uint64(SETTLED)
            self.words[row] = words.tobytes()

    def mark(self, number: int, pages: Array, set_flags: int, clear_flags: int) -> None:
        """Set and clear flags of some pages of one region; pages no longer known are left out."""
        row = self.find(number)
        if row is None:
            return
        words = np.frombuffer(self.words[row], dtype=_WORD).copy()
        chosen = np.isin(page_of(words), pages)
        words[chosen] &= ~np.uint64(clear_flags)
        words[chosen] |= np.uint64(set_flags)
        self.words[row] = words.tobytes()

    def revisit(self, number: int, now: float, delay: float) -> None:
        """Scan a region after `delay` seconds, as its yield was good: back-off starts over."""
        row = self.find(number)
        if row is not None:
            self.rows["interval"][row] = delay
            self.rows["due"][row] = now + delay

    def merged(self, number: int, pages: int, saved_bytes: float) -> None:
        """Count pages of a region that were merged now, until the next look counts them all."""
        row = self.find(number)
        if row is not None:
            self.rows["merged"][row] = min(REGION_PAGES, int(self.rows["merged"][row]) + pages)
            self.rows["saved_bytes"][row] += saved_bytes

    def split(self, number: int, now: float) -> None:
        """Remember that a huge page was split in a region."""
        row = self.find(number)
        if row is not None:
            self.rows["split"][row] = now

    def _spread(self, first: int, count: int) -> Array:
        """Return the remembered words of some regions, each in the place of its page."""
        blobs = self.words[first : first + count]
        words = np.frombuffer(b"".join(blobs), dtype=_WORD)
        lengths = [len(blob) // _WORD.itemsize for blob in blobs]
        start = np.repeat(np.arange(count) * REGION_PAGES, lengths)
        spread = np.zeros(count * REGION_PAGES, dtype=_WORD)
        spread[start + page_of(words).astype(np.intp)] = words
        return spread

    def _store(self, first: int, count: int, words: Array, present: Array) -> None:
        for index in range(count):
            part = slice(index * REGION_PAGES, (index + 1) * REGION_PAGES)
            self.words[first + index] = words[part][present[part]].tobytes()


# Timers and clocks round: a look that was due after 10 s may come after 9.9999 s.
_CLOCK_TOLERANCE: Final = 0.999


def blank_records(count: int) -> Array:
    """Return records for `count` regions in which nothing is mapped."""
    return np.zeros(count * REGION_PAGES, dtype=RECORD)


def _words(records: Array, count: int, max_mappings: int, wanted: Wanted) -> Array:
    """Return a word for each record of a page that can be merged, 0 for all others."""
    state = records["state"]
    merged, zero, huge = state == State.MERGED, state == State.ZERO, _is_huge(records)
    mergeable = merged | (state == State.ANON)
    if wanted.huge:
        mergeable |= state == State.HUGE
    if wanted.zero:
        mergeable |= zero if wanted.huge else zero & ~huge
    map_counts = records["map_count"]
    pages = np.tile(np.arange(REGION_PAGES, dtype=_WORD), count)
    words = records["checksum"] & _CHECKSUM_MASK
    words |= pages << np.uint64(_PAGE_SHIFT)
    # At least 1, so that a word is never 0, which means that there is none.
    words |= np.clip(map_counts, 1, MANY_MAPPINGS).astype(_WORD) << np.uint64(_MAP_COUNT_SHIFT)
    words |= merged.astype(_WORD) * np.uint64(MERGED)
    words |= (merged & (map_counts >= max_mappings)).astype(_WORD) * np.uint64(FULL)
    words |= huge.astype(_WORD) * np.uint64(HUGE)
    words |= zero.astype(_WORD) * np.uint64(ZERO)
    words *= mergeable
    return words


def _is_huge(records: Array) -> Array:
    state = records["state"]
    huge: Array = (state == State.HUGE) | ((state == State.ZERO) & (records["order"] > 0))
    return huge


def _per_region(pages: Array) -> Array:
    totals: Array = pages.reshape(-1, REGION_PAGES).sum(axis=1)
    return totals


def _account(rows: Array, records: Array) -> None:
    state = records["state"]
    merged = state == State.MERGED
    saved = np.where(merged, PAGE_BYTES - PAGE_BYTES / np.maximum(records["map_count"], 1), 0.0)
    rows["zero"] = _per_region(state == State.ZERO)
    huge = _is_huge(records)
    rows["huge"] = _per_region(huge)
    orders = np.where(huge, records["order"], 0).reshape(-1, REGION_PAGES)
    rows["order"] = orders.max(axis=1)
    rows["merged"] = _per_region(merged)
    rows["saved_bytes"] = _per_region(saved)


def _schedule(rows: Array, changed: Array, now: float, settle: float) -> None:
    """Say when to scan each region next.

    Looks at a region come ever more rarely, each time after twice as long, whether it never
    changes or changes always: neither yields anything. Two things start over at `settle`: the
    first look, and a change after calm, since what has changed may have come to rest. (A third
    is a merge: see Regions.revisit().)
    """
    start_over = (rows["looks"] == 0) | (changed & ~rows["changed"])
    doubled = np.minimum(rows["interval"] * 2, max(MAX_INTERVAL_SECONDS, settle))
    rows["interval"] = np.where(start_over, settle, np.maximum(doubled, settle))
    rows["changed"] = changed | (rows["looks"] == 0)
    rows["looks"] += 1
    rows["looked"] = now
    rows["due"] = now + rows["interval"]
