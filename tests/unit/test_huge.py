# SPDX-License-Identifier: MIT
"""Huge pages: which ones are split, by requests that hold enough of each."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergemem_agent import huge, index
from mergemem_agent.contract import GROUP_ZERO, RECORD, Result, State
from mergemem_agent.huge import HugeTally, needed_pages
from mergemem_agent.info import Limits
from mergemem_agent.look import Wanted
from mergemem_agent.merge import Request, split_folios
from mergemem_agent.policy import MergeRules
from mergemem_agent.region import REGION_PAGES, Regions
from mergemem_agent.search import search
from mergemem_agent.window import Stretch, Window
from mergemem_agent.word import HUGE, MERGED, SETTLED

Array = np.ndarray[Any, np.dtype[Any]]

ZEROS = -1  # stands for the content of a page of zeros
LIMITS = Limits(1024, 4000, 16384, 4096, 0)


@dataclass(frozen=True)
class Block:
    """A region: the contents of its 512 pages, and the order of the folios that they are in."""

    contents: list[int]
    order: int = 9
    map_count: int = 1

    def records(self) -> Array:
        records = np.zeros(REGION_PAGES, dtype=RECORD)
        contents = np.array(self.contents, dtype=np.int64)
        zero = contents == ZEROS
        # Well mixed, as checksums are.
        records["checksum"] = (contents + 2).astype(np.uint64) * np.uint64(0x9E37_79B9_7F4A_7C15)
        records["map_count"], records["order"] = self.map_count, self.order
        records["state"] = State.HUGE if self.order else State.ANON
        records["state"][zero] = State.ZERO
        return records


def settled(blocks: dict[int, Block]) -> Regions:
    """Return what two looks remember of a process with these regions."""
    regions = Regions()
    regions.replace(np.array(sorted(blocks), dtype=np.uint64))
    for row, number in enumerate(sorted(blocks)):
        for now in (100.0, 110.0):
            records = blocks[number].records()
            Window([Stretch(regions, row, 1)]).look(
                records, now, 10.0, 4096, Wanted(huge=True, zero=True)
            )
    return regions


def found(processes: list[Regions], percent: int | None = 25, most: int = 4000) -> list[Request]:
    """Return the requests that a search makes, those for huge pages only."""
    limits = Limits(1024, most, 16384, 4096, 0)
    return [
        request
        for request in search(processes, MergeRules(percent), limits)
        if request.split_percent is not None
    ]


def pages_of(request: Request) -> Counter[tuple[int, int, int]]:
    """Count the candidates of each huge page: process, region, block within it."""
    pages = request.nominated[request.nominated["order"] > 0]
    return Counter(
        zip(
            pages["process"].tolist(),
            pages["number"].tolist(),
            (pages["page"] >> pages["order"]).tolist(),
            strict=True,
        )
    )


def unique(start: int) -> list[int]:
    return list(range(start, start + REGION_PAGES))


SAME = unique(1)


def test_siblings_are_split_together_and_evenly() -> None:
    (request,) = found([settled({5: Block(SAME)}) for _ in range(8)])
    assert len(request.candidates) <= 4000
    counts = pages_of(request)
    assert set(counts) == {(process, 5, 0) for process in range(8)}
    assert set(counts.values()) == {500}
    assert request.split_percent == 25


def test_more_siblings_than_one_request_can_hold() -> None:
    processes = [settled({5: Block(SAME)}) for _ in range(40)]
    seen: Counter[tuple[int, int, int]] = Counter()
    for request in search(processes, MergeRules(25), LIMITS):
        seen.update(pages_of(request))
        assert min(pages_of(request).values()) >= needed_pages(25, 9)
        # As the results would have it.
        for row in request.nominated:
            regions = processes[row["process"]]
            regions.mark(
                regions.find(int(row["number"])) or 0,
                np.array([row["page"]]),
                MERGED | SETTLED,
                HUGE,
            )
    assert set(seen) == {(process, 5, 0) for process in range(40)}


def test_copies_at_other_offsets_find_each_other() -> None:
    """The same data, shifted by 100 pages: each huge page has its partners in two others."""
    data = list(range(1, 4 * REGION_PAGES + 1))
    one = {number: Block(data[number * 512 :][:512]) for number in range(4)}
    shifted = [-1000 - n for n in range(100)] + data
    other = {10 + number: Block(shifted[number * 512 :][:512]) for number in range(4)}
    split = set().union(*(pages_of(request) for request in found([settled(one), settled(other)])))
    assert {(0, number, 0) for number in range(4)} <= split
    assert {(1, 10 + number, 0) for number in range(4)} <= split


@pytest.mark.parametrize(("shared", "split"), [(127, False), (128, True)])
def test_the_share_decides(shared: int, split: bool) -> None:
    blocks = [Block(SAME[:shared] + unique(1000 * (n + 1))[shared:]) for n in range(2)]
    assert bool(found([settled({5: block}) for block in blocks])) == split


@pytest.mark.parametrize(("zeros", "split"), [(127, False), (128, True)])
def test_zeros_count_and_need_no_partner(zeros: int, split: bool) -> None:
    block = Block([ZEROS] * zeros + unique(1000)[zeros:])
    requests = found([settled({5: block})])
    assert bool(requests) == split
    for request in requests:
        assert set(request.candidates["group"].tolist()) == {GROUP_ZERO}


def test_zeros_and_partners_add_up() -> None:
    blocks = [Block([ZEROS] * 64 + SAME[64:128] + unique(1000 * (n + 1))[128:]) for n in range(2)]
    (request,) = found([settled({5: block}) for block in blocks])
    assert set(pages_of(request).values()) == {128}


def test_many_huge_pages_of_zeros() -> None:
    """512 zeros in each of 40 huge pages: five requests, each with enough of its huge pages."""
    requests = found([settled({n: Block([ZEROS] * REGION_PAGES) for n in range(40)})])
    seen: set[tuple[int, int, int]] = set()
    for request in requests:
        assert len(request.candidates) <= 4000
        assert min(pages_of(request).values()) >= 128
        seen |= set(pages_of(request))
    assert len(seen) == 40


def test_a_small_page_is_partner_enough() -> None:
    (request,) = found([settled({5: Block(SAME)}), settled({9: Block(SAME, order=0)})])
    assert set(pages_of(request)) == {(0, 5, 0)}


def test_what_fork_shares_still_is_left_whole() -> None:
    assert not found([settled({5: Block(SAME, map_count=3)}) for _ in range(3)])
    assert found([settled({5: Block(SAME, map_count=3)}) for _ in range(6)])


def test_without_split_no_huge_page_is_nominated() -> None:
    processes = [settled({5: Block(SAME), 6: Block(SAME, order=0)}) for _ in range(2)]
    requests = list(search(processes, MergeRules(None), LIMITS))
    assert {int(n) for request in requests for n in request.nominated["number"]} == {6}


def test_what_was_split_is_left_alone_for_a_while() -> None:
    processes = [settled({5: Block(SAME)}) for _ in range(2)]
    for regions in processes:
        regions.rows["split"] = 1000.0
    assert not list(HugeTally(processes, 1001.0)._gain)
    assert HugeTally(processes, 1000.0 + huge.SPLIT_REST_SECONDS + 1)


def test_large_folios_are_judged_in_blocks() -> None:
    """64 KiB folios: the first of each region has partners, the others have not."""
    blocks = [Block(SAME[:16] + unique(1000 * (n + 1))[16:], order=4) for n in range(2)]
    (request,) = found([settled({5: block}) for block in blocks])
    assert pages_of(request) == {(0, 5, 0): 16, (1, 5, 0): 16}


CONTENTS = st.lists(
    st.one_of(st.integers(0, 40), st.just(ZEROS), st.integers(10**6, 2 * 10**6)),
    min_size=8,
    max_size=8,
).flatmap(
    lambda seeds: st.just(
        # A few seeds make 512 pages: runs of equal, distinct-but-shared, or unique contents.
        [
            seed if seed < 20 else seed * 1000 + (page if seed < 10**6 else page + 64 * run)
            for run, seed in enumerate(seeds)
            for page in range(64)
        ]
    )
)
BLOCKS = st.dictionaries(
    st.tuples(st.integers(0, 2), st.integers(0, 3)),
    st.builds(Block, CONTENTS, st.sampled_from([9, 9, 9, 4, 6, 0]), st.sampled_from([1, 1, 2])),
    max_size=8,
)


@settings(max_examples=150, deadline=None)
@given(BLOCKS, st.sampled_from([1, 25, 60, 100]), st.sampled_from([600, 4000]))
def test_requests_keep_all_promises(
    blocks: dict[tuple[int, int], Block], percent: int, most: int
) -> None:
    processes = [
        settled({number: block for (owner, number), block in blocks.items() if owner == process})
        for process in range(3)
    ]
    for request in found(processes, percent, most):
        candidates, nominated = request.candidates, request.nominated
        assert 1 <= len(candidates) <= most
        assert len(np.unique(candidates[["process", "address"]])) == len(candidates)
        # Whoever is in it is in it with enough pages.
        for (process, number, _), count in pages_of(request).items():
            order = max(blocks[process, number].order, huge.MIN_BLOCK_ORDER)
            assert count >= needed_pages(percent, order)
        # Groups are equal pages, and worth it; zeros are zeros.
        for group in np.unique(candidates["group"]):
            members = nominated[candidates["group"] == group]
            contents = {
                blocks[int(m["process"]), int(m["number"])].contents[int(m["page"])]
                for m in members
            }
            assert len(contents) == 1
            assert (contents == {ZEROS}) == (group == GROUP_ZERO)
            if group != GROUP_ZERO:
                assert len(members) >= 2
                kinds = Counter(members["map_count"].tolist())
                assert group < len(candidates)
                assert sum(count // m for m, count in kinds.items()) >= 1


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6), max_size=30))
def test_the_majority_is_the_leader(shares: list[list[int]]) -> None:
    """Boyer and Moore: whoever has more than half of the votes in each share wins."""
    tally = HugeTally([settled({n: Block(unique(0)) for n in range(12)})], 0.0)
    for share in shares:
        votes = [*share, *[11] * (len(share) + 1)]
        tally._vote(np.zeros(len(votes), dtype=np.intp), np.array(votes, dtype=np.uint32))
    assert not shares or tally._leader[0] == 11


def test_a_few_other_votes_do_not_unseat_the_leader() -> None:
    tally = HugeTally([settled({n: Block(unique(0)) for n in range(3)})], 0.0)
    for share in ([1] * 5, [2], [2, 2]):
        tally._vote(np.zeros(len(share), dtype=np.intp), np.array(share, dtype=np.uint32))
    assert (tally._leader[0], tally._votes[0]) == (1, 2)


def test_what_is_below_the_share_is_not_even_looked_at() -> None:
    blocks = [Block(SAME[:100] + unique(1000 * (n + 1))[100:]) for n in range(2)]
    processes = [settled({5: block}) for block in blocks]
    tally = HugeTally(processes)
    assert not list(index.nominate(processes, tally.show))
    assert not list(tally.clusters(25))
    assert list(tally.clusters(19)) == [[(0, 5), (1, 5)]]


def test_counts_are_those_of_all_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the checksums searched in 128 parts, nothing is counted twice, nothing is lost."""
    monkeypatch.setattr(index, "MIN_CHUNK_PAGES", 8)
    processes = [settled({5: Block(SAME)}), settled({7: Block(SAME[:300] + unique(5000)[300:])})]
    tally = HugeTally(processes)
    assert not list(index.nominate(processes, tally.show))
    assert tally._gain.tolist() == [300, 300]


def test_split_folios_are_counted_once() -> None:
    requests = found([settled({5: Block(SAME, map_count=2)}) for _ in range(4)])
    (request,) = requests
    results = np.full(len(request.candidates), Result.SUCCESS, dtype=np.uint8)
    # Four processes, and each frame is mapped twice: two huge pages.
    assert split_folios(request, results) == 2
    results[:] = Result.HUGE
    assert split_folios(request, results) == 0
