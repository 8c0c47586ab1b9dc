# SPDX-License-Identifier: MIT
"""Who pays: a merge only ever lowers what a control group uses.

The first page that is given up for a shared page hands its charge over; the others are uncharged.
So k equal pages of one group become one page charged to it, and zero pages cost nobody anything.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator

import pytest

from tests.kernel import cgroup
from tests.kernel.actor import Region, Stage
from tests.kernel.cgroup import Cgroup
from tests.kernel.contract import Result
from tests.kernel.sharing import flat, pairs, wait_until, write_privately
from tests.kernel.wire import Client, Refused

PAGES, SEED = 1500, 150
# Charges come in stocks of 64 for each processor, and page tables are charged as well.
SLACK_PAGES = 400
Group = Callable[[], Cgroup]


@pytest.fixture
def group() -> Iterator[Group]:
    """Makes control groups. Name it before `stage`: processes go before their groups do."""
    with cgroup.many() as groups:

        def make() -> Cgroup:
            groups.append(Cgroup())
            return groups[-1]

        yield make


def region_in(group: Cgroup, stage: Stage, pages: int = PAGES) -> Region:
    return group.add(stage.start()).region(pages, SEED)


def assert_near(read: Callable[[], int], expected: int, what: str) -> None:
    """Counters of groups settle in the background."""
    message = f"{what} is near {expected}; first it was {read()}"
    wait_until(lambda: abs(read() - expected) <= SLACK_PAGES, message)


def merge_in_parts(client: Client, *regions: Region) -> None:
    """As large as a request may be."""
    groups = pairs(*regions)
    share = 4000 // len(regions)
    for start in range(0, len(groups), share):
        assert set(flat(client.merge(*groups[start : start + share]))) == {Result.SUCCESS}


def test_one_group(group: Group, stage: Stage, client: Client) -> None:
    """Four equal pages become one: three of them are uncharged."""
    payer = group()
    start = payer.pages
    regions = [region_in(payer, stage) for _ in range(4)]
    before, anonymous = payer.pages, payer.stat("anon")
    mapped = payer.stat("file_mapped")
    assert anonymous >= 4 * PAGES - SLACK_PAGES
    merge_in_parts(client, *regions)
    assert_near(lambda: payer.pages, before - 3 * PAGES, "memory.current")
    assert_near(lambda: payer.stat("anon"), anonymous - 4 * PAGES, "anon")
    assert_near(lambda: payer.stat("file_mapped"), mapped + PAGES, "file_mapped")
    for region in regions[:3]:
        region.actor.exit()
    # The last one that maps the shared pages keeps them charged.
    assert_near(lambda: payer.pages, start + PAGES, "memory.current with one process left")
    regions[3].verify()
    regions[3].actor.exit()
    assert_near(lambda: payer.pages, start, "memory.current at the end")
    assert_near(lambda: payer.stat("file_mapped"), 0, "file_mapped at the end")
    assert_near(lambda: payer.stat("anon"), 0, "anon at the end")


def test_two_groups(group: Group, stage: Stage, client: Client) -> None:
    """One of them pays for each shared page, and neither for more than it had."""
    groups = [group(), group()]
    regions = [region_in(one, stage) for one in groups]
    before = [one.pages for one in groups]
    merge_in_parts(client, *regions)
    assert_near(lambda: sum(one.pages for one in groups), sum(before) - PAGES, "both together")
    for one, pages in zip(groups, before, strict=True):
        assert one.pages <= pages + SLACK_PAGES
    for region in regions:
        region.verify()


def test_written_again(group: Group, stage: Stage, client: Client) -> None:
    """Who writes pays for the copy, and the shared page goes with its last mapping."""
    payers = [group(), group()]
    regions = [region_in(payer, stage) for payer in payers]
    before = [payer.pages for payer in payers]
    merge_in_parts(client, *regions)
    for region in regions:
        region.actor.ask("flip", region.address, PAGES, 1)
        region.actor.ask("flip", region.address, PAGES, 1)
        region.verify()
    for payer, pages in zip(payers, before, strict=True):
        assert_near(lambda payer=payer: payer.pages, pages, "as before")  # type: ignore[misc]
        assert_near(lambda payer=payer: payer.stat("file_mapped"), 0, "file_mapped")  # type: ignore[misc]
    assert client.info().shared_pages == 0


def test_zero_pages(group: Group, stage: Stage, client: Client) -> None:
    payer = group()
    regions = [region_in(payer, stage) for _ in range(2)]
    for region in regions:
        region.actor.ask("clear", region.address, PAGES)
    before, anonymous = payer.pages, payer.stat("anon")
    assert set(client.merge_zeros(*regions[0], *regions[1])) == {Result.ZEROED}
    assert_near(lambda: payer.pages, before - 2 * PAGES, "memory.current")
    assert_near(lambda: payer.stat("anon"), anonymous - 2 * PAGES, "anon")
    assert payer.stat("file_mapped") <= SLACK_PAGES


def test_merge_at_the_limit(group: Group, stage: Stage, client: Client) -> None:
    """A group that has all it may have merges without asking for a page."""
    payer = group()
    regions = [region_in(payer, stage) for _ in range(2)]
    before = payer.pages
    payer.limit(before, swap=False)
    reached = payer.events("max")
    merge_in_parts(client, *regions)
    assert_near(lambda: payer.pages, before - PAGES, "memory.current")
    assert (payer.events("oom"), payer.events("oom_kill")) == (0, 0)
    assert payer.events("max") == reached
    for region in regions:
        region.verify()
    write_privately(regions[0], 0, regions[1])


@pytest.mark.parametrize("of_parent", [False, True])
def test_unmerge_at_the_limit(group: Group, stage: Stage, client: Client, of_parent: bool) -> None:
    """Refused whole, with a text, and nobody is killed."""
    limited = group()
    inner = limited.child() if of_parent else limited
    try:
        regions = [region_in(inner, stage) for _ in range(2)]
        merge_in_parts(client, *regions)
        limited.limit(limited.pages + PAGES // 2, swap=False)
        before = regions[0].frames
        with pytest.raises(Refused) as refused:
            client.unmerge(regions[0].actor.key, regions[0].address, PAGES)
        assert refused.value.errno == errno.ENOMEM
        assert "cgroup" in refused.value.text
        assert (regions[0].frames == before).all()
        assert (limited.events("oom"), limited.events("oom_kill")) == (0, 0)
        # What fits is done.
        part = PAGES // 8
        assert client.unmerge(regions[0].actor.key, regions[0].address, part)[0] == part
        limited.limit(None)
        unmerged, _ = client.unmerge(regions[0].actor.key, regions[0].address, PAGES)
        assert unmerged == PAGES - part
        assert (limited.events("oom"), limited.events("oom_kill")) == (0, 0)
        for region in regions:
            region.verify()
    finally:
        if of_parent:
            stage.close()
            inner.remove()


def test_a_group_that_is_removed(group: Group, stage: Stage, client: Client) -> None:
    """Its pages live on in another group's process, and go with that."""
    first, second = group(), group()
    start = second.pages
    gone, stays = region_in(first, stage), region_in(second, stage)
    merge_in_parts(client, gone, stays)
    gone.actor.exit()
    first.remove()
    stays.verify()
    assert client.info().shared_pages == PAGES
    stays.actor.ask("flip", stays.address, PAGES // 2, 1)
    stays.actor.ask("flip", stays.address, PAGES // 2, 1)
    stays.verify()
    stays.actor.exit()
    assert_near(lambda: second.pages, start, "memory.current at the end")


def test_a_process_that_moves(group: Group, stage: Stage, client: Client) -> None:
    """Merged pages stay charged where they were; the copies count where the process is now."""
    first, second = group(), group()
    regions = [region_in(first, stage) for _ in range(2)]
    merge_in_parts(client, *regions)
    for region in regions:
        second.add(region.actor)
    charged = first.pages
    assert charged >= PAGES
    for region in regions:
        region.actor.ask("flip", region.address, PAGES, 1)
        region.actor.ask("flip", region.address, PAGES, 1)
        region.verify()
    assert_near(lambda: first.pages, charged - PAGES, "the old group")
    assert second.pages >= 2 * PAGES
