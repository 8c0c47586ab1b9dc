# SPDX-License-Identifier: MIT
"""Huge pages: which of them are worth splitting, and the requests that split them.

A huge page is split only if enough of its pages can be merged, and the request that splits it has
to hold that many of them at once. But the index (index.py) searches a 128th of all checksums at a
time, in which a huge page has four pages. So there are two steps:

    while the index is searched   HugeTally counts, for each huge page, the pages that have
                                  partners, or are zeros, and notes the region in which most
                                  partners are: its leader.
    after that                    the huge pages whose count suffices are taken, those with the
                                  same leader together (siblings of a fork at the same offset,
                                  copies of the same data), and are searched again with their
                                  leader, all of their pages at once. That gives requests.

8 processes times 512 pages are more than the 4,000 candidates of a request. So a request takes as
many pages of each huge page as fit, evenly. The others are small pages after the split, and are
merged as these are.

Large folios that are smaller than a region are taken together in aligned blocks of the size of the
largest in their region, of 16 pages at least. The kernel judges each folio for itself.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np

from mergemem_agent.contract import GROUP_ZERO
from mergemem_agent.index import equal, gainful
from mergemem_agent.merge import Request, request_for
from mergemem_agent.nominated import NOMINATED
from mergemem_agent.region import REGION_PAGES, Regions
from mergemem_agent.word import DEEP, HUGE, MERGED, SETTLED, ZERO, map_count_of, page_of

Array = np.ndarray[Any, np.dtype[Any]]

HUGE_PAGE_ORDER: Final = 9
MIN_BLOCK_ORDER: Final = 4

# khugepaged may put together again what was split. It is not split a second time before this.
SPLIT_REST_SECONDS: Final = 1800.0

_NOBODY: Final = 0xFFFF_FFFF
_U64 = np.uint64

# A region: index of its process, and its number.
Place = tuple[int, int]


def needed_pages(percent: int, order: int) -> int:
    """Return how many pages of a folio are at least `percent` of it."""
    return -(-(percent << order) // 100)


class HugeTally:
    """What each huge page of some processes has to gain, counted while they are searched.

    Regions must neither come nor go meanwhile: places are their positions in one row.
    """

    def __init__(self, processes: Sequence[Regions], now: float | None = None) -> None:
        """Begin with the pages that are zeros; show() tells of those that have partners."""
        now = time.monotonic() if now is None else now
        rows = [regions.rows for regions in processes]
        self._starts = np.cumsum([0, *map(len, rows)])
        self._numbers = np.concatenate([np.zeros(0, np.uint64), *(r["number"] for r in rows)])
        orders = np.concatenate([np.zeros(0, np.uint8), *(r["order"] for r in rows)])
        split = np.concatenate([np.zeros(0, np.float32), *(r["split"] for r in rows)])
        rests = (orders == HUGE_PAGE_ORDER) & (split > 0) & (now - split < SPLIT_REST_SECONDS)
        huge = (orders > 0) & ~rests
        # 0 where nothing is to be split.
        self._order = np.where(huge, np.maximum(orders, MIN_BLOCK_ORDER), 0).astype(np.uint8)
        blocks = np.where(huge, REGION_PAGES >> self._order.astype(np.intp), 0)
        self._blocks = blocks.astype(np.uint8)
        self._first_block = np.cumsum([0, *self._blocks.tolist()], dtype=np.uint32)
        # Many small blocks count to less than 256, and one byte for each is enough.
        size = np.uint16 if (self._order >= 8).any() else np.uint8
        self._gain: Array = np.zeros(int(self._first_block[-1]), dtype=size)
        self._leader = np.full(len(orders), _NOBODY, dtype=np.uint32)
        self._votes = np.zeros(len(orders), dtype=np.uint16)
        self._count_zeros(processes)

    def __bool__(self) -> bool:
        """Whether there is any huge page."""
        return len(self._gain) > 0

    def show(self, words: Array, places: Array, groups: Array) -> None:
        """Take in pages that are in groups worth a merge: index.Witness."""
        huge = (words & _U64(HUGE) != 0) & (self._order[places] > 0)
        if huge.any():
            leaders = _leaders(words, places, groups)[huge]
            words, places = words[huge], places[huge].astype(np.intp)
            self._count(words, places)
            self._vote(places, leaders)

    def clusters(self, percent: int) -> Iterator[list[Place]]:
        """Yield regions that are to be split together: first their leader, if they have one.

        The leader is there for its pages, it may have nothing to be split.
        """
        orders = range(HUGE_PAGE_ORDER + 1)
        needed = np.array([needed_pages(percent, order) for order in orders], dtype=np.uint16)
        # Small types: there are many blocks.
        enough = self._gain >= np.repeat(needed[self._order], self._blocks)
        region_of = np.repeat(np.arange(len(self._order), dtype=np.uint32), self._blocks)
        ready = np.unique(region_of[enough])
        ready = ready[np.argsort(self._leader[ready], kind="stable")]
        for members in np.split(ready, np.flatnonzero(np.diff(self._leader[ready])) + 1):
            if len(members):
                leader = int(self._leader[members[0]])
                first = [leader] if leader != _NOBODY else []
                yield [self._place(p) for p in first + members[members != leader].tolist()]

    def may_split(self, place: Place) -> bool:
        """Whether a region holds huge pages that may be split now."""
        start, end = self._starts[place[0]], self._starts[place[0] + 1]
        index = int(start + np.searchsorted(self._numbers[start:end], _U64(place[1])))
        return index < end and int(self._numbers[index]) == place[1] and self._order[index] > 0

    def _place(self, index: int) -> Place:
        process = int(np.searchsorted(self._starts, index, side="right")) - 1
        return process, int(self._numbers[index])

    def _count_zeros(self, processes: Sequence[Regions]) -> None:
        wanted = _U64(HUGE | ZERO | SETTLED)
        for start, regions in zip(self._starts.tolist(), processes, strict=False):
            for row in np.flatnonzero((regions.rows["order"] > 0) & (regions.rows["zero"] > 0)):
                words = np.frombuffer(regions.words[row], dtype=np.uint64)
                words = words[words & wanted == wanted]
                if self._order[start + row]:
                    self._count(words, np.full(len(words), start + row, dtype=np.intp))

    def _count(self, words: Array, places: Array) -> None:
        within = page_of(words) >> self._order[places].astype(np.uint64)
        blocks, counts = np.unique(
            self._first_block[places] + within.astype(np.uint32), return_counts=True
        )
        self._gain[blocks] += counts.astype(self._gain.dtype)

    def _vote(self, places: Array, leaders: Array) -> None:
        """Boyer and Moore's majority vote for the leader of each region, a share at a time."""
        pairs, counts = np.unique(
            places.astype(np.uint64) << _U64(32) | leaders.astype(np.uint64), return_counts=True
        )
        regions = (pairs >> _U64(32)).astype(np.intp)
        strongest = np.lexsort((-counts, regions))
        strongest = strongest[np.unique(regions[strongest], return_index=True)[1]]
        regions, counts = regions[strongest], counts[strongest]
        leaders = (pairs[strongest] & _U64(0xFFFF_FFFF)).astype(np.uint32)
        votes = self._votes[regions].astype(np.intp)
        agrees = self._leader[regions] == leaders
        taken = ~agrees & (counts > votes)
        self._leader[regions[taken]] = leaders[taken]
        votes = np.where(agrees, votes + counts, np.abs(votes - counts))
        self._votes[regions] = np.minimum(votes, 0xFFFF)


def _leaders(words: Array, places: Array, groups: Array) -> Array:
    """Return for each page where its group's leader lies: a merged page, a small one, the first."""
    huge = words & _U64(HUGE) != 0
    rank = np.where(words & _U64(MERGED) != 0, 0, 1 + huge.astype(np.uint8))
    order = np.lexsort((places, rank, groups))
    ordered = groups[order]
    first = np.flatnonzero(np.diff(ordered, prepend=-1))
    leaders = np.empty(len(words), dtype=np.uint32)
    leaders[order] = np.repeat(places[order][first], np.diff(first, append=len(words)))
    return leaders


# --- requests ------------------------------------------------------------------------------------


def split_requests(
    processes: Sequence[Regions],
    tally: HugeTally,
    percent: int,
    max_candidates: int,
    max_processes: int,
) -> Iterator[Request]:
    """Yield a request for each few huge pages that are worth splitting.

    Each is made when it is asked for, so it sees what became of the one before.
    """
    # A little more than what is needed, since some pages will have changed meanwhile.
    share = needed_pages(min(100, percent + percent // 8 + 1), HUGE_PAGE_ORDER)
    at_once = max(1, min(max_candidates // share, max_processes) - 1)
    for leader, *members in tally.clusters(percent):
        for first in range(0, max(1, len(members)), at_once):
            places = [leader, *members[first : first + at_once]]
            nominated = _together(processes, places, tally, percent, max_candidates)
            if len(nominated):
                yield request_for([nominated], percent)


def _together(
    processes: Sequence[Regions],
    places: Sequence[Place],
    tally: HugeTally,
    percent: int,
    max_candidates: int,
) -> Array:
    """Return what is to be nominated of some regions: NOMINATED, in groups, zeros last."""
    parts, orders, position = [], [], []
    for index, (process, number) in enumerate(places):
        regions = processes[process]
        row = regions.find(number)
        if row is None:
            continue
        words = np.frombuffer(regions.words[row], dtype=np.uint64)
        huge = words & _U64(HUGE) != 0
        usable = (words & _U64(SETTLED | MERGED) != 0) & (huge | (words & _U64(ZERO) == 0))
        usable &= words & _U64(MERGED | DEEP) != MERGED
        if not tally.may_split((process, number)):
            usable &= ~huge
        parts.append(words[usable])
        orders.append(np.where(huge[usable], regions.rows["order"][row], 0))
        position.append(np.full(len(parts[-1]), index))
    if not parts:
        return np.empty(0, dtype=NOMINATED)
    words, order, where = np.concatenate(parts), np.concatenate(orders), np.concatenate(position)
    members, groups, anchors = _whole_blocks(words, order, where, percent, max_candidates)
    nominated = np.empty(len(members), dtype=NOMINATED)
    nominated["process"] = np.array([process for process, _ in places])[where[members]]
    nominated["number"] = np.array([number for _, number in places], np.uint64)[where[members]]
    nominated["page"] = page_of(words[members])
    nominated["map_count"] = map_count_of(words[members])
    nominated["anchor"] = anchors
    nominated["group"] = groups
    nominated["order"] = order[members]
    return nominated


def _whole_blocks(
    words: Array, order: Array, where: Array, percent: int, max_candidates: int
) -> tuple[Array, Array, Array]:
    """Choose at most so many pages, and of each huge page that is among them enough to split it.

    Returns their positions, groups and which ones are anchors. A huge page of which there are too
    few is left out, and with it go the partners of others: so it is tried again without it, until
    all that are left have enough.
    """
    huge = order > 0
    block_order = np.maximum(order, MIN_BLOCK_ORDER)
    block = where * REGION_PAGES + (page_of(words).astype(np.intp) >> block_order)
    needed = np.array([needed_pages(percent, size) for size in range(HUGE_PAGE_ORDER + 1)])
    usable = np.ones(len(words), dtype=np.bool_)
    while True:
        members, groups, anchors = _pick(words, usable, block, max_candidates)
        of_huge = members[huge[members]]
        have = np.bincount(block[of_huge], minlength=int(block.max(initial=0)) + 1)
        short = huge & usable & (have[block] < needed[block_order])
        if not short.any():
            return members, groups, anchors
        usable &= ~short


def _pick(
    words: Array, usable: Array, block: Array, max_candidates: int
) -> tuple[Array, Array, Array]:
    """Choose pages that are worth a merge: the largest groups first, evenly from all blocks."""
    zero = words & _U64(ZERO) != 0
    (plain,) = np.nonzero(usable & ~zero)
    members, groups = equal(words[plain], 0)
    members, groups, anchors = gainful(words[plain], members, groups)
    members = plain[members]
    (zeros,) = np.nonzero(usable & zero)
    if len(groups):
        _, groups, sizes = np.unique(groups, return_inverse=True, return_counts=True)
        largest_first = np.argsort(-sizes, kind="stable")
        rank = np.empty(len(sizes), dtype=np.intp)
        rank[largest_first] = np.arange(len(sizes))
        groups = rank[groups.reshape(-1)]
    members = np.concatenate([members, zeros])
    groups = np.concatenate([groups, np.full(len(zeros), -1)]).astype(np.intp)
    anchors = np.concatenate([anchors, np.zeros(len(zeros), dtype=np.bool_)])

    # The turn of a page: that of its group, and later if its block has more such pages.
    owners = np.where(anchors, -1, block[members])
    turn = np.maximum(groups, 0) + _number_among_equals(groups, owners)
    chosen = np.lexsort((~anchors, groups, turn))[:max_candidates]
    zeros_last = np.where(groups < 0, len(members), groups)
    chosen = chosen[np.lexsort((members[chosen], ~anchors[chosen], zeros_last[chosen]))]
    members, groups, anchors = members[chosen], groups[chosen], anchors[chosen]
    # What the limit has cut down to one page is no group.
    alone = (groups >= 0) & (np.bincount(groups + 1)[groups + 1] < 2)
    members, groups, anchors = members[~alone], groups[~alone], anchors[~alone]
    return members, np.where(groups < 0, GROUP_ZERO, groups), anchors


def _number_among_equals(first: Array, second: Array) -> Array:
    """Return for each element how many before it have the same two values."""
    order = np.lexsort((second, first))
    a, b = first[order], second[order]
    new = np.ones(len(order), dtype=np.bool_)
    new[1:] = (np.diff(a) != 0) | (np.diff(b) != 0)
    starts = np.flatnonzero(new)
    numbers = np.empty(len(order), dtype=np.intp)
    numbers[order] = np.arange(len(order)) - np.repeat(starts, np.diff(starts, append=len(order)))
    return numbers
