# SPDX-License-Identifier: MIT
"""Merging: equal pages get one frame, across processes and within one."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kernel import frames
from tests.kernel.actor import Stage
from tests.kernel.contract import Result
from tests.kernel.module import Module
from tests.kernel.sharing import flat, merge_all, pairs, write_privately
from tests.kernel.wire import Client

SUCCESS, ALREADYSH = Result.SUCCESS, Result.ALREADYSH


@pytest.mark.parametrize("processes", [2, 3])
def test_across_processes(stage: Stage, client: Client, processes: int) -> None:
    regions = [stage.start().region(4, seed=1) for _ in range(processes)]
    merge_all(client, *regions)
    for number, region in enumerate(regions):
        write_privately(region, 2, *regions[number + 1 :])
    # The pages next to the written one are shared as before.
    frames.assert_shared([region[1] for region in regions])
    frames.assert_shared([region[3] for region in regions])


def test_within_one_process(stage: Stage, client: Client) -> None:
    region = stage.start().region(3, seed=2, period=1)
    frames.assert_distinct(region)
    assert client.merge(list(region)) == [[SUCCESS] * 3]
    shared = frames.assert_shared(region)
    region.write(1, region.original(1) ^ 0xFF)
    assert [int(frame) == shared for frame in region.frames] == [True, False, True]
    assert [region.read(n) == region.original(n) for n in range(3)] == [True, False, True]


def test_group_of_a_thousand(stage: Stage, client: Client) -> None:
    regions = [stage.start().region(250, seed=3, period=1) for _ in range(4)]
    pages = [page for region in regions for page in region]
    assert len({page.frame for page in pages}) == 1000
    assert client.merge(pages) == [[SUCCESS] * 1000]
    shared = frames.assert_shared(pages)
    info = client.info()
    assert (info.shared_pages, info.shared_mappings) == (1, 1000)
    for region in regions:
        region.verify()
        region.write(249, region.original(249) ^ 0xFF)
        region.write(249, region.original(249))
        region.verify()
    assert frames.map_count(shared) == 996
    assert client.info().shared_mappings == 996


def test_many_groups_over_page_tables_and_batches(stage: Stage, client: Client) -> None:
    """1,300 pages lie in three page tables, in batches of which the last is not full."""
    alice, bob = (stage.start().region(1300, seed=4) for _ in range(2))
    before = np.concatenate([alice.frames, bob.frames])
    assert len(np.unique(before)) == 2600
    assert before.all()
    results = client.merge(*pairs(alice, bob))
    assert results == [[SUCCESS, SUCCESS]] * 1300
    after = alice.frames
    assert (after == bob.frames).all()
    assert len(np.unique(after)) == 1300
    # The survivor is a fresh page, never one that a process had chosen.
    assert not np.isin(after, before).any()
    alice.verify()
    bob.verify()


def test_order_of_candidates_does_not_matter(stage: Stage, client: Client) -> None:
    """Members of a group need be neither neighbours nor sorted."""
    alice, bob = (stage.start().region(64, seed=5) for _ in range(2))
    keys = [alice.actor.key, bob.actor.key]
    candidates = [
        (region[n].address, process, (n * 37) % 64)
        for process, region in ((1, bob), (0, alice))
        for n in reversed(range(64))
    ]
    shuffled = [candidates[(n * 53) % 128] for n in range(128)]
    assert set(client.merge_candidates(keys, shuffled)) == {SUCCESS}
    for group in pairs(alice, bob):
        frames.assert_shared(group)


def test_rss_moves_from_anonymous_to_file(stage: Stage, client: Client) -> None:
    regions = [stage.start().region(512, seed=6) for _ in range(2)]
    before = [(r.actor.status("RssAnon"), r.actor.status("RssFile")) for r in regions]
    merge_all(client, *regions)
    for region, (anonymous, file) in zip(regions, before, strict=True):
        # The kernel keeps these counts per CPU or per task, up to 64 pages late on each.
        assert abs(region.actor.status("RssAnon") - (anonymous - 512)) <= 128
        assert abs(region.actor.status("RssFile") - (file + 512)) <= 128


def test_same_page_twice(stage: Stage, client: Client) -> None:
    alice, bob = (stage.start().region(2, seed=7) for _ in range(2))
    (results,) = client.merge([alice[0], bob[0], alice[0], bob[0], alice[0]])
    # Whichever comes first makes it so; whoever asks again is told that it is so.
    assert sorted(results[0::2]) == [SUCCESS, ALREADYSH, ALREADYSH]
    assert sorted(results[1::2]) == [SUCCESS, ALREADYSH]
    frames.assert_shared([alice[0], bob[0]])
    # In two groups of one request: the first merges it, the other must not undo that.
    results = flat(client.merge([alice[1], bob[1]], [alice[1], bob[1]]))
    assert set(results) <= {SUCCESS, ALREADYSH, Result.ALONE}
    frames.assert_shared([alice[1], bob[1]])
    alice.verify()
    bob.verify()


def test_nothing_but_the_same_page_twice(stage: Stage, client: Client) -> None:
    region = stage.start().region(1, seed=8)
    frame = region[0].frame
    assert client.merge([region[0], region[0]]) == [[ALREADYSH, ALREADYSH]]
    assert region[0].frame == frame
    assert frames.has_flag(frame, frames.KPF_ANON)
    assert client.info().shared_pages == 0


def test_already_shared(stage: Stage, client: Client) -> None:
    alice, bob = (stage.start().region(4, seed=9) for _ in range(2))
    merge_all(client, alice, bob)
    before = alice.frames
    assert client.merge(*pairs(alice, bob)) == [[ALREADYSH, ALREADYSH]] * 4
    assert (alice.frames == before).all()


def test_already_shared_by_fork(stage: Stage, client: Client) -> None:
    parent = stage.start().region(4, seed=10)
    child = parent.of(parent.actor.fork())
    before = parent.frames
    assert (child.frames == before).all()
    assert client.merge(*pairs(parent, child)) == [[ALREADYSH, ALREADYSH]] * 4
    assert (parent.frames == before).all()
    assert client.info().shared_pages == 0


def test_pages_shared_by_fork_join_others(stage: Stage, client: Client) -> None:
    """A frame mapped twice by fork, and an equal one: three mappings of one frame."""
    parent = stage.start().region(4, seed=11)
    child = parent.of(parent.actor.fork())
    other = stage.start().region(4, seed=11)
    assert client.merge(*pairs(parent, child, other)) == [[SUCCESS] * 3] * 4
    for group in pairs(parent, child, other):
        frames.assert_shared(group)
    write_privately(child, 0, parent, other)


def test_others_join_a_merged_page(stage: Stage, client: Client) -> None:
    alice, bob, carol = (stage.start().region(4, seed=12) for _ in range(3))
    merge_all(client, alice, bob)
    before = alice.frames
    # The newcomer comes first in the request, and still the merged page is the one that stays.
    assert client.merge(*pairs(carol, alice)) == [[SUCCESS, ALREADYSH]] * 4
    assert (carol.frames == before).all()
    assert (alice.frames == before).all()
    assert client.info().shared_mappings == 12


def test_two_merged_pages_become_one(stage: Stage, client: Client) -> None:
    regions = [stage.start().region(2, seed=13) for _ in range(4)]
    merge_all(client, *regions[:2])
    merge_all(client, *regions[2:])
    assert client.info().shared_pages == 4
    for results in client.merge(*pairs(*regions)):
        assert sorted(results) == [SUCCESS, SUCCESS, ALREADYSH, ALREADYSH]
    for group in pairs(*regions):
        frames.assert_shared(group)
    info = client.info()
    assert (info.shared_pages, info.shared_mappings) == (2, 8)


def test_alone(stage: Stage, client: Client) -> None:
    alice = stage.start().region(2, seed=14)
    frame = alice[0].frame
    gone = stage.start()
    gone_page = gone.region(1, seed=14)[0]
    gone.exit()
    assert client.merge([alice[0]], [alice[1], gone_page]) == [
        [Result.ALONE],
        [Result.ALONE, Result.NOTASK2],
    ]
    assert alice[0].frame == frame
    assert client.info().shared_pages == 0
    alice.verify()


def test_max_mappings(stage: Stage, module: Module) -> None:
    regions = [stage.start().region(2, seed=15) for _ in range(6)]
    # Few writers have a page that nobody else may join any more: six pages, four mappings.
    with module.reloaded(max_mappings=4), Client() as client:
        assert client.info().limits["max_mappings"] == 4
        for results in client.merge(*pairs(*regions)):
            assert sorted(results) == [SUCCESS] * 4 + [Result.MOREMAP] * 2
        for group in pairs(*regions):
            numbers = [page.frame for page in group]
            (shared,) = {number for number in numbers if numbers.count(number) == 4}
            assert frames.map_count(shared) == 4
            assert sorted(map(numbers.count, numbers)) == [1, 1, 4, 4, 4, 4]
        for region in regions:
            region.verify()


def test_max_shared_bytes(stage: Stage, module: Module) -> None:
    alice, bob = (stage.start().region(3, seed=16) for _ in range(2))
    with module.reloaded(max_shared_bytes=2 * 4096), Client() as client:
        assert client.info().limits["max_shared_bytes"] == 2 * 4096
        before = alice[2].frame, bob[2].frame
        results = client.merge(*pairs(alice, bob))
        assert results == [[SUCCESS] * 2, [SUCCESS] * 2, [Result.NOMEM] * 2]
        assert (alice[2].frame, bob[2].frame) == before
        # Joining a page that is there already costs nothing.
        carol = stage.start().region(3, seed=16)
        assert client.merge([alice[0], carol[0]]) == [[ALREADYSH, SUCCESS]]
        # And when one has gone, there is room again.
        for region in (alice, bob, carol):
            region.write(0, 0)
            region.write(0, region.original(0))
        assert client.merge([alice[2], bob[2]]) == [[SUCCESS] * 2]
        frames.assert_shared([alice[2], bob[2]])
        for region in (alice, bob, carol):
            region.verify()


def test_counters_and_totals(stage: Stage, client: Client) -> None:
    before = client.info()
    alice, bob = (stage.start().region(300, seed=17) for _ in range(2))
    bob.write(299, bob.original(299) ^ 1)
    client.merge(*pairs(alice, bob))
    after = client.info()
    assert after.contract_version == 3
    assert after.module_version
    gained = [new - old for new, old in zip(after.results, before.results, strict=True)]
    # Of the two pages that differ, one was compared with the other's copy, which nobody joined.
    assert {result: n for result, n in enumerate(gained) if n} == {
        Result.SUCCESS: 598,
        Result.NOTEQUAL: 1,
        Result.ALONE: 1,
    }
    assert after.counters["merge_requests"] == before.counters["merge_requests"] + 1
    # One flush per page table and batch of 128 pages; far from one per page.
    assert after.counters["tlb_flushes"] - before.counters["tlb_flushes"] <= 12
    assert int((alice.frames == bob.frames).sum()) == 299
    assert (after.shared_pages, after.shared_mappings) == (299, 598)
