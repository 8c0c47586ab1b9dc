# SPDX-License-Identifier: MIT
"""From nominated pages to MERGE requests, and from results back to what is remembered."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np

from mergemem_agent.contract import CANDIDATE, GROUP_ZERO, PAGE_BYTES, Result
from mergemem_agent.nominated import starts_of
from mergemem_agent.region import REGION_SHIFT

Array = np.ndarray[Any, np.dtype[Any]]

_U64 = np.uint64
_PAGE_SHIFT: Final = _U64(PAGE_BYTES.bit_length() - 1)

# Results as arrays hold them: comparing an array with a member of an enum takes four times as long.
SUCCESS: Final = np.uint8(Result.SUCCESS)
ZEROED: Final = np.uint8(Result.ZEROED)


@dataclass(frozen=True)
class Request:
    """One MERGE request: `nominated` beside `candidates`, `processes` indexes the caller's list."""

    processes: tuple[int, ...]
    candidates: Array  # contract.CANDIDATE
    nominated: Array  # index.NOMINATED, one for each candidate
    split_percent: int | None = None  # it may split huge pages of which it holds so much

    @cached_property
    def groups(self) -> Array:
        """The group of each candidate; -1 of those that are in none, as they are zeros."""
        groups = self.candidates["group"].astype(np.int64)
        groups[groups == GROUP_ZERO] = -1
        return groups

    @cached_property
    def anchors(self) -> Array:
        """Where the anchors are; most requests have none."""
        return self.nominated["anchor"].nonzero()[0]

    def merged(self, results: Array) -> Array:
        """Return which candidates are merged now, and were not."""
        merged: Array = results == SUCCESS
        merged[self.anchors] = False
        return merged

    def only(self, chosen: Array) -> Request:
        """Return a request for some of the candidates, whole groups of them."""
        return _request(self.nominated[chosen], self.split_percent)


# What each result means for the page that got it, beyond being counted.
JOINED: Final = frozenset({Result.SUCCESS, Result.ALREADYSH})
GONE: Final = frozenset({Result.NOTASK1, Result.NOTASK2})


def requests(nominated: Array, max_candidates: int, max_processes: int) -> Iterator[Request]:
    """Cut nominated pages (index.NOMINATED, whole groups) into requests that keep to the limits.

    Raises ValueError when a limit is below 2: a group needs two pages.
    """
    if min(max_candidates, max_processes) < 2:
        raise ValueError("a request must hold at least two candidates and processes")
    starts = [*starts_of(nominated["group"]).tolist(), len(nominated)]
    # Processes are counted group by group only where there are that many of them.
    many = np.count_nonzero(np.bincount(nominated["process"])) > max_processes
    first = 0
    while first < len(starts) - 1:
        end = bisect_right(starts, starts[first] + max_candidates) - 1
        if many:
            end = _with_few_processes(nominated, starts, first, end, max_processes)
        if end > first:
            yield _request(nominated[starts[first] : starts[end]])
            first = end
        else:
            group = nominated[starts[first] : starts[first + 1]]
            yield from map(_request, _pieces(group, max_candidates, max_processes))
            first += 1


def _with_few_processes(
    nominated: Array, starts: list[int], first: int, end: int, max_processes: int
) -> int:
    """Return how far the groups from `first` on, before `end`, are of so few processes."""
    processes = set[int]()
    for group in range(first, end):
        processes.update(nominated["process"][starts[group] : starts[group + 1]].tolist())
        if len(processes) > max_processes:
            return group
    return end


def _pieces(group: Array, max_candidates: int, max_processes: int) -> Iterator[Array]:
    """Cut a group that is too large for one request; each piece has the group's anchor.

    A group without an anchor gets one in its first piece, whose first page is merged by the time
    when the next piece is sent.
    """
    anchor, others = group[:1], group[1:]
    # Ascending by process, a piece of so many pages never has more processes than pages.
    others = others[np.argsort(others["process"], kind="stable")]
    step = max_candidates - 1
    if len(np.unique(group["process"])) > max_processes:
        step = min(step, max_processes - 1)
    for first in range(0, len(others), step):
        yield np.concatenate([anchor, others[first : first + step]])


def request_for(pieces: list[Array], split_percent: int | None = None) -> Request:
    """Return one request for some groups; zero-filled pages are one of them."""
    return _request(np.concatenate(pieces), split_percent)


def _request(nominated: Array, split_percent: int | None = None) -> Request:
    named = np.bincount(nominated["process"]) > 0
    candidates = np.empty(len(nominated), dtype=CANDIDATE)
    address = nominated["number"] << _U64(REGION_SHIFT)
    address |= nominated["page"].astype(np.uint64) << _PAGE_SHIFT
    candidates["address"] = address
    candidates["process"] = (np.cumsum(named) - 1).take(nominated["process"])
    # Pieces of one group are groups of their own to the kernel, which finds the anchor in each.
    group = nominated["group"]
    begins = np.zeros(len(group), dtype=np.intp)
    np.not_equal(group[1:], group[:-1], out=begins[1:], casting="unsafe")
    candidates["group"] = np.cumsum(begins)
    candidates["group"][group == GROUP_ZERO] = GROUP_ZERO
    return Request(tuple(named.nonzero()[0].tolist()), candidates, nominated, split_percent)


def freed_frames(request: Request, results: Array) -> int:
    """Return how many frames a request has freed, by what is known of the pages' map counts.

    The same count as in index.py, over the pages that were merged now: a frame that m mappings
    shared is free when all m were replaced, and a group without an anchor has taken a new one.
    Zero-filled pages are not among them: see zero_freed_frames().
    """
    merged = request.merged(results)
    map_counts = request.nominated["map_count"][merged]
    replaced = len(map_counts)
    if not (map_counts == 1).all():
        kinds, counts = np.unique(request.groups[merged] << 8 | map_counts, return_counts=True)
        replaced = int((counts // (kinds & 0xFF)).sum())
    return replaced - len(new_frames(request, results))


def new_frames(request: Request, results: Array) -> Array:
    """Return the groups for which the kernel has made a new shared frame."""
    groups = request.groups
    made = np.zeros(len(groups), dtype=np.bool_)
    made[groups[request.merged(results)]] = True
    made[groups[request.anchors]] = False
    return made.nonzero()[0]


def zero_freed_frames(request: Request, results: Array) -> int:
    """Return how many frames were freed because the kernel's zero page has taken their place."""
    counts = np.bincount(request.nominated["map_count"][results == ZEROED])
    return int((counts // np.maximum(np.arange(len(counts)), 1)).sum())


def mappings_now(request: Request, results: Array) -> Array:
    """Return for each candidate that was merged how many mappings its frame has by now, else 0.

    As far as the request tells; the next look counts them all.
    """
    groups, anchors = request.groups, request.anchors
    merged = request.merged(results)
    mappings = np.bincount(groups[merged], minlength=len(groups))
    if len(anchors):
        np.add.at(mappings, groups[anchors], request.nominated["map_count"][anchors])
    now: Array = mappings.take(groups)
    now *= merged
    return now


def split_folios(request: Request, results: Array) -> int:
    """Return how many huge pages and large folios a request has split.

    One that fork shares is seen in each process, at the same address: it counts once.
    """
    nominated = request.nominated
    split = (nominated["order"] > 0) & ((results == SUCCESS) | (results == ZEROED))
    pages = nominated[split]
    seen = np.empty(len(pages), dtype=[("number", "u8"), ("block", "u2"), ("map_count", "u1")])
    seen["number"], seen["map_count"] = pages["number"], pages["map_count"]
    seen["block"] = pages["page"] >> pages["order"]
    folios: dict[tuple[int, ...], set[int]] = {}
    for folio, process in zip(seen.tolist(), pages["process"].tolist(), strict=True):
        folios.setdefault(folio, set()).add(process)
    return sum(-(-len(owners) // max(1, folio[-1])) for folio, owners in folios.items())
