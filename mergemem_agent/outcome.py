# SPDX-License-Identifier: MIT
"""What the results of a MERGE request change: the counts, and what is remembered of its pages.

It is done for all of a request's processes together as far as it can be: with few candidates, its
cost is the number of calls of numpy. What a request has none of takes one of them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from mergemem_agent import schedule
from mergemem_agent.contract import PAGE_BYTES, Result
from mergemem_agent.counts import Counts
from mergemem_agent.footprint import Footprint
from mergemem_agent.huge import HUGE_PAGE_ORDER
from mergemem_agent.merge import (
    JOINED,
    SUCCESS,
    ZEROED,
    Request,
    freed_frames,
    mappings_now,
    split_folios,
    zero_freed_frames,
)
from mergemem_agent.region import REGION_PAGES
from mergemem_agent.targets import Target
from mergemem_agent.word import DEEP, FULL, HUGE, MERGED, PARTNER, SETTLED

Array = np.ndarray[Any, np.dtype[Any]]
_U64 = np.uint64

_MOREMAP: Final = np.uint8(Result.MOREMAP)
_NOTEQUAL: Final = np.uint8(Result.NOTEQUAL)


def count(counts: Counts, targets: Sequence[Target], request: Request, results: Array) -> None:
    """Count results and freed frames: small pages, huge pages and zeros apart."""
    for code, pages in enumerate(np.bincount(results).tolist()):
        if pages:
            counts.results[Result(code)] += pages
    zeroed = results == ZEROED
    if zeroed.any():
        counts.zero_freed_pages += zero_freed_frames(request, results)
        owners = np.bincount(request.nominated["process"][zeroed])
        for index in owners.nonzero()[0].tolist():
            counts.policy(targets[index].policy.name).zeroed += int(owners[index])
    freed = freed_frames(request, results)
    if request.split_percent is None:
        counts.freed_pages += freed
    else:
        counts.split_freed_pages += freed
        policy = targets[request.processes[0]].policy
        counts.policy(policy.name).split_folios += split_folios(request, results)


def remember(targets: Sequence[Target], request: Request, results: Array) -> None:
    """Let each result change what is remembered of its page.

    A page that joined its group is an anchor for others from now on. One that the zero page has
    replaced, or that failed, for whatever reason, has to settle again: it is read in full once
    more when its region is due, with the back-off of that. One that met a full frame stays
    nominated, and that frame's pages stop being anchors. So does an anchor that nobody is equal to:
    it was written to between its last checksum and its merge, and is to be read in full.
    """
    footprint = Footprint.of(request, targets)
    order = footprint.order
    if not len(order):
        return
    sets, keeps = _flags(request, results)
    pages = request.nominated["page"].take(order)
    before, after = footprint.change(pages, keeps.take(order), sets.take(order))
    for part in footprint.parts:
        part.target.regions.moved(before[part.pages], after[part.pages])
    gained = (results == SUCCESS) | (results == ZEROED)
    if gained.any():
        _account(footprint, request, results, gained)


def _flags_by_result() -> tuple[Array, Array]:
    """Return the flags that the word of a page gets, by result, and all those that it keeps."""
    sets = np.full(256, PARTNER, dtype=np.uint64)
    clears = np.full(256, SETTLED, dtype=np.uint64)
    for result in JOINED:
        sets[result], clears[result] = MERGED | SETTLED, HUGE
    sets[Result.MOREMAP] = clears[Result.MOREMAP] = 0
    return sets, ~clears


_SETS, _KEEPS = _flags_by_result()


def _flags(request: Request, results: Array) -> tuple[Array, Array]:
    """Return the flags that the word of each candidate gets, and all those that it keeps."""
    sets, keeps, groups = _SETS.take(results), _KEEPS.take(results), request.groups
    zeros = groups < 0
    if zeros.any():
        sets[zeros & (sets == PARTNER)] = 0  # they need nobody
    crowded = results == _MOREMAP
    if crowded.any():
        full = _with(groups, crowded)
        sets[(sets == MERGED | SETTLED) & full.take(groups)] |= _U64(FULL)
    unequal = results == _NOTEQUAL
    if len(request.anchors) and unequal.any():
        # Pages were found to differ there, and none to be equal.
        misled = _with(groups, unequal)
        misled[groups[results == SUCCESS]] = False
        suspect = request.anchors[misled.take(groups[request.anchors])]
        sets[suspect] = MERGED | PARTNER
        keeps[suspect] = ~_U64(SETTLED | DEEP)
    return sets, keeps


def _with(groups: Array, chosen: Array) -> Array:
    """Return for each group whether it has any of the chosen; the last one is that of the zeros."""
    found = np.zeros(len(groups) + 1, dtype=np.bool_)
    found[groups[chosen]] = True
    return found


def _account(footprint: Footprint, request: Request, results: Array, gained: Array) -> None:
    """Count what was merged, region by region.

    Regions in which something was gained are looked at again soon; that look counts it all anew.
    """
    order, starts, now = footprint.order, footprint.starts, time.monotonic()
    rows = footprint.take_rows()
    mappings = mappings_now(request, results).take(order)
    saved = PAGE_BYTES - PAGE_BYTES / np.maximum(mappings, 1)
    merged = np.add.reduceat((mappings > 0).view(np.uint8), starts, dtype=np.intp)
    rows["merged"] = np.minimum(rows["merged"] + merged, REGION_PAGES)
    rows["saved_bytes"] += np.add.reduceat(saved, starts)
    huge = request.nominated["order"] == HUGE_PAGE_ORDER
    if huge.any():
        rows["split"][np.logical_or.reduceat((gained & huge).take(order), starts)] = now
    here = np.logical_or.reduceat(gained.take(order), starts)
    settles = [part.target.policy.settle_seconds for part in footprint.parts]
    of_regions = footprint.of_regions(settles)
    for settle in set(settles):
        chosen = (here & (of_regions == settle)).nonzero()[0]
        soon = rows.take(chosen)
        schedule.after_merge(soon, now, settle)
        rows[chosen] = soon
    footprint.put_rows(rows)
