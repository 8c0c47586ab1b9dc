# SPDX-License-Identifier: MIT
"""What programs do to their memory after a merge; the kernel must do the rest as always.

    alice[0..7]  ─┐
                  ├─  eight merged frames
    bob[0..7]    ─┘

Every test ends with bytes: alice's and bob's are what they should be, whatever the other did.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
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
    Region,
    Stage,
    content,
)
from tests.kernel.nbd import SlowDisk
from tests.kernel.sharing import merge_all, pairs, write_privately
from tests.kernel.wire import Client, Result

PAGES, SEED = 8, 30
MADV_COLLAPSE = 25
PTRACE_POKEDATA, PTRACE_ATTACH, PTRACE_DETACH = 5, 16, 17


@dataclass(frozen=True)
class Merged:
    """Two processes that share eight frames."""

    alice: Region
    bob: Region
    frames: list[int]

    def assert_shared(self) -> None:
        """Still so, both still right."""
        for group in pairs(self.alice, self.bob):
            frames.assert_shared(group)
        self.alice.verify()
        self.bob.verify()


@pytest.fixture
def merged(stage: Stage, client: Client) -> Merged:
    """The scene of this file."""
    alice, bob = (stage.start().region(PAGES, SEED) for _ in range(2))
    merge_all(client, alice, bob)
    return Merged(alice, bob, [int(frame) for frame in alice.frames])


@pytest.fixture
def totals(client: Client) -> Iterator[list[int]]:
    """What INFO must say at the end: [shared pages, mappings], set by the test's last line."""
    expected: list[int] = []
    yield expected
    info = client.info()
    if expected:
        assert [info.shared_pages, info.shared_mappings] == expected


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


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


_libc = ctypes.CDLL(None, use_errno=True)


def test_process_vm_writev(merged: Merged, totals: list[int]) -> None:
    alice = merged.alice
    data = ctypes.create_string_buffer(b"written from outside", 20)
    ours = _Iovec(ctypes.addressof(data), 20)
    theirs = _Iovec(alice[0].address, 20)
    ranges = ctypes.byref(ours), 1, ctypes.byref(theirs), 1, 0
    assert _libc.process_vm_writev(alice.actor.pid, *ranges) == 20, ctypes.get_errno()
    assert alice.read(0) == ord("w")
    assert alice[0].frame != merged.frames[0]
    merged.bob.verify()
    totals += [8, 15]


def test_ptrace_poke(merged: Merged, totals: list[int]) -> None:
    alice = merged.alice
    _libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
    assert _libc.ptrace(PTRACE_ATTACH, alice.actor.pid, None, None) == 0
    os.waitpid(alice.actor.pid, 0)
    assert _libc.ptrace(PTRACE_POKEDATA, alice.actor.pid, alice[0].address, 0x4242) == 0
    assert _libc.ptrace(PTRACE_DETACH, alice.actor.pid, None, None) == 0
    assert alice.read(0) == 0x42
    assert alice[0].frame != merged.frames[0]
    merged.bob.verify()
    totals += [8, 15]


def test_debugger_writes_to_read_only_memory(merged: Merged, totals: list[int]) -> None:
    """Through /proc/PID/mem, which as a breakpoint does overrides the protection."""
    alice = merged.alice
    alice.actor.ask("mprotect", alice.address, PAGES, PROT_READ)
    with open(f"/proc/{alice.actor.pid}/mem", "r+b", buffering=0) as memory:
        memory.seek(alice[0].address)
        memory.write(b"\xcc")
    assert alice.read(0) == 0xCC
    assert alice[0].frame != merged.frames[0]
    merged.bob.verify()
    totals += [8, 15]


def test_read_through_proc_mem(merged: Merged) -> None:
    with open(f"/proc/{merged.alice.actor.pid}/mem", "rb", buffering=0) as memory:
        memory.seek(merged.alice.address)
        data = memory.read(PAGES * PAGE_BYTES)
    assert data == b"".join(content(SEED, page) for page in range(PAGES))
    merged.assert_shared()


def test_direct_io_into_a_merged_page(merged: Merged, totals: list[int]) -> None:
    """A read from a disk into alice's page must not reach bob's."""
    alice = merged.alice
    with SlowDisk(content(SEED + 1, 0)) as disk:
        alice.actor.ask("direct", disk.path, alice[0].address, 2)
        assert alice.actor.ask("wait") == str(2 * PAGE_BYTES)
    assert alice.actor.ask("verify", alice.address, 2, SEED + 1, 1) == "same"
    merged.bob.verify()
    totals += [8, 14]


def test_fixed_buffer_over_a_merged_page(merged: Merged, totals: list[int]) -> None:
    """A long-term pin is taken on a private copy, or I/O would write to everybody's page."""
    alice = merged.alice
    alice.actor.ask("register", alice.address, PAGES)
    assert not {int(frame) for frame in alice.frames} & set(merged.frames)
    alice.verify()
    merged.bob.verify()
    alice.actor.ask("unregister")
    totals += [8, 8]


def test_lent_to_a_pipe_then_written(merged: Merged) -> None:
    """What a pipe was lent is not what the lender writes afterwards."""
    alice = merged.alice
    alice.actor.ask("vmsplice", alice.address, PAGES)
    alice.actor.ask("fill", alice.address, PAGES, SEED + 1)
    merged.bob.verify()
    merged.bob.actor.exit()
    assert alice.actor.ask("drain", PAGES, SEED) == "1"


def test_core_dump(merged: Merged, tmp_path: Path) -> None:
    pattern = Path("/proc/sys/kernel/core_pattern")
    before = pattern.read_text()
    pattern.write_text(f"{tmp_path}/core")
    try:
        merged.alice.actor.ask_to_crash()
    finally:
        pattern.write_text(before)
    core = next(tmp_path.glob("core*"))
    assert core_memory(core, merged.alice.address, PAGES * PAGE_BYTES) == b"".join(
        content(SEED, page) for page in range(PAGES)
    )
    merged.bob.verify()


def core_memory(core: Path, address: int, length: int) -> bytes:
    """Memory out of a 64-bit ELF core file."""
    data = core.read_bytes()
    (headers_at,) = struct.unpack_from("<Q", data, 32)
    size, count = struct.unpack_from("<HH", data, 54)
    for number in range(count):
        kind, _, at, start, _, in_file, _, _ = struct.unpack_from(
            "<IIQQQQQQ", data, headers_at + number * size
        )
        if kind == 1 and start <= address and address + length <= start + in_file:
            return data[at + address - start :][:length]
    raise AssertionError(f"{address:#x} is not in the core file")


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
