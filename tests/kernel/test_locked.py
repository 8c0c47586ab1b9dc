# SPDX-License-Identifier: MIT
"""Locked memory (mlock): a program's word that its pages shall stay, each in a frame of its own.

Locking before a merge is in test_refusals.py; here it comes afterwards, or ahead of the mapping.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel import frames
from tests.kernel.actor import PROT_READ, PROT_WRITE, Stage
from tests.kernel.contract import Result
from tests.kernel.sharing import Merged, pairs, wait_until, write_privately
from tests.kernel.wire import Client

PAGES, SEED = Merged.PAGES, Merged.SEED
MCL_CURRENT, MCL_FUTURE, MCL_ONFAULT, MLOCK_ONFAULT = 1, 2, 4, 1


def locked_pages() -> int:
    """Pages that the kernel holds for locked, of all processes."""
    # Locking and unlocking go through per-CPU lists; compaction drains them.
    Path("/proc/sys/vm/compact_memory").write_text("1")
    found = re.search(r"Mlocked: +(\d+) kB", Path("/proc/meminfo").read_text())
    assert found
    return int(found[1]) // 4


@pytest.fixture
def nothing_stays_locked() -> Iterator[None]:
    """A merged page that counts as locked after its end would count for ever."""
    before = locked_pages()
    yield
    wait_until(lambda: locked_pages() <= before, "as many pages are locked as before")


def assert_locked(client: Client, merged: Merged) -> None:
    """Alice's pages are refused, whatever they are."""
    before = merged.alice.frames.tolist()
    for results in client.merge(*pairs(merged.alice, merged.bob)):
        assert results[0] is Result.REFUSED
    assert merged.alice.frames.tolist() == before


@pytest.mark.usefixtures("nothing_stays_locked")
def test_merged_then_locked_then_merged(merged: Merged, client: Client, totals: list[int]) -> None:
    """Locking writable private memory faults it in for writing, which gives it frames."""
    alice, bob = merged.alice, merged.bob
    alice.actor.ask("mlock", alice.address, PAGES)
    frames.assert_distinct([*alice, *bob])
    assert_locked(client, merged)
    assert [frames.map_count(frame) for frame in merged.frames] == [1] * PAGES
    alice.actor.ask("munlock", alice.address, PAGES)
    assert client.merge(*pairs(bob, alice)) == [[Result.ALREADYSH, Result.SUCCESS]] * PAGES
    merged.assert_shared()
    write_privately(alice, 0, bob)
    totals += [8, 15]


@pytest.mark.usefixtures("nothing_stays_locked")
@pytest.mark.parametrize("how", ["on fault", "read-only"])
def test_locked_without_a_write(
    merged: Merged, client: Client, totals: list[int], how: str
) -> None:
    """Where locking writes nothing, the shared frame itself is locked, for as long as it lasts."""
    alice, bob = merged.alice, merged.bob
    if how == "on fault":
        alice.actor.ask("mlock2", alice.address, PAGES, MLOCK_ONFAULT)
    else:
        alice.actor.ask("mprotect", alice.address, PAGES, PROT_READ)
        alice.actor.ask("mlock", alice.address, PAGES)
    merged.assert_shared()
    assert_locked(client, merged)
    # Bob's part in it goes on, with others.
    carol = alice.actor.stage.start().region(PAGES, SEED)
    assert client.merge(*pairs(bob, carol)) == [[Result.ALREADYSH, Result.SUCCESS]] * PAGES
    if how == "read-only":
        # Locked memory that becomes writable gets its frames then, not with its first write.
        alice.actor.ask("mprotect", alice.address, PAGES, PROT_READ | PROT_WRITE)
        frames.assert_distinct([*alice, *bob])
    else:
        write_privately(alice, 0, bob, carol)
    assert alice.actor.status("VmLck") == PAGES
    # She goes as she is: locked.
    alice.actor.exit()
    bob.verify()
    carol.verify()
    totals += [8, 16]


@pytest.mark.usefixtures("nothing_stays_locked")
def test_all_memory_locked(merged: Merged, client: Client, totals: list[int]) -> None:
    """MCL_CURRENT: as mlock of everything; MCL_FUTURE: what is mapped later is refused at once."""
    alice, bob = merged.alice, merged.bob
    alice.actor.ask("mlockall", MCL_FUTURE)
    merged.assert_shared()
    later = alice.actor.region(PAGES, SEED)
    for results in client.merge(*pairs(bob, alice, later)):
        assert results == [Result.ALREADYSH, Result.ALREADYSH, Result.REFUSED]
    alice.actor.ask("mlockall", MCL_CURRENT | MCL_FUTURE)
    frames.assert_distinct([*alice, *bob, *later])
    assert_locked(client, merged)
    alice.actor.ask("munlockall")
    assert (
        client.merge(*pairs(bob, alice, later))
        == [[Result.ALREADYSH, Result.SUCCESS, Result.SUCCESS]] * PAGES
    )
    for group in pairs(bob, alice, later):
        frames.assert_shared(group)
    for region in (alice, bob, later):
        region.verify()
    totals += [8, 24]


def test_child_of_a_locked_process(stage: Stage, client: Client) -> None:
    """Locks are not inherited: the child's pages merge, the parent's do not."""
    alice, bob = (stage.start().region(PAGES, SEED) for _ in range(2))
    alice.actor.ask("mlock", alice.address, PAGES)
    child = alice.of(alice.actor.fork())
    for results in client.merge(*pairs(bob, alice, child)):
        assert results == [Result.SUCCESS, Result.REFUSED, Result.SUCCESS]
    for group in pairs(bob, child):
        frames.assert_shared(group)
    for region in (alice, bob, child):
        region.verify()
    alice.actor.ask("munlock", alice.address, PAGES)
    assert (
        client.merge(*pairs(bob, child, alice))
        == [[Result.ALREADYSH, Result.ALREADYSH, Result.SUCCESS]] * PAGES
    )
    write_privately(alice, 0, bob, child)
