# SPDX-License-Identifier: MIT
"""The candidate index: which pages of one domain have the same checksum.

There is no index to keep. When a domain is due, its words (see region.py) are searched for equal
checksums by sorting, one share of the checksums after the other, and what was found is nominated:

    words of all regions ── those whose checksum begins with 0, 1, 2 ... ──► chunk
    chunk ── key = checksum, its low bits replaced by the position in the chunk ──► sorted in place
    neighbours with the same checksum ──► groups ── is there a gain? ──► nominated pages

Memory. All words of n pages are 8 n bytes and stay where they are (8.2 n with all that goes with
them). A chunk is a 128th of them, or 8,192 pages where that is more. While it is worked on it takes
12 bytes a page for words and places, 8 for the keys, and up to 130 for what becomes of them when
each page is in a group: 150 / 128 = 1.2 bytes. Sum: 9.4 n; the limit is 10 n. 64 GiB of memory in
4 KiB pages take 158 MB at most. Where huge pages are to be split, their tally (huge.py) takes 2
bytes more for each of their blocks, and 40 for each region: 0.1 n, or 0.2 n with folios of 64 KiB
and less. `python -m tests.bench.index_memory` measures it.

Time. Sorting costs about 80 ns a page, picking 128 shares out of all words about 150 ns: a fifth of
what the two checksums of the page have cost before.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import numpy as np

from mergemem_agent.region import (
    CHECKSUM_BITS,
    FULL,
    HUGE,
    MANY_MAPPINGS,
    MERGED,
    SETTLED,
    ZERO,
    Regions,
    map_count_of,
    page_of,
)

Array = np.ndarray[Any, np.dtype[Any]]

MAX_SHARE_BITS: Final = 7
MIN_CHUNK_PAGES: Final = 8192

# How many regions are joined to be searched at once: at most 256 KiB of words.
_REGIONS_AT_ONCE: Final = 64
_HIGHEST_BYTE: Final = 7 if sys.byteorder == "little" else 0

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
    ]
)

_U64 = np.uint64

# Is shown words, the place of each, and the number of the group of equal ones that it is in.
Witness = Callable[[Array, Array, Array], None]


def nominate(processes: Sequence[Regions], witness: Witness | None = None) -> Iterator[Array]:
    """Yield arrays of NOMINATED, each with whole groups, over all equal pages of one domain.

    Groups come in the order of their pages' addresses. Between two arrays anything may be done to
    the regions: what was marked or scanned meanwhile is seen in the shares that follow.

    Pages of huge pages are not nominated here, as one alone must not split a huge page. With a
    `witness` they are searched, too, and it is shown all groups that are worth a merge (huge.py).
    """
    pages = sum(regions.pages for regions in processes)
    share_bits = 1
    while share_bits < MAX_SHARE_BITS and MIN_CHUNK_PAGES << share_bits < pages:
        share_bits += 1
    # Checksums are spread evenly, so a chunk is full only where many pages hold the same. What
    # does not fit goes into a chunk of its own, and its pages get an anchor of their own.
    chunk = _Chunk(max(MIN_CHUNK_PAGES, (pages >> share_bits) * 5 // 4))
    for share in range(1 << share_bits):
        places = _Places(processes)
        for part in places.search(share, share_bits, huge=witness is not None):
            for full in chunk.fill(part):
                yield from _nominated(full, share_bits, places, witness)
        yield from _nominated(chunk.take(), share_bits, places, witness)


class _Chunk:
    """Words of one share and, beside each, the place where it lies."""

    def __init__(self, capacity: int) -> None:
        self._words = np.empty(capacity, dtype=np.uint64)
        self._places = np.empty(capacity, dtype=np.uint32)
        self._used = 0

    def fill(self, part: tuple[Array, Array]) -> Iterator[tuple[Array, Array]]:
        """Add words and places; yield the whole content each time that it is full."""
        words, places = part
        while len(words):
            added = min(len(self._words) - self._used, len(words))
            self._words[self._used : self._used + added] = words[:added]
            self._places[self._used : self._used + added] = places[:added]
            self._used += added
            words, places = words[added:], places[added:]
            if self._used == len(self._words):
                yield self.take()

    def take(self) -> tuple[Array, Array]:
        """Return the content, valid until the next fill(), and be empty."""
        used, self._used = self._used, 0
        return self._words[:used], self._places[:used]


class _Places:
    """All regions of a domain in a row: the place of a word is the number of its region there.

    A snapshot for the time of one share, since regions come and go between two nominations. It
    holds references to the words, not copies: 16 bytes for a region.
    """

    def __init__(self, processes: Sequence[Regions]) -> None:
        self._words = [list(regions.words) for regions in processes]
        self._numbers = [regions.rows["number"].copy() for regions in processes]
        self._starts = np.cumsum([0, *map(len, self._words)])

    def search(self, share: int, share_bits: int, huge: bool) -> Iterator[tuple[Array, Array]]:
        """Yield the words of one share that may be nominated, and the place of each."""
        wanted = _U64(SETTLED | MERGED)
        unwanted = _U64(ZERO if huge else ZERO | HUGE)
        head_mask, head = 0xFF << (8 - share_bits) & 0xFF, share << (8 - share_bits)
        for start, process in zip(self._starts.tolist(), self._words, strict=False):
            for first in range(0, len(process), _REGIONS_AT_ONCE):
                blobs = process[first : first + _REGIONS_AT_ONCE]
                joined = b"".join(blobs)
                words = np.frombuffer(joined, dtype=np.uint64)
                # Looking at one byte of each word is several times faster than at all eight.
                heads = np.frombuffer(joined, dtype=np.uint8)[_HIGHEST_BYTE::8]
                (positions,) = np.nonzero(heads & head_mask == head)
                found = words[positions]
                positions = positions[(found & wanted != 0) & (found & unwanted == 0)]
                ends = np.cumsum([len(blob) // 8 for blob in blobs])
                places = np.searchsorted(ends, positions, side="right") + (start + first)
                yield words[positions], places.astype(np.uint32)

    def locate(self, places: Array) -> tuple[Array, Array]:
        """Return the index of the process, and the number of the region, of each place."""
        processes = np.searchsorted(self._starts, places, side="right") - 1
        numbers = np.zeros(len(places), dtype=np.uint64)
        for process in np.unique(processes).tolist():
            here = processes == process
            numbers[here] = self._numbers[process][places[here] - self._starts[process]]
        return processes, numbers


def _nominated(
    content: tuple[Array, Array], share_bits: int, places: _Places, witness: Witness | None
) -> Iterator[Array]:
    """Yield the pages of one chunk that are worth a merge, if any, as NOMINATED."""
    words, place = content
    members, groups = equal(words, share_bits)
    if witness:
        _show(witness, words, place, members, groups)
        small = words[members] & _U64(HUGE) == 0
        members, groups = members[small], groups[small]
    members, groups, anchors = gainful(words, members, groups)
    if len(members):
        nominated = np.empty(len(members), dtype=NOMINATED)
        nominated["process"], nominated["number"] = places.locate(place[members])
        nominated["page"] = page_of(words[members])
        nominated["map_count"] = map_count_of(words[members])
        nominated["anchor"] = anchors
        nominated["group"] = groups
        nominated["order"] = 0
        yield _in_order_of_addresses(nominated)


def _show(witness: Witness, words: Array, place: Array, members: Array, groups: Array) -> None:
    """Show a witness the groups that would be worth a merge if huge pages were split."""
    members, groups, _ = gainful(words, members, groups)
    if len(members):
        witness(words[members], place[members], groups)


def equal(words: Array, share_bits: int) -> tuple[Array, Array]:
    """Return the positions of words whose checksum another one has too, and their groups' numbers.

    Groups are numbered from 0 in the order of checksums, and their members are neighbours. No bit
    of a checksum is lost in a chunk of less than 2**(22 + share_bits) pages, and those that are
    lost in a larger one cost some comparisons in the kernel.
    """
    position_bits = _U64(len(words).bit_length())
    keys = words << _U64(share_bits)  # the highest bits are the same in all of them
    low_bits = _U64(64) - _U64(min(CHECKSUM_BITS - share_bits, 64 - int(position_bits)))
    keys >>= low_bits
    keys <<= low_bits
    keys |= np.arange(len(words), dtype=np.uint64)
    keys.sort()
    as_before = keys[1:] ^ keys[:-1] < _U64(1) << low_bits
    member = np.zeros(len(words), dtype=np.bool_)
    member[1:] |= as_before
    member[:-1] |= as_before
    first = np.ones(len(words), dtype=np.bool_)
    first[1:] = ~as_before
    groups = np.cumsum(first[member], dtype=np.intp) - 1
    positions = (keys[member] & ((_U64(1) << position_bits) - _U64(1))).astype(np.intp)
    return positions, groups


def gainful(words: Array, members: Array, groups: Array) -> tuple[Array, Array, Array]:
    """Return those members whose merge frees frames, their groups, and which ones are anchors.

    A frame is freed when all its mappings are replaced. Of c pages of a group that say that their
    frame is mapped m times, c // m frames can be freed; c < m can free none, and would only cost
    the sharing that they have. The merged page takes a frame of its own, unless the group has one.
    """
    if not len(members):
        return members, groups, np.zeros(0, dtype=np.bool_)
    # Sorted by group, anchors first, then by map count.
    chosen = words[members]
    map_counts = map_count_of(chosen).astype(np.intp)
    merged = chosen & _U64(MERGED) != 0
    kinds = (groups << 9) | np.where(merged, 0, 256 + map_counts)
    order = np.argsort(kinds, kind="stable")
    members, groups, merged = members[order], groups[order], merged[order]
    map_counts, kinds = map_counts[order], kinds[order]

    starts = np.flatnonzero(np.diff(kinds, prepend=-1))
    counts = np.diff(starts, append=len(kinds))
    frees = counts // map_counts[starts] * ~merged[starts]
    frees[map_counts[starts] == MANY_MAPPINGS] = 0  # shared well already, and not known exactly

    total = groups[-1] + 1
    usable = merged & (words[members] & _U64(FULL) == 0)
    anchored = np.bincount(groups[usable], minlength=total) > 0
    gain = np.bincount(groups[starts], weights=frees, minlength=total) - ~anchored
    _, first_usable = np.unique(groups[usable], return_index=True)
    anchors = np.zeros(len(members), dtype=np.bool_)
    anchors[np.flatnonzero(usable)[first_usable]] = True

    wanted = (np.repeat(frees > 0, counts) | anchors) & (gain > 0)[groups]
    return members[wanted], groups[wanted], anchors[wanted]


def _in_order_of_addresses(nominated: Array) -> Array:
    """Sort groups by where their first page lies, and number them so, from 0.

    Pages of one page table then come in the same request, where the kernel handles them together:
    fewer locks, and fewer TLB flushes.
    """
    by_address = np.lexsort(
        (nominated["page"], nominated["number"], nominated["process"], nominated["anchor"])
    )
    rank = np.empty(len(nominated), dtype=np.intp)
    rank[by_address] = np.arange(len(nominated))
    _, group = np.unique(nominated["group"], return_inverse=True)
    first = np.full(int(group.max()) + 1, len(nominated), dtype=np.intp)
    np.minimum.at(first, group, rank)
    order = np.lexsort((rank, ~nominated["anchor"], first[group]))
    ordered = nominated[order]
    ordered["group"] = np.cumsum(np.diff(first[group][order], prepend=-1) != 0) - 1
    return ordered
