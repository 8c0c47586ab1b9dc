# SPDX-License-Identifier: MIT
"""One look at some regions: from what was remembered and what the kernel saw to what is known now.

Of each page the kernel tells its state, and, as it was asked, a checksum of all of it, of a sample
of it, or none. Merged pages are counted by their state; they are read only where the agent does not
know their checksum, since it was started anew or the page came by fork.

    read in full    its word is new. If its last full checksum was the same, and `settle` ago, it
                    is SETTLED; else it has to find a partner first.
    sampled         the same sample as before: what was known of it stays known, though it may have
                    changed elsewhere, as the kernel decides by bytes. Another sample: its word is
                    new. (Were it to settle anew, two pages could wait for each other for ever.)
    not read        a merged page, or one of a region that is not due for a sample: as before.

All arrays here have one row for each region, of 512 pages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mergemem_agent.contract import RECORD, State
from mergemem_agent.word import (
    CHECKSUM_MASK,
    DEEP,
    FULL,
    HUGE,
    MANY_MAPPINGS,
    MAP_COUNT_SHIFT,
    MERGED,
    PAGE_BITS,
    PAGE_SHIFT,
    PARTNER,
    SAMPLE_MASK,
    SETTLED,
    WORD,
    ZERO,
    checksum_bits,
)

Array = np.ndarray[Any, np.dtype[Any]]

_U64 = np.uint64
# Of the type of records: to compare with a State itself would have numpy widen the array first.
_ANON, _MERGED, _ZERO, _HUGE = (
    RECORD["state"].type(state) for state in (State.ANON, State.MERGED, State.ZERO, State.HUGE)
)
_NUMBERS = np.arange(1 << PAGE_BITS, dtype=WORD) << _U64(PAGE_SHIFT)
_KEPT_WHEN_SAMPLED = CHECKSUM_MASK | _U64(DEEP | PARTNER | SETTLED)
_KEPT_UNREAD = CHECKSUM_MASK | _U64(DEEP | PARTNER | SETTLED | ZERO)
_LOOKS_ALIKE = SAMPLE_MASK | _U64(ZERO)
_IS_ALIKE = CHECKSUM_MASK | _U64(DEEP)


@dataclass(frozen=True)
class Wanted:
    """Which pages to remember beside ordinary ones: those that a policy wants merged, too."""

    huge: bool = False
    zero: bool = False


ORDINARY = Wanted()


@dataclass(frozen=True)
class Seen:
    """What a look has made of each page: arrays of one bool a page beside `words`, and counts."""

    words: Array  # 0: none
    fresh: Array  # read, and not what it was: nobody knows whether it has a partner
    broken: Array  # was merged, and is not any more
    unseen: Array  # could be merged, but was not read, and nothing is known of it
    deep: Array  # read in full
    zero: Array  # filled with zeros
    huge: Array  # part of a huge page
    merged: Array  # merged pages
    any_deep: bool
    any_zero: bool
    any_huge: bool
    any_merged: bool
    present: int  # pages that are there, whatever their state
    touched: int  # of which anything was read
    in_full: int  # of which all was read
    deepened: int  # of the same sample as before, and now read in full for the first time
    settled: int  # newly settled, or newly free to be merged
    settled_zero: int  # the same, and only the kernel's zero page is equal to it


def compare(
    old: Array, records: Array, full: Array, apart: Array, max_mappings: int, wanted: Wanted
) -> Seen:
    """Make new words from old ones and from records.

    `full` tells which pages were asked for in full, `apart` in which regions the last full
    checksums, and the last sight of zeros, are `settle` ago: one row of two for each.
    """
    # Contiguous copies: each is used several times. What a look has none of, is not computed.
    state = np.ascontiguousarray(records["state"])
    checksums = np.ascontiguousarray(records["checksum"])
    map_counts = np.ascontiguousarray(records["map_count"])
    kinds = np.bincount(state.reshape(-1), minlength=len(State))
    any_zero, any_merged = kinds[State.ZERO] > 0, kinds[State.MERGED] > 0
    any_huge = kinds[State.HUGE] > 0 or any_zero

    there = state == _ANON
    merged = zero = huge = none = np.zeros(state.shape, dtype=np.bool_)
    if any_merged:
        merged = state == _MERGED
        there |= merged
    if any_huge:
        huge = state == _HUGE
        if wanted.huge:
            there |= huge
    if any_zero:
        zero = state == _ZERO
        huge |= zero & (records["order"] > 0)
        if wanted.zero:
            there |= zero if wanted.huge else zero & ~huge
    touched = checksums != 0
    read = touched & there
    deep = read & full
    if any_zero:
        deep &= ~zero
    any_deep = bool(deep.any())

    words = checksum_bits(checksums)
    if any_zero:
        words[zero] = _U64(ZERO)
    if any_deep:
        words |= deep.astype(WORD) << _U64(5)  # DEEP
    before = old != 0
    # Merged before and not now: it was written to, though it may look the same again.
    was_merged = (old & _U64(MERGED)) != 0
    broken = was_merged & there
    if any_merged:
        broken &= ~merged
    differs = old ^ words
    alike = (differs & _LOOKS_ALIKE) == 0
    alike &= before
    alike &= read
    alike &= ~broken
    known = alike & (~deep | ((differs & _IS_ALIKE) == 0)) if any_deep else alike

    unread = there & ~read
    unknown = none
    if unread.any():
        words *= read
        # What is known of a page that is not read: that it is there, and of the same kind.
        held = unread & before & (was_merged == merged)
        unknown = unread & ~held
        words |= np.where(held, old & _KEPT_UNREAD, _U64(0))
    kept = known & ~deep
    if any_zero:
        kept &= ~zero
    if kept.any():
        words |= np.where(kept, old & _KEPT_WHEN_SAMPLED, _U64(0))
    settled_before = (old & _U64(SETTLED)) != 0
    if any_deep or any_zero:
        again = known & (settled_before | np.where(zero, apart[:, 1:], apart[:, :1]))
        words |= (again & (deep | zero)).astype(WORD)  # SETTLED
    unseen = unknown
    if any_merged:
        words |= (unknown & merged).astype(WORD) << _U64(6)  # PARTNER: to be read in full once
        words |= merged.astype(WORD) << _U64(1)  # MERGED
        words |= (merged & (map_counts >= max_mappings)).astype(WORD) << _U64(2)  # FULL
        unseen = unknown & ~merged
    if wanted.huge and any_huge:
        words |= huge.astype(WORD) << _U64(3)  # HUGE
    # At least 1, so that a word is never 0, which means that there is none.
    np.minimum(map_counts, MANY_MAPPINGS, out=map_counts)
    np.maximum(map_counts, 1, out=map_counts)
    words |= map_counts.astype(WORD) << _U64(MAP_COUNT_SHIFT)
    words |= _NUMBERS
    words *= there & ~unseen

    settled = settled_zero = 0
    if any_deep or any_zero or wanted.huge:
        # What was part of a huge page and is no more can be merged only now.
        newly = (words & _U64(SETTLED | MERGED)) == SETTLED
        newly &= ~settled_before | ((old & ~words & _U64(HUGE)) != 0)
        settled = int(np.count_nonzero(newly))
        settled_zero = int(np.count_nonzero(newly & ((words & _U64(ZERO | HUGE)) == ZERO)))
    fresh = read & ~alike
    if any_zero:
        fresh &= ~zero
    return Seen(
        words=words,
        fresh=fresh,
        broken=broken,
        unseen=unseen,
        deep=deep,
        zero=zero,
        huge=huge,
        merged=merged,
        any_deep=any_deep,
        any_zero=any_zero,
        any_huge=any_huge,
        any_merged=any_merged,
        present=state.size - int(kinds[0]),
        touched=int(np.count_nonzero(touched)),
        in_full=int(np.count_nonzero(touched & full)),
        deepened=int(np.count_nonzero(alike & deep & ~known)) if any_deep else 0,
        settled=settled - settled_zero,
        settled_zero=settled_zero,
    )


assert (SETTLED, MERGED, FULL, HUGE, DEEP, PARTNER) == (1, 2, 4, 8, 1 << 5, 1 << 6)
