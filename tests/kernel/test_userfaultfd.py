# SPDX-License-Identifier: MIT
"""userfaultfd over merged pages: the handler hears of each write, and of nothing else."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.kernel import frames, race
from tests.kernel.actor import MADV_DONTNEED, PAGE_BYTES, Region, Stage, content
from tests.kernel.contract import Result, State
from tests.kernel.sharing import Merged, flat, merge_all, pairs, write_privately
from tests.kernel.userfault import (
    FEATURE_MOVE,
    FLAG_WP,
    FLAG_WRITE,
    MODE_MISSING,
    MODE_WP,
    Userfault,
    watched,
)
from tests.kernel.wire import Client

PAGES, SEED = Merged.PAGES, Merged.SEED
RACE_SECONDS = 3


def write_with_event(userfault: Userfault, region: Region, page: int, byte: int) -> None:
    """The writer waits until the handler has heard of it, then goes on."""
    region.actor.ask("access", region[page].address, byte)
    assert userfault.event() == (FLAG_WP | FLAG_WRITE, region[page].address)
    userfault.protect(False)
    assert int(region.actor.ask("accessed")) == byte


def assert_refused(client: Client, region: Region, other: Region) -> None:
    before = region.frames.tolist()
    for results in client.merge(*pairs(region, other)):
        assert results[0] is Result.REFUSED
    assert region.frames.tolist() == before


def test_write_protection_of_merged_pages(
    merged: Merged, client: Client, stage: Stage, totals: list[int]
) -> None:
    """Registered and protected, they stay merged; a write is an event, then a copy."""
    alice, bob = merged.alice, merged.bob
    with watched(alice, MODE_WP) as userfault:
        userfault.protect(True)
        merged.assert_shared()
        assert userfault.quiet()
        write_with_event(userfault, alice, 3, alice.original(3) ^ 0xFF)
        assert alice[3].frame not in (0, merged.frames[3])
        assert alice.read(3) == alice.original(3) ^ 0xFF
        bob.verify()
        alice.write(3, alice.original(3))
        alice.verify()
        # Others may merge with what she shares; she may not.
        assert_refused(client, alice, stage.start().region(PAGES, SEED))
        userfault.protect(True)
        userfault.unregister()
        # No event any more, nor a merge that is refused.
        write_privately(alice, 0, bob)
        assert client.merge(*pairs(bob, alice)) == [
            [Result.ALREADYSH, Result.SUCCESS if page in (0, 3) else Result.ALREADYSH]
            for page in range(PAGES)
        ]
        assert userfault.quiet()
    merged.assert_shared()
    totals += [8, 16]


def test_child_of_a_watched_process(merged: Merged, client: Client, totals: list[int]) -> None:
    """A child of a registered process is not registered: it writes, merges and ends in peace."""
    alice, bob = merged.alice, merged.bob
    with watched(alice, MODE_WP) as userfault:
        userfault.protect(True)
        child = alice.of(alice.actor.fork())
        write_privately(child, 1, bob, alice)
        assert client.merge([bob[1], child[1]]) == [[Result.ALREADYSH, Result.SUCCESS]]
        child.verify()
        child.actor.exit()
        assert userfault.quiet()
        # Alice ends with her pages still protected.
        alice.actor.exit()
    bob.verify()
    totals += [8, 8]


def test_unmerge_of_protected_pages(merged: Merged, client: Client, totals: list[int]) -> None:
    """UNMERGE writes on behalf of the process: that too is for the handler to allow."""
    alice = merged.alice
    with watched(alice, MODE_WP) as userfault:
        userfault.protect(True)
        assert client.unmerge(alice.actor.key, alice.address, PAGES)[0] == 0
        merged.assert_shared()
        assert userfault.quiet()
        userfault.protect(False)
        assert client.unmerge(alice.actor.key, alice.address, PAGES)[0] == PAGES
    frames.assert_distinct([*alice, *merged.bob])
    alice.verify()
    totals += [8, 8]


def test_missing_pages(merged: Merged, client: Client, totals: list[int]) -> None:
    """Discarded, a merged page is missing; the handler brings it back, and it is private."""
    alice, bob = merged.alice, merged.bob
    with watched(alice, MODE_MISSING) as userfault:
        # What is there is not missing, whoever else maps it: reads and writes go on.
        alice.verify()
        write_privately(alice, 2, bob)
        assert userfault.quiet()
        alice.actor.ask("madvise", alice.address, PAGES, MADV_DONTNEED)
        for page in range(PAGES):
            alice.actor.ask("access", alice[page].address)
            assert userfault.event() == (0, alice[page].address)
            userfault.copy(page, content(SEED, page))
            assert int(alice.actor.ask("accessed")) == alice.original(page)
        alice.verify()
        bob.verify()
        assert_refused(client, alice, bob)
        frames.assert_distinct(list(alice) + list(bob))
        userfault.unregister()
    assert client.merge(*pairs(bob, alice)) == [[Result.ALREADYSH, Result.SUCCESS]] * PAGES
    merged.alice.verify()
    totals += [8, 16]


@pytest.mark.parametrize("mode", [MODE_MISSING, MODE_WP, MODE_MISSING | MODE_WP])
def test_registered_pages_are_refused(stage: Stage, client: Client, mode: int) -> None:
    alice, bob, carol = (stage.start().region(PAGES, SEED) for _ in range(3))
    with watched(alice, mode) as userfault:
        for results in client.merge(*pairs(alice, bob, carol)):
            assert results == [Result.REFUSED, Result.SUCCESS, Result.SUCCESS]
        (run,) = client.checksum(alice.actor.key, alice.address, PAGES)
        assert (run.refused_pages, len(run.records)) == (PAGES, 0)
        userfault.unregister()
        assert set(client.records(alice)["state"].tolist()) == {State.ANON}
        assert client.merge(*pairs(bob, alice)) == [[Result.ALREADYSH, Result.SUCCESS]] * PAGES
    for group in pairs(alice, bob, carol):
        frames.assert_shared(group)
    for region in (alice, bob, carol):
        region.verify()


def require_move(userfault: Userfault) -> None:
    """Linux 6.8 has it."""
    if not userfault.features & FEATURE_MOVE:
        pytest.skip("no UFFDIO_MOVE")


@pytest.fixture
def target(merged: Merged) -> Iterator[tuple[Userfault, Region]]:
    """A range of alice's that is watched, and empty: where UFFDIO_MOVE may move pages."""
    actor = merged.alice.actor
    empty = Region(actor, actor.map(PAGES), PAGES, SEED)
    with watched(empty, MODE_MISSING) as userfault:
        require_move(userfault)
        yield userfault, empty


def move(userfault: Userfault, to: Region, source: Region) -> int:
    words = userfault.descriptor_of_actor, to.address, source.address, source.pages
    return int(source.actor.ask("move", *words))


def test_move_of_merged_pages(
    merged: Merged, client: Client, target: tuple[Userfault, Region], totals: list[int]
) -> None:
    """UFFDIO_MOVE takes pages that are exclusive to their mapping, and a merged one is not."""
    userfault, empty = target
    alice = merged.alice
    assert move(userfault, empty, alice) == -errno.EBUSY
    merged.assert_shared()
    assert not empty.frames.any()
    # With frames of their own again, they move, and merge where they are now.
    client.unmerge(alice.actor.key, alice.address, PAGES)
    own = alice.frames.tolist()
    assert move(userfault, empty, alice) == PAGES * PAGE_BYTES
    assert empty.frames.tolist() == own
    assert not alice.frames.any()
    empty.verify()
    userfault.unregister()
    assert client.merge(*pairs(merged.bob, empty)) == [[Result.ALREADYSH, Result.SUCCESS]] * PAGES
    write_privately(empty, 0, merged.bob)
    totals += [8, 15]


def test_move_while_merging(stage: Stage, client: Client) -> None:
    """Pages that are moved away at the moment in which they are merged."""
    pages, period = 64, 4
    bob = stage.start().region(pages, SEED, period)
    actor = stage.start()
    source = Region(actor, actor.map(pages), pages, SEED, period)
    empty = Region(actor, actor.map(pages), pages, SEED, period)
    results: Counter[Result] = Counter()
    with watched(empty, MODE_MISSING) as userfault:
        require_move(userfault)
        words = userfault.descriptor_of_actor, empty.address, source.address, pages, SEED
        actor.ask("moves", *words)

        def met() -> bool:
            rounds, moved, busy, *wrong = actor.ask("moves_so_far").split(" ", 3)
            assert not wrong, wrong
            return int(rounds) > 2 and min(int(moved), int(busy), results[Result.SUCCESS]) > 0

        for _ in race.rounds(RACE_SECONDS, met, lambda: results):
            results.update(flat(client.merge(*pairs(source, bob))))
        rounds, moved, busy, *wrong = actor.ask("stop_moves").split(" ", 3)
    assert not wrong, wrong
    bob.verify()
    print(f"{rounds} rounds, {moved} moved, {busy} busy, {dict(results)}")
    assert set(results) <= {
        Result.SUCCESS,
        Result.ALREADYSH,
        Result.ALONE,
        Result.NOPAGE1,
        Result.NOTEQUAL,
        Result.PINNED,
        Result.BUSY,
    }


def test_merge_needs_no_handler(stage: Stage, client: Client) -> None:
    """Two ranges of one process, one of them watched: only that one is left alone."""
    actor = stage.start()
    watched_region, other = (actor.region(PAGES, SEED) for _ in range(2))
    bob = stage.start().region(PAGES, SEED)
    with watched(watched_region, MODE_WP):
        merge_all(client, other, bob)
        frames.assert_distinct(watched_region)
