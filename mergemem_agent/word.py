# SPDX-License-Identifier: MIT
"""What the agent remembers of one page between two looks: a word of 64 bits.

     63          36 35      24 23      15 14         7 6     0
    +--------------+----------+----------+------------+-------+
    | sample, 28   | full, 12 | page     | map count  | flags |
    +--------------+----------+----------+------------+-------+

The word holds all that is needed between two looks (is the page still the same?), for the search
(which pages have the same checksum?) and for nominating (how many frames would that free?).

- `sample` is what 256 bytes of the page hash to, `full` what all of it does. The second is there
  where DEEP is set; then the two are one checksum of 40 bits. Of n pages, n * n / 2**29 pairs
  look equal by their samples and are not: each costs two full checksums. By all 40 bits it is
  n * n / 2**41 pairs, 0.5 among a million pages: each costs one comparison in the kernel.
- Map counts of 255 and more are kept as 255, which means "many".
- A word is never 0: the map count is at least 1. Pages without a word were absent, swapped, or of
  a kind that is never merged; so are, where the policy does not want them merged, pages of huge
  pages and pages filled with zeros.
"""

from __future__ import annotations

import enum
from typing import Any, Final

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

PAGE_BITS: Final = 9
CHECKSUM_SHIFT: Final = 24
CHECKSUM_BITS: Final = 64 - CHECKSUM_SHIFT
SAMPLE_SHIFT: Final = 36
SAMPLE_BITS: Final = 64 - SAMPLE_SHIFT
PAGE_SHIFT: Final = 15
MAP_COUNT_SHIFT: Final = 7
MANY_MAPPINGS: Final = 255

# Flags of a word.
SETTLED: Final = 1 << 0  # two full checksums, far enough apart, were the same
MERGED: Final = 1 << 1  # a merged page: others can join it
FULL: Final = 1 << 2  # ... but its frame has as many mappings as it may have
HUGE: Final = 1 << 3  # part of a huge page or large folio, which must be split first
ZERO: Final = 1 << 4  # filled with zeros: equal to nobody's page but the kernel's own
DEEP: Final = 1 << 5  # the page was read in full: all 40 bits of its checksum are known
PARTNER: Final = 1 << 6  # worth reading in full at the next look: see Stage
FLAGS: Final = (1 << MAP_COUNT_SHIFT) - 1

WORD: Final = np.dtype(np.uint64)
_U64 = np.uint64
SAMPLE_MASK: Final = _U64(((1 << SAMPLE_BITS) - 1) << SAMPLE_SHIFT)
CHECKSUM_MASK: Final = _U64(((1 << CHECKSUM_BITS) - 1) << CHECKSUM_SHIFT)
MAP_COUNT_MASK: Final = _U64(MANY_MAPPINGS << MAP_COUNT_SHIFT)

# Of a record's checksum, the upper 32 bits are the sample's, the lower ones the whole page's.
_RECORD_FULL: Final = _U64(0xFFF0_0000)
_RECORD_TO_WORD: Final = _U64(4)


class Stage(enum.IntEnum):
    """Where a page stands on its way from unknown to merged; its flags say so."""

    ABSENT = 0  # there is no word
    SAMPLED = 1  # its sample is known, and no other page has the same
    PARTNER = 2  # another page has the same sample: to be read in full
    DISMISSED = 3  # it was read in full, and no other page is equal
    CONFIRMING = 4  # another page is equal: to be read in full once more, after `settle`
    SETTLED = 5  # read in full twice: to be nominated
    MERGED = 6
    ZERO = 7  # filled with zeros: to be looked at once more, after `settle`
    ZERO_SETTLED = 8  # to be replaced by the kernel's zero page


def _stage(flags: int) -> Stage:
    if flags & MERGED:
        return Stage.MERGED
    if flags & ZERO:
        return Stage.ZERO_SETTLED if flags & SETTLED else Stage.ZERO
    if flags & SETTLED:
        return Stage.SETTLED
    if flags & DEEP:
        return Stage.CONFIRMING if flags & PARTNER else Stage.DISMISSED
    return Stage.PARTNER if flags & PARTNER else Stage.SAMPLED


# By the flags of a word.
STAGE_OF_FLAGS: Final = np.array([_stage(flags) for flags in range(FLAGS + 1)], dtype=np.uint8)


def page_of(words: Array) -> Array:
    """Return the page numbers within their regions, 0 to 511."""
    return (words >> _U64(PAGE_SHIFT)) & _U64((1 << PAGE_BITS) - 1)


def map_count_of(words: Array) -> Array:
    """Return the map counts, of which 255 means 255 or more."""
    return (words >> _U64(MAP_COUNT_SHIFT)) & _U64(MANY_MAPPINGS)


def checksum_bits(checksums: Array) -> Array:
    """Return the part of a word that comes from a record's checksum, which must be uint64."""
    full = (checksums & _RECORD_FULL) << _RECORD_TO_WORD
    full |= checksums & SAMPLE_MASK
    return full


def stage_of(words: Array) -> Array:
    """Return the Stage of each word as uint8; a word of 0 stands for a page without one."""
    stages = STAGE_OF_FLAGS[(words & _U64(FLAGS)).astype(np.intp)]
    stages[words == 0] = Stage.ABSENT
    return stages
