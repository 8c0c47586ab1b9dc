# SPDX-License-Identifier: MIT
"""The index against a naive model: a dictionary from checksum to pages."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergemem_agent import index
from mergemem_agent.contract import RECORD, State
from mergemem_agent.region import REGION_PAGES, Regions
from mergemem_agent.window import Stretch, Window
from mergemem_agent.word import FULL, MERGED, SETTLED

MAX_MAPPINGS = 100
Place = tuple[int, int, int]  # process, region, page


@dataclass(frozen=True)
class Page:
    content: int
    map_count: int
    state: State
    settled: bool


def checksum(content: int) -> int:
    """Return what stands for a checksum of the content: 64 well-mixed bits."""
    return (content + 1) * 0x9E37_79B9_7F4A_7C15 % 2**64


def regions_of(pages: dict[tuple[int, int], Page]) -> Regions:
    """Return what two looks remember of one process's pages, by region and page."""
    regions = Regions()
    regions.replace(np.array(sorted({number for number, _ in pages}), dtype=np.uint64))
    for row, number in enumerate(regions.rows["number"].tolist()):
        records = np.zeros(REGION_PAGES, dtype=RECORD)
        unsettled = []
        for (where, position), page in pages.items():
            if where == number:
                records[position] = (checksum(page.content), page.map_count, page.state, 0)
                if not page.settled:
                    unsettled.append(position)
        Window([Stretch(regions, row, 1)]).look(records, 100.0, 10.0, MAX_MAPPINGS)
        Window([Stretch(regions, row, 1)]).look(records, 110.0, 10.0, MAX_MAPPINGS)
        regions.mark(row, np.array(unsettled), 0, SETTLED)
    return regions


def naive(pages: dict[Place, Page]) -> tuple[set[frozenset[Place]], dict[int, set[Place]]]:
    """Return the pages of each group without anchors, and possible anchors by content."""
    groups: dict[int, list[Place]] = defaultdict(list)
    anchors: dict[int, set[Place]] = defaultdict(set)
    for place, page in pages.items():
        if page.state is State.MERGED:
            if page.map_count < MAX_MAPPINGS:
                anchors[page.content].add(place)
        elif page.state is State.ANON and page.settled:
            groups[page.content].append(place)
    nominated = set()
    for content, places in groups.items():
        by_map_count: dict[int, list[Place]] = defaultdict(list)
        for place in places:
            by_map_count[pages[place].map_count].append(place)
        useful = {m: p for m, p in by_map_count.items() if len(p) >= m}
        freed = sum(len(p) // m for m, p in useful.items())
        if freed - (0 if anchors[content] else 1) > 0:
            nominated.add(frozenset(place for p in useful.values() for place in p))
    return nominated, anchors


def nominated_groups(processes: list[Regions]) -> list[list[Any]]:
    groups = []
    for array in index.nominate(processes):
        splits = np.flatnonzero(np.diff(array["group"].astype(int))) + 1
        groups += [part.tolist() for part in np.split(array, splits)]
        assert array["group"].tolist() == sorted(array["group"].tolist())
    return groups


PAGES = st.dictionaries(
    st.tuples(st.integers(0, 3), st.sampled_from([5, 6, 9, 2**26]), st.integers(0, 511)),
    st.builds(
        Page,
        content=st.integers(0, 12),
        map_count=st.sampled_from([1, 1, 1, 2, 3]),
        state=st.sampled_from([*[State.ANON] * 6, State.MERGED, State.HUGE, State.PINNED]),
        settled=st.sampled_from([True, True, True, False]),
    ),
    max_size=120,
)


@settings(max_examples=60, deadline=None)
@given(PAGES, st.sampled_from([2, 16, 16384]))
def test_groups_are_those_of_the_naive_model(pages: dict[Place, Page], chunk: int) -> None:
    by_process: list[dict[tuple[int, int], Page]] = [{} for _ in range(4)]
    for (process, number, position), page in pages.items():
        by_process[process][number, position] = page
    expected, anchors = naive(pages)
    before = index.MIN_CHUNK_PAGES
    index.MIN_CHUNK_PAGES = max(chunk, len(pages))  # type: ignore[misc]  # never full: see below
    try:
        groups = nominated_groups([regions_of(each) for each in by_process])
    finally:
        index.MIN_CHUNK_PAGES = before  # type: ignore[misc]
    found = set()
    for group in groups:
        places = [(process, number, page) for process, page, _, _, number, _, _ in group]
        flags = [anchor for _, _, anchor, _, _, _, _ in group]
        content = pages[places[0]].content
        assert flags == [flags[0]] + [False] * (len(flags) - 1), "the anchor is first"
        assert flags[0] == bool(anchors[content])
        if flags[0]:
            assert places.pop(0) in anchors[content]
        found.add(frozenset(places))
    assert found == expected


def test_a_full_chunk_splits_a_group_and_loses_none() -> None:
    pages = {(1, position): Page(7, 1, State.ANON, True) for position in range(512)}
    before = index.MIN_CHUNK_PAGES
    index.MIN_CHUNK_PAGES = 100  # type: ignore[misc]
    try:
        groups = nominated_groups([regions_of(pages)])
    finally:
        index.MIN_CHUNK_PAGES = before  # type: ignore[misc]
    assert len(groups) > 1
    places = [(number, page) for group in groups for _, page, _, _, number, _, _ in group]
    assert sorted(places) == sorted(pages)


def test_what_is_marked_between_two_nominations_is_seen() -> None:
    contents = {position: position // 2 for position in range(512)}
    regions = regions_of({(1, p): Page(c, 1, State.ANON, True) for p, c in contents.items()})
    arrays = index.nominate([regions])
    first = next(arrays)
    regions.mark(0, np.arange(512), 0, SETTLED)
    assert len(first)
    assert list(arrays) == []


@pytest.mark.parametrize(
    ("map_counts", "anchored", "gain"),
    [
        ([1, 1], False, True),
        ([1], True, True),
        ([1], False, False),
        ([2, 2], False, False),  # one frame, shared by fork
        ([2, 2], True, True),
        ([2, 2, 1], False, True),
        ([2, 1], False, False),  # the other half of the first is somewhere else
        ([3, 3, 3, 3, 3, 3], False, True),
        ([255] * 255, True, False),  # "many": shared well already
    ],
)
def test_expected_gain(map_counts: list[int], anchored: bool, gain: bool) -> None:
    pages = {
        (1, position): Page(1, count, State.ANON, True) for position, count in enumerate(map_counts)
    }
    if anchored:
        pages[2, 0] = Page(1, 2, State.MERGED, True)
    assert bool(nominated_groups([regions_of(pages)])) == gain


def test_a_full_frame_is_no_anchor() -> None:
    regions = regions_of(
        {(1, 0): Page(1, 2, State.MERGED, True), (1, 1): Page(1, 1, State.ANON, True)}
    )
    assert nominated_groups([regions])
    regions.mark(0, np.array([0]), FULL | MERGED, 0)
    assert not nominated_groups([regions])


def test_nothing_comes_of_nothing() -> None:
    assert nominated_groups([]) == []
    assert nominated_groups([Regions(), Regions()]) == []


def test_merged_pages_that_nobody_has_read_are_nobody_s_partners() -> None:
    regions = Regions()
    regions.replace(np.array([1], dtype=np.uint64))
    records = np.zeros(REGION_PAGES, dtype=RECORD)
    records[:10] = (0, 2, State.MERGED, 0)
    records[10] = (1, 1, State.ANON, 0)  # its sample is 0, as theirs seem to be
    Window([Stretch(regions, 0, 1)]).look(
        records, 1.0, 10.0, MAX_MAPPINGS, full=np.zeros(REGION_PAGES, bool)
    )
    marked: list[int] = []
    found = index.nominate([regions], marker=lambda words, _: marked.append(len(words)))
    assert list(found) == []
    assert marked == []
