# SPDX-License-Identifier: MIT
"""Pages that are filled with zeros: the kernel's own zero page takes their place.

They need no partner, so neither index nor domain: that a page of mine is the kernel's zero page
tells nobody anything about anybody else. They are counted apart, everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mergemem_agent.contract import GROUP_ZERO
from mergemem_agent.merge import Request, request_for
from mergemem_agent.nominated import NOMINATED
from mergemem_agent.region import Regions
from mergemem_agent.word import HUGE, SETTLED, ZERO, map_count_of, page_of

Array = np.ndarray[Any, np.dtype[Any]]

_KIND = np.uint64(ZERO | SETTLED | HUGE)
_WANTED = np.uint64(ZERO | SETTLED)


def zero_requests(
    processes: Sequence[Regions], max_candidates: int, max_processes: int
) -> Iterator[Request]:
    """Yield requests for all settled zero-filled pages, but for those of huge pages (huge.py)."""
    held: list[Array] = []
    pages, named = 0, set[int]()
    for process, regions in enumerate(processes):
        for part in _pages_of(process, regions):
            for first in range(0, len(part), max_candidates):
                piece = part[first : first + max_candidates]
                too_many = len(named | {process}) > max_processes
                if held and (pages + len(piece) > max_candidates or too_many):
                    yield request_for(held)
                    held, pages, named = [], 0, set()
                held.append(piece)
                pages += len(piece)
                named.add(process)
    if held:
        yield request_for(held)


def _pages_of(process: int, regions: Regions) -> Iterator[Array]:
    """Yield the pages of each region, in order of addresses."""
    numbers = regions.rows["number"].copy()
    for row in np.flatnonzero(regions.rows["zero"]).tolist():
        words = np.frombuffer(regions.words[row], dtype=np.uint64)
        words = words[words & _KIND == _WANTED]
        if len(words):
            pages = np.zeros(len(words), dtype=NOMINATED)
            pages["process"], pages["number"], pages["group"] = process, numbers[row], GROUP_ZERO
            pages["page"], pages["map_count"] = page_of(words), map_count_of(words)
            yield pages
