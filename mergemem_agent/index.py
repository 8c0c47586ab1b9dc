# SPDX-License-Identifier: MIT
"""The candidate index: which pages of one domain have the same checksum.

There is no index to keep. When a domain is due, its words (see region.py) are searched for equal
checksums by sorting, one share of the checksums after the other, and what was found is nominated:

    words of all regions ── those whose checksum begins with 0, 1, 2 ... ──► chunk
    chunk ── those of which another one has the same first bits ──► few, where few are equal
    key = checksum, its low bits replaced by the position among these ──► sorted in place
    neighbours with the same checksum ──► groups ── is there a gain? ──► nominated pages

Three kinds of groups are found in one pass: pages with the same sample, which are to be read in
full; pages with the same full checksum, which are to be read once more; and those of which both
were the same, which are nominated.

Memory. All words of n pages are 8 n bytes and stay where they are (8.3 n with all that goes with
them). A chunk is a 128th of them, or 8,192 pages where that is more; of few pages, 16,384. While it
is worked on it takes 12 bytes a page for words and places, 8 for the keys, 80 for counting them by
their first bits, and after that up to 130 for what becomes of them when each page is in a group:
150 / 128 = 1.2 bytes; and a 64th of the pages, nominated, 8 bytes each. Sum: 9.6 n; the limit is
10 n. 64 GiB of memory in 4 KiB pages take 161 MB at most. Where huge pages are to be split, their
tally (huge.py) takes 2 bytes more for each of their blocks, and 40 for each region: 0.1 n, or 0.2 n
with folios of 64 KiB and less. `python -m tests.bench.index_memory` measures it.

Time. 100 to 130 ns a page that is searched, where a quarter million are. Where little is new, most
words are left out at a glance: heads.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import numpy as np

from mergemem_agent.heads import each_head
from mergemem_agent.nominated import MIN_HELD_PAGES, Nominations, packed, sizes_of, starts_of
from mergemem_agent.region import Regions
from mergemem_agent.word import (
    CHECKSUM_BITS,
    DEEP,
    FULL,
    HUGE,
    MANY_MAPPINGS,
    MAP_COUNT_MASK,
    MAP_COUNT_SHIFT,
    MERGED,
    PAGE_BITS,
    PARTNER,
    SAMPLE_BITS,
    SETTLED,
    ZERO,
    map_count_of,
    page_of,
)

Array = np.ndarray[Any, np.dtype[Any]]

MAX_SHARE_BITS: Final = 7
MIN_CHUNK_PAGES: Final = 8192
# Of so few pages a chunk is twice as large: that takes less time, and no memory to speak of.
SMALL_POOL_PAGES: Final = 1 << 17

# How many regions are joined to be searched at once: at most 256 KiB of words.
_REGIONS_AT_ONCE: Final = 64
_HIGHEST_BYTE, _LOWEST_BYTE = (7, 0) if sys.byteorder == "little" else (0, 7)

_U64 = np.uint64

# Of a page that is mapped once, and not merged, _ONE_MAPPING alone of these bits is set.
_SHARED: Final = MAP_COUNT_MASK | _U64(MERGED)
_ONE_MAPPING: Final = _U64(1 << MAP_COUNT_SHIFT)

# Is shown words, the place of each, and the number of the group of equal ones that it is in.
Witness = Callable[[Array, Array, Array], None]

# Is shown words that are worth reading in full, and the place of each.
Marker = Callable[[Array, Array], None]


def nominate(
    processes: Sequence[Regions],
    witness: Witness | None = None,
    marker: Marker | None = None,
    samples: bool = True,
    heads: Array | None = None,
) -> Iterator[Array]:
    """Yield arrays of NOMINATED, each with whole groups, over all equal pages of one domain.

    Groups come in the order of their pages' addresses. Between two arrays pages may be marked, but
    regions must neither come nor go, nor be looked at.

    Pages of huge pages are not nominated here, as one alone must not split a huge page. With a
    `witness` they are searched, too, and it is shown all groups that are worth a merge (huge.py).
    A `marker` is shown the pages that have to be read in full before they can be nominated;
    without `samples` only those that were read in full once, which is much less to search. With
    `heads` (Heads.table()), words of other heads are left out.
    """
    needed = 0 if marker and samples else DEEP if marker else SETTLED | MERGED
    places = _Places(processes)
    pages = places.count(needed, heads)
    share_bits = 1
    least = MIN_CHUNK_PAGES * (2 if pages <= SMALL_POOL_PAGES else 1)
    while share_bits < MAX_SHARE_BITS and least << share_bits < pages:
        share_bits += 1
    # Checksums are spread evenly, so a chunk is full only where many pages hold the same. What
    # does not fit goes into a chunk of its own, and its pages get an anchor of their own.
    chunk = _Chunk(max(least, (pages >> share_bits) * 5 // 4))
    found = Nominations(max(MIN_HELD_PAGES, pages // 64), places.locate)
    for share in range(1 << share_bits):
        for part in places.search(share, share_bits, needed, witness is not None, heads):
            for words, place in chunk.fill(part):
                found.add(*_found(words, place, share_bits, witness, marker, samples))
        if found.add(*_found(*chunk.take(), share_bits, witness, marker, samples)):
            yield from found.take()
    yield from found.take()


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

    Regions must neither come nor go meanwhile.
    """

    def __init__(self, processes: Sequence[Regions]) -> None:
        self._words = [blob for regions in processes for blob in regions.words]
        self._pages = np.concatenate(
            [np.zeros(0, np.uint16), *(r.rows["pages"] for r in processes)]
        )
        self._numbers = np.concatenate(
            [np.zeros(0, np.uint64), *(r.rows["number"] for r in processes)]
        )
        self._starts = np.cumsum([0, *(len(regions.rows) for regions in processes)])

    def count(self, needed: int, heads: Array | None = None) -> int:
        """Return how many words have one of the flags needed; or one of the `heads`, if given."""
        if heads is not None:
            return sum(
                int(np.count_nonzero(heads.take(each_head(joined)))) for _, joined in self._joined()
            )
        if not needed:
            return int(self._pages.sum(dtype=np.int64))
        return sum(
            int(np.count_nonzero(np.frombuffer(joined, dtype=np.uint8)[_LOWEST_BYTE::8] & needed))
            for _, joined in self._joined()
        )

    def search(
        self, share: int, share_bits: int, needed: int, huge: bool, heads: Array | None = None
    ) -> Iterator[tuple[Array, Array]]:
        """Yield the words of one share that have one of the flags needed, and their places.

        With `heads`, those of others are left out.
        """
        usable = _usable(needed, huge)
        for first, joined in self._joined():
            words = np.frombuffer(joined, dtype=np.uint64)
            # Looking at one byte of each word is several times faster than at all eight.
            shares = np.frombuffer(joined, dtype=np.uint8)[_HIGHEST_BYTE::8]
            (positions,) = (shares >> np.uint8(8 - share_bits) == share).nonzero()
            if heads is not None:
                positions = positions[heads.take(each_head(joined).take(positions))]
            found = words.take(positions)
            chosen = usable.take(found.astype(np.uint8))
            positions, found = positions[chosen], found[chosen]
            pages = self._pages[first : first + _REGIONS_AT_ONCE]
            if len(words) == len(pages) << PAGE_BITS:
                places = positions >> PAGE_BITS
            else:
                places = np.cumsum(pages, dtype=np.intp).searchsorted(positions, side="right")
            yield found, places.astype(np.uint32) + np.uint32(first)

    def _joined(self) -> Iterator[tuple[int, bytes]]:
        """Yield the words of all regions, some at a time, after the place of the first."""
        for first in range(0, len(self._words), _REGIONS_AT_ONCE):
            yield first, b"".join(self._words[first : first + _REGIONS_AT_ONCE])

    def locate(self, places: Array) -> tuple[Array, Array]:
        """Return the index of the process, and the number of the region, of each place."""
        places = places.astype(np.intp)
        return self._starts.searchsorted(places, side="right") - 1, self._numbers.take(places)


def _usable(needed: int, huge: bool) -> Array:
    """Return for each lowest byte of a word, which holds all of its flags, whether to search it."""
    flags = np.arange(256)
    usable: Array = flags & (ZERO if huge else ZERO | HUGE) == 0
    if needed:
        usable &= flags & needed != 0
    # Of a merged page that was never read, the checksum is not known.
    usable &= flags & (MERGED | DEEP) != MERGED
    return usable


def _found(
    words: Array,
    place: Array,
    share_bits: int,
    witness: Witness | None,
    marker: Marker | None,
    samples: bool,
) -> tuple[Array, Array]:
    """Take one chunk through the steps: equal samples, equal checksums, both of them twice."""
    members, groups = _equal_in_full(words, place, share_bits, marker if samples else None)
    if marker:
        members, groups = _marked(words, place, members, groups, marker, _U64(DEEP))
        settled = words[members] & _U64(SETTLED | MERGED) != 0
        members, groups = members[settled], groups[settled]
    return _nominated(words, place, members, groups, witness)


def _equal_in_full(
    words: Array, place: Array, share_bits: int, marker: Marker | None
) -> tuple[Array, Array]:
    """Return pages with the same full checksum; a marker is shown those with the same sample."""
    deep = words & _U64(DEEP) != 0
    if not marker or deep.all():
        return equal(words, share_bits)
    if _unmarked(words, _U64(0)).any():
        chosen, groups = equal(words, share_bits, SAMPLE_BITS)
        chosen, _ = _marked(words, place, chosen, groups, marker, _U64(0))
        chosen = chosen[deep[chosen]]
    else:
        (chosen,) = deep.nonzero()
    members, groups = equal(words[chosen], share_bits)
    return chosen[members], groups


def _unmarked(words: Array, depth: np.uint64) -> Array:
    """Return which words are of that depth, and neither settled nor to be read already."""
    unmarked: Array = words & _U64(SETTLED | MERGED | PARTNER | DEEP) == depth
    return unmarked


def _marked(
    words: Array, place: Array, members: Array, groups: Array, marker: Marker, depth: np.uint64
) -> tuple[Array, Array]:
    """Show a marker the pages of one depth that are worth reading in full, if all were equal.

    Returns the members of the groups that are worth it, and maybe others, and their groups.
    """
    if not len(members):
        return members, groups
    # Most groups have been merged already, and a glance tells that.
    found = words[members]
    is_open = np.bincount(groups, weights=found & _U64(MERGED) == 0) > 0
    if not is_open.all():
        still = is_open[groups]
        members, groups, found = members[still], groups[still], found[still]
    if not _unmarked(found, depth).any():
        return members, groups
    hopeful, of, _ = gainful(words, members, groups)
    worth = np.zeros(len(is_open), dtype=np.bool_)
    worth[of] = True
    found = words[hopeful]
    shown = hopeful[_unmarked(found, depth)]
    if len(shown):
        marker(words[shown], place[shown])
    still = worth[groups]
    return members[still], groups[still]


def _nominated(
    words: Array, place: Array, members: Array, groups: Array, witness: Witness | None
) -> tuple[Array, Array]:
    """Return the pages of one chunk that are worth a merge, if any, and where groups start."""
    if witness:
        _show(witness, words, place, members, groups)
        small = words[members] & _U64(HUGE) == 0
        members, groups = members[small], groups[small]
    members, groups, anchors = gainful(words, members, groups)
    chosen = words[members]
    pages = packed(place[members], page_of(chosen), map_count_of(chosen), anchors)
    return pages, starts_of(groups)


def _show(witness: Witness, words: Array, place: Array, members: Array, groups: Array) -> None:
    """Show a witness the groups that would be worth a merge if huge pages were split."""
    members, groups, _ = gainful(words, members, groups)
    if len(members):
        witness(words[members], place[members], groups)


def equal(words: Array, share_bits: int, bits: int = CHECKSUM_BITS) -> tuple[Array, Array]:
    """Return the positions of words of which the upper `bits` are another one's too, and groups.

    Groups are numbered from 0 in the order of checksums, and their members are neighbours. No bit
    of a checksum is lost in a chunk of less than 2**(24 + share_bits) pages, and those that are
    lost in a larger one cost some comparisons in the kernel.
    """
    keys = words << _U64(share_bits)  # the highest bits are the same in all of them
    near = _near(keys, bits - share_bits)
    keys = keys[near]
    position_bits = len(keys).bit_length()
    low_bits = _U64(64 - min(bits - share_bits, 64 - position_bits))
    keys >>= low_bits
    keys <<= low_bits
    keys |= np.arange(len(keys), dtype=np.uint64)
    keys.sort()
    as_before = keys[1:] ^ keys[:-1] < _U64(1) << low_bits
    member = np.zeros(len(keys), dtype=np.bool_)
    member[1:] |= as_before
    member[:-1] |= as_before
    first = np.ones(len(keys), dtype=np.bool_)
    first[1:] = ~as_before
    groups = np.cumsum(first[member], dtype=np.intp) - 1
    positions = (keys[member] & _U64((1 << position_bits) - 1)).view(np.int64)
    return near[positions], groups


def _near(keys: Array, bits: int) -> Array:
    """Return where keys are that may have an equal: the others need no sorting.

    Keys are counted by their first bits, a few more than it takes to number them. Of those without
    an equal seven in eight are alone then, and a count costs a tenth of the sort.
    """
    bits = min(len(keys).bit_length() + 2, bits)
    heads = (keys >> _U64(64 - bits)).view(np.int64)
    return (np.bincount(heads).take(heads) > 1).nonzero()[0]


def gainful(words: Array, members: Array, groups: Array) -> tuple[Array, Array, Array]:
    """Return those members whose merge frees frames, their groups, and which ones are anchors.

    A frame is freed when all its mappings are replaced. Of c pages of a group that say that their
    frame is mapped m times, c // m frames can be freed; c < m can free none, and would only cost
    the sharing that they have. The merged page takes a frame of its own, unless the group has one.
    """
    chosen = words[members]
    if (chosen & _SHARED == _ONE_MAPPING).all():
        # So it is nearly always: then each group is worth it that has two pages.
        wanted = (np.bincount(groups) > 1)[groups]
        return members[wanted], groups[wanted], np.zeros(np.count_nonzero(wanted), dtype=np.bool_)
    # Sorted by group, anchors first, then by map count.
    map_counts = map_count_of(chosen).astype(np.intp)
    merged = chosen & _U64(MERGED) != 0
    kinds = (groups << 9) | np.where(merged, 0, 256 + map_counts)
    order = kinds.argsort(kind="stable")
    members, groups, merged = members[order], groups[order], merged[order]
    map_counts, kinds = map_counts[order], kinds[order]

    starts = starts_of(kinds)
    counts = sizes_of(starts, len(kinds))
    mapped = map_counts[starts]
    frees = counts // mapped * ~merged[starts]
    frees[mapped == MANY_MAPPINGS] = 0  # shared well already, and not known exactly

    total = int(groups[-1]) + 1
    usable = (merged & (words[members] & _U64(FULL) == 0)).nonzero()[0]
    first_usable = usable[starts_of(groups[usable])]
    anchors = np.zeros(len(members), dtype=np.bool_)
    anchors[first_usable] = True
    gain = np.bincount(groups[starts], weights=frees, minlength=total) - 1
    gain[groups[first_usable]] += 1  # they have a frame

    wanted = ((frees > 0).repeat(counts) | anchors) & (gain > 0)[groups]
    return members[wanted], groups[wanted], anchors[wanted]
