# SPDX-License-Identifier: MIT
"""What the results of a MERGE request change: the counts, and what is remembered of its pages."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from mergemem_agent import schedule
from mergemem_agent.contract import GROUP_ZERO, PAGE_BYTES, Result
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
from mergemem_agent.region import REGION_PAGES, Regions, positions
from mergemem_agent.targets import Target
from mergemem_agent.word import DEEP, FULL, HUGE, MERGED, PARTNER, SETTLED

Array = np.ndarray[Any, np.dtype[Any]]
_U64 = np.uint64

# What became of one page of a request.
_OUTCOME = np.dtype(
    [
        ("number", np.uint64),  # of its region
        ("sets", np.uint64),  # flags that its word gets
        ("keeps", np.uint64),  # and all those that it does not lose
        ("saved_bytes", np.float64),
        ("page", np.uint16),
        ("merged", np.bool_),  # it is a merged page now, and was none
        ("gained", np.bool_),  # it was merged, or replaced by the zero page
        ("split", np.bool_),  # it was part of a huge page, which was split
    ]
)


def count(counts: Counts, targets: Sequence[Target], request: Request, results: Array) -> None:
    """Count results and freed frames: small pages, huge pages and zeros apart."""
    for code in np.flatnonzero(np.bincount(results)).tolist():
        counts.results[Result(code)] += int(np.count_nonzero(results == code))
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
    replaced, or that failed, for whatever reason, has to settle again: it is read in full once
    more when its region is due, with the back-off of that. One that met a full frame stays
    nominated, and that frame's pages stop being anchors. So does an anchor that nobody is equal to:
    it was written to between its last checksum and its merge, and is to be read in full.
    """
    pages = request.nominated
    joined = np.isin(results, list(JOINED))
    crowded = results == Result.MOREMAP
    groups = request.candidates["group"]
    of_full_frame = joined & np.isin(groups, groups[crowded])
    failed = ~joined & ~crowded
    sets = np.where(joined, _U64(MERGED | SETTLED), _U64(0))
    sets |= np.where(of_full_frame, _U64(FULL), _U64(0))
    sets |= np.where(failed & (groups != GROUP_ZERO), _U64(PARTNER), _U64(0))
    clears = np.where(joined, _U64(HUGE), np.where(failed, _U64(SETTLED), _U64(0)))
    suspect = pages["anchor"] & np.isin(groups, _misled(groups, results))
    sets[suspect] = _U64(MERGED | PARTNER)
    clears[suspect] = _U64(SETTLED | DEEP)

    mappings = mappings_now(request, results)
    gained = (results == Result.SUCCESS) | (results == Result.ZEROED)
    outcomes = np.empty(len(pages), dtype=_OUTCOME)
    outcomes["number"], outcomes["page"] = pages["number"], pages["page"]
    outcomes["sets"], outcomes["keeps"] = sets, ~clears
    outcomes["merged"], outcomes["gained"] = mappings > 0, gained
    saved = PAGE_BYTES - PAGE_BYTES / np.maximum(mappings, 1)
    outcomes["saved_bytes"] = np.where(mappings > 0, saved, 0.0)
    outcomes["split"] = gained & (pages["order"] == HUGE_PAGE_ORDER)
    now = time.monotonic()
    order = np.lexsort((pages["page"], pages["number"], pages["process"]))
    owners, starts = np.unique(pages["process"][order], return_index=True)
    for owner, mine in zip(owners.tolist(), np.split(order, starts[1:]), strict=True):
        target = targets[owner]
        _apply(target.regions, outcomes[mine], now, target.policy.settle_seconds)


def _apply(regions: Regions, outcomes: Array, now: float, settle: float) -> None:
    """Let outcomes, in order of addresses, change what is remembered of one process."""
    numbers = regions.rows["number"]
    if not len(numbers):
        return
    rows = np.minimum(numbers.searchsorted(outcomes["number"]), len(numbers) - 1)
    known = numbers[rows] == outcomes["number"]
    rows, outcomes = rows[known], outcomes[known]
    if not len(rows):
        return
    starts = np.flatnonzero(np.diff(rows, prepend=-1))
    ends = [*starts[1:].tolist(), len(rows)]
    pages, sets, keeps = outcomes["page"], outcomes["sets"], outcomes["keeps"]
    before, after = [], []
    for row, start, end in zip(rows[starts].tolist(), starts.tolist(), ends, strict=True):
        words = regions.words_of(row)
        at, found = positions(words, pages[start:end])
        old = words[at]
        words[at] = new = (old & keeps[start:end][found]) | sets[start:end][found]
        before.append(old)
        after.append(new)
    regions.moved(np.concatenate(before), np.concatenate(after))
    _account(regions, rows[starts], starts, outcomes, now, settle)


def _account(
    regions: Regions, rows: Array, starts: Array, outcomes: Array, now: float, settle: float
) -> None:
    """Count what was merged in some rows, of which the outcomes begin at `starts`.

    Regions in which something was gained are looked at again soon; that look counts it all anew.
    """
    here = regions.rows[rows]
    merged = np.add.reduceat(outcomes["merged"].astype(np.uint16), starts)
    here["merged"] = np.minimum(here["merged"] + merged, REGION_PAGES)
    here["saved_bytes"] += np.add.reduceat(outcomes["saved_bytes"], starts)
    here["split"][np.logical_or.reduceat(outcomes["split"], starts)] = now
    gained = np.logical_or.reduceat(outcomes["gained"], starts)
    if gained.any():
        soon = here[gained]
        schedule.after_merge(soon, now, settle)
        here[gained] = soon
    regions.rows[rows] = here
    regions.changed()


def _misled(groups: Array, results: Array) -> Array:
    """Return the groups in which pages were found to differ, and none to be equal."""
    return np.setdiff1d(groups[results == Result.NOTEQUAL], groups[results == Result.SUCCESS])
