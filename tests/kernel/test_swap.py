# SPDX-License-Identifier: MIT
"""Pages on swap, on their way back, and back again."""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel import cgroup, frames, race
from tests.kernel.actor import MADV_PAGEOUT, Region, Stage
from tests.kernel.cgroup import Cgroup
from tests.kernel.contract import Result, State
from tests.kernel.sharing import flat, merge_all, pairs, wait_until, write_privately
from tests.kernel.wire import Client
from tests.kernel.writers import Writers, merge_equal

PAGES, SEED = 16, 100
SWAP_BYTES = 32 << 20
# Slots that are free, or reserved, in per-CPU caches, and count as used: 128 on each CPU.
SLOT_CACHES_KIB = (os.cpu_count() or 1) * 128 * 4
PRESSURE_SECONDS = 5.0


@pytest.fixture(scope="module")
def swap(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A loop device over a file: other than zram, it goes through the swap cache."""
    file = tmp_path_factory.mktemp("swap") / "file"
    with file.open("wb") as empty:
        empty.truncate(SWAP_BYTES)
    subprocess.run(["modprobe", "loop"], check=True)
    words = ["losetup", "--find", "--show", str(file)]
    device = subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()
    subprocess.run(["mkswap", device], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["swapon", device], check=True)
    yield
    subprocess.run(["swapoff", device], check=True)
    subprocess.run(["losetup", "--detach", device], check=True)


def page_out(region: Region) -> None:
    """All pages of a region go to swap."""

    def gone() -> bool:
        region.actor.ask("madvise", region.address, region.pages, MADV_PAGEOUT)
        return bool(frames.swapped(region.actor.pid, region.address, region.pages).all())

    wait_until(gone, "the pages are on swap")


@pytest.mark.usefixtures("swap")
def test_swapped_pages_are_left_there(stage: Stage, client: Client) -> None:
    alice, bob = (stage.start().region(PAGES, SEED) for _ in range(2))
    page_out(alice)
    assert set(client.records(alice)["state"].tolist()) == {State.SWAPPED}
    assert client.merge(*pairs(bob, alice)) == [[Result.ALONE, Result.NOPAGE2]] * PAGES
    assert frames.swapped(alice.actor.pid, alice.address, PAGES).all()
    alice.verify()
    merge_soon(client, alice, bob)
    write_privately(alice, 0, bob)


@pytest.mark.usefixtures("swap")
def test_pages_in_the_swap_cache(stage: Stage, client: Client) -> None:
    """Read back, a page keeps its slot on swap, and the swap cache a reference, until a write."""
    alice, bob = (stage.start().region(PAGES, SEED) for _ in range(2))
    page_out(alice)
    # Forked only now: reclaim on request passes over pages that others map too.
    child = alice.of(alice.actor.fork())
    for region in (alice, child):
        region.verify()
    assert all(frames.has_flag(page.frame, frames.KPF_SWAPCACHE) for page in alice)
    assert all(frames.map_count(page.frame) == 2 for page in alice)
    assert set(client.records(alice)["state"].tolist()) == {State.ANON}
    merge_soon(client, bob, alice, child)
    for group in pairs(alice, bob, child):
        frames.assert_shared(group)
    for region in (alice, bob, child):
        region.verify()
    write_privately(child, 0, alice, bob)


@pytest.mark.usefixtures("swap")
def test_merged_pages_are_not_swapped(stage: Stage, client: Client) -> None:
    alice, bob = (stage.start().region(PAGES, SEED) for _ in range(2))
    merge_all(client, alice, bob)
    before = alice.frames
    alice.actor.ask("madvise", alice.address, PAGES, MADV_PAGEOUT)
    assert (alice.frames == before).all()
    # What comes out of a merged page is an ordinary page again, which is.
    alice.actor.ask("fill", alice.address, PAGES, SEED)
    page_out(alice)
    bob.verify()
    alice.verify()


@pytest.mark.usefixtures("swap")
def test_slots_are_given_back(stage: Stage, client: Client) -> None:
    """A merge of pages in the swap cache frees their slots; nothing is left on swap."""
    before = swap_used_kib()
    regions = [stage.start().region(1500, SEED) for _ in range(2)]
    for region in regions:
        page_out(region)
    assert swap_used_kib() >= before + 2 * 1500 * 4 - SLOT_CACHES_KIB
    for region in regions:
        region.verify()
    merge_soon(client, *regions)
    for region in regions:
        region.verify()
    assert swap_used_kib() <= before + SLOT_CACHES_KIB


def merge_soon(client: Client, *regions: Region) -> None:
    """Merge pages that the kernel has just written out: it may hold on to them for a moment."""

    def merged() -> bool:
        results = flat(client.merge(*pairs(*regions)))
        assert set(results) <= {Result.SUCCESS, Result.ALREADYSH, Result.ALONE, Result.PINNED}
        return all((region.frames == regions[0].frames).all() for region in regions)

    wait_until(merged, "the pages are merged")


def swap_used_kib() -> int:
    """Over all swap devices."""
    return sum(int(line.split()[3]) for line in Path("/proc/swaps").read_text().splitlines()[1:])


@pytest.fixture
def small_group() -> Iterator[Cgroup]:
    """A control group. Name it before `stage`: processes go before their groups do."""
    with cgroup.many() as groups:
        groups.append(Cgroup())
        yield groups[0]


@pytest.mark.usefixtures("swap")
def test_merging_under_pressure(small_group: Cgroup, stage: Stage, client: Client) -> None:
    """Random writers with more memory than they may have: pages go to swap and come back, while
    those that are equal are merged, and break apart again."""
    pages = 1024
    regions = []
    for seed in range(2):
        actor = small_group.add(stage.start())
        regions.append(Region(actor, actor.map(pages), pages, seed))
    writers = Writers(regions, threads=2)
    small_group.limit(small_group.pages * 2 // 3)
    before = vmstat()
    results: Counter[Result] = Counter()

    def enough() -> bool:
        swapped = (vmstat()[name] - before[name] for name in ("pswpout", "pswpin"))
        return results[Result.SUCCESS] > pages // 2 and min(swapped) > pages // 2

    for _ in race.rounds(PRESSURE_SECONDS, enough, lambda: (results, vmstat())):
        # Some are on swap whenever we look; it takes pages that are in memory to be merged.
        results.update(merge_equal(client, regions))
        for region in regions:
            region.actor.ask("madvise", region.address, pages // 2, MADV_PAGEOUT)
    after = vmstat()
    writers.stop()
    print(dict(results), {name: after[name] - before[name] for name in ("pswpout", "pswpin")})
    assert small_group.events("oom_kill") == 0


@pytest.mark.usefixtures("swap")
def test_merged_pages_survive_pressure(small_group: Cgroup, stage: Stage, client: Client) -> None:
    """What is around them goes to swap; they stay where they are, and right."""
    alice, bob = (small_group.add(stage.start()).region(300, SEED) for _ in range(2))
    merge_all(client, alice, bob)
    shared = alice.frames
    others = [small_group.add(stage.start()).region(600, SEED + n) for n in (1, 2)]
    small_group.limit(small_group.pages - 500)
    wait_until(
        lambda: any(frames.swapped(r.actor.pid, r.address, r.pages).any() for r in others),
        "other pages are on swap",
    )
    for region in (*others, alice, bob):
        region.verify()
    assert (alice.frames == shared).all()
    assert (bob.frames == shared).all()
    write_privately(alice, 0, bob)
    assert small_group.events("oom_kill") == 0


def vmstat() -> dict[str, int]:
    """The counters of /proc/vmstat."""
    lines = Path("/proc/vmstat").read_text().splitlines()
    return {name: int(value) for name, value in (line.split() for line in lines)}
