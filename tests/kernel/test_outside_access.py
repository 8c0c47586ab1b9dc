# SPDX-License-Identifier: MIT
"""Others who reach into a process after a merge: debuggers, disks, pipes, core dumps.

    alice[0..7]  ─┐
                  ├─  eight merged frames
    bob[0..7]    ─┘

What they write to alice must not reach bob; what they read must be what was there.
"""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path

from tests.kernel.actor import PAGE_BYTES, PROT_READ, content
from tests.kernel.nbd import SlowDisk
from tests.kernel.sharing import Merged
from tests.kernel.syscalls import traced

PAGES, SEED = Merged.PAGES, Merged.SEED
PTRACE_POKEDATA, PTRACE_ATTACH, PTRACE_DETACH = 5, 16, 17


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
    pid = alice.actor.pid
    with traced(pid), open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
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
