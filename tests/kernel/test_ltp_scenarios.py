# SPDX-License-Identifier: MIT
"""What the Linux Test Project demands of KSM (ksm01 to ksm05), demanded of mergemem.

    phase   one    two    three      pages shared
      0      c      a      a              2
      1      c      b      a              3
      2      d      d      d              1
      3      d      d      d              1          the last byte of two's last page differs
      4             (unmerged)            0

ksm01 runs it as it is, ksm02 within a cpuset and bound to a node, ksm03 within a memory cgroup,
ksm04 with all of these. ksm05 has processes that end while they are scanned. As the agent does,
each phase asks for checksums and merges what is equal.
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.kernel import nodes
from tests.kernel.actor import PAGE_BYTES, Region, Stage, content
from tests.kernel.contract import Result, State
from tests.kernel.sharing import wait_until
from tests.kernel.syscalls import read_memory
from tests.kernel.wire import Client, Refused
from tests.kernel.writers import merge_equal

# Of each process: 1 MiB, all pages alike.
PAGES = 256
A, B, C, D = 1, 2, 3, 4
PHASES = [((C, A, A), 2), ((C, B, A), 3), ((D, D, D), 1)]
CGROUPS = Path("/sys/fs/cgroup")
# Charges that a processor keeps for the next page, on each of a few.
SLACK_PAGES = 4 * 64


class Cgroup:
    """A control group of one test."""

    def __init__(self, node: int | None, limit_pages: int | None) -> None:
        (CGROUPS / "cgroup.subtree_control").write_text("+cpuset +memory")
        self.path = CGROUPS / "scenario"
        self.path.mkdir()
        if node is not None:
            (self.path / "cpuset.mems").write_text(str(node))
        if limit_pages is not None:
            self.limit(limit_pages * PAGE_BYTES)

    def add(self, pid: int) -> None:
        (self.path / "cgroup.procs").write_text(str(pid))

    def limit(self, most_bytes: int | str) -> None:
        (self.path / "memory.max").write_text(str(most_bytes))

    def used_pages(self) -> int:
        return int((self.path / "memory.current").read_text()) // PAGE_BYTES

    def killed(self) -> int:
        events = (self.path / "memory.events").read_text().split()
        return int(events[events.index("oom_kill") + 1])

    def remove(self) -> None:
        wait_until(lambda: not (self.path / "cgroup.procs").read_text(), "the cgroup is empty")
        self.path.rmdir()


@contextmanager
def cgroup(node: int | None, limit_pages: int | None) -> Iterator[Cgroup]:
    group = Cgroup(node, limit_pages)
    try:
        yield group
    finally:
        group.remove()


def fill(regions: list[Region], contents: tuple[int, ...]) -> list[Region]:
    """Everybody's pages get this content; nobody's change by that but theirs."""
    filled = []
    for region, seed in zip(regions, contents, strict=True):
        region.actor.ask("fill", region.address, PAGES, seed, 1)
        filled.append(Region(region.actor, region.address, PAGES, seed, 1))
    return filled


def scan(client: Client, regions: list[Region]) -> None:
    """Until there is nothing left to merge."""
    for _ in range(4):
        merge_equal(client, regions)


def assert_counts(client: Client, shared: int, mappings: int) -> None:
    info = client.info()
    assert (info.shared_pages, info.shared_mappings) == (shared, mappings)


def run_phases(client: Client, regions: list[Region]) -> None:
    for contents, shared in PHASES:
        regions = fill(regions, contents)
        scan(client, regions)
        assert_counts(client, shared, 3 * PAGES)
        for region in regions:
            region.verify()


def change_last_byte(client: Client, regions: list[Region]) -> None:
    """All are D; one page of two's is so no more."""
    one, two, three = (Region(r.actor, r.address, PAGES, D, 1) for r in regions)
    last = two[PAGES - 1].address
    two.actor.ask("write", last + PAGE_BYTES - 1, ord("e"))
    scan(client, [one, two, three])
    assert_counts(client, 1, 3 * PAGES - 1)
    for region in (one, three):
        region.verify()
    assert two.actor.ask("verify", two.address, PAGES - 1, D, 1) == "same"
    assert read_memory(two.actor.pid, last, 1) == content(D, 0)[:-1] + b"e"


def unmerge_all(client: Client, regions: list[Region]) -> None:
    for region in regions:
        client.unmerge(region.actor.key, region.address, PAGES)
    assert_counts(client, 0, 0)
    for region in (regions[0], regions[2]):
        assert region.actor.ask("verify", region.address, PAGES, D, 1) == "same"


def three_regions(stage: Stage, group: Cgroup | None, node: int | None) -> list[Region]:
    regions = []
    for _ in range(3):
        actor = stage.start()
        if group:
            group.add(actor.pid)
        if node is None:
            regions.append(actor.region(PAGES, A, period=1))
        else:
            regions.append(nodes.region_on(actor, node, PAGES, A, 1))
    return regions


def test_ksm01(stage: Stage, client: Client) -> None:
    """ksm01: three processes, contents that change in phases, counters and every byte."""
    regions = three_regions(stage, None, None)
    run_phases(client, regions)
    change_last_byte(client, regions)
    unmerge_all(client, regions)


@pytest.mark.parametrize("which", [0, -1])
def test_ksm02(client: Client, which: int) -> None:
    """ksm02: in a cpuset with one node, bound to it: what is shared lies there."""
    node = nodes.with_memory()[which]
    with cgroup(node, None) as group, Stage() as stage:
        regions = three_regions(stage, group, node)
        run_phases(client, regions)
        for region in regions:
            assert nodes.of(region) == [node] * PAGES
        change_last_byte(client, regions)
        unmerge_all(client, regions)
        for region in regions:
            assert nodes.of(region) == [node] * PAGES


@pytest.mark.parametrize("bound", [False, True])
def test_ksm03_and_ksm04(client: Client, bound: bool) -> None:
    """ksm03: within memory.max, ksm04: and in a cpuset; merging only ever lowers what it uses."""
    node = nodes.with_memory()[-1] if bound else None
    with cgroup(node, 4 * PAGES) as group, Stage() as stage:
        regions = three_regions(stage, group, node)
        used = group.used_pages()
        run_phases(client, regions)
        # Of 3 * 256 pages one is left, but for what processors hold back.
        assert group.used_pages() < used - 3 * PAGES + SLACK_PAGES
        change_last_byte(client, regions)
        # Near its limit it gets no page by being unmerged, let alone an OOM kill.
        group.limit((group.used_pages() + PAGES // 2) * PAGE_BYTES)
        with pytest.raises(Refused) as refused:
            client.unmerge(regions[0].actor.key, regions[0].address, PAGES)
        assert refused.value.errno == errno.ENOMEM
        assert_counts(client, 1, 3 * PAGES - 1)
        group.limit("max")
        unmerge_all(client, regions)
        assert abs(group.used_pages() - used) < SLACK_PAGES
        assert group.killed() == 0


def test_ksm05(stage: Stage, client: Client) -> None:
    """ksm05 (CVE-2011-2183): processes that end, by themselves or by a signal, while scanned."""
    parent = stage.start()
    survivor = stage.start().region(16, A, period=1)
    for round_number in range(3):
        children = [parent.fork() for _ in range(8)]
        regions = [child.region(16, A, period=1) for child in children]
        every = [page for region in [survivor, *regions] for page in region]
        for number, child in enumerate(children):
            if number % 2:
                child.close_channel()
            else:
                os.kill(child.pid, signal.SIGKILL)
            (results,) = client.merge(every)
            assert set(results[:16]) <= {Result.SUCCESS, Result.ALREADYSH}
            assert set(results) <= {
                Result.SUCCESS,
                Result.ALREADYSH,
                Result.NOTASK2,
                Result.NOPAGE2,
                Result.BUSY,
            }
        for child in children:
            child.wait()
        assert set(client.records(survivor)["state"].tolist()) == {State.MERGED}
        survivor.verify()
        assert_counts(client, 1, 16)
        print(f"round {round_number}: survived")
