# SPDX-License-Identifier: MIT
"""Moving pages to other frames: compaction, move_pages, migrate_pages, mbind, cpusets.

A merged page stays where it is, and whoever asks is told so; its neighbours move. With a single
node, "the other node" is the same one, to which pages have moved before anybody asks.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.kernel import frames, nodes
from tests.kernel.actor import Actor, ActorError, Region, Stage
from tests.kernel.contract import Result
from tests.kernel.disturbance import merge_disturbed
from tests.kernel.sharing import merge_all, pairs, wait_until, write_privately
from tests.kernel.syscalls import MPOL_MF_MOVE, MPOL_MF_MOVE_ALL, migrate_pages, move_pages
from tests.kernel.wire import Client

PAGES, SEED = 8, 70
MPOL_BIND, MPOL_MF_STRICT = 2, 1
RACE_SECONDS = 3
COMPACT = Path("/proc/sys/vm/compact_memory")
CGROUPS = Path("/sys/fs/cgroup")


@pytest.fixture
def home() -> int:
    """Where the pages of a test are."""
    return nodes.with_memory()[0]


@pytest.fixture
def away(home: int) -> int:
    """Where they are to go."""
    return nodes.with_memory()[-1]


@pytest.fixture
def shared(stage: Stage, client: Client, home: int) -> tuple[Region, Region]:
    alice, bob = (nodes.region_on(stage.start(), home, PAGES, SEED) for _ in range(2))
    merge_all(client, alice, bob)
    return alice, bob


def assert_stayed(shared: tuple[Region, Region], before: list[int]) -> None:
    """Shared as before, both right, and a write goes its usual way."""
    alice, bob = shared
    assert alice.frames.tolist() == before == bob.frames.tolist()
    for region in shared:
        region.verify()
    write_privately(alice, 0, bob)
    write_privately(bob, 1, alice)


def test_compaction(stage: Stage, client: Client) -> None:
    """Frames that are taken away under random writers, at the moment in which they are merged."""
    regions = []
    for seed in range(2):
        actor = stage.start()
        regions.append(Region(actor, actor.map(384), 384, seed))
    merge_disturbed(client, regions, lambda: COMPACT.write_text("1"), RACE_SECONDS)


def test_compaction_passes_by(shared: tuple[Region, Region]) -> None:
    before = shared[0].frames.tolist()
    COMPACT.write_text("1")
    assert_stayed(shared, before)


@pytest.mark.parametrize(
    ("flags", "verdict"), [(MPOL_MF_MOVE, -errno.EACCES), (MPOL_MF_MOVE_ALL, -errno.EBUSY)]
)
def test_move_pages(
    shared: tuple[Region, Region], home: int, away: int, flags: int, verdict: int
) -> None:
    """EACCES: not ours alone; EBUSY: cannot be isolated. The pages around them move."""
    alice, _ = shared
    private = nodes.region_on(alice.actor, home, PAGES, SEED + 1)
    before, own = alice.frames.tolist(), private.frames.tolist()
    addresses = [page.address for region in (alice, private) for page in region]
    said = move_pages(alice.actor.pid, addresses, away, flags)
    assert said == [home if home == away else verdict] * PAGES + [away] * PAGES
    assert nodes.of(private) == [away] * PAGES
    assert (private.frames.tolist() == own) is (home == away)
    private.verify()
    assert_stayed(shared, before)


def test_migrate_pages(shared: tuple[Region, Region], client: Client, home: int, away: int) -> None:
    """The whole process moves, but for what is merged; later its pages merge on the new node."""
    alice, bob = shared
    before = alice.frames.tolist()
    client.unmerge(alice.actor.key, alice[4].address, 4)
    migrate_pages(alice.actor.pid, home, away)
    assert nodes.of(alice) == [home] * 4 + [away] * 4
    assert alice.frames.tolist()[:4] == before[:4]
    for region in shared:
        region.verify()
    write_privately(alice, 0, bob)


def test_mbind(shared: tuple[Region, Region], home: int, away: int) -> None:
    """mbind leaves what others map too; told to move that as well and to be strict, it is EIO."""
    alice, _ = shared
    before = alice.frames.tolist()
    words = "mbind", alice.address, PAGES, MPOL_BIND, 1 << away
    alice.actor.ask(*words, MPOL_MF_MOVE)
    if home == away:
        alice.actor.ask(*words, MPOL_MF_MOVE_ALL | MPOL_MF_STRICT)
    else:
        with pytest.raises(ActorError, match=f"error {errno.EIO}"):
            alice.actor.ask(*words, MPOL_MF_MOVE_ALL | MPOL_MF_STRICT)
    assert nodes.of(alice) == [home] * PAGES
    assert_stayed(shared, before)
    # The writer's own copy goes where the new policy wants it.
    assert nodes.of(alice)[0] == away


@contextmanager
def cpuset(mems: int) -> Iterator[Path]:
    """A cgroup with a memory node of its own."""
    (CGROUPS / "cgroup.subtree_control").write_text("+cpuset")
    group = CGROUPS / "migration"
    group.mkdir()
    (group / "cpuset.mems").write_text(str(mems))
    try:
        yield group
    finally:
        wait_until(lambda: not (group / "cgroup.procs").read_text(), "the cgroup is empty")
        group.rmdir()


def leave(actor: Actor) -> None:
    (CGROUPS / "cgroup.procs").write_text(str(actor.pid))


def test_cpuset(shared: tuple[Region, Region], home: int, away: int) -> None:
    """Changing a cgroup's memory nodes moves its processes' pages, all but the merged ones."""
    alice, bob = shared
    private = nodes.region_on(alice.actor, home, PAGES, SEED + 1)
    before = alice.frames.tolist()
    with cpuset(home) as group:
        (group / "cgroup.procs").write_text(str(alice.actor.pid))
        (group / "cpuset.mems").write_text(str(away))
        wait_until(lambda: nodes.of(private) == [away] * PAGES, "the private pages have moved")
        assert nodes.of(alice) == [home] * PAGES
        private.verify()
        assert_stayed(shared, before)
        assert nodes.of(alice)[0] == away
        assert nodes.of(bob)[1] == home
        leave(alice.actor)


def test_moving_while_merging(stage: Stage, client: Client, home: int, away: int) -> None:
    """move_pages there and back under random writers, at the moment in which they are merged."""
    regions = []
    for seed in range(2):
        actor = stage.start()
        regions.append(Region(actor, actor.map(256), 256, seed))

    def there_and_back() -> None:
        for node in (away, home):
            for region in regions:
                addresses = [page.address for page in region]
                move_pages(region.actor.pid, addresses, node, MPOL_MF_MOVE_ALL)

    merge_disturbed(client, regions, there_and_back, RACE_SECONDS)


def test_moved_pages_merge_where_they_are(
    stage: Stage, client: Client, home: int, away: int
) -> None:
    alice, bob = (nodes.region_on(stage.start(), home, PAGES, SEED) for _ in range(2))
    for region in (alice, bob):
        migrate_pages(region.actor.pid, home, away)
        assert nodes.of(region) == [away] * PAGES
    merge_all(client, alice, bob)
    assert client.merge(*pairs(alice, bob)) == [[Result.ALREADYSH] * 2] * PAGES
    assert all(frames.map_count(frame) == 2 for frame in alice.frames.tolist())
    write_privately(alice, 0, bob)
