# SPDX-License-Identifier: MIT
"""Nominated pages: collected from many shares of a search, and handed out in order of addresses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np

from mergemem_agent.word import MANY_MAPPINGS, PAGE_BITS

Array = np.ndarray[Any, np.dtype[Any]]

# So many pages are collected before they are nominated, or a 64th of all, where that is more; and
# so many are nominated at once.
MIN_HELD_PAGES: Final = 16384
_PIECE_PAGES: Final = 8000

# One page that is nominated. Pages of a group are neighbours; a group with an anchor (a page that
# is merged already, which the others shall join) has it first.
NOMINATED: Final = np.dtype(
    [
        ("process", np.uint32),  # index into the processes given
        ("page", np.uint16),  # within the region
        ("anchor", np.bool_),
        ("map_count", np.uint8),
        ("number", np.uint64),  # of the region: address >> 21
        ("group", np.uint32),  # contract.GROUP_ZERO: filled with zeros, in no group
        ("order", np.uint8),  # of the folio that must be split first; 0: a small page
    ],
    align=True,  # fields that lie askew are slow to work with
)

_U64 = np.uint64

# One page to be nominated: place 32 bits | page 9 | map count 8 | 1, but 0 of an anchor.
_PAGE: Final = _U64(9)
_PLACE: Final = _U64(9 + PAGE_BITS)

# The same as it is sorted: number of the group 14 | not an anchor 1 | place, page, map count.
_NO_ANCHOR: Final = _U64(49)
_GROUP: Final = _U64(50)
_LOCATED: Final = _U64((1 << 49) - 1)

# Returns the index of the process, and the number of the region, of each place.
Locate = Callable[[Array], tuple[Array, Array]]


def packed(places: Array, pages: Array, map_counts: Array, anchors: Array) -> Array:
    """Return pages to be nominated as one uint64 each."""
    whole: Array = places.astype(np.uint64) << _PLACE | pages << _PAGE | map_counts << _U64(1)
    # An anchor sorts before the other pages of its group by this bit.
    whole |= ~anchors
    return whole


class Nominations:
    """Pages to be nominated, from many shares: 8 bytes for each, and 8 for each group.

    A share holds few pages of each region, as many shares as memory allows hold more. Pages of one
    page table then come in the same request, where the kernel handles them together: fewer locks,
    and fewer TLB flushes.
    """

    def __init__(self, capacity: int, locate: Locate) -> None:
        """Hold about `capacity` pages; `locate` tells where a place is."""
        self._capacity = capacity
        self._locate = locate
        self._pages: list[Array] = []
        self._sizes: list[Array] = []
        self._held = 0

    def add(self, pages: Array, starts: Array) -> bool:
        """Take in groups of pages; True: that is enough for now."""
        if len(pages):
            self._pages.append(pages)
            self._sizes.append(sizes_of(starts, len(pages)))
            self._held += len(pages)
        return self._held >= self._capacity

    def take(self) -> Iterator[Array]:
        """Yield all groups as NOMINATED, in the order of addresses, and be empty."""
        if not self._held:
            return
        pages, sizes = np.concatenate(self._pages), np.concatenate(self._sizes)
        self._pages, self._sizes, self._held = [], [], 0
        starts = np.cumsum(sizes) - sizes
        by_address = np.argsort(np.minimum.reduceat(pages, starts), kind="stable")
        ends = np.cumsum(sizes[by_address])
        first = 0
        while first < len(by_address):
            before = int(ends[first - 1]) if first else 0
            last = max(first + 1, int(ends.searchsorted(before + _PIECE_PAGES, side="right")))
            chosen = by_address[first:last]
            lengths = sizes[chosen]
            groups = np.arange(len(chosen)).repeat(lengths)
            # Where each group starts among all, less where it will among the chosen.
            shift = starts[chosen] - (np.cumsum(lengths) - lengths)
            yield _as_nominated(pages[np.arange(len(groups)) + shift[groups]], groups, self._locate)
            first = last


def _as_nominated(pages: Array, groups: Array, locate: Locate) -> Array:
    # One key instead of three; stable, as that is fast where most is in order, which it is.
    keys = groups.astype(np.uint64) << _GROUP | (pages & _U64(1)) << _NO_ANCHOR | pages >> _U64(1)
    keys.sort(kind="stable")
    nominated = np.zeros(len(keys), dtype=NOMINATED)
    nominated["process"], nominated["number"] = locate((keys & _LOCATED) >> _PLACE - _U64(1))
    nominated["page"] = keys >> _PAGE - _U64(1) & _U64((1 << PAGE_BITS) - 1)
    nominated["map_count"] = keys & _U64(MANY_MAPPINGS)
    nominated["anchor"] = keys >> _NO_ANCHOR & _U64(1) == 0
    nominated["group"] = keys >> _GROUP
    return nominated


def starts_of(values: Array) -> Array:
    """Return where each run of equal values begins."""
    begins = np.empty(len(values), dtype=np.bool_)
    begins[:1] = True
    np.not_equal(values[1:], values[:-1], out=begins[1:])
    return begins.nonzero()[0]


def sizes_of(starts: Array, total: int) -> Array:
    """Return how long the runs are that begin at `starts`, of `total` elements."""
    ends = np.empty_like(starts)
    ends[:-1], ends[-1:] = starts[1:], total
    ends -= starts
    return ends
