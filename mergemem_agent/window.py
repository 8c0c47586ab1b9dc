# SPDX-License-Identifier: MIT
"""Some regions, of one process or of several, that are looked at in one go.

What numpy takes for one array it nearly takes for none at all, so regions are put side by side,
whoever they belong to, and worked on together: a look at one region of three pages costs as much
Python as one at sixty regions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from mergemem_agent import schedule
from mergemem_agent.contract import PAGE_BYTES, RECORD
from mergemem_agent.heads import heads_of
from mergemem_agent.look import ORDINARY, Seen, Wanted, compare
from mergemem_agent.region import REGION_PAGES, STAGES, Regions
from mergemem_agent.schedule import NEGLECT_SECONDS
from mergemem_agent.word import (
    CHECKSUM_MASK,
    DEEP,
    FLAGS,
    MERGED,
    PARTNER,
    SAMPLE_MASK,
    SETTLED,
    STAGE_OF_FLAGS,
    WORD,
    ZERO,
    Stage,
    checksum_bits,
    page_of,
)

Array = np.ndarray[Any, np.dtype[Any]]

_U64 = np.uint64

# What reading a page in full has told of it, beside its sample.
_TOLD_IN_FULL: Final = CHECKSUM_MASK & ~SAMPLE_MASK | _U64(DEEP | SETTLED)

# So often, what is known of pages that stayed alone is doubted. To settle again they need three
# searches, which may wait that long together; or two pages could wait for each other for ever.
DOUBT_SECONDS: Final = 4 * NEGLECT_SECONDS

# The flags of a word, or this for a page without one.
_NO_WORD: Final = FLAGS + 1
_CODES: Final = FLAGS + 2
_STAGE_OF_CODE: Final = np.append(STAGE_OF_FLAGS, np.uint8(Stage.ABSENT))


def _kinds() -> Array:
    """Return for each code whether it counts as a page, a first, a second, and a merged one."""
    codes = np.arange(_CODES)
    word = codes != _NO_WORD
    # A merged page of unknown checksum can wait for the next look, so it is not among them.
    partner = codes & (PARTNER | DEEP | MERGED)
    second = (partner == PARTNER | DEEP) | (codes & (ZERO | SETTLED) == ZERO)
    counted = [word, word & (partner == PARTNER), word & second, word & (codes & MERGED != 0)]
    return np.stack(counted, axis=1).astype(np.intp)


_KINDS: Final = _kinds()


@dataclass(frozen=True)
class Stretch:
    """Neighbouring rows of one process's table."""

    regions: Regions
    first: int
    count: int


@dataclass(frozen=True)
class Look:
    """What one look saw, in pages."""

    scanned: int  # that are there, whatever their state
    sampled: int  # of those, only a sample was read
    checksummed: int  # of those, all of it was read
    fresh: int  # whose sample is new: worth a search for partners
    deepened: int  # read in full for the first time: worth a search among such
    settled: int  # newly settled: worth a search, too
    settled_zero: int  # newly settled, and only the zero page is equal to them
    broken: int  # that were merged, and are no more
    zero: int
    huge: int
    # Of what is worth a search; None: too many to tell.
    heads: Array | None = field(default=None, compare=False)


class Window:
    """Stretches of regions side by side: `rows` is a copy of theirs, until look() stores it."""

    def __init__(self, stretches: Sequence[Stretch]) -> None:
        """Take stretches, none of which overlap."""
        self._stretches = stretches
        parts = [one.regions.rows[one.first : one.first + one.count] for one in stretches]
        self.rows: Array = np.concatenate(parts)
        self._words = self._spread()

    def wanted_in_full(self, now: float, settle: float) -> Array:
        """Return which pages are to be read in full now, as one bool for each page.

        These are the pages with a partner, and zeros that have to be seen twice: but for the first
        checksum, not before `settle` seconds have passed.
        """
        words = self._words
        apart = schedule.apart(self.rows, now, settle)
        partner = (words & _U64(PARTNER)) != 0
        deep = (words & _U64(DEEP)) != 0
        full = partner & (~deep | apart[:, :1])
        full |= ((words & _U64(ZERO | SETTLED)) == ZERO) & apart[:, 1:]
        result: Array = full.reshape(-1)
        return result

    def look(
        self,
        records: Array,
        now: float,
        settle: float,
        max_mappings: int,
        wanted: Wanted = ORDINARY,
        full: Array | None = None,
        sampled: Array | bool = True,
    ) -> Look:
        """Take in what the kernel saw, once.

        `records` has 512 contract.RECORD for each region, all zero where nothing is mapped; `full`
        a bool for each, which tells what was to be read in full (None: all of it). Of the others a
        sample was taken where the region is `sampled`.
        """
        rows, shape = self.rows, (len(self.rows), REGION_PAGES)
        records = records.reshape(shape)
        asked = np.ones(shape, dtype=np.bool_) if full is None else full.reshape(shape)
        schedule.after_movement(rows, *self._movement(records, asked))
        apart = schedule.apart(rows, now, settle)
        sampled = np.broadcast_to(np.asarray(sampled), len(rows))
        doubtful = self._doubtful(now, sampled)
        before = self._words
        if doubtful is not None:
            doubtful &= ~asked
            # To be read in full again, should another page have the same sample: a search tells.
            before = np.where(doubtful, before & ~_TOLD_IN_FULL, before)
        seen = compare(before, records, asked, apart, max_mappings, wanted)
        searched = seen.fresh
        if doubtful is not None:
            searched = searched | (doubtful & (seen.words != 0))
        merged_before = rows["merged"].copy()
        self._count(seen)
        _account(rows, records, seen, sampled)
        if seen.any_deep:
            rows["read"][seen.deep.any(axis=1)] = now
        # What was merged by others, and is known only now, is no change.
        news = seen.fresh & ~seen.merged if seen.any_merged else seen.fresh
        if not sampled.all():
            news = np.where(sampled[:, np.newaxis], news, seen.unseen)
        changed, broken = _by_region(news), _by_region(seen.broken)
        schedule.after_look(rows, changed, broken, merged_before, now, settle, sampled)
        self._store(seen.words)
        return Look(
            scanned=seen.present,
            sampled=seen.touched - seen.in_full,
            checksummed=seen.in_full,
            fresh=int(np.count_nonzero(searched)),
            deepened=seen.deepened,
            settled=seen.settled,
            settled_zero=seen.settled_zero,
            broken=int(broken.sum()),
            zero=int(rows["zero"].sum()),
            huge=int(rows["huge"].sum()),
            heads=heads_of(seen.words[searched | seen.deep]),
        )

    def _doubtful(self, now: float, sampled: Array) -> Array | None:
        """Return which pages may not be what they were when they were read in full; None: none.

        What is written to a page beside its sample is not seen, and nobody reads pages in full
        again that stayed alone. So after a while such pages may have become equal to others.
        """
        overdue = sampled & (now - self.rows["doubted"] >= DOUBT_SECONDS)
        if not overdue.any():
            return None
        self.rows["doubted"] = np.where(overdue, now, self.rows["doubted"])
        alone: Array = (self._words & _U64(DEEP | PARTNER | MERGED | ZERO)) == DEEP
        alone &= overdue[:, np.newaxis]
        return alone

    def _parts(self) -> Iterator[tuple[Stretch, slice]]:
        """Yield each stretch with its place among all rows."""
        start = 0
        for one in self._stretches:
            yield one, slice(start, start + one.count)
            start += one.count

    def _spread(self) -> Array:
        """Return the remembered words, each in the place of its page."""
        blobs: list[bytearray] = []
        for one in self._stretches:
            blobs += one.regions.words[one.first : one.first + one.count]
        words = np.frombuffer(b"".join(blobs), dtype=WORD)
        count = len(self.rows)
        if len(words) == count * REGION_PAGES:
            return words.reshape(count, REGION_PAGES)
        spread = np.zeros(count * REGION_PAGES, dtype=WORD)
        if len(words):
            start = np.repeat(np.arange(count) * REGION_PAGES, self.rows["pages"])
            spread[start + page_of(words).astype(np.intp)] = words
        return spread.reshape(count, REGION_PAGES)

    def _movement(self, records: Array, asked: Array) -> tuple[Array, Array]:
        """Return of each region how many pages are read in full again, and how many differ."""
        again = (self._words & _U64(DEEP)) != 0
        again &= asked
        if not again.any():
            nothing = np.zeros(len(self.rows), dtype=np.intp)
            return nothing, nothing
        differs = (self._words ^ checksum_bits(records["checksum"])) & CHECKSUM_MASK != 0
        return _by_region(again), _by_region(again & differs)

    def _count(self, seen: Seen) -> None:
        """Count pages by kind in each region, and by the stage that they leave and enter."""
        before, after = _codes(self._words), _codes(seen.words)
        pairs = _STAGE_OF_CODE[before] * np.uint8(STAGES) + _STAGE_OF_CODE[after]
        # Moves are added up over all processes anyway, so one of them may count for all.
        self._stretches[0].regions.count(np.bincount(pairs, minlength=STAGES * STAGES))
        codes = after.reshape(len(self.rows), REGION_PAGES)
        codes += (np.arange(len(self.rows)) * _CODES)[:, np.newaxis]
        by_code = np.bincount(codes.reshape(-1), minlength=len(self.rows) * _CODES)
        counts = by_code.reshape(len(self.rows), _CODES) @ _KINDS
        for place, name in enumerate(("pages", "first", "second", "merged")):
            self.rows[name] = counts[:, place]

    def _store(self, words: Array) -> None:
        packed = memoryview(words[words != 0].tobytes())
        ends = (np.cumsum(self.rows["pages"], dtype=np.intp) * WORD.itemsize).tolist()
        starts = [0, *ends]
        blobs = [bytearray(packed[s:e]) for s, e in zip(starts, ends, strict=False)]
        for one, part in self._parts():
            one.regions.store(one.first, self.rows[part], blobs[part])


def _codes(words: Array) -> Array:
    """Return the code of each word, in one row."""
    codes = (words & _U64(FLAGS)).astype(np.intp)
    codes[words == 0] = _NO_WORD
    return codes.reshape(-1)


def _by_region(pages: Array) -> Array:
    """Return how many pages of each region it is."""
    counts: Array = pages.sum(axis=1)
    return counts


def _account(rows: Array, records: Array, seen: Seen, sampled: Array) -> None:
    rows["huge"] = _by_region(seen.huge) if seen.any_huge else 0
    rows["order"] = np.where(seen.huge, records["order"], 0).max(axis=1) if seen.any_huge else 0
    zero = _by_region(seen.zero) if seen.any_zero else 0
    rows["zero"] = np.where(sampled, zero, rows["zero"])
    rows["saved_bytes"] = 0
    if seen.any_merged:
        map_counts = np.maximum(records["map_count"], 1)
        saved = np.where(seen.merged, PAGE_BYTES - PAGE_BYTES / map_counts, 0.0)
        rows["saved_bytes"] = saved.sum(axis=1)


def blank_records(count: int) -> Array:
    """Return records for `count` regions in which nothing is mapped."""
    return np.zeros(count * REGION_PAGES, dtype=RECORD)
