# SPDX-License-Identifier: MIT
"""A search of the memory of some processes: which pages have partners, and which to merge now.

One pass over the words does all of it: pages whose sample another one has too are to be read in
full; pages whose full checksum another one has too, once more; and those of which both full
checksums agree go into requests, small pages first, then huge ones.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np

from mergemem_agent.huge import HugeTally, split_requests
from mergemem_agent.index import nominate
from mergemem_agent.info import Limits
from mergemem_agent.merge import Request, requests
from mergemem_agent.policy import MergeRules
from mergemem_agent.region import Regions
from mergemem_agent.word import DEEP, PAGE_BITS, page_of

Array = np.ndarray[Any, np.dtype[Any]]

# Partners are kept in a list of their own until it holds so many, or an eighth of all pages.
_MIN_HELD_PAGES: Final = 1 << 16
_U64 = np.uint64


class Partners:
    """Pages that a search has found worth reading in full, on their way into the regions.

    Kept for a while, as looking for the regions of a few pages each time would cost more than the
    search. Regions must neither come nor go meanwhile.
    """

    def __init__(self, processes: Sequence[Regions], settle: Sequence[float]) -> None:
        """Mark pages of `processes`; `settle` is that of each one's policy, in seconds."""
        self._processes = processes
        self._settle = settle
        self._starts = np.cumsum([0, *(len(regions.rows) for regions in processes)])
        self._most = max(_MIN_HELD_PAGES, sum(regions.pages for regions in processes) // 8)
        self._held: list[Array] = []
        self._held_pages = 0
        self.found_pages = 0

    def add(self, words: Array, places: Array) -> None:
        """Take in words, and the place of each: index.Marker."""
        keys = places.astype(np.uint64) << _U64(PAGE_BITS) | page_of(words)
        self._held.append(keys << _U64(1) | (words & _U64(DEEP) != 0))
        self._held_pages += len(words)
        if self._held_pages >= self._most:
            self.flush()

    def flush(self) -> None:
        """Mark all pages that are held, and have their regions looked at in time."""
        if not self._held:
            return
        keys = np.sort(np.concatenate(self._held))
        self._held, self._held_pages = [], 0
        self.found_pages += len(keys)
        deep = (keys & _U64(1)).astype(np.bool_)
        pages = (keys >> _U64(1) & _U64((1 << PAGE_BITS) - 1)).astype(np.intp)
        places = (keys >> _U64(PAGE_BITS + 1)).astype(np.intp)
        now = time.monotonic()
        ends = np.searchsorted(places, self._starts)
        for index in np.flatnonzero(np.diff(ends)).tolist():
            part = slice(int(ends[index]), int(ends[index + 1]))
            regions = self._processes[index]
            regions.partners(places[part] - int(self._starts[index]), pages[part], deep[part])
            regions.schedule(now, self._settle[index])


def search(
    processes: Sequence[Regions],
    rules: MergeRules,
    limits: Limits,
    partners: Partners | None = None,
    samples: bool = True,
    heads: Array | None = None,
) -> Iterator[Request]:
    """Yield requests for all equal pages of processes that may share under the same rules.

    Each is made when it is asked for. Between two of them pages may be marked, but regions must
    neither come nor go. Without `partners`, only what has settled is searched; without `samples`,
    only pages that were read in full; with `heads` (Heads.table()), only those that have one of
    them, unless huge pages are to be split, which takes all there is to know of them.
    """
    tally = HugeTally(processes) if rules.split_percent else None
    marker = partners.add if partners else None
    for nominated in nominate(
        processes, tally.show if tally else None, marker, samples, None if tally else heads
    ):
        yield from requests(nominated, limits.max_candidates, limits.max_processes)
    if partners:
        partners.flush()
    if tally and rules.split_percent:
        yield from split_requests(
            processes, tally, rules.split_percent, limits.max_candidates, limits.max_processes
        )
