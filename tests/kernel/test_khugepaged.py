# SPDX-License-Identifier: MIT
"""Collapse of small pages into a huge one, by khugepaged and MADV_COLLAPSE.

A range with a merged page in it does not collapse: such a page is no anonymous page, and on no LRU
list. Once each page has a frame of its own again it does. A huge page is not merged.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel import frames
from tests.kernel.actor import PAGE_BYTES, ActorError, Region, Stage
from tests.kernel.contract import Result, State
from tests.kernel.disturbance import merge_disturbed
from tests.kernel.sharing import flat, merge_all, pairs, wait_until, write_privately
from tests.kernel.wire import Client, Refused

HUGE_PAGES, SEED = 512, 130
MADV_HUGEPAGE, MADV_NOHUGEPAGE, MADV_COLLAPSE = 14, 15, 25
KHUGEPAGED = Path("/sys/kernel/mm/transparent_hugepage/khugepaged")
SPLIT = Path("/sys/kernel/debug/split_huge_pages")
RACE_SECONDS = 3


@pytest.fixture
def eager() -> Iterator[None]:
    """khugepaged without pauses."""
    settings = {"scan_sleep_millisecs": "0", "alloc_sleep_millisecs": "0", "pages_to_scan": "8192"}
    before = {name: (KHUGEPAGED / name).read_text() for name in settings}
    for name, value in settings.items():
        (KHUGEPAGED / name).write_text(value)
    yield
    for name, value in before.items():
        (KHUGEPAGED / name).write_text(value)


def is_huge(region: Region) -> bool:
    """Whether its first page is part of a huge page."""
    frame = region[0].frame
    return bool(frame) and frames.has_flag(frame, frames.KPF_THP)


def full_scans() -> int:
    return int((KHUGEPAGED / "full_scans").read_text())


def let_khugepaged_scan(times: int) -> None:
    """Until it has looked at everything so often."""
    before = full_scans()
    wait_until(lambda: full_scans() >= before + times, f"khugepaged has been round {times} times")


def advise(region: Region, advice: int) -> None:
    region.actor.ask("madvise", region.address, region.pages, advice)


def collapse(region: Region) -> None:
    advise(region, MADV_COLLAPSE)


@pytest.fixture
def small(stage: Stage) -> tuple[Region, Region]:
    """What fills a huge page, in small ones, which may become one."""
    alice, bob = (stage.start().region(HUGE_PAGES, SEED) for _ in range(2))
    advise(alice, MADV_HUGEPAGE)
    return alice, bob


@pytest.mark.parametrize("merged_pages", [1, HUGE_PAGES])
def test_collapse_on_request(
    small: tuple[Region, Region], client: Client, merged_pages: int
) -> None:
    """MADV_COLLAPSE: an error, and nothing changed, while a page is merged; success afterwards."""
    alice, bob = small
    groups = pairs(alice, bob)[-merged_pages:]
    assert set(flat(client.merge(*groups))) == {Result.SUCCESS}
    before = alice.frames.tolist()
    with pytest.raises(ActorError, match=f"error ({errno.EAGAIN}|{errno.EINVAL})"):
        collapse(alice)
    assert alice.frames.tolist() == before
    for group in groups:
        frames.assert_shared(group)
    for region in small:
        region.verify()
    assert client.unmerge(alice.actor.key, alice.address, HUGE_PAGES)[0] == merged_pages
    collapse(alice)
    assert is_huge(alice)
    for region in small:
        region.verify()
    # The other side's frames are what they were, and hers are a huge page's now.
    assert bob[HUGE_PAGES - 1].frame == before[-1]
    assert set(flat(client.merge(*pairs(bob, alice)[:8]))) <= {
        Result.ALREADYSH,
        Result.ALONE,
        Result.HUGE,
    }
    assert set(client.records(alice)["state"].tolist()) == {State.HUGE}


@pytest.mark.usefixtures("eager")
def test_khugepaged_passes_by(stage: Stage, client: Client) -> None:
    """It scans on, and leaves the range be; when the last merged page is gone, it collapses."""
    alice, bob = (stage.start().region(HUGE_PAGES, SEED) for _ in range(2))
    merge_all(client, alice, bob)
    advise(alice, MADV_HUGEPAGE)
    before = alice.frames.tolist()
    let_khugepaged_scan(3)
    assert alice.frames.tolist() == before == bob.frames.tolist()
    write_privately(alice, 0, bob)
    alice.actor.ask("fill", alice.address, HUGE_PAGES - 1, SEED)
    let_khugepaged_scan(3)
    assert not is_huge(alice)
    assert alice[HUGE_PAGES - 1].frame == before[-1]
    client.unmerge(alice.actor.key, alice.address, HUGE_PAGES)
    wait_until(lambda: is_huge(alice), "khugepaged has collapsed the range")
    for region in (alice, bob):
        region.verify()


@pytest.mark.usefixtures("eager")
def test_khugepaged_while_merging(stage: Stage, client: Client) -> None:
    """Ranges that collapse, are split and merged, under random writers."""
    if os.environ["MERGEMEM_KERNEL"] == "debug":
        # Between its two looks at a range it asserts what only a merge can change.
        pytest.skip("khugepaged of a debug kernel asserts that nobody merges")
    regions = []
    for seed in range(2):
        actor = stage.start()
        regions.append(Region(actor, actor.map(HUGE_PAGES), HUGE_PAGES, seed))
    collapses = 0

    def collapse_and_split() -> None:
        nonlocal collapses
        for region in regions:
            advise(region, MADV_HUGEPAGE)
            # Merged pages keep a range from collapsing, so each gets its own now and then.
            # UNMERGE may find mmap_lock taken, by khugepaged too.
            with contextlib.suppress(Refused), Client() as other:
                other.unmerge(region.actor.key, region.address, HUGE_PAGES)
            let_khugepaged_scan(2)
            collapses += is_huge(region)
            advise(region, MADV_NOHUGEPAGE)
            end = region.address + HUGE_PAGES * PAGE_BYTES
            SPLIT.write_text(f"{region.actor.pid},{region.address:#x},{end:#x}")

    merge_disturbed(client, regions, collapse_and_split, RACE_SECONDS, lambda: collapses > 0)
    print(f"{collapses} collapses")
