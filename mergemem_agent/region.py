# SPDX-License-Identifier: MIT
"""What the agent remembers of a process's memory: a table of regions, and a word for each page.

A region is a window of 2 MiB of one process's address space, aligned to 2 MiB: what one page
table maps, and so what the kernel module can handle under one lock. Of a region the agent keeps
one row of a table, and one word (word.py) per page that could be merged when it was last looked at.
Words of a region are kept in ascending order of pages.

Memory, for each region with n words: 8 * n, 57 bytes of Python's for the `bytearray` that holds
them, on average 16 more to align it, 8 in a list, and 83 in the table: 8.3 bytes per page in a full
region, 9.6 in one with a hundred pages. A numpy array in place of each would cost 64 more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from mergemem_agent import schedule
from mergemem_agent.hint import Hint
from mergemem_agent.word import (
    PAGE_BITS,
    PARTNER,
    SETTLED,
    WORD,
    Stage,
    page_of,
    stage_of,
)

Array = np.ndarray[Any, np.dtype[Any]]

REGION_PAGES: Final = 1 << PAGE_BITS
REGION_SHIFT: Final = 21
REGION_BYTES: Final = 1 << REGION_SHIFT

# One row of the table of a process's regions. Times are seconds of time.monotonic().
ROW: Final = np.dtype(
    [
        ("number", np.uint64),  # address >> REGION_SHIFT; rows are sorted by it
        ("due", np.float64),  # when to look at it next; 0: as soon as possible
        ("sample", np.float64),  # when to take samples of its pages next
        ("sampled", np.float64),  # when that was done last; 0: never
        ("read", np.float64),  # when pages of it were last read in full; 0: never
        ("interval", np.float32),  # seconds between the last samples and the next
        ("saved_bytes", np.float32),  # what merged pages save: 4096 * (1 - 1 / map count) for each
        ("split", np.float32),  # when a huge page was split here; 0: never
        ("news", np.float32),  # average of pages that were not what they were, see schedule.py
        ("doubted", np.float32),  # when what is known of pages that stayed alone was doubted
        ("restless", np.float32),  # 0 to 4: how often its merges break, see schedule.py
        ("looks", np.uint32),  # how often it was looked at
        ("pages", np.uint16),  # that have a word
        ("first", np.uint16),  # pages to be read in full, as others have the same sample
        ("second", np.uint16),  # pages to be read once more, `settle` after the first time
        ("zero", np.uint16),  # pages filled with zeros
        ("huge", np.uint16),  # pages that are part of a huge page
        ("merged", np.uint16),  # merged pages
        ("order", np.uint8),  # of the largest folio with pages here; 9: a huge page
        ("hinted", np.uint8),  # how often hints have moved the next look
        ("changed", np.bool_),  # the last look saw pages that the one before had not
    ]
)

STAGES: Final = len(Stage)
_U64 = np.uint64


@dataclass(frozen=True)
class Totals:
    """What the regions of one process hold, as last scanned, in pages."""

    merged: int
    saved_bytes: float
    zero: int
    huge: int


class Regions:
    """The regions of one process: a table of ROW, and beside it the words of each row."""

    def __init__(self) -> None:
        """Know nothing of the process yet."""
        self.rows: Array = np.zeros(0, dtype=ROW)
        self.words: list[bytearray] = []
        # How many pages went from one Stage to another: STAGES * STAGES, until taken.
        self.moves: Array = np.zeros(0, dtype=np.int64)
        self._pages = 0
        self._next_due: float | None = None
        self._totals: Totals | None = None

    def replace(self, numbers: Array, now: float = 0.0) -> bool:
        """Keep what is known of the regions in `numbers`, sorted; forget all others.

        New ones are due `now`. Returns whether any came or went.
        """
        if np.array_equal(numbers, self.rows["number"]):
            return False
        rows = np.zeros(len(numbers), dtype=ROW)
        rows["number"], rows["due"], rows["sample"] = numbers, now, now
        _, new, old = np.intersect1d(
            numbers, self.rows["number"], assume_unique=True, return_indices=True
        )
        rows[new] = self.rows[old]
        words = [bytearray() for _ in range(len(rows))]
        for to, source in zip(new.tolist(), old.tolist(), strict=True):
            words[to] = self.words[source]
            self.words[source] = bytearray()
        self.moved(self._all_words(), None)
        self.rows, self.words = rows, words
        self._pages = int(rows["pages"].sum())
        self.changed()
        return True

    @property
    def pages(self) -> int:
        """How many pages have a word."""
        return self._pages

    @property
    def next_due(self) -> float:
        """When the first of the regions is due; infinite without any."""
        if self._next_due is None:
            self._next_due = float(self.rows["due"].min(initial=np.inf))
        return self._next_due

    def due_after(self, now: float) -> float:
        """Return when the first of the regions that are not due yet will be."""
        due = self.rows["due"]
        return float(due[due > now].min(initial=np.inf))

    def find(self, number: int) -> int | None:
        """Return the index of a region's row, or None when it is not (or no longer) known."""
        numbers = self.rows["number"]
        index = int(numbers.searchsorted(_U64(number)))
        found = index < len(numbers) and int(numbers[index]) == number
        return index if found else None

    def words_of(self, row: int) -> Array:
        """Return the words of a row. They may be changed, but for whether they are 0."""
        return np.frombuffer(self.words[row], dtype=WORD)

    def settle(self) -> None:
        """Take one look for enough, for all pages: who asks for a merge by hand may know."""
        for row in range(len(self.words)):
            words = self.words_of(row)
            before = words.copy()
            words |= _U64(SETTLED)
            self.moved(before, words)

    def mark(self, row: int, pages: Array, set_flags: int, clear_flags: int) -> None:
        """Set and clear flags of some pages of a row; those without a word are left out."""
        words = self.words_of(row)
        at, _ = positions(words, pages)
        before = words[at]
        words[at] = (before & ~_U64(clear_flags)) | _U64(set_flags)
        self.moved(before, words[at])

    def partners(self, rows: Array, pages: Array, deep: Array) -> None:
        """Let pages that have partners be read in full: the row, the page, and the DEEP of each.

        `rows` is sorted, and none of these pages is PARTNER yet. See schedule() for when.
        """
        starts = np.flatnonzero(np.diff(rows, prepend=-1))
        for row, part in zip(rows[starts].tolist(), np.split(pages, starts[1:]), strict=True):
            words = self.words_of(row)
            words[part if len(words) == REGION_PAGES else positions(words, part)[0]] |= _U64(
                PARTNER
            )
        for name, chosen in (("first", rows[~deep]), ("second", rows[deep])):
            self.rows[name] += np.bincount(chosen, minlength=len(self.rows)).astype(np.uint16)
        moves = np.zeros((STAGES, STAGES), dtype=np.int64)
        moves[Stage.DISMISSED, Stage.CONFIRMING] = np.count_nonzero(deep)
        moves[Stage.SAMPLED, Stage.PARTNER] = np.count_nonzero(~deep)
        self.count(moves.reshape(-1))

    def hint(self, row: int, now: float, settle: float, hint: Hint) -> bool:
        """Have a row looked at when it has been quiet; False: it was put off often enough.

        So many faults, so much is expected to be new there. To be followed by schedule().
        """
        faults = hint.first_touches + hint.write_protect_faults
        rows = self.rows[row : row + 1]
        unknown = rows["news"][0] == schedule.NEWS_UNKNOWN
        if faults > rows["pages" if unknown else "news"][0]:
            rows["news"] = min(faults, REGION_PAGES)
        breaks = hint.write_protect_faults > hint.first_touches
        return schedule.after_hint(rows, now, settle, breaks)

    def schedule(self, now: float, settle: float) -> None:
        """Say anew when each region is due, after partners() or a change of its times."""
        schedule.after_search(self.rows, now, settle)
        self.changed()

    def totals(self) -> Totals:
        """Add up what the regions hold."""
        if self._totals is None:
            self._totals = Totals(
                merged=int(self.rows["merged"].sum()),
                saved_bytes=float(self.rows["saved_bytes"].sum(dtype=np.float64)),
                zero=int(self.rows["zero"].sum()),
                huge=int(self.rows["huge"].sum()),
            )
        return self._totals

    def put_off(self, first: int, count: int) -> None:
        """Leave some regions alone until their samples are due, since they cannot be looked at."""
        rows = self.rows[first : first + count]
        rows["due"] = rows["sample"]
        self.changed()

    def take_moves(self) -> Array:
        """Return how many pages went from one stage to another since this was called last."""
        moves, self.moves = self.moves, np.zeros(0, dtype=np.int64)
        return moves if len(moves) else np.zeros(STAGES * STAGES, dtype=np.int64)

    def forget(self) -> None:
        """Count all pages as gone, since the process, or the interest in it, is."""
        self.replace(np.zeros(0, dtype=np.uint64))

    def changed(self) -> None:
        """Forget what was added up of the table, since it has changed."""
        self._next_due = self._totals = None

    def _all_words(self) -> Array:
        return np.frombuffer(b"".join(self.words), dtype=WORD)

    def moved(self, before: Array, after: Array | None) -> None:
        """Count pages by the stage that they leave and the one that they enter."""
        if not before.size:
            return
        pairs = stage_of(before.reshape(-1)) * np.uint8(STAGES)
        if after is not None:
            pairs += stage_of(after.reshape(-1))
        self.count(np.bincount(pairs, minlength=STAGES * STAGES))

    def count(self, moves: Array) -> None:
        """Add to the moves between stages."""
        self.moves = self.moves + moves if len(self.moves) else moves

    def store(self, first: int, rows: Array, words: Sequence[bytearray]) -> None:
        """Replace some rows from `first` on, and the words of each."""
        places = slice(first, first + len(rows))
        known = self.rows[places]
        self._pages += int(rows["pages"].sum()) - int(known["pages"].sum())
        known[:] = rows
        self.words[places] = words
        self.changed()


def positions(words: Array, pages: Array) -> tuple[Array, Array]:
    """Return where the words of some pages are, and which of the pages have one."""
    if not len(words):
        return np.zeros(0, dtype=np.intp), np.zeros(len(pages), dtype=np.bool_)
    if len(words) == REGION_PAGES:
        return pages.astype(np.intp), np.ones(len(pages), dtype=np.bool_)
    numbers = page_of(words)
    pages = pages.astype(np.uint64)
    at = np.minimum(numbers.searchsorted(pages), len(words) - 1)
    found: Array = numbers[at] == pages
    return at[found], found
