# SPDX-License-Identifier: MIT
"""What a page is worth before it is read: expectations that the scan's order is made of.

Three figures, all of them measured while scanning:

    share      of the pages of a region, how many will be merged: as many as in its siblings, the
               regions of the same number in processes that share with it (fork, and programs that
               map the same files, put the same data at the same addresses); where there is none,
               as many as in all regions of the pool. Regions whose pages have had no time to merge
               yet tell nothing (schedule.have_shown())
    success    of the pages that are read in full for the first or for the second time, how many
               are merged in the end
    cost       in CPU seconds, Python's and the kernel's, of one region, of one page sampled, of one
               read in full, and of one searched
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

_SIBLING_BITS: Final = 10
_SIBLINGS: Final = 1 << _SIBLING_BITS
_FIBONACCI: Final = np.uint64(0x9E37_79B9_7F4A_7C15)

# Before anything was seen: so many pages, of which a tenth can be merged.
_ASSUMED_PAGES: Final = 512.0
_ASSUMED_SHARE: Final = 0.1

# What was seen of siblings before counts so much less with each new look at one.
_DECAY: Final = 0.75

# How far one measurement moves the averages of cost.
_GAIN: Final = 0.1


class Siblings:
    """The share of merged pages by region number, for one pool, in 16 KiB.

    Numbers that meet in one of its places are averaged: this is an expectation, and no more.
    """

    def __init__(self) -> None:
        """Assume little, until something was seen."""
        self._pages: Array = np.zeros(_SIBLINGS)
        self._merged: Array = np.zeros(_SIBLINGS)
        self._all_pages, self._all_merged = _ASSUMED_PAGES, _ASSUMED_PAGES * _ASSUMED_SHARE

    def learn(self, numbers: Array, pages: Array, merged: Array, average: bool = True) -> None:
        """Take in what regions have: their numbers, how many pages, how many of these merged.

        Without `average` they count for their own numbers alone.
        """
        places = _places(numbers)
        kept = np.power(_DECAY, np.bincount(places, minlength=_SIBLINGS))
        self._pages = self._pages * kept + np.bincount(places, pages, _SIBLINGS)
        self._merged = self._merged * kept + np.bincount(places, merged, _SIBLINGS)
        if not average:
            return
        # The pool's average forgets by pages, as it is made of many regions.
        pages_now, merged_now = float(pages.sum()), float(merged.sum())
        keep = max(0.0, 1.0 - pages_now / (1 << 18))
        self._all_pages = self._all_pages * keep + pages_now
        self._all_merged = self._all_merged * keep + merged_now

    @property
    def average(self) -> float:
        """The share of merged pages in the pool."""
        return self._all_merged / self._all_pages

    def share(self, numbers: Array) -> Array:
        """Return what share of the pages of each region is to be expected to merge."""
        places = _places(numbers)
        pages = self._pages[places]
        shares: Array = np.where(
            pages > 0, self._merged[places] / np.maximum(pages, 1), self.average
        )
        return shares


class Success:
    """How many of the pages that are read in full get merged."""

    def __init__(self) -> None:
        """Be hopeful at first."""
        self._first, self._second, self._merged = 512.0, 480.0, 448.0

    def learn(self, first: int, second: int, merged: int) -> None:
        """Take in pages that were read in full once, those that were twice, and merged ones."""
        self._first += first
        self._second += second
        self._merged += merged
        if self._first > 1 << 18:
            self._first, self._second, self._merged = (
                value / 2 for value in (self._first, self._second, self._merged)
            )

    @property
    def of_second(self) -> float:
        """How many of the pages that are read for the second time will be merged."""
        return min(1.0, self._merged / max(1.0, self._second))

    @property
    def of_first(self) -> float:
        """How many of those that are read in full for the first time will be merged."""
        return min(1.0, self._merged / max(1.0, self._first))


class Costs:
    """CPU seconds of the parts of a scan, as running averages.

    A slice is measured as a whole. What it took more, or less, than was expected is laid at the
    door of each of its parts, as much as that part was expected to take.
    """

    def __init__(self) -> None:
        """Begin with figures of one machine; a few dozen slices replace them."""
        self.region, self.sample, self.full, self.search = 1e-5, 1e-7, 9e-7, 2e-7

    def learn(self, seconds: float, regions: int, sampled: int, full: int) -> None:
        """Take in what a slice has cost."""
        parts = (regions * self.region, sampled * self.sample, full * self.full)
        expected = sum(parts)
        if expected <= 0 or seconds <= 0:
            return
        ratio = min(4.0, max(0.25, seconds / expected))
        self.region, self.sample, self.full = (
            cost * ratio ** (_GAIN * part / expected)
            for cost, part in zip((self.region, self.sample, self.full), parts, strict=True)
        )

    def learn_search(self, seconds: float, pages: int) -> None:
        """Take in what a search of so many pages has cost."""
        if pages and seconds > 0:
            self.search += (seconds / pages - self.search) * _GAIN

    @property
    def straight_share(self) -> float:
        """From which expected share of merged pages on a first sample is a waste.

        Sampling first costs sample + search for each page, and full for the share p that has a
        partner; going straight costs full for each. That is less where
        p > 1 - (sample + search) / full.
        """
        return min(0.95, max(0.5, 1.0 - (self.sample + self.search) / self.full))


def _places(numbers: Array) -> Array:
    return (numbers * _FIBONACCI >> np.uint64(64 - _SIBLING_BITS)).astype(np.intp)
