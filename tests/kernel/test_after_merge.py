# SPDX-License-Identifier: MIT
"""What programs do to their memory after a merge; the kernel must do the rest as always.

    alice[0..7]  ─┐
                  ├─  eight merged frames
    bob[0..7]    ─┘

Every test ends with bytes: alice's and bob's are what they should be, whatever the other did.
"""

from __future__ import annotations

import contextlib
import mmap
import time
from pathlib import Path

import pytest

from tests.kernel import frames
from tests.kernel.actor import (
    MADV_DONTNEED,
    MADV_FREE,
    MADV_PAGEOUT,
    MREMAP_DONTUNMAP,
    MREMAP_FIXED,
    MREMAP_MAYMOVE,
    PAGE_BYTES,
    PROT_NONE,
    PROT_READ,
    PROT_WRITE,
    Actor,
    ActorError,
    Stage,
)
from tests.kernel.contract import Result
from tests.kernel.sharing import Merged, merge_all, write_privately
from tests.kernel.wire import Client

PAGES, SEED = Merged.PAGES, Merged.SEED
MADV_COLLAPSE = 25
PTRACE_POKEDATA, PTRACE_ATTACH, PTRACE_DETACH = 5, 16, 17


def test_write_from_either_side(merged: Merged, totals: list[int]) -> None:
    write_privately(merged.alice, 0, merged.bob)
    write_privately(merged.bob, 1, merged.alice)
    # The one who is left alone with a shared page gets a frame of its own with its next write.
    assert frames.map_count(merged.frames[0]) == 1
    write_privately(merged.bob, 0)
    totals += [7, 13]


def test_written_pages_merge_again(merged: Merged, client: Client) -> None:
    write_privately(merged.alice, 0, merged.bob)
    assert client.merge([merged.alice[0], merged.bob[0]]) == [[Result.SUCCESS, Result.ALREADYSH]]
    merged.assert_shared()


def test_child_and_grandchild_write(merged: Merged, totals: list[int]) -> None:
    child = merged.alice.of(merged.alice.actor.fork())
    grandchild = merged.alice.of(child.actor.fork())
    assert frames.map_count(merged.frames[0]) == 4
    write_privately(grandchild, 0, child, merged.alice, merged.bob)
    write_privately(child, 0, merged.alice, merged.bob)
    write_privately(merged.alice, 1, grandchild, child, merged.bob)
    for region in (grandchild, child, merged.alice, merged.bob):
        region.verify()
    totals += [8, 2 + 3 + 6 * 4]


def test_parent_exits_before_child(merged: Merged, totals: list[int]) -> None:
    child = merged.alice.of(merged.alice.actor.fork())
    merged.alice.actor.exit()
    child.verify()
    write_privately(child, 0, merged.bob)
    merged.bob.actor.exit()
    child.verify()
    totals += [7, 7]


def test_exec(merged: Merged, totals: list[int]) -> None:
    merged.alice.actor.exec()
    assert frames.map_count(merged.frames[0]) == 1
    merged.bob.verify()
    write_privately(merged.bob, 0)
    totals += [7, 7]


def test_exit(merged: Merged, totals: list[int]) -> None:
    merged.alice.actor.exit()
    merged.bob.verify()
    assert [frames.map_count(frame) for frame in merged.frames] == [1] * PAGES
    merged.bob.actor.exit()
    assert [frames.map_count(frame) for frame in merged.frames] == [0] * PAGES
    totals += [0, 0]


def test_munmap(merged: Merged, totals: list[int]) -> None:
    merged.alice.actor.ask("munmap", merged.alice[2].address, 3)
    merged.bob.verify()
    assert [frames.map_count(frame) for frame in merged.frames] == [2, 2, 1, 1, 1, 2, 2, 2]
    totals += [8, 13]


def test_mremap_moves(merged: Merged, totals: list[int]) -> None:
    alice = merged.alice
    target = alice.actor.map(PAGES)
    flags = MREMAP_MAYMOVE | MREMAP_FIXED
    at = int(alice.actor.ask("mremap", alice.address, PAGES, PAGES, flags, target))
    moved = alice.at(at)
    assert at == target
    assert not alice.frames.any()
    assert [int(frame) for frame in moved.frames] == merged.frames
    moved.verify()
    write_privately(moved, 0, merged.bob)
    write_privately(merged.bob, 1, moved)
    totals += [8, 14]


def test_mremap_on_top_of_merged_pages(merged: Merged, totals: list[int]) -> None:
    alice = merged.alice
    other = alice.actor.region(PAGES, SEED + 1)
    flags = MREMAP_MAYMOVE | MREMAP_FIXED
    alice.actor.ask("mremap", other.address, PAGES, PAGES, flags, alice.address)
    other.at(alice.address).verify()
    merged.bob.verify()
    totals += [8, 8]


def test_mremap_that_leaves_the_old_mapping(merged: Merged, totals: list[int]) -> None:
    alice = merged.alice
    flags = MREMAP_MAYMOVE | MREMAP_DONTUNMAP
    moved = alice.at(int(alice.actor.ask("mremap", alice.address, PAGES, PAGES, flags)))
    moved.verify()
    assert alice.actor.ask("zeros", alice.address, PAGES) == "1"
    write_privately(moved, 3, merged.bob)
    totals += [8, 15]


def test_mremap_shrinks_and_grows(merged: Merged, totals: list[int]) -> None:
    alice = merged.alice
    alice.actor.ask("mremap", alice.address, PAGES, 4, MREMAP_MAYMOVE)
    grown = int(alice.actor.ask("mremap", alice.address, 4, PAGES, MREMAP_MAYMOVE))
    assert alice.actor.ask("verify", grown, 4, SEED) == "same"
    assert alice.actor.ask("zeros", grown + 4 * PAGE_BYTES, 4) == "1"
    merged.bob.verify()
    totals += [8, 12]


def test_mprotect_to_none_and_back(merged: Merged, totals: list[int]) -> None:
    alice = merged.alice
    for protection in (PROT_NONE, PROT_READ, PROT_READ | PROT_WRITE):
        alice.actor.ask("mprotect", alice.address, PAGES, protection)
        assert frames.map_count(merged.frames[0]) == 2
    merged.assert_shared()
    write_privately(alice, 0, merged.bob)
    write_privately(merged.bob, 1, alice)
    totals += [8, 14]


def test_dontneed(merged: Merged, totals: list[int]) -> None:
    alice = merged.alice
    alice.actor.ask("madvise", alice.address, PAGES, MADV_DONTNEED)
    assert alice.actor.ask("zeros", alice.address, PAGES) == "1"
    merged.bob.verify()
    totals += [8, 8]


def test_free(merged: Merged, totals: list[int]) -> None:
    """MADV_FREE lets the kernel drop the content; it must not drop bob's."""
    alice = merged.alice
    alice.actor.ask("madvise", alice.address, PAGES, MADV_FREE)
    Path("/proc/sys/vm/drop_caches").write_text("3")
    merged.bob.verify()
    assert alice.read(0) in (0, alice.original(0))
    alice.actor.ask("fill", alice.address, PAGES, SEED + 1)
    merged.bob.verify()
    assert alice.actor.ask("verify", alice.address, PAGES, SEED + 1) == "same"
    totals += [8, 8]


def test_mlock(merged: Merged, totals: list[int]) -> None:
    """Locking a writable private page faults it in for writing: the sharing ends."""
    alice = merged.alice
    alice.actor.ask("mlock", alice.address, PAGES)
    merged.bob.verify()
    alice.verify()
    assert not {int(frame) for frame in alice.frames} & set(merged.frames)
    alice.actor.ask("munlock", alice.address, PAGES)
    alice.verify()
    totals += [8, 8]


@pytest.mark.parametrize("advice", [MADV_PAGEOUT, MADV_COLLAPSE])
def test_reclaim_and_collapse_leave_them(merged: Merged, advice: int) -> None:
    """Merged pages are on no LRU list, so neither finds them; whatever it does, bytes stay."""
    actor = merged.alice.actor
    if advice == MADV_COLLAPSE:
        actor.ask("madvise", merged.alice.address, PAGES, mmap.MADV_HUGEPAGE)
    with contextlib.suppress(ActorError):
        actor.ask("madvise", merged.alice.address, PAGES, advice)
    merged.assert_shared()
    write_privately(merged.alice, 0, merged.bob)


def test_merge_of_read_only_memory(stage: Stage, client: Client) -> None:
    """Memory made read-only after it was filled is merged as well, and stays readable."""
    alice, bob = (stage.start().region(PAGES, SEED) for _ in range(2))
    alice.actor.ask("mprotect", alice.address, PAGES, PROT_READ)
    merge_all(client, alice, bob)
    alice.actor.ask("mprotect", alice.address, PAGES, PROT_READ | PROT_WRITE)
    write_privately(alice, 0, bob)


def test_soft_dirty_shows_no_write(stage: Stage, client: Client) -> None:
    """Merging changes no byte, so whoever tracks writes (checkpoints) must see none."""
    alice, bob = (stage.start().region(PAGES, SEED) for _ in range(2))
    soft_dirty = 1 << 55

    def dirty(actor: Actor) -> list[bool]:
        entries = frames.pagemap(actor.pid, alice.address, PAGES)
        return [bool(int(entry) & soft_dirty) for entry in entries]

    Path(f"/proc/{alice.actor.pid}/clear_refs").write_text("4")
    assert dirty(alice.actor) == [False] * PAGES
    merge_all(client, alice, bob)
    assert dirty(alice.actor) == [False] * PAGES
    alice.write(0, 1)
    assert dirty(alice.actor) == [True] + [False] * (PAGES - 1)


def test_idle_shared_pages_stay(merged: Merged) -> None:
    """Writeback, compaction and reclaim pass over them."""
    Path("/proc/sys/vm/compact_memory").write_text("1")
    Path("/proc/sys/vm/drop_caches").write_text("3")
    time.sleep(0.2)
    merged.assert_shared()
