# SPDX-License-Identifier: MIT
"""The footprint of a request: the regions in which it has pages, of all of its processes.

A few candidates in each of many regions are what most requests are made of. What has to be done for
each of these regions is a line of Python, and numpy does the rest for all of them together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np

from mergemem_agent.merge import Request
from mergemem_agent.nominated import sizes_of, starts_of
from mergemem_agent.region import REGION_PAGES, ROW, Regions
from mergemem_agent.targets import Target
from mergemem_agent.word import PAGE_BITS, WORD, page_of

Array = np.ndarray[Any, np.dtype[Any]]
_U64 = np.uint64

# How many regions are joined to be changed at once: at most 256 KiB of words.
_REGIONS_AT_ONCE: Final = 64

_PROCESS_BITS: Final = _U64(28)  # the number of a region has 36
_ALL: Final = slice(None)


class Part(NamedTuple):
    """What a request has of one process: places in the arrays of a Footprint."""

    target: Target
    regions: slice
    pages: slice


@dataclass(frozen=True)
class Footprint:
    """The regions of a request, process by process, in the order of addresses."""

    order: Array  # its candidates, region by region; without those whose region is not known
    starts: Array  # where in `order` each region begins
    sizes: Array  # how many candidates are in it
    rows: Array  # which row it is of its process's table
    parts: list[Part]

    @classmethod
    def of(cls, request: Request, targets: Sequence[Target]) -> Footprint:
        """Find the regions of a request; some may be gone since it was made."""
        candidates = request.candidates
        order = np.lexsort((candidates["address"], candidates["process"]))
        process = candidates["process"].take(order)
        number = request.nominated["number"].take(order)
        starts = starts_of(number << _PROCESS_BITS | process)
        sizes, numbers = sizes_of(starts, len(order)), number.take(starts)
        ends = process.take(starts).searchsorted(np.arange(1, len(request.processes) + 1))
        rows = np.empty(len(starts), dtype=np.intp)
        first = 0
        for index, end in zip(request.processes, ends.tolist(), strict=True):
            rows[first:end] = _rows(targets[index].regions, numbers[first:end])
            first = end
        known = rows >= 0
        if not known.all():
            order, sizes, rows = order[known.repeat(sizes)], sizes[known], rows[known]
            starts = sizes.cumsum() - sizes
            ends = np.cumsum([0, *known])[ends]
        named = [targets[index] for index in request.processes]
        bounds = [*starts.tolist(), len(order)]
        return cls(order, starts, sizes, rows, _parts(named, ends.tolist(), bounds))

    def change(self, pages: Array, keeps: Array, sets: Array) -> tuple[Array, Array]:
        """Let the words of pages, in `order`, keep some of their flags, and get others.

        Returns what they were and what they are, 0 of a page without a word.
        """
        blobs = [
            part.target.regions.words[row]
            for part in self.parts
            for row in self.rows[part.regions].tolist()
        ]
        before, after = np.zeros(len(pages), dtype=WORD), np.zeros(len(pages), dtype=WORD)
        bounds = [*self.starts[::_REGIONS_AT_ONCE].tolist(), len(pages)]
        for index, first in enumerate(range(0, len(blobs), _REGIONS_AT_ONCE)):
            here = slice(bounds[index], bounds[index + 1])
            some = blobs[first : first + _REGIONS_AT_ONCE]
            sizes = self.sizes[first : first + _REGIONS_AT_ONCE]
            joined = bytearray().join(some)
            words = np.frombuffer(joined, dtype=WORD)
            wanted = np.arange(len(some)).repeat(sizes) << PAGE_BITS | pages[here]
            at, found = _positions(words, some, wanted)
            old = words.take(at)
            words[at] = new = old & keeps[here][found] | sets[here][found]
            before[here][found], after[here][found] = old, new
            _part_again(joined, some)
        return before, after

    def take_rows(self) -> Array:
        """Return the rows of all regions: copies, see put_rows()."""
        rows = np.empty(len(self.rows), dtype=ROW)
        for part in self.parts:
            here = self.rows[part.regions]
            part.target.regions.rows.take(here, out=rows[part.regions], mode="clip")
        return rows

    def put_rows(self, rows: Array) -> None:
        """Put rows back where they came from."""
        for part in self.parts:
            part.target.regions.rows[self.rows[part.regions]] = rows[part.regions]
            part.target.regions.changed()

    def of_regions(self, values: Sequence[float]) -> Array:
        """Return for each region its process's value, of one for each of the parts."""
        return np.repeat(values, [part.regions.stop - part.regions.start for part in self.parts])


def _rows(regions: Regions, numbers: Array) -> Array:
    """Return the rows of some regions, -1 of those that are not known."""
    known = regions.rows["number"]
    rows = known.searchsorted(numbers)
    if len(known):
        rows[known.take(rows, mode="clip") != numbers] = -1
    else:
        rows[:] = -1
    return rows


def _parts(targets: list[Target], ends: list[int], bounds: list[int]) -> list[Part]:
    """Return the part of each process whose last regions come before `ends`.

    `bounds` says where the pages of each region begin, and where those of the last one end.
    """
    parts, first = [], 0
    for target, end in zip(targets, ends, strict=True):
        if end > first:
            parts.append(Part(target, slice(first, end), slice(bounds[first], bounds[end])))
        first = end
    return parts


def _positions(words: Array, blobs: list[bytearray], pages: Array) -> tuple[Array, Array | slice]:
    """Return where the words of some pages are among those of all blobs, and which have one.

    Pages are numbered through, REGION_PAGES for each blob.
    """
    if len(words) == len(blobs) * REGION_PAGES:
        return pages, _ALL
    if not len(words):
        return np.zeros(0, dtype=np.intp), np.zeros(len(pages), dtype=np.bool_)
    counts = [len(blob) // WORD.itemsize for blob in blobs]
    numbers = np.arange(len(blobs)).repeat(counts) << PAGE_BITS | page_of(words).astype(np.intp)
    at = numbers.searchsorted(pages)
    found = numbers.take(at, mode="clip") == pages
    return at[found], found


def _part_again(joined: bytearray, blobs: list[bytearray]) -> None:
    """Write what was joined back into the blobs that it came from."""
    whole, start = memoryview(joined), 0
    for blob in blobs:
        blob[:] = whole[start : start + len(blob)]
        start += len(blob)
