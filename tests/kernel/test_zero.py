# SPDX-License-Identifier: MIT
"""Pages filled with zeros become mappings of the kernel's zero page, which takes no frame."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.kernel import frames
from tests.kernel.actor import MADV_DONTDUMP, PROT_NONE, PROT_READ, PROT_WRITE, Region, Stage
from tests.kernel.contract import DEPTH_FULL_BYTES, DEPTH_SAMPLE_BYTES, GROUP_ZERO, Result, State
from tests.kernel.module import Module
from tests.kernel.sharing import pairs
from tests.kernel.wire import Client

PAGES, SEED = 8, 120
ZEROED = Result.ZEROED
NOPAGE = {Result.NOPAGE1, Result.NOPAGE2}
# Counters of a process are up to 64 pages late on each processor.
RSS_SLACK_PAGES = 256
KSM_ZERO_PAGES = Path("/sys/kernel/mm/ksm/ksm_zero_pages")


def zeros(
    stage: Stage, pages: int = PAGES, uid: int | None = None, kind: str = "private"
) -> Region:
    """Pages that were written, with zeros; `seed` has no meaning."""
    actor = stage.start(uid)
    region = Region(actor, actor.map(pages, kind), pages, SEED)
    actor.ask("clear", region.address, pages)
    return region


def is_zero(region: Region) -> bool:
    return region.actor.ask("zeros", region.address, region.pages) == "1"


def zero_page_of(stage: Stage) -> int:
    """The frame that a read of untouched memory gets."""
    actor = stage.start()
    region = Region(actor, actor.map(1), 1, SEED)
    actor.ask("touch", region.address, 1)
    return region[0].frame


def assert_zeroed(region: Region, zero_page: int) -> None:
    assert region.frames.tolist() == [zero_page] * region.pages
    assert is_zero(region)


def test_a_zero_page_takes_their_place(stage: Stage, client: Client) -> None:
    zero_page = zero_page_of(stage)
    region = zeros(stage)
    frames.assert_distinct(region)
    before = client.info()
    assert client.merge_zeros(*region) == [ZEROED] * PAGES
    assert_zeroed(region, zero_page)
    after = client.info()
    assert after.results[ZEROED] - before.results[ZEROED] == PAGES
    assert after.results[Result.SUCCESS] == before.results[Result.SUCCESS]
    # Nothing is shared that could not be without us.
    assert (after.shared_pages, after.shared_mappings) == (0, 0)
    assert set(client.records(region)["state"].tolist()) == {State.ZERO_PAGE}


def test_writes_give_private_pages(stage: Stage, client: Client) -> None:
    zero_page = zero_page_of(stage)
    region = zeros(stage)
    assert client.merge_zeros(*region) == [ZEROED] * PAGES
    region.write(3, 7)
    assert region[3].frame not in (0, zero_page)
    assert frames.has_flag(region[3].frame, frames.KPF_ANON)
    assert [region.read(n) for n in range(PAGES)] == [0, 0, 0, 7, 0, 0, 0, 0]
    assert region.frames.tolist().count(zero_page) == PAGES - 1
    region.write(3, 0)
    assert is_zero(region)
    assert client.merge_zeros(region[3]) == [ZEROED]
    assert_zeroed(region, zero_page)


def test_memory_is_freed(stage: Stage, client: Client) -> None:
    pages = 2000
    region = zeros(stage, pages)
    anonymous, file = region.actor.status("RssAnon"), region.actor.status("RssFile")
    assert set(client.merge_zeros(*region)) == {ZEROED}
    assert abs(anonymous - region.actor.status("RssAnon") - pages) <= RSS_SLACK_PAGES
    # The zero page counts as nobody's.
    assert abs(file - region.actor.status("RssFile")) <= RSS_SLACK_PAGES
    assert region.frames.min() == region.frames.max() == zero_page_of(stage)
    region.actor.exit()


def test_any_users(stage: Stage, client: Client) -> None:
    """It reveals nothing of anybody else, so users may differ where they must not share pages."""
    zero_page = zero_page_of(stage)
    regions = [zeros(stage, uid=uid) for uid in (1001, 1002, 0)]
    pages = [page for region in regions for page in region]
    assert client.merge_zeros(*pages) == [ZEROED] * len(pages)
    for region in regions:
        assert_zeroed(region, zero_page)


@pytest.mark.parametrize("at", [0, 2048, 4095])
def test_one_byte_is_enough(stage: Stage, client: Client, at: int) -> None:
    region = zeros(stage)
    region.actor.ask("write", region.address + 2 * 4096 + at, 1)
    before = region[2].frame
    faults = region.actor.minor_faults()
    expected = [ZEROED] * PAGES
    expected[2] = Result.NOTEQUAL
    assert client.merge_zeros(*region) == expected
    assert region[2].frame == before
    assert int(region.actor.ask("read", region.address + 2 * 4096 + at)) == 1
    # As it was means writable, too.
    region.actor.ask("write", region.address + 2 * 4096 + at, 2)
    assert region[2].frame == before
    assert region.actor.minor_faults() == faults


def test_among_ordinary_groups(stage: Stage, client: Client) -> None:
    alice, bob = (stage.start().region(PAGES, SEED) for _ in range(2))
    zero = [zeros(stage) for _ in range(2)]
    keys = [region.actor.key for region in (alice, bob, *zero)]
    candidates = []
    for n in range(PAGES):
        candidates += [
            (zero[0][n].address, 2, GROUP_ZERO),
            (alice[n].address, 0, n),
            (zero[1][n].address, 3, GROUP_ZERO),
            (bob[n].address, 1, n),
        ]
    # And one that lies.
    candidates.append((alice[0].address + PAGES * 4096, 0, GROUP_ZERO))
    results = client.merge_candidates(keys, candidates)
    assert results[:-1] == [ZEROED, Result.SUCCESS] * (2 * PAGES)
    assert results[-1] not in (ZEROED, Result.SUCCESS)
    for group in pairs(alice, bob):
        frames.assert_shared(group)
    for region in zero:
        assert_zeroed(region, zero_page_of(stage))
    alice.verify()
    bob.verify()


def test_in_an_ordinary_group(stage: Stage, client: Client) -> None:
    """Nothing is special about zeros there: a frame of their own, shared."""
    zero_page = zero_page_of(stage)
    alice, bob = zeros(stage), zeros(stage)
    assert client.merge(*pairs(alice, bob)) == [[Result.SUCCESS] * 2] * PAGES
    for group in pairs(alice, bob):
        assert frames.assert_shared(group) != zero_page
    assert is_zero(alice)
    assert is_zero(bob)


def test_merged_before(stage: Stage, client: Client) -> None:
    """A merged page full of zeros gives way like any other, in one process after the other."""
    zero_page = zero_page_of(stage)
    alice, bob = zeros(stage), zeros(stage)
    client.merge(*pairs(alice, bob))
    shared = bob.frames
    assert client.merge_zeros(*alice) == [ZEROED] * PAGES
    assert_zeroed(alice, zero_page)
    assert (bob.frames == shared).all()
    info = client.info()
    assert (info.shared_pages, info.shared_mappings) == (PAGES, PAGES)
    assert client.merge_zeros(*bob) == [ZEROED] * PAGES
    assert_zeroed(bob, zero_page)
    assert client.info().shared_pages == 0
    alice.write(0, 1)
    assert bob.read(0) == 0


def test_zero_page_already(stage: Stage, client: Client) -> None:
    region = zeros(stage)
    assert client.merge_zeros(*region) == [ZEROED] * PAGES
    assert client.merge_zeros(*region) == [Result.ALREADYSH] * PAGES
    actor = stage.start()
    fresh = Region(actor, actor.map(2), 2, SEED)
    actor.ask("touch", fresh.address, 1)
    already, absent = client.merge_zeros(*fresh)
    assert already is Result.ALREADYSH
    assert absent in NOPAGE
    # Nothing was mapped for being asked about.
    assert fresh[1].frame == 0


def test_huge_zero_page(stage: Stage, client: Client) -> None:
    """A read of untouched huge memory: 2 MiB of zeros at once, left as they are."""
    actor = stage.start()
    region = Region(actor, actor.map(512, "huge"), 512, SEED)
    actor.ask("touch", region.address, 1)
    before = region.frames
    assert frames.has_flag(int(before[0]), frames.KPF_ZERO_PAGE)
    results = client.merge_zeros(*list(region)[:100], split_percent=1)
    assert set(results) <= NOPAGE | {Result.ALREADYSH}
    assert (region.frames == before).all()
    assert set(client.records(region)["state"].tolist()) == {State.ZERO_PAGE}
    assert is_zero(region)


def test_shared_by_fork(stage: Stage, client: Client) -> None:
    """One frame, two processes: each mapping counts, and either may be asked for alone."""
    zero_page = zero_page_of(stage)
    parent = zeros(stage)
    child = parent.of(parent.actor.fork())
    before = child.frames
    assert client.merge_zeros(*parent) == [ZEROED] * PAGES
    assert_zeroed(parent, zero_page)
    assert (child.frames == before).all()
    parent.write(0, 5)
    assert is_zero(child)
    assert client.merge_zeros(*child) == [ZEROED] * PAGES
    assert_zeroed(child, zero_page)
    assert parent.read(0) == 5


def test_fork_and_exit_afterwards(stage: Stage, client: Client) -> None:
    region = zeros(stage)
    assert client.merge_zeros(*region) == [ZEROED] * PAGES
    child = region.of(region.actor.fork())
    assert_zeroed(child, region[0].frame)
    child.write(1, 9)
    assert is_zero(region)
    region.write(2, 8)
    assert [child.read(n) for n in range(4)] == [0, 9, 0, 0]
    region.actor.exit()
    assert child.read(0) == 0
    child.actor.ask("munmap", child.address, 1)
    child.actor.exit()


@pytest.mark.parametrize("kind", ["pipe", "fixed buffer"])
def test_in_use(stage: Stage, client: Client, kind: str) -> None:
    region = zeros(stage)
    region.actor.ask("vmsplice" if kind == "pipe" else "register", region.address, 2)
    before = region.frames[:2].tolist()
    assert client.merge_zeros(*region) == [Result.PINNED] * 2 + [ZEROED] * (PAGES - 2)
    assert region.frames[:2].tolist() == before
    assert is_zero(region)


def dont_dump(region: Region) -> None:
    region.actor.ask("madvise", region.address, PAGES, MADV_DONTDUMP)


def lock(region: Region) -> None:
    region.actor.ask("mlock", region.address, PAGES)


def userfault(region: Region) -> None:
    region.actor.ask("userfault", region.address, PAGES)


def set_aside(region: Region) -> None:
    region.actor.ask("mprotect", region.address, PAGES, PROT_NONE)


def hide(region: Region) -> None:
    region.actor.ask("dumpable", 0)


@pytest.mark.parametrize("way", [dont_dump, lock, userfault, set_aside, hide])
def test_refused(stage: Stage, client: Client, way: Callable[[Region], None]) -> None:
    region = zeros(stage)
    way(region)
    before = region.frames
    assert client.merge_zeros(*region) == [Result.REFUSED] * PAGES
    assert (region.frames == before).all()
    region.actor.ask("mprotect", region.address, PAGES, PROT_READ | PROT_WRITE)
    assert is_zero(region)


def test_no_process_no_page(stage: Stage, client: Client) -> None:
    gone = zeros(stage)
    page = gone[0]
    gone.actor.exit()
    absent = zeros(stage, 2)
    absent.actor.ask("munmap", absent[1].address, 1)
    results = client.merge_zeros(page, *absent)
    assert results[0] in (Result.NOTASK1, Result.NOTASK2)
    assert results[1] is ZEROED
    assert results[2] in NOPAGE


def test_checksum_reports_them_before(stage: Stage, client: Client) -> None:
    """At any depth, and never one with a byte in it that was not sampled."""
    region = zeros(stage)
    region.actor.ask("write", region[1].address + 4095, 1)
    expected = [State.ZERO, State.ANON, *[State.ZERO] * (PAGES - 2)]
    for depth in (DEPTH_FULL_BYTES, DEPTH_SAMPLE_BYTES, 64):
        assert client.records(region, depth)["state"].tolist() == expected
    assert set(client.records(region, 0)["state"].tolist()) == {State.ANON}


def test_unmerge_leaves_them(stage: Stage, client: Client) -> None:
    region = zeros(stage)
    client.merge_zeros(*region)
    end = region.address + PAGES * 4096
    assert client.unmerge(region.actor.key, region.address, PAGES) == (0, end)
    assert_zeroed(region, zero_page_of(stage))


def test_soft_dirty_is_kept(stage: Stage, client: Client) -> None:
    """Who follows a program's writes sees none that it did not make, and misses none."""
    region = zeros(stage)
    Path(f"/proc/{region.actor.pid}/clear_refs").write_text("4")
    region.write(1, 0)
    assert soft_dirty(region) == [False, True, *[False] * (PAGES - 2)]
    assert client.merge_zeros(*region) == [ZEROED] * PAGES
    assert soft_dirty(region) == [False, True, *[False] * (PAGES - 2)]
    region.write(2, 0)
    assert soft_dirty(region)[2]


def soft_dirty(region: Region) -> list[bool]:
    entries = frames.pagemap(region.actor.pid, region.address, region.pages)
    return [bool(entry) for entry in entries & np.uint64(1 << 55)]


def test_counters_of_ksm_are_left_alone(stage: Stage, client: Client) -> None:
    """KSM knows its own zero pages by a dirty entry, and counts them when they go."""
    region = zeros(stage)

    def ksm_zero_pages() -> list[str]:
        files = [KSM_ZERO_PAGES, Path(f"/proc/{region.actor.pid}/ksm_stat")]
        return [file.read_text() for file in files if file.exists()]

    before = ksm_zero_pages()
    client.merge_zeros(*region)
    assert ksm_zero_pages() == before
    region.write(0, 1)
    region.actor.ask("munmap", region[1].address, 2)
    assert ksm_zero_pages() == before
    region.actor.exit()
    if KSM_ZERO_PAGES.exists():
        assert KSM_ZERO_PAGES.read_text() == before[0]


def test_over_page_tables_and_batches(stage: Stage, client: Client) -> None:
    region = zeros(stage, 1300)
    for index in (0, 511, 512, 1299):
        region.write(index, index % 255 + 1)
    results = client.merge_zeros(*region)
    odd = [n for n, result in enumerate(results) if result is not ZEROED]
    assert odd == [0, 511, 512, 1299]
    zero_page = zero_page_of(stage)
    assert np.flatnonzero(region.frames != zero_page).tolist() == odd
    for index in odd:
        assert region.read(index) == index % 255 + 1
        region.write(index, 0)
    assert is_zero(region)


def test_no_cap_on_them(stage: Stage, module: Module) -> None:
    """max_shared_bytes is about frames that cannot be swapped; these take none."""
    region = zeros(stage)
    with module.reloaded(max_shared_bytes=4096), Client() as client:
        assert client.merge_zeros(*region) == [ZEROED] * PAGES
