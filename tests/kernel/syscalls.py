# SPDX-License-Identifier: MIT
"""System calls that Python has no names for: into other processes, their memory and where it is."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tests.kernel.actor import PAGE_BYTES

# x86-64.
SYS_MIGRATE_PAGES, SYS_MOVE_PAGES, SYS_PIDFD_GETFD = 256, 279, 438
PTRACE_PEEKDATA, PTRACE_ATTACH, PTRACE_DETACH = 2, 16, 17
MPOL_MF_MOVE, MPOL_MF_MOVE_ALL = 2, 4

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def copy_of_descriptor(pid: int, descriptor: int) -> int:
    """A descriptor of our own for what one of another process stands for."""
    process = os.pidfd_open(pid)
    try:
        return _checked(_libc.syscall(SYS_PIDFD_GETFD, process, descriptor, 0))
    finally:
        os.close(process)


def process_vm_read(pid: int, address: int, length: int) -> bytes:
    """process_vm_readv."""
    data = ctypes.create_string_buffer(length)
    ours = _Iovec(ctypes.addressof(data), length)
    theirs = _Iovec(address, length)
    ranges = ctypes.byref(ours), 1, ctypes.byref(theirs), 1, 0
    assert _checked(_libc.process_vm_readv(pid, *ranges)) == length
    return data.raw


def process_vm_write(pid: int, address: int, data: bytes) -> None:
    """process_vm_writev."""
    ours = _Iovec(ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value, len(data))
    theirs = _Iovec(address, len(data))
    ranges = ctypes.byref(ours), 1, ctypes.byref(theirs), 1, 0
    assert _checked(_libc.process_vm_writev(pid, *ranges)) == len(data)


@contextmanager
def traced(pid: int) -> Iterator[None]:
    """A process stopped by ptrace."""
    _checked(_libc.ptrace(PTRACE_ATTACH, pid, None, None))
    os.waitpid(pid, 0)
    try:
        yield
    finally:
        _checked(_libc.ptrace(PTRACE_DETACH, pid, None, None))


def peek(pid: int, address: int) -> bytes:
    """PTRACE_PEEKDATA: eight bytes of a traced process."""
    ctypes.set_errno(0)
    word = int(_libc.ptrace(PTRACE_PEEKDATA, pid, address, None))
    assert not ctypes.get_errno()
    return (word % (1 << 64)).to_bytes(8, "little")


def move_pages(
    pid: int, addresses: Sequence[int], node: int | None, flags: int = MPOL_MF_MOVE
) -> list[int]:
    """move_pages: the node of each page afterwards, or why not, as a negative errno.

    Without a node it only tells where they are.
    """
    count = len(addresses)
    wanted = None if node is None else (ctypes.c_int * count)(*[node] * count)
    status = (ctypes.c_int * count)(*[-1000] * count)
    pages = (ctypes.c_void_p * count)(*addresses)
    _checked(
        _libc.syscall(SYS_MOVE_PAGES, pid, ctypes.c_ulong(count), pages, wanted, status, flags)
    )
    return list(status)


def migrate_pages(pid: int, old_node: int, new_node: int) -> int:
    """migrate_pages: how many pages could not be moved."""
    old, new = ctypes.c_ulong(1 << old_node), ctypes.c_ulong(1 << new_node)
    masks = ctypes.byref(old), ctypes.byref(new)
    return _checked(_libc.syscall(SYS_MIGRATE_PAGES, pid, ctypes.c_ulong(64), *masks))


def read_memory(pid: int, address: int, pages: int) -> bytes:
    """/proc/PID/mem."""
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        memory.seek(address)
        return memory.read(pages * PAGE_BYTES)
