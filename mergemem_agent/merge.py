# SPDX-License-Identifier: MIT
"""From nominated pages to MERGE requests, and from results back to what is remembered."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from mergemem_agent.contract import CANDIDATE, PAGE_BYTES, Result
from mergemem_agent.region import REGION_SHIFT

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Request:
    """One MERGE request: `nominated` beside `candidates`, `processes` indexes the caller's list."""

    processes: tuple[int, ...]
    candidates: Array  # contract.CANDIDATE
    nominated: Array  # index.NOMINATED, one for each candidate


# What each result means for the page that got it, beyond being counted.
JOINED: Final = frozenset({Result.SUCCESS, Result.ALREADYSH})
GONE: Final = frozenset({Result.NOTASK1, Result.NOTASK2})


def requests(nominated: Array, max_candidates: int, max_processes: int) -> Iterator[Request]:
    """Cut nominated pages (index.NOMINATED, whole groups) into requests that keep to the limits.

    Raises ValueError when a limit is below 2: a group needs two pages.
    """
    if min(max_candidates, max_processes) < 2:
        raise ValueError("a request must hold at least two candidates and processes")
    pieces = [
        piece
        for group in np.split(nominated, _starts(nominated)[1:])
        for piece in _pieces(group, max_candidates, max_processes)
    ]
    held: list[Array] = []
    pages, processes = 0, set[int]()
    for piece in pieces:
        wanted = set(np.unique(piece["process"]).tolist())
        too_long = pages + len(piece) > max_candidates
        if held and (too_long or len(processes | wanted) > max_processes):
            yield _request(held)
            held, pages, processes = [], 0, set()
        held.append(piece)
        pages += len(piece)
        processes |= wanted
    if held:
        yield _request(held)


def _starts(nominated: Array) -> Array:
    return np.flatnonzero(np.diff(nominated["group"].astype(np.int64), prepend=-1))


def _pieces(group: Array, max_candidates: int, max_processes: int) -> Iterator[Array]:
    """Cut a group that is too large for one request; each piece has the group's anchor.

    A group without an anchor gets one in its first piece, whose first page is merged by the time
    when the next piece is sent.
    """
    if len(group) <= max_candidates and len(np.unique(group["process"])) <= max_processes:
        yield group
        return
    anchor, others = group[:1], group[1:]
    # Ascending by process, a piece of so many pages never has more processes than pages.
    others = others[np.argsort(others["process"], kind="stable")]
    step = max_candidates - 1
    if len(np.unique(group["process"])) > max_processes:
        step = min(step, max_processes - 1)
    for first in range(0, len(others), step):
        yield np.concatenate([anchor, others[first : first + step]])


def _request(pieces: list[Array]) -> Request:
    nominated = np.concatenate(pieces)
    processes, index = np.unique(nominated["process"], return_inverse=True)
    candidates = np.empty(len(nominated), dtype=CANDIDATE)
    address = nominated["number"] << np.uint64(REGION_SHIFT)
    candidates["address"] = address + nominated["page"].astype(np.uint64) * np.uint64(PAGE_BYTES)
    candidates["process"] = index
    # Pieces of one group are groups of their own to the kernel, which finds the anchor in each.
    candidates["group"] = np.repeat(np.arange(len(pieces)), [len(piece) for piece in pieces])
    return Request(tuple(processes.tolist()), candidates, nominated)


def freed_frames(request: Request, results: Array) -> int:
    """Return how many frames a request has freed, by what is known of the pages' map counts.

    The same count as in index.py, over the pages that were merged now: a frame that m mappings
    shared is free when all m were replaced, and a group without an anchor has taken a new one.
    """
    merged = (results == Result.SUCCESS) & ~request.nominated["anchor"]
    groups = request.candidates["group"].astype(np.int64)
    kinds, counts = np.unique(
        groups[merged] << 8 | request.nominated["map_count"][merged], return_counts=True
    )
    anchored = np.isin(np.unique(groups[merged]), groups[request.nominated["anchor"]])
    return int((counts // (kinds & 0xFF)).sum()) - int(np.count_nonzero(~anchored))
