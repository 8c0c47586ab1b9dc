# SPDX-License-Identifier: MIT
"""Reading a process from outside, as checkpointers (CRIU), debuggers and live migration do.

Whoever only reads gets the right bytes, and leaves the sharing as it is. What a checkpointer
learns of merged pages: present, and "file or shared", as of any page that is not anonymous; so one
that dumps private memory must go by the mapping, not by that bit, as CRIU does for written-to
private files.
"""

from __future__ import annotations

import ctypes
import fcntl
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.kernel import frames
from tests.kernel.actor import PAGE_BYTES, Region, Stage, content
from tests.kernel.contract import Result
from tests.kernel.sharing import Merged, merge_all, pairs, write_privately
from tests.kernel.syscalls import peek, process_vm_read, process_vm_write, read_memory, traced
from tests.kernel.wire import Client

PAGES, SEED = Merged.PAGES, Merged.SEED
SOFT_DIRTY = 1 << 55
# include/uapi/linux/fs.h; Linux 6.7 has it.
PAGEMAP_SCAN = 3 << 30 | 96 << 16 | ord("f") << 8 | 16
IS_FILE, IS_PRESENT, IS_SOFT_DIRTY = 1 << 2, 1 << 3, 1 << 7


def by_memory_file(region: Region) -> bytes:
    return read_memory(region.actor.pid, region.address, region.pages)


def by_process_vm_readv(region: Region) -> bytes:
    return process_vm_read(region.actor.pid, region.address, region.pages * PAGE_BYTES)


def by_ptrace(region: Region) -> bytes:
    with traced(region.actor.pid):
        return b"".join(
            peek(region.actor.pid, region.address + offset)
            for offset in range(0, region.pages * PAGE_BYTES, 8)
        )


READERS = [by_memory_file, by_process_vm_readv, by_ptrace]


def bytes_of(region: Region) -> bytes:
    return b"".join(content(region.seed, page) for page in range(region.pages))


@pytest.mark.parametrize("read", READERS)
def test_reading(merged: Merged, read: Callable[[Region], bytes]) -> None:
    assert read(merged.alice) == bytes_of(merged.alice)
    merged.assert_shared()
    write_privately(merged.bob, 0, merged.alice)
    assert read(merged.alice) == bytes_of(merged.alice)
    write_privately(merged.alice, 1, merged.bob)


@pytest.mark.parametrize("read", READERS)
def test_reading_after_fork(stage: Stage, client: Client, read: Callable[[Region], bytes]) -> None:
    """process_vm_readv pins, and so unshares what fork shares; of merged pages it does not."""
    alice, bob = (stage.start().region(PAGES, SEED) for _ in range(2))
    child = alice.of(alice.actor.fork())
    assert client.merge(*pairs(alice, bob)[:4]) == [[Result.SUCCESS] * 2] * 4
    before = alice.frames.tolist()
    assert read(alice) == bytes_of(alice)
    assert alice.frames.tolist()[:4] == before[:4] == bob.frames.tolist()[:4]
    # Frames that only fork shares may be taken apart by it, on kernels since 5.19.
    if read is not by_process_vm_readv:
        assert alice.frames.tolist() == before
    for region in (alice, child, bob):
        region.verify()
    # However it was read, it merges again.
    every = client.merge(*pairs(bob, alice, child))
    assert {result for group in every for result in group} <= {Result.SUCCESS, Result.ALREADYSH}
    for group in pairs(bob, alice, child):
        frames.assert_shared(group)


def test_pagemap(merged: Merged) -> None:
    """Present, with a frame, not swapped, and not anonymous."""
    for entry in frames.pagemap(merged.alice.actor.pid, merged.alice.address, PAGES):
        assert entry & frames.PRESENT
        assert entry & frames.FILE_OR_SHARED
        assert not entry & frames.SWAPPED
    smaps = Path(f"/proc/{merged.alice.actor.pid}/smaps").read_text()
    (mapping,) = (part for part in smaps.split("VmFlags") if f"\n{merged.alice.address:x}-" in part)
    sizes = dict(line.split(":") for line in mapping.splitlines() if line.endswith(" kB"))
    assert sizes["Rss"].split() == [str(4 * PAGES), "kB"]
    assert sizes["Pss"].split() == [str(2 * PAGES), "kB"]
    assert sizes["Anonymous"].split() == ["0", "kB"]
    merged.assert_shared()


def pagemap_scan(region: Region, categories: int) -> list[tuple[int, int]]:
    """PAGEMAP_SCAN: the ranges, in pages of the region, that are in one of the categories."""
    found = (ctypes.c_uint64 * (3 * region.pages))()
    end = region.address + region.pages * PAGE_BYTES
    fields = [96, 0, region.address, end, 0, ctypes.addressof(found), region.pages, 0]
    argument = struct.pack("=12Q", *fields, 0, 0, categories, categories)
    with open(f"/proc/{region.actor.pid}/pagemap", "rb") as file:
        count = fcntl.ioctl(file, PAGEMAP_SCAN, bytearray(argument))
    return [
        (
            (found[3 * n] - region.address) // PAGE_BYTES,
            (found[3 * n + 1] - region.address) // PAGE_BYTES,
        )
        for n in range(count)
    ]


def test_pagemap_scan(merged: Merged) -> None:
    alice, bob = merged.alice, merged.bob
    try:
        present = pagemap_scan(alice, IS_PRESENT)
    except OSError:
        pytest.skip("no PAGEMAP_SCAN")
    assert present == pagemap_scan(alice, IS_FILE) == [(0, PAGES)]
    Path(f"/proc/{alice.actor.pid}/clear_refs").write_text("4")
    assert pagemap_scan(alice, IS_SOFT_DIRTY) == []
    write_privately(alice, 2, bob)
    assert pagemap_scan(alice, IS_SOFT_DIRTY) == [(2, 3)]
    assert pagemap_scan(alice, IS_FILE) == [(0, 2), (3, PAGES)]
    assert pagemap_scan(bob, IS_FILE) == [(0, PAGES)]
    bob.verify()


def soft_dirty(region: Region) -> list[int]:
    entries = frames.pagemap(region.actor.pid, region.address, region.pages)
    return [page for page, entry in enumerate(entries) if int(entry) & SOFT_DIRTY]


class Checkpoint:
    """Dumps of a region: a full one, then what was written since; and its restoration."""

    def __init__(self, region: Region) -> None:
        self.region = region
        self.pages: dict[int, bytes] = {}
        self.sizes: list[int] = []

    def dump(self) -> None:
        """All pages that are soft-dirty; at first, that is every page."""
        pid = self.region.actor.pid
        with traced(pid):
            dirty = soft_dirty(self.region)
            for page in dirty:
                address = self.region[page].address
                self.pages[page] = process_vm_read(pid, address, PAGE_BYTES)
            Path(f"/proc/{pid}/clear_refs").write_text("4")
        self.sizes.append(len(dirty))

    def restore(self, stage: Stage) -> Region:
        """The same memory in a new process."""
        actor = stage.start()
        restored = Region(actor, actor.map(self.region.pages), self.region.pages, SEED)
        for page, data in self.pages.items():
            process_vm_write(actor.pid, restored[page].address, data)
        return restored


def test_incremental_checkpoint(stage: Stage, client: Client) -> None:
    """Dump, merge, dump, write, dump: merging alone dumps nothing, and all of it restores."""
    alice, bob = (stage.start().region(PAGES, SEED) for _ in range(2))
    checkpoint = Checkpoint(alice)
    checkpoint.dump()
    merge_all(client, alice, bob)
    checkpoint.dump()
    alice.actor.ask("fill", alice[5].address, 1, SEED + 1)
    checkpoint.dump()
    client.unmerge(alice.actor.key, alice.address, 2)
    checkpoint.dump()
    # All, nothing for the merge, what was written, and what UNMERGE copied.
    assert checkpoint.sizes == [PAGES, 0, 1, 2]
    restored = checkpoint.restore(stage)
    assert by_memory_file(restored) == by_memory_file(alice)
    alice.actor.exit()
    assert restored.actor.ask("verify", restored.address, 5, SEED) == "same"
    assert restored.actor.ask("verify", restored[5].address, 1, SEED + 1) == "same"
    # What was restored is ordinary memory, and merges with what it was merged with before.
    assert client.merge(*pairs(bob, restored)[:5]) == [[Result.ALREADYSH, Result.SUCCESS]] * 5
    frames.assert_shared([bob[0], restored[0]])
    bob.verify()
