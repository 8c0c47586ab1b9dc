# SPDX-License-Identifier: MIT
"""What the results of a MERGE request change: the counts, and what is remembered of its pages."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mergemem_agent.contract import PAGE_BYTES, Result
from mergemem_agent.counts import Counts
from mergemem_agent.huge import HUGE_PAGE_ORDER
from mergemem_agent.merge import (
    JOINED,
    Request,
    freed_frames,
    mappings_now,
    split_folios,
    zero_freed_frames,
)
from mergemem_agent.region import FULL, HUGE, MERGED, SETTLED
from mergemem_agent.targets import Target

Array = np.ndarray[Any, np.dtype[Any]]


def count(counts: Counts, targets: Sequence[Target], request: Request, results: Array) -> None:
    """Count results and freed frames: small pages, huge pages and zeros apart."""
    counts.results.update(Result(code) for code in results.tolist())
    counts.zero_freed_pages += zero_freed_frames(request, results)
    owners = request.nominated["process"][results == Result.ZEROED]
    for index, pages in zip(*np.unique(owners, return_counts=True), strict=True):
        counts.policy(targets[int(index)].policy.name).zeroed += int(pages)
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
    replaced, or that failed, for whatever reason, has to settle again: another look or two, with
    the back-off of its region. One that met a full frame stays nominated, and that frame's pages
    stop being anchors.
    """
    pages = request.nominated
    joined = np.isin(results, list(JOINED))
    crowded = results == Result.MOREMAP
    of_full_frame = joined & np.isin(
        request.candidates["group"], request.candidates["group"][crowded]
    )
    _mark(targets, pages[joined], MERGED | SETTLED, HUGE)
    _mark(targets, pages[of_full_frame], FULL, 0)
    _mark(targets, pages[~joined & ~crowded], 0, SETTLED)
    _account(targets, request, results)
    _revisit(targets, pages[np.isin(results, [Result.SUCCESS, Result.ZEROED])])


def _mark(targets: Sequence[Target], pages: Array, set_flags: int, clear_flags: int) -> None:
    for target, number, here in _by_region(targets, pages):
        target.regions.mark(number, here["page"], set_flags, clear_flags)


def _account(targets: Sequence[Target], request: Request, results: Array) -> None:
    """Let the figures have what was merged, before the next look at it."""
    mappings = mappings_now(request, results)
    merged = mappings > 0
    pages, mappings = request.nominated[merged], mappings[merged]
    saved = (PAGE_BYTES - PAGE_BYTES / mappings[_region_order(pages)]).tolist()
    done = 0
    for target, number, here in _by_region(targets, pages):
        target.regions.merged(number, len(here), sum(saved[done : done + len(here)]))
        done += len(here)


def _revisit(targets: Sequence[Target], pages: Array) -> None:
    now = time.monotonic()
    for target, number, here in _by_region(targets, pages):
        target.regions.revisit(number, now, target.policy.settle_seconds)
        if (here["order"] == HUGE_PAGE_ORDER).any():
            target.regions.split(number, now)


def _by_region(targets: Sequence[Target], pages: Array) -> Iterator[tuple[Target, int, Array]]:
    """Split nominated pages by the region in which they lie."""
    if not len(pages):
        return
    pages = pages[_region_order(pages)]
    new_region = (np.diff(pages["number"]) != 0) | (np.diff(pages["process"]) != 0)
    for part in np.split(pages, np.flatnonzero(new_region) + 1):
        yield targets[int(part["process"][0])], int(part["number"][0]), part


def _region_order(pages: Array) -> Array:
    return np.lexsort((pages["number"], pages["process"]))
