# SPDX-License-Identifier: MIT
"""What the kernel remembers of accesses to a page: soft-dirty, referenced.

Checkpointing and live migration copy what is soft-dirty; estimates of working sets count what is
referenced. Neither may mistake a merge for an access, nor forget one over it.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.kernel import frames
from tests.kernel.actor import Region, Stage
from tests.kernel.contract import Result
from tests.kernel.sharing import flat, merge_all, pairs, write_privately
from tests.kernel.wire import Client

PAGES, SEED = 8, 60
SOFT_DIRTY = 1 << 55
CLEAR_REFERENCED, CLEAR_SOFT_DIRTY = 1, 4


def clear(region: Region, what: int) -> None:
    Path(f"/proc/{region.actor.pid}/clear_refs").write_text(str(what))


def dirty(region: Region) -> list[int]:
    """Numbers of the pages that are soft-dirty."""
    entries = frames.pagemap(region.actor.pid, region.address, region.pages)
    return [page for page, entry in enumerate(entries) if int(entry) & SOFT_DIRTY]


def referenced(region: Region) -> int:
    """How many pages of the region are said to have been accessed."""
    text = Path(f"/proc/{region.actor.pid}/smaps").read_text()
    found = re.search(rf"^{region.address:x}-.*?^Referenced: +(\d+) kB", text, re.M | re.S)
    assert found
    return int(found[1]) // 4


@pytest.fixture
def unmerged(stage: Stage) -> tuple[Region, Region]:
    return stage.start().region(PAGES, SEED), stage.start().region(PAGES, SEED)


def test_merge_sets_nothing(unmerged: tuple[Region, Region], client: Client) -> None:
    alice, bob = unmerged
    clear(alice, CLEAR_SOFT_DIRTY)
    alice.write(2, alice.original(2))
    assert dirty(alice) == [2]
    merge_all(client, alice, bob)
    # Nor does it clear what it finds, on either side.
    assert dirty(alice) == [2]
    assert dirty(bob) == list(range(PAGES))


def test_write_to_a_merged_page_sets_it(unmerged: tuple[Region, Region], client: Client) -> None:
    alice, bob = unmerged
    merge_all(client, alice, bob)
    for region in (alice, bob):
        clear(region, CLEAR_SOFT_DIRTY)
        assert dirty(region) == []
        region.verify()
        assert dirty(region) == []
    write_privately(alice, 3, bob)
    assert (dirty(alice), dirty(bob)) == ([3], [])
    # Merged again, it is as clean, or as dirty, as before.
    assert client.merge([bob[3], alice[3]]) == [[Result.ALREADYSH, Result.SUCCESS]]
    assert (dirty(alice), dirty(bob)) == ([3], [])
    write_privately(alice, 3, bob)
    clear(alice, CLEAR_SOFT_DIRTY)
    assert client.merge([bob[3], alice[3]]) == [[Result.ALREADYSH, Result.SUCCESS]]
    assert dirty(alice) == []
    alice.verify()


def test_fork_and_unmerge(unmerged: tuple[Region, Region], client: Client) -> None:
    """A child starts all clean or all dirty as ever; UNMERGE is a write, and says so."""
    alice, bob = unmerged
    merge_all(client, alice, bob)
    clear(bob, CLEAR_SOFT_DIRTY)
    client.unmerge(bob.actor.key, bob.address, 2)
    assert dirty(bob) == [0, 1]
    bob.verify()
    alice.verify()


def test_clearing_while_merged_and_shared(unmerged: tuple[Region, Region], client: Client) -> None:
    """clear_refs write-protects private pages; of shared ones it must touch no frame."""
    alice, bob = unmerged
    merge_all(client, alice, bob)
    before = alice.frames.tolist()
    for what in (CLEAR_REFERENCED, CLEAR_SOFT_DIRTY, CLEAR_REFERENCED):
        clear(alice, what)
    assert alice.frames.tolist() == before == bob.frames.tolist()
    write_privately(bob, 0, alice)
    write_privately(alice, 1, bob)


def test_referenced(unmerged: tuple[Region, Region], client: Client) -> None:
    """Estimates of working sets clear the mark, wait, and count: a merge is no access."""
    alice, bob = unmerged
    clear(alice, CLEAR_REFERENCED)
    assert (referenced(alice), referenced(bob)) == (0, PAGES)
    assert set(flat(client.merge(*pairs(alice, bob)))) == {Result.SUCCESS}
    assert (referenced(alice), referenced(bob)) == (0, PAGES)
    clear(alice, CLEAR_REFERENCED)
    assert (referenced(alice), referenced(bob)) == (0, PAGES)
    for region in unmerged:
        region.verify()
    write_privately(alice, 0, bob)
    assert referenced(alice) > 0
