# SPDX-License-Identifier: MIT
"""Cutting nominated pages into requests."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergemem_agent.contract import Result
from mergemem_agent.merge import Request, freed_frames, requests
from mergemem_agent.nominated import NOMINATED

Array = np.ndarray[Any, np.dtype[Any]]


def nominated(groups: list[tuple[bool, list[int]]], map_count: int = 1) -> Array:
    """Return pages of groups, given as (has an anchor, process of each page)."""
    rows: list[tuple[int, ...]] = []
    for group, (anchored, processes) in enumerate(groups):
        for position, process in enumerate(processes):
            first = anchored and position == 0
            page, number = len(rows) % 512, 5 + len(rows) // 512
            rows.append((process, page, first, map_count, number, group, 0))
    return np.array(rows, dtype=NOMINATED)


GROUPS = st.lists(
    st.tuples(st.booleans(), st.lists(st.integers(0, 30), min_size=2, max_size=40)),
    min_size=1,
    max_size=20,
)


@settings(deadline=None)
@given(GROUPS, st.integers(2, 30), st.integers(2, 12))
def test_requests_keep_to_the_limits_and_lose_no_page(
    groups: list[tuple[bool, list[int]]], max_candidates: int, max_processes: int
) -> None:
    pages = nominated(groups)
    sent: Counter[tuple[int, ...]] = Counter()
    for request in requests(pages, max_candidates, max_processes):
        candidates = request.candidates
        assert 2 <= len(candidates) <= max_candidates
        assert len(request.processes) <= max_processes
        assert candidates["group"].max() < len(candidates)
        assert min(Counter(candidates["group"].tolist()).values()) >= 2
        named = np.array(request.processes)[candidates["process"]]
        assert named.tolist() == request.nominated["process"].tolist()
        pages_of = request.nominated["page"].astype(np.uint64)
        expected = request.nominated["number"] * 2**21 + pages_of * np.uint64(4096)
        assert candidates["address"].tolist() == expected.tolist()
        same = candidates["group"][1:] == candidates["group"][:-1]
        assert (np.diff(request.nominated["group"].astype(int))[same] == 0).all()
        sent.update(request.nominated[["number", "page", "group"]].tolist())
    for group, (_, processes) in enumerate(groups):
        members = [tuple(p) for p in pages[pages["group"] == group][["number", "page", "group"]]]
        assert all(sent[member] == 1 for member in members[1:])
        assert 1 <= sent[members[0]] <= len(processes)
    assert set(sent) == set(map(tuple, pages[["number", "page", "group"]].tolist()))


def test_a_large_group_has_its_anchor_in_each_piece() -> None:
    found = list(requests(nominated([(True, [0] * 100)]), 10, 8))
    assert len(found) == 11
    assert all(bool(request.nominated["anchor"][0]) for request in found)


def test_small_groups_share_a_request() -> None:
    (request,) = requests(nominated([(False, [0, 1]), (False, [1, 2])]), 10, 8)
    assert request.processes == (0, 1, 2)
    assert request.candidates["group"].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("limits", [(1, 8), (8, 1)])
def test_impossible_limits_are_refused(limits: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="at least two"):
        list(requests(nominated([(False, [0, 1])]), *limits))


@pytest.mark.parametrize(
    ("anchored", "map_count", "results", "freed"),
    [
        (False, 1, [Result.SUCCESS] * 3, 2),
        (True, 1, [Result.ALREADYSH, Result.SUCCESS, Result.SUCCESS], 2),
        (True, 1, [Result.SUCCESS, Result.NOTEQUAL, Result.BUSY], 0),
        (False, 1, [Result.ALONE, Result.NOTEQUAL, Result.BUSY], 0),
        (False, 2, [Result.SUCCESS] * 4, 1),
        (False, 2, [Result.SUCCESS] * 3 + [Result.PINNED], 0),
    ],
)
def test_freed_frames(anchored: bool, map_count: int, results: list[Result], freed: int) -> None:
    pages = nominated([(anchored, [0] * len(results))], map_count)
    (request,) = requests(pages, 100, 8)
    assert isinstance(request, Request)
    assert freed_frames(request, np.array(results, dtype=np.uint8)) == freed
